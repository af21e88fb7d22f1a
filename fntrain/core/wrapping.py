"""Functions around a step, and what a step says of itself: the ranks that do it together."""

import attrs

from fntrain.core import ranks as all_ranks
from fntrain.core.ranks import ALONE, Ranks
from fntrain.core.state import StepFn, TrainState


@attrs.frozen
class Wrapped:
    """A function of state and batch that stands for a step; made by `wrap`. It says of itself what that step does."""

    step: StepFn
    fn: StepFn
    ranks: Ranks = attrs.field(eq=False, repr=False)

    def __call__(self, state: TrainState, batch: object) -> TrainState:
        return self.fn(state, batch)


def wrap(step: StepFn, fn: StepFn) -> Wrapped:
    """Put a function around a step, for `fit`, and keep what the step says of itself: the ranks that do it together.

    A plain function says nothing, and `fit` refuses it where several processes train: each would train by itself.

    Args:
      step: from `ft.supervised_step`, `ft.shell.distribute` or another of `ft.shell`.
      fn: (state, batch) -> state; it calls the step.
    Raises:
      TypeError: one of them can't be called.
    Example:
      >>> def step(state, batch):
      ...     return state.advance(params={"w": state.params["w"] + batch})
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(())})
      >>> doubled = wrap(step, lambda state, batch: step(state, 2 * batch))
      >>> ft.fit(doubled, state=state, data=[1.0], max_steps=1).params["w"]
      tensor(2.)
    """
    for name, function in (("step", step), ("fn", fn)):
        if not callable(function):
            raise TypeError(f"wrap: {name}: got {type(function).__name__}, expected a function of state and batch")
    return Wrapped(step, fn, getattr(step, "ranks", ALONE))


def ranks_of(step: StepFn) -> Ranks:
    """Return the ranks that do a step together.

    Raises:
      ValueError: the step is done alone, in a process group of several, and nothing says that this is meant.
    """
    ranks: Ranks = getattr(step, "ranks", ALONE)
    size = all_ranks.num_processes()
    if size > 1 and ranks.world_size == 1 and not ranks.by_choice:
        name = getattr(step, "__name__", type(step).__name__)
        raise ValueError(
            f"step_fn: each of the {size} processes would train {name} by itself, on whole batches; give what "
            "ft.shell.distribute(step_fn) returns, put a function around it by ft.wrap(step_fn, fn), or say that each "
            "is to train by itself: ft.shell.alone(step_fn)"
        )
    return ranks
