"""in_place: a step on the module's own memory, bitwise the pure step, at less than the cost of a loop by hand.

The body of the step is `SupervisedStep.work`, the same as for the pure step; only where the update is written differs.
What the old state held is overwritten, so its lease ends at the first write and any later access says so.
"""

import gc
import logging
import weakref
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fntrain.core import tree
from fntrain.core.errors import StateConsumedError
from fntrain.core.lease import FIELDS, Home, Leased
from fntrain.core.ranks import Ranks
from fntrain.core.state import TrainState
from fntrain.core.tree import PyTree
from fntrain.shell.steps.kernels import FusedAdam
from fntrain.steps.batch import Batch
from fntrain.steps.module import came_or_went, copy_in, is_dense, same_memory
from fntrain.steps.optim import lr_scale
from fntrain.steps.supervised import CHECK_EVERY, SupervisedStep, alike, choose

_TRAINING, _REQUIRES_GRAD = attrgetter("training"), attrgetter("requires_grad")
_log = logging.getLogger("fntrain")


def in_place(
    step_fn: SupervisedStep,
    *,
    compile: bool = False,  # noqa: A002  # torch's word for it
    debug: bool = False,
) -> "InPlace":
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
    if compile:
        step_fn = attrs.evolve(step_fn, loss_fn=torch.compile(step_fn.loss_fn))
    tenant = next(iter(Home.of(step_fn.slots.params).tenants), None)
    if tenant is not None and tenant.step is step_fn and tenant.debug == debug:
        return tenant  # type: ignore[no-any-return]  # the same step: a line run again in a notebook
    if (
        step_fn.exchange is None
        and dist.is_available()
        and dist.is_initialized()
        and (size := dist.get_world_size()) > 1
    ):
        _log.warning(
            "in_place: each of the %d processes trains by itself, on whole batches; for one training of all of them "
            "give the pure step to ft.shell.distribute",
            size,
        )
    return InPlace(step_fn, debug)


def check_step(step_fn: Any) -> None:
    """Raise TypeError unless the step is one whose parts the shell knows."""
    if isinstance(step_fn, InPlace) or isinstance(getattr(step_fn, "eager", None), InPlace):
        raise TypeError(
            f"step_fn: got {step_fn!r:.60}..., which runs in place already; give the pure step it was made of"
        )
    if not isinstance(step_fn, SupervisedStep):
        raise TypeError(
            f"step_fn: got {getattr(step_fn, '__name__', type(step_fn).__name__)}, expected what ft.supervised_step "
            "returned; give a step written by hand to ft.fit as it is"
        )


def check_free(step: SupervisedStep) -> None:
    """Raise ValueError if a step runs in place on the model already, or on one that shares parameters with it."""
    if tenants := Home.of(step.slots.params).tenants:
        raise ValueError(
            f"step_fn: another step runs in place on this {type(step.model).__name__}, or on part of it, and two "
            "would overwrite each other's states; use that one, or `del` it first (after an error in an interactive "
            f"session, sys.last_traceback may hold it): {tenants[0]!r}"
        )


class InPlace:
    """A step on the module's own memory; made by `in_place`."""

    def __init__(self, step: SupervisedStep, debug: bool = False) -> None:
        self.step = step
        self.debug = debug
        self.home = Home.of(step.slots.params)
        check_free(step)
        self.home.tenant = weakref.ref(self)
        self._take_memory()
        self.params = {name: param.detach() for name, param in step.slots.params.items()}
        self.buffers = {name: buffer.detach() for name, buffer in step.slots.buffers.items()}
        self.opt_state: dict[str, Any] = {}
        self.updated: set[str] = set()  # parameters that have had an update: their optimizer state is there
        self.fused: FusedAdam | None = None
        self.memory: set[int] | None = None  # addresses of what is written to; None: not known
        self.said = False  # that the host waits for each decision
        self.moves = 0  # how often a parameter or a buffer got other memory
        self.modules = tuple(step.model.modules())

    @property
    def ranks(self) -> Ranks:
        """The processes that do this step together, for the fold."""
        return self.step.ranks

    def modes(self) -> Hashable:
        """What a step captured or compiled is fixed to besides shapes: train/eval and gradient flags, autocast."""
        params = self.step.slots.params.values()
        kind = next(iter(params)).device.type
        cast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        return (*map(_TRAINING, self.modules), *map(_REQUIRES_GRAD, params), *cast)

    def __repr__(self) -> str:
        return f"in_place({self.step!r})"

    def __reduce__(self) -> Any:
        raise TypeError("a step run in place belongs to the memory of its module; pickle the pure step it was made of")

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        step = self.step
        if state.step % CHECK_EVERY == 0 or not step.bound.seen:
            step.check_model()
        state = self.own(state)
        before = self.begin()
        try:
            step.seed(state)
            work = step.work(state, batch)
            healthy = work.healthy
            if isinstance(healthy, Tensor) and not self.decides_on_device(work.leaves):
                healthy = bool(healthy)
            if healthy is not False:
                self.settle_buffers(before, healthy)
                self.settle_params()
        except BaseException:
            if step.exchange is not None:
                step.exchange.reset()
            self.undo(before)
            raise
        if healthy is False:
            self.undo(before)
        else:
            self.home.end(f"step {state.step + 1}", *FIELDS)
            try:
                self.update(work.leaves, healthy, state)
            finally:
                self.end(before)
            if self.debug:
                del before
                self._find_holders(state.step)
        return self.advanced(state, work.changes)

    def advanced(self, state: TrainState, changes: dict[str, Any]) -> TrainState:
        """The next state: this memory, on lease."""
        step = state.step + 1
        return state.advance(
            params=Leased(self.params, self.home, "params", step),
            buffers=Leased(self.buffers, self.home, "buffers", step),
            opt_state=Leased(self.opt_state, self.home, "opt_state", step),
            **changes,
        )

    def _take_memory(self) -> None:
        """Copy what can't be written to as it lies: strided or expanded tensors, buffers that are views of another."""
        slots = self.step.slots
        seen: dict[int, int] = {}  # storage -> the tensor that keeps it
        for tensor in [*slots.params.values(), *(owner[key] for _, owner, key in slots.places)]:
            if tensor is None or not tensor.numel() or tensor.layout is not torch.strided:
                continue
            keeper = seen.setdefault(tensor.untyped_storage().data_ptr(), id(tensor))
            if not is_dense(tensor) or (keeper != id(tensor) and not isinstance(tensor, nn.Parameter)):
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)

    def own(self, state: TrainState) -> TrainState:
        """Copy in what of a state is not this memory already; returns the state with nothing of it elsewhere."""
        here = self.home.leased(state.params, "params") and self.home.leased(state.buffers, "buffers")
        theirs: Any = state.opt_state
        kept = self.home.leased(theirs, "opt_state")
        if here and kept and theirs.tensors is self.opt_state:
            return self._spared(state)
        reason = f"step {state.step + 1} (begun from another state)"
        if not (here and kept):
            state = self._apart(state)  # reads all of it: a consumed part raises before anything is written
        if not here:
            torch.clear_autocast_cache()
            self.step.slots.check(state)
            self.settle_params()  # somebody may have moved the module since the last step
            self.buffers = {name: buffer.detach() for name, buffer in self.step.slots.buffers.items()}
            copy_in(self.step.slots, state, reason)
            self.memory = None
        if not kept:
            self.home.end(reason, "opt_state")
            theirs = self.step.bound.placed(state.opt_state, self.step.slots.params)
            if not tree.copy_into(self.opt_state, theirs):
                self.opt_state, self.fused, self.memory = tree.clone(theirs), None, None
            self.updated = set(self.opt_state)
        elif theirs.tensors is not self.opt_state:  # of a step that ran in place here before, or resumed
            self.opt_state = dict(self.step.bound.placed(theirs.tensors, self.step.slots.params))
            self.fused, self.updated, self.memory = None, set(theirs), None
        if not (here and kept):
            state = self.advanced(state, {}).replace(step=state.step, position=state.position)
        return self._spared(state)

    def _apart(self, state: TrainState) -> TrainState:
        """The state, its tensors copied where they lie in memory of this step that is about to be overwritten."""
        slots = self.step.slots
        own: dict[str, Any] = {"params": slots.params, "buffers": slots.buffers, "opt_state": self.opt_state}
        memory = _storages(own)
        changes = {}
        for field, tensors in own.items():
            theirs = getattr(state, field)
            if not self.home.leased(theirs, field):
                moved = {n: t for n, t in theirs.items() if memory & _storages(t) and not _is(t, tensors.get(n))}
                changes[field] = {**theirs, **tree.clone(moved)}
        return state.replace(**changes)

    def _spared(self, state: TrainState) -> TrainState:
        """The state; what hooks or the user keep in it of this step's memory is copied before that is written to."""
        if not state.hooks and not state.extra:
            return state
        kept = {"hooks": state.hooks, "extra": state.extra}
        if not (tensors := tree.tensors(kept)):
            return state
        if self.memory is None:
            self.memory = _storages({"params": self.params, "buffers": self.buffers, "opt_state": self.opt_state})
        memory = self.memory
        if memory.isdisjoint(_storages(tensors)):
            return state
        return state.replace(**tree.map_tensors(lambda t: tree.clone(t) if memory & _storages(t) else t, kept))

    def begin(self) -> "Before":
        """No gradients, frozen parameters asking for none; copies of the buffers, which the forward may write to."""
        slots = self.step.slots
        for param in slots.params.values():
            param.grad = None
        frozen = [slots.params[name] for name in self.step.bound.frozen if slots.params[name].requires_grad]
        kept: list[Any] = []
        if slots.places:
            buffers = [owner[key] for _, owner, key in slots.places]
            homes = [None if buffer is None else buffer.data for buffer in buffers]
            kept = list(zip(slots.places, buffers, homes, tree.clone(homes), strict=True))
        for param in frozen:  # last: what failed before this has changed nothing
            param.requires_grad_(False)
        return Before(frozen, kept)

    def undo(self, before: "Before", *, ran: bool = True) -> None:
        """Leave the state as it was: buffers get the values back that the forward wrote over, if it `ran` at all."""
        for name in self.strays():
            self.step.slots.params[name].data = self.params[name]
        self.end(before, keep_buffers=False, copies=ran)
        self.buffers = {name: buffer.detach() for name, buffer in self.step.slots.buffers.items()}

    def end(self, before: "Before", *, keep_buffers: bool = True, copies: bool = True) -> None:
        """Drop gradients and casts, put scratch buffers back; without `keep_buffers` the persistent ones too."""
        torch.clear_autocast_cache()  # a caller's autocast would go on with casts of the weights before the update
        for param in self.step.slots.params.values():
            param.grad = None
        for param in before.frozen:
            param.requires_grad_(True)
        back = [one for one in before.buffers if one[0][0] is None or not keep_buffers]
        for (_, owner, key), buffer, home, _ in back:  # all places first: copying may fail
            owner[key] = buffer
            if buffer is not None and home is not None:
                buffer.data = home
        for _, _, home, copy in back if copies else ():
            if home is not None and copy is not None:
                home.copy_(copy)  # memory apart from autograd: `.data`

    def settle_params(self) -> None:
        """Follow a forward or an optimizer that put another tensor in a parameter's place."""
        for name in self.strays():
            self.params[name], self.fused, self.memory = self.step.slots.params[name].detach(), None, None
            self.moves += 1

    def strays(self) -> list[str]:
        """Parameters that no longer lie in the memory of the state."""
        own = self.params
        return [n for n, param in self.step.slots.params.items() if param.data_ptr() != own[n].data_ptr()]

    def settle_buffers(self, before: "Before", healthy: bool | Tensor) -> None:
        """Keep in the state's memory what a forward wrote to the buffers, or assigned in their place."""
        assigned = []
        for (name, owner, key), buffer, home, copy in before.buffers:
            value = owner[key]
            if name is None or (value is None and buffer is None):
                continue
            if value is None or buffer is None or home is None or copy is None:
                raise came_or_went(name, buffer, value)  # before anything is written
            if value is not buffer or value.data_ptr() != home.data_ptr():
                assigned.append((name, owner, key, buffer, home, value.detach()))
        if assigned:
            homes = _storages([home for (name, *_), _, home, _ in before.buffers if name is not None])
            # `self.previous = self.current` assigns memory that is written here too: take its value first.
            values = [v.clone() if v.untyped_storage().data_ptr() in homes else v for *_, v in assigned]
            for (name, owner, key, buffer, home, _), value in zip(assigned, values, strict=True):
                same = value.shape == home.shape and value.dtype == home.dtype
                buffer.data = home.copy_(value) if same else value.clone()
                self.moves += not same
                owner[key] = buffer
                self.buffers[name], self.memory = buffer.detach(), None
        if isinstance(healthy, Tensor):
            for (name, _, _), buffer, _, copy in before.buffers:
                if name is None or buffer is None or copy is None:
                    continue
                if buffer.shape == copy.shape:
                    torch.where(healthy, buffer.data, copy, out=buffer.data)
                elif not bool(healthy):  # it has grown: nothing to choose from element by element
                    buffer.data = copy
                    self.buffers[name] = buffer.detach()

    def _find_holders(self, step: int) -> None:
        """Move the state to new memory; if some of the old is not free then, somebody holds a tensor in it."""
        slots = self.step.slots
        fields = {"params": self.params, "buffers": self.buffers, "opt_state": self.opt_state}
        left = [
            (path, StorageWeakRef(leaf.untyped_storage()))  # type: ignore[no-untyped-call]
            for path, leaf in tree.named_leaves(fields)
            if isinstance(leaf, Tensor)
        ]
        for one in gc.get_objects():
            if type(one) is Leased and one.lease.ended is not None:
                one.tensors = {}
        for tensor in (*slots.params.values(), *slots.buffers.values()):
            tensor.data = tensor.data.clone()
        self.params = {name: param.detach() for name, param in slots.params.items()}
        self.buffers = {name: buffer.detach() for name, buffer in slots.buffers.items()}
        self.opt_state, self.fused, self.memory = tree.clone(self.opt_state), None, None
        self.moves += 1
        del fields
        if held := [path for path, storage in left if not storage.expired()]:  # type: ignore[no-untyped-call]
            raise StateConsumedError(
                f"somebody holds {', '.join(held[:5])} of the state of step {step}, as a bare tensor or in "
                f"dict(state.params) or the like: without debug=True it would change with step {step + 1}; keep a "
                "clone, or ft.snapshot(state)"
            )

    def decides_on_device(self, leaves: dict[str, Tensor]) -> bool:
        """Whether the update can be made, or not made, without the host knowing which."""
        if not leaves.keys() <= self.updated:
            return False  # the first update makes the optimizer's state: the host decides
        if self._takes_found_inf or alike(self.opt_state, self.opt_state, next(iter(leaves.values())).device):
            return True
        if not self.said:
            self.said = True
            _log.warning(
                "in_place: waits for the device at every step, because %s keeps counters on the host; give it "
                "fused=True or capturable=True if it has them, or the step on_nonfinite='allow'",
                self.step.optimizer.cls.__name__,
            )
        return False

    @property
    def _takes_found_inf(self) -> bool:
        return getattr(self.step.bound.template, "_step_supports_amp_scaling", False)

    def update(
        self, leaves: dict[str, Tensor], healthy: bool | Tensor, state: TrainState, lrs: Sequence[Tensor] | None = None
    ) -> None:
        """The optimizer's update, in place; a decision left to the device goes into its kernel, or picks afterwards."""
        bound, params = self.step.bound, self.step.slots.params
        found_inf = (~healthy).float() if isinstance(healthy, Tensor) and self._takes_found_inf else None
        choosing = isinstance(healthy, Tensor) and found_inf is None
        old = (
            tree.clone({"params": {n: self.params[n] for n in leaves}, "opt_state": self.opt_state}) if choosing else {}
        )
        if self.fused is not None and self.fused.takes(leaves):
            self.fused(leaves, state, found_inf, lrs)
        else:
            self.opt_state = dict(bound.apply_(params, self.opt_state, state.step, found_inf, lr_scale(state)))
            self.settle_params()
            self.fused = FusedAdam.of(bound, self.params, self.opt_state)
            self.updated |= leaves.keys()
            self.memory = None
        if isinstance(healthy, Tensor) and choosing:
            new = {"params": {name: self.params[name] for name in leaves}, "opt_state": self.opt_state}
            if alike(new, old, healthy.device):
                old = choose(healthy, new, old)
            elif bool(healthy):
                return
            with torch.no_grad():
                torch._foreach_copy_(list(new["params"].values()), list(old["params"].values()))
            self.opt_state, self.fused, self.memory = old["opt_state"], None, None


def _is(theirs: Any, own: Any) -> bool:
    return isinstance(theirs, Tensor) and isinstance(own, Tensor) and same_memory(theirs, own)


def _storages(tensors: PyTree) -> set[int]:
    return {tree.local(tensor).untyped_storage().data_ptr() for tensor in tree.tensors(tensors)}


@attrs.frozen(eq=False)
class Before:
    """What a step may have to put back."""

    frozen: list[nn.Parameter]
    buffers: list[tuple[Any, Tensor | None, Tensor | None, Tensor | None]]  # place, buffer, its memory, a copy
