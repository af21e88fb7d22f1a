"""strategy="fsdp": ranks that each hold a part of the state."""

import functools

import jobs
import pytest
import torch
from test_distribute import TOLERANCE, close

import fntrain as ft


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
