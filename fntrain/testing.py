"""Laws of a training job, to run on your own: a step is pure, a resumed run is the run that was never stopped."""

import tempfile
from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import StateConsumedError
from fntrain.core.fold import fit, states
from fntrain.core.rng import fold_in
from fntrain.core.state import StepFn, TrainState, digest, named_leaves, snapshot
from fntrain.shell.checkpoints.resume import resume_or
from fntrain.shell.checkpoints.save_load import save


def assert_states_equal(got: TrainState, expected: TrainState) -> None:
    """Compare the saved leaves of two states bit by bit.

    Raises:
      AssertionError: names the leaves that differ, and by how much.
    Example:
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(2)})
      >>> assert_states_equal(state, ft.snapshot(state))
      >>> assert_states_equal(state.replace(seed=1), state)
      Traceback (most recent call last):
      AssertionError: 1 of 4 leaves differ:
        seed: got 1, expected 0
    """
    pairs = list(zip_longest(named_leaves(got), named_leaves(expected), fillvalue=("nothing", None)))
    lines = [_difference(a, b) for a, b in pairs if a[0] != b[0] or not tree.bitwise_equal(a[1], b[1])]
    if lines:
        more = [f"... and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise AssertionError(f"{len(lines)} of {len(pairs)} leaves differ:\n  " + "\n  ".join(lines[:10] + more))
    if got != expected:
        raise AssertionError("the leaves are equal, but not the containers around them")


def assert_pure(step_fn: StepFn, state: TrainState, batch: Any) -> TrainState:
    """Check that a step keeps the old state's bits and gives the same bits again, whatever was drawn before.

    Returns:
      the new state.
    Raises:
      AssertionError: says which law the step breaks, and at which leaf.
    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(params={"w": state.params["w"] + batch})
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(2)})
      >>> assert_pure(step_fn, state, 1.0).step
      1
    """
    before, twin = digest(state), snapshot(state)
    torch.default_generator.manual_seed(fold_in(state.seed, 1))
    new = step_fn(state, batch)
    try:
        after = digest(state)
    except StateConsumedError as error:
        raise AssertionError("the step runs in place, which is not pure; give the pure step it was made of") from error
    assert after == before, "the step wrote to the old state"
    torch.default_generator.manual_seed(fold_in(state.seed, 2))
    for source in (state, twin):
        try:
            assert_states_equal(step_fn(source, batch), new)
        except AssertionError as error:
            raise AssertionError(f"same state and batch, other result: {error}") from None
    return new


def assert_resume_exact(
    make: Callable[[], dict[str, Any]], *, num_steps: int, at: Iterable[int] | None = None
) -> TrainState:
    """Check that a job saved at any step and resumed in a fresh one ends with the bits of one never stopped.

    Args:
      make: builds the job anew: a dict of the arguments of `ft.fit` (step_fn, hooks, state, data) without max_steps.
      num_steps: length of the run; a hook may end it before.
      at: steps to stop at; all but the last by default.
    Returns:
      the final state of the run that was never stopped.
    Raises:
      AssertionError: names the step it was stopped at and the leaves that differ.
    Example:
      >>> def make():
      ...     model = torch.nn.Linear(2, 1)
      ...     torch.nn.init.ones_(model.weight)
      ...     optimizer = ft.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)
      ...     step_fn = ft.supervised_step(model, lambda m, batch: m(batch).square().mean(), optimizer)
      ...     data = ft.data.stream(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)), 4, seed=0)
      ...     return {"step_fn": step_fn, "state": ft.init_state(model, optimizer), "data": data}
      >>> assert_resume_exact(make, num_steps=4).step
      4

    Source: grain's checks of iterator state
    """
    scan = [snapshot(state) for state in states(**make(), max_steps=num_steps)]
    whole, last = {state.step: state for state in scan}, scan[-1]
    for step in at if at is not None else range(1, last.step):
        with tempfile.TemporaryDirectory() as directory:
            save(whole[step], directory)
            job = make()
            job["state"] = resume_or(job["state"], directory)
        final = fit(**job, max_steps=num_steps)
        try:
            assert_states_equal(final, last)
        except AssertionError as error:
            raise AssertionError(f"resumed at step {step}, the run ends differently: {error}") from None
    return last


def _difference(got: tuple[str, Any], expected: tuple[str, Any]) -> str:
    if got[0] != expected[0]:
        return f"got leaf {got[0]}, expected {expected[0]}"
    a, b = got[1], expected[1]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{got[0]}: got {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}"
        return f"{got[0]}: differs by up to {(a.double() - b.double()).abs().max().item():.3g}"
    return f"{got[0]}: got {a!r}, expected {b!r}"
