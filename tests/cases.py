"""Models, losses and batches that every step law is crossed with, among them all that a prototype got wrong."""

import torch
import torch.nn.functional as F
from torch import nn

import fntrain as ft


class SharedGradStorage(nn.Module):
    """`x + (p1 + p2)`: torch.autograd.grad returns one storage for both gradients."""

    def __init__(self):
        super().__init__()
        self.p1, self.p2 = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return x + (self.p1 + self.p2)


class ExpandedGrad(nn.Module):
    """`p.sum()`: the gradient has stride 0."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(5, 3))

    def forward(self, x):
        return x * self.p.sum()


class ForeignStride(nn.Module):
    """`w.t()` of a (96, 1) weight: the gradient has a foreign stride."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, 96)[:, None].contiguous())

    def forward(self, x):
        return x @ self.w.t()


class Tied(nn.Module):
    """Embedding and output share one weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 4, bias=False)
        self.out = nn.Linear(6, 4, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.tanh(x)) + self.embed(x)


class SharedSubmodule(nn.Module):
    """One sub-module reached by two paths, with a buffer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x))


class ReassignsBuffer(nn.Module):
    """The forward assigns its buffer anew instead of writing into it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x - self.mean)


class Unused(nn.Module):
    """One parameter never gets a gradient, one is frozen by its owner."""

    def __init__(self):
        super().__init__()
        self.used, self.idle, self.frozen = nn.Linear(6, 3), nn.Linear(2, 2), nn.Linear(6, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.used(x) + self.frozen(x)


class Recurrent(nn.Module):
    """An LSTM keeps a list of its weights beside the slots."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, None].expand(-1, 3, -1))[0]


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def dropout():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def batchnorm():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def convolution():
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.BatchNorm2d(4), nn.Flatten())
    return model.to(memory_format=torch.channels_last)


MODELS = {
    "mlp": mlp,
    "dropout": dropout,
    "batchnorm": batchnorm,
    "channels_last": convolution,
    "tied": Tied,
    "shared_submodule": SharedSubmodule,
    "reassigned_buffer": ReassignsBuffer,
    "unused_and_frozen": Unused,
    "lstm": Recurrent,
    "shared_grad_storage": SharedGradStorage,
    "expanded_grad": ExpandedGrad,
    "foreign_stride": ForeignStride,
}
NARROW = {"foreign_stride": 1}


def make(name, seed=0):
    """A model of the table, the same weights every time."""
    torch.manual_seed(seed)
    return MODELS[name]()


def batches(name, num, size=8):
    """Batches for a model of the table."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, NARROW.get(name, 6), generator=generator) for _ in range(num)]


def square_loss(model, batch):
    """A plain loss: the mean over samples."""
    out = model(batch)
    ft.put_scalar("out", out.mean())
    return out.square().flatten(1).mean(1).mean()


def token_loss(model, batch):
    """A loss with a weight of its own: the number of positive inputs."""
    out = model(batch)
    mask = batch[:, 0] > 0
    return ft.weighted((out.square().flatten(1).mean(1) * mask).sum(), mask.sum())


def raw_loop(model, loss_fn, optimizer, data, *, seed=0, clip=None, schedule=None, precision="fp32"):
    """What people write by hand: the reference that everything is compared with, bit for bit."""
    for step, batch in enumerate(data):
        ft.seed_generators(seed, step, 0)
        with ft.events.collecting(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if schedule is not None:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
        optimizer.step()
    return model


def same(a, b):
    """Whether two mappings of tensors hold the same bits."""
    return ft.core.tree.bitwise_equal(dict(a), dict(b))


def classification(size=8):
    """A labelled batch as a dict, for losses with names."""
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(size, 6, generator=generator), "y": torch.randint(0, 3, (size,), generator=generator)}


def cross_entropy(model, batch):
    """Mean over samples of the classification batch."""
    return F.cross_entropy(model(batch["x"]), batch["y"])
