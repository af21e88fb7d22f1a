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


def step_of(strategy, loss="mean", **options):
    step_fn, state, data = jobs.parts(loss, optimizer=ft.optimizer(torch.optim.AdamW, lr=0.01), **options)
    return (step_fn if strategy is None else ft.shell.distribute(step_fn, strategy)), state, data


def save_and_go_on(directory, strategy, *, until, hooks=()):
    """Train with a checkpoint at every second step, from whatever is in the directory."""
    step_fn, state, data = step_of(strategy)
    own = [ft.hooks.ema(0.5), *hooks]
    hooks = [*own, ft.hooks.checkpoint(directory, every=2)]
    final = ft.fit(step_fn, hooks, state=ft.resume_or(state, directory), data=data, max_steps=until)
    if strategy != "fsdp":
        return {name: value.clone() for name, value in final.params.items()}
    return {name: value.full_tensor() for name, value in final.params.items()}


def saved_by_hand(directory):
    step_fn, state, data = step_of("fsdp")
    final = ft.fit(step_fn, state=state, data=data, max_steps=3)
    ft.save(final, directory)
    return {name: value.full_tensor() for name, value in final.params.items()}


def test_what_parts_saved_is_read_as_a_whole(ranks, tmp_path):
    """One process loads what three ranks have saved, each its part: bit for bit."""
    params = ranks(3)(saved_by_hand, tmp_path)[0]
    (path,) = ft.shell.checkpoint.checkpoints(tmp_path)
    loaded = ft.load(path)
    assert loaded.params.keys() == params.keys()
    assert all(torch.equal(loaded.params[name], value) for name, value in params.items())
    assert sorted(file.name for file in path.iterdir()) == sorted(
        [f"{kind}-rank{rank}.safetensors" for kind in ("model", "train") for rank in range(3)] + ["state.json"]
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [((3, "fsdp"), (2, "ddp")), ((2, "fsdp"), (1, None)), ((2, "ddp"), (3, "fsdp")), ((3, "fsdp"), (2, "fsdp"))],
    ids=str,
)
def test_a_run_goes_on_with_other_ranks_and_another_strategy(ranks, tmp_path, first, second):
    """Saved by some ranks, gone on by others: what one process that was never stopped has."""

    def job(size, strategy, until):
        call = functools.partial(save_and_go_on, tmp_path, strategy, until=until)
        return call() if size == 1 else ranks(size)(call)[0]

    job(*first, 4)
    params = job(*second, 8)
    alone = save_and_go_on(tmp_path / "alone", None, until=8)
    for name, value in alone.items():
        assert (params[name] - value).abs().max() <= 1e-6 * value.abs().max(), name
