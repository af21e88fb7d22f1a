"""What ranks do in tests: small models, ragged data, and functions that every rank runs."""

import torch
import torch.nn.functional as F
from torch import nn

import fntrain as ft

SAMPLES, BATCH, STEPS = 37, 11, 4


class Net(nn.Module):
    """A small net; with BatchNorm on request."""

    def __init__(self, norm=False, dtype=torch.float32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Tanh(), nn.Linear(16, 3))
        self.to(dtype)

    def forward(self, x):
        return self.layers(x)


def samples(dtype):
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(SAMPLES, 6, generator=generator, dtype=dtype)
    ys = torch.randint(0, 3, (SAMPLES,), generator=generator)
    masks = torch.rand(SAMPLES, generator=generator) < 0.5
    return [{"x": x, "y": y, "mask": mask} for x, y, mask in zip(xs, ys, masks, strict=True)]


def mean_loss(model, batch):
    logits = model(batch["x"])
    ft.put_scalar("accuracy", (logits.argmax(-1) == batch["y"]).double().mean())
    ft.put_scalar("right", (logits.argmax(-1) == batch["y"]).sum(), reduce="sum")
    ft.put_scalar("largest", logits.max(), reduce="max")
    return F.cross_entropy(logits, batch["y"])


def masked_loss(model, batch):
    losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
    return ft.weighted((losses * batch["mask"]).sum(), batch["mask"].sum())


def dict_loss(model, batch):
    logits = model(batch["x"])
    return {"class": F.cross_entropy(logits, batch["y"]), "size": logits.square().mean()}


def sums_loss(model, batch):
    logits = model(batch["x"])
    return {
        "class": (F.cross_entropy(logits, batch["y"], reduction="none") * batch["mask"]).sum(),
        "size": logits.square().sum(),
    }


def denominators(batch):
    return {"class": batch["mask"].sum(), "size": 3 * len(batch["y"])}


LOSSES = {"mean": mean_loss, "masked": masked_loss, "dict": dict_loss, "sums": sums_loss}


def parts(loss="mean", *, loss_fn=None, dtype=torch.float32, norm=False, optimizer=None, **options):
    """A step that is not run yet, its first state, and data; the same in every rank and alone."""
    torch.manual_seed(0)
    model = Net(norm, dtype)
    optimizer = optimizer or ft.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
    if loss == "sums":
        options["weights"] = denominators
    step_fn = ft.supervised_step(model, loss_fn or LOSSES[loss], optimizer, **options)
    return step_fn, ft.init_state(model, optimizer), ft.data.stream(samples(dtype), BATCH, seed=0)


def summary(state):
    """What can be sent and compared."""
    return {
        "digest": ft.digest(state),
        "params": {name: value.detach().clone() for name, value in state.params.items()},
        "buffers": {name: value.detach().clone() for name, value in state.buffers.items()},
        "metrics": {
            name: float(value) for name, value in state.metrics.items() if not isinstance(value, ft.events.Text)
        },
        "stop": state.run.stop,
        "step": state.step,
    }


def train(loss="mean", *, strategy=None, max_steps=STEPS, hooks=(), rows=None, **options):
    """Train a few steps, with others if there are any; returns a summary and the rows that were written."""
    step_fn, state, data = parts(loss, **options)
    step_fn = ft.shell.distribute(step_fn, **(strategy or {}))
    final = ft.fit(step_fn, list(hooks), state=state, data=data, max_steps=max_steps)
    return summary(final)
