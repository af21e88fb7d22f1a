"""strategy="fsdp": ranks that each hold a part of the state."""

import functools

import jobs
import pytest
import torch
import torch.nn.functional as F
from test_distribute import TOLERANCE, close
from torch import nn

import fntrain as ft
from fntrain.shell.shards import Shards


def whole(state):
    """The parameters of all ranks together, and what one rank holds."""
    params = {name: value.full_tensor() for name, value in state.params.items()}
    return {
        "params": params,
        "buffers": {name: value.detach().clone() for name, value in state.buffers.items()},
        "metrics": {name: float(value) for name, value in state.metrics.items()},
        "held": sum(value.to_local().numel() for value in state.params.values()),
        "moments": sum(
            value.to_local().numel()
            for entry in state.opt_state.values()
            for value in entry.values()
            if hasattr(value, "to_local")
        ),
    }


def layers(name, module):
    return isinstance(module, torch.nn.Linear)


def train(loss="mean", *, wrap=None, strategy=None, late=False, max_steps=jobs.STEPS, **options):
    step_fn, state, data = jobs.parts(loss, **options)
    step_fn = ft.shell.distribute(step_fn, "fsdp", wrap=wrap, **(strategy or {}))
    if late:
        state = ft.init_state(step_fn.step.model, step_fn.step.optimizer)
    return whole(ft.fit(step_fn, state=state, data=data, max_steps=max_steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("loss", jobs.LOSSES)
@pytest.mark.parametrize(("size", "wrap"), [(2, None), (3, layers)])
def test_parts_are_trained_as_the_whole(ranks, size, wrap, loss, accumulate, dtype):
    """Weights, losses and norms of one process, with blocks gathered each by itself or all together."""
    job = functools.partial(train, loss, wrap=wrap, accumulate=accumulate, dtype=dtype, clip_grad_norm=0.5)
    found, alone = ranks(size)(job), jobs.train(loss, dtype=dtype, clip_grad_norm=0.5)
    close(found, alone, dtype)
    for name in ("loss", "grad_norm"):
        for one in found:
            assert one["metrics"][name] == pytest.approx(alone["metrics"][name], rel=10 * TOLERANCE[dtype])
    number = sum(value.numel() for value in alone["params"].values())
    assert sum(one["held"] for one in found) == number
    assert sum(one["moments"] for one in found) == number
    assert max(one["held"] for one in found) < 0.7 * number



def full(state):
    """Parameters and what the optimizer keeps of them, whole."""
    return {
        leaf: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for leaf, value in ft.named_leaves(state)
        if isinstance(value, torch.Tensor)
    }


def law_same(found, alone, tolerance=1e-6):
    """All leaves of all ranks are those of one process, relative to the largest of their tensor."""
    for one in found:
        assert one.keys() == alone.keys()
        for leaf, value in alone.items():
            scale = max(float(value.abs().max()), 1e-12) if value.numel() else 1.0
            difference = (one[leaf].double() - value.double()).abs().max() if value.numel() else 0.0
            assert difference <= tolerance * scale, leaf


class Odd(nn.Module):
    """Fewer rows than ranks, tied weights, one frozen layer, BatchNorm, a single number."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.one = nn.Linear(8, 1)
        self.up = nn.Linear(1, 8, bias=False)
        self.head = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)
        self.head.weight = self.body[0].weight
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.body(x) + self.up(self.one(self.head(x)).tanh()) * self.scale)


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "fused AdamW": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
}


def odd_step(optimizer="AdamW", *, loss=jobs.mean_loss, **options):
    torch.manual_seed(0)
    model = Odd()
    cls, kwargs = OPTIMIZERS[optimizer]
    one = ft.optimizer(cls, groups=[ft.group("out.bias", frozen=True), ft.group("*bias", lr_scale=2.0)], **kwargs)
    return ft.supervised_step(model, loss, one, **options)


def odd(optimizer="AdamW", *, wrap=None, strategy=None, made="before", directory=None, **options):
    """Train the odd model, alone or with others, from a state made before or after it was distributed."""
    step_fn = odd_step(optimizer, **options)
    model, data = step_fn.model, ft.data.stream(jobs.samples(torch.float32), jobs.BATCH, seed=0)
    state = ft.init_state(model, step_fn.optimizer)
    if made == "resumed before":
        state = ft.resume_or(state, directory)
    if strategy:
        step_fn = ft.shell.distribute(step_fn, "fsdp", wrap=wrap, **strategy)
        del state.params["up.weight"] if False else None
    return state


