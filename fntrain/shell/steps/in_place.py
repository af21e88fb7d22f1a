"""in_place: a step on the module's own memory, bitwise the pure step, at less than the cost of a loop by hand.

What the old state held is overwritten, so its lease ends at the first write and any later access says so.
"""

import gc
import weakref
from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fntrain.core import tree
from fntrain.core.errors import StateConsumedError
from fntrain.core.lease import FIELDS, Home, Leased
from fntrain.core.ranks import Ranks
from fntrain.core.state import TrainState
from fntrain.shell.steps.memory import Memory
from fntrain.steps.batch import Batch
from fntrain.steps.supervised import SupervisedStep

Changes = dict[str, Any]  # fields of the next state that the memory does not hold: metrics, extra
Execution = Callable[[Memory, TrainState, Batch], Changes]
_TRAINING, _REQUIRES_GRAD = attrgetter("training"), attrgetter("requires_grad")


def in_place(
    step_fn: SupervisedStep,
    *,
    compile: bool = False,  # noqa: A002  # torch's word for it
    debug: bool = False,
) -> "Donated":
    """Make the donated form of a step: it writes the new state over the old one's memory, the module's own.

    Leaf by leaf bitwise the pure step. The state given is consumed at the step's first write: reading it afterwards
    raises StateConsumedError, `ft.snapshot(state)` keeps a copy. A step that raises before that, or skips its update,
    leaves it whole. A state from elsewhere (a checkpoint, a roll-back, a hook that replaced buffers) is copied in;
    the step's own is recognised and costs nothing. The module holds the current weights after every step.

    What a lease can't guard: a bare tensor, or `dict(state.params)`, taken earlier changes under its holder
    (`debug=True` finds them; in `state.hooks` and `state.extra` they are copied in time), and gradients left in the
    module are dropped. `list(ft.states(ft.shell.in_place(step_fn), ...))` is a list of consumed states. A forward that
    writes to parameters (not buffers) is not undone when its step is skipped.

    Args:
      step_fn: from `ft.supervised_step`.
      compile: run model and loss through torch.compile.
      debug: look after every step for tensors of the old state that somebody still holds; costs a copy of the state.
    Raises:
      TypeError: the step is not from `ft.supervised_step`: one written by hand runs as it is.
      ValueError: another step runs in place on the module, or on one that shares parameters with it.
      StateConsumedError: (when called) the state was consumed; with `debug`, a bare tensor of it is still held.
    Example:
      >>> model = torch.nn.Linear(2, 1)
      >>> sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
      >>> step_fn = ft.supervised_step(model, lambda model, batch: model(batch).square().mean(), sgd)
      >>> before = ft.init_state(model, sgd)
      >>> after = in_place(step_fn)(before, torch.ones(4, 2))
      >>> before.params["bias"]
      Traceback (most recent call last):
      fntrain.StateConsumedError: the state of step 0 was consumed by step 1, which wrote to its memory; ...

    Source: buffer donation of jax.jit
    """
    check_step(step_fn)
    form = (in_place, compile, debug)
    if (same := same_form(step_fn, form)) is not None:
        return same
    compiled = attrs.evolve(step_fn, loss_fn=torch.compile(step_fn.loss_fn)) if compile else step_fn
    return Donated(Memory(compiled.body), run_and_find_holders if debug else run, step_fn, form)


class Donated:
    """A step on the module's own memory: what `in_place`, `cuda_step`, `compile_step` and `distribute` make.

    They differ in the memory (of ranks that hold parts, say) and in the execution, which does the work on it.
    """

    def __init__(self, memory: Memory, execution: Execution, step: SupervisedStep, form: Hashable = None) -> None:
        self.memory = memory
        self.execution = execution
        self.step = step  # as it was given
        self.form = form  # by which function and with which options it was made
        memory.home.writer = weakref.ref(self)

    @property
    def ranks(self) -> Ranks:
        """The processes that do this step together, for the fold."""
        return self.memory.body.exchange.ranks

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        self.memory.body.check_now_and_then(state)
        state = self.memory.adopt(state)
        changes = self.execution(self.memory, state, batch)
        return self.memory.advanced(state, changes)

    def __repr__(self) -> str:
        described = getattr(self.execution, "described", "in_place({})".format)
        return str(described(repr(self.step)))

    def __reduce__(self) -> Any:
        raise TypeError("a step run in place belongs to the memory of its module; pickle the pure step it was made of")


def run(memory: Memory, state: TrainState, batch: Batch) -> Changes:
    """Execute a step eagerly: forward, backward, decision, then the update, which ends the leases of older states."""
    body = memory.body
    with memory.writing() as writing:
        body.seed(state)
        rates = body.rates(state)
        work = body.gradients(state, batch, rates)
        healthy = memory.decision(work)
        if healthy is not False:
            writing.keep(healthy)
            memory.end_leases(state, *FIELDS)
            memory.update(work.leaves, healthy, rates)
    return work.changes


def run_and_find_holders(memory: Memory, state: TrainState, batch: Batch) -> Changes:
    """Execute a step eagerly, then raise StateConsumedError if somebody still holds a tensor of the old state.

    The state is moved to new memory: if some of the old is not free then, somebody holds a tensor in it.
    """
    changes = run(memory, state, batch)
    if not memory.home.leased(state.params, "params"):  # a step that skips its update writes to nothing
        left = [
            (path, StorageWeakRef(leaf.untyped_storage()))  # type: ignore[no-untyped-call]
            for path, leaf in tree.named_leaves({field: getattr(memory, field) for field in FIELDS})
            if isinstance(leaf, Tensor)
        ]
        for one in gc.get_objects():
            if type(one) is Leased and not one.open:
                one.tensors = {}  # a consumed state can't be read: it holds nothing for anybody
        memory.move()
        if held := [path for path, storage in left if not storage.expired()]:  # type: ignore[no-untyped-call]
            raise StateConsumedError(
                f"somebody holds {', '.join(held[:5])} of the state of step {state.step}, as a bare tensor or in "
                f"dict(state.params) or the like: without debug=True it would change with step {state.step + 1}; keep "
                "a clone, or ft.snapshot(state)"
            )
    return changes


def modes(memory: Memory) -> Hashable:
    """Return what a captured or compiled step is fixed to besides shapes: train/eval, gradient flags, autocast."""
    params = memory.body.slots.params.values()
    kind = memory.body.device.type
    cast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
    return (*map(_TRAINING, memory.modules), *map(_REQUIRES_GRAD, params), *cast)


def same_form(step_fn: SupervisedStep, form: Hashable) -> "Donated | None":
    """Return the step that the same call made before, if it still runs on the model: a notebook's cell run twice."""
    writers = Home.of(step_fn.body.slots.params).writers
    return next((one for one in writers if one.step is step_fn and one.form == form), None)


def check_step(step_fn: Any) -> None:
    """Raise TypeError unless the step is one whose parts the shell knows."""
    if isinstance(step_fn, Donated):
        raise TypeError(
            f"step_fn: got {step_fn!r:.60}..., which runs in place already; give the pure step it was made of"
        )
    if not isinstance(step_fn, SupervisedStep):
        raise TypeError(
            f"step_fn: got {getattr(step_fn, '__name__', type(step_fn).__name__)}, expected what ft.supervised_step "
            "returned; give a step written by hand to ft.fit as it is"
        )
