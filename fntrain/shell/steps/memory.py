"""Memory: the tensors of one module, on which a step runs in place, and the states that share them.

A donated step is a memory and an execution. The execution (eager, graphs, programs) computes; everything else stands
here once: what of a state has to be copied in, what a step that fails has to put back, the update, the next state.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fntrain.core import tree
from fntrain.core.lease import FIELDS, Home, Leased
from fntrain.core.state import TrainState
from fntrain.shell.steps.kernels import FusedAdam
from fntrain.shell.steps.writing import Writing
from fntrain.steps import decision, module
from fntrain.steps.body import Body, Gradients
from fntrain.steps.rates import Rates


class Memory:
    """Parameters, buffers and optimizer state of the states that a donated step hands out.

    `updated` names the parameters that have had an update, so that their optimizer state is there. `moves` counts how
    often a parameter or a buffer got other memory: what was captured or compiled before that is stale.
    """

    def __init__(self, body: Body) -> None:
        check_free(body)
        self.body = body
        self.home = Home.of(body.slots.params)
        self.modules = tuple(body.settings.model.modules())
        self._separate()
        self.params = {name: param.detach() for name, param in body.slots.params.items()}
        self.buffers: dict[str, Tensor] = {}
        self.find_buffers()
        self.opt_state: dict[str, Any] = {}
        self.updated: set[str] = set()
        self.moves = 0
        self.fused: FusedAdam | None = None
        self._storages: set[int] | None = None  # addresses of what is written to; None: to be found anew
        self._addresses = [tensor.data_ptr() for tensor in self.params.values()]
        self._handed: tuple[Any, ...] = (None, None, None)  # params, buffers, opt_state of the last state returned
        self._warned = False  # that the host waits for each decision

    def _separate(self) -> None:
        """Copy what can't be written to as it lies: strided or expanded tensors, buffers that are views of another."""
        seen: dict[int, int] = {}  # storage -> the tensor that keeps it
        slots = self.body.slots
        for tensor in [*slots.params.values(), *(owner[key] for _, owner, key in slots.places)]:
            if tensor is None or not tensor.numel() or tensor.layout is not torch.strided:
                continue
            keeper = seen.setdefault(tensor.untyped_storage().data_ptr(), id(tensor))
            if not module.is_dense(tensor) or (keeper != id(tensor) and not isinstance(tensor, nn.Parameter)):
                tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)

    # What the memory of ranks that hold parts of tensors overrides.

    def shown(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return the mappings that states hold, of parameters, buffers and optimizer state: the tensors as they are."""
        return self.params, self.buffers, self.opt_state

    def own_part(self, name: str, value: tree.PyTree) -> tree.PyTree:
        """Return what of a state's entry belongs into this memory: here all of it."""
        del name
        return value

    # Taking a state over.

    def adopt(self, state: TrainState) -> TrainState:
        """Copy in what of a state lies elsewhere; returns the state with nothing of it elsewhere.

        Addresses decide. That a state is on lease does not tell whether the module has been moved since (`.to`).

        Raises:
          StateConsumedError: a part of the state was overwritten; nothing is written then.
          ValueError: names or shapes of the state are not the module's.
        """
        params, buffers, opt_state = self._handed
        known = state.params is params and state.buffers is buffers and state.opt_state is opt_state
        if not (known and params.open and buffers.open and opt_state.open and self._is_unmoved()):
            state = self._copied_in(state)
        return self._without_aliases(state) if state.hooks or state.extra else state

    def _copied_in(self, state: TrainState) -> TrainState:
        reason, slots = f"step {state.step + 1} (begun from another state)", self.body.slots
        mapping: Any = state.opt_state
        is_last = self.home.leased(mapping, "opt_state") and mapping.tensors is self.shown()[2]
        keeps_opt_state = is_last and self._is_unmoved()  # the one returned last, not written to since
        state = self._without_overlaps(state.replace(**{field: self._local(state, field) for field in FIELDS}))
        torch.clear_autocast_cache()  # a caller's autocast would go on with casts of what the module held before
        slots.check(state)
        self.follow_params()
        self.find_buffers()
        module.copy_in(slots, state, reason)
        self._storages = None
        if not keeps_opt_state:
            self._take_opt_state(state.opt_state, reason)
        return self.advanced(state, {}).replace(step=state.step, position=state.position)

    def _local(self, state: TrainState, field: str) -> Mapping[str, Any]:
        """What of a field belongs into this memory, on lease if the field is; what is consumed raises."""
        mapping = getattr(state, field)
        mine = {name: self.own_part(name, value) for name, value in mapping.items()}
        return Leased(mine, self.home, field, state.step) if self.home.leased(mapping, field) else mine

    def _without_overlaps(self, state: TrainState) -> TrainState:
        """The state, its tensors copied where they lie in memory of this step that is about to be overwritten."""
        opt_state = {} if self.home.leased(state.opt_state, "opt_state") else self.opt_state
        slots = self.body.slots
        own: dict[str, Any] = {"params": slots.params, "buffers": slots.buffers, "opt_state": opt_state}
        memory = module.storages(own)
        changes = {}
        for field, tensors in own.items():
            theirs = getattr(state, field)
            others = {name: one for name, one in theirs.items() if not _is(one, tensors.get(name))}
            if overlapping := {name: one for name, one in others.items() if memory & module.storages(one)}:
                changes[field] = {**theirs, **tree.clone(overlapping)}
        return state.replace(**changes)

    def _take_opt_state(self, theirs: Mapping[str, Any], reason: str) -> None:
        """Take optimizer state over: tensors that are on lease as they are, others by copy."""
        placed = dict(self.body.bound.placed(theirs, self.body.slots.params))
        leased = self.home.leased(theirs, "opt_state")
        if not leased:
            self.home.end(reason, "opt_state")
        if leased or not tree.copy_into(self.opt_state, placed):
            self.opt_state, self.fused = placed if leased else tree.clone(placed), None
        self.updated = set(self.opt_state)

    def _without_aliases(self, state: TrainState) -> TrainState:
        """The state; what hooks or the user keep in it of this memory is copied before that is written to."""
        kept = {"hooks": state.hooks, "extra": state.extra}
        if not (tensors := tree.tensors(kept)):
            return state
        if self._storages is None:
            self._storages = module.storages([self.params, self.buffers, self.opt_state])
        memory = self._storages
        if memory.isdisjoint(module.storages(tensors)):
            return state
        return state.replace(**tree.map_tensors(lambda t: tree.clone(t) if memory & module.storages(t) else t, kept))

    # One step.

    def writing(self, *, runs: bool = True) -> Writing:
        """Begin a step on this memory, see `Writing`; with `runs` False it is recorded only, and nothing is written."""
        return Writing(self, runs)

    def end_leases(self, state: TrainState, *fields: str) -> None:
        """Declare the states that share these fields consumed by the step that starts at a state."""
        self.home.end(f"step {state.step + 1}", *fields)

    def decision(self, work: Gradients) -> bool | Tensor:
        """Whether to update; the device decides if the update can be made, or not, without the host knowing which."""
        healthy = work.healthy
        if not isinstance(healthy, Tensor):
            return healthy
        if not work.leaves.keys() <= self.updated:
            return bool(healthy)  # the first update makes the optimizer's state
        device = next(iter(work.leaves.values())).device
        if self._takes_found_inf or decision.can_choose(self.opt_state, self.opt_state, device):
            return healthy
        if not self._warned:
            self._warned = True
            name = self.body.settings.optimizer.cls.__name__
            warnings.warn(
                f"in_place: waits for the device at every step, because {name} keeps counters on the host; give it "
                "fused=True or capturable=True if it has them, or the step on_nonfinite='allow'",
                stacklevel=4,
            )
        return bool(healthy)

    @property
    def _takes_found_inf(self) -> bool:
        return getattr(self.body.bound.template, "_step_supports_amp_scaling", False)

    def update(self, leaves: Mapping[str, Tensor], healthy: bool | Tensor, rates: Rates) -> None:
        """Update in place; a decision left to the device goes into the optimizer's kernel, or picks afterwards."""
        if not isinstance(healthy, Tensor):
            self._apply(leaves, rates, None)
        elif self._takes_found_inf:
            self._apply(leaves, rates, (~healthy).float())
        else:
            old = tree.clone(self._written(leaves))
            self._apply(leaves, rates, None)
            self._choose(healthy, old, self._written(leaves))

    def _apply(self, leaves: Mapping[str, Tensor], rates: Rates, found_inf: Tensor | None) -> None:
        if self.fused is not None and self.fused.takes(leaves):
            self.fused(leaves, rates, found_inf)
            return
        bound = self.body.bound
        self.opt_state = dict(bound.apply_(self.body.slots.params, self.opt_state, rates, found_inf))
        self.follow_params()
        self.fused = FusedAdam.of(bound, self.params, self.opt_state)
        self.updated |= leaves.keys()
        self._storages = None

    def _written(self, leaves: Iterable[str]) -> dict[str, Any]:
        """What an update of these parameters writes to."""
        return {"params": {name: self.params[name] for name in leaves}, "opt_state": self.opt_state}

    def _choose(self, healthy: Tensor, old: dict[str, Any], new: dict[str, Any]) -> None:
        """Put the values from before the update back where the device says so."""
        if (chosen := decision.choose(healthy, new, old)) is not new:
            with torch.no_grad():
                torch._foreach_copy_(list(new["params"].values()), list(chosen["params"].values()))
            self.opt_state, self.fused, self._storages = chosen["opt_state"], None, None

    def advanced(self, state: TrainState, changes: dict[str, Any]) -> TrainState:
        """Return the next state: this memory, on lease."""
        home, step = self.home, state.step + 1
        mappings = self.shown()
        params = Leased(mappings[0], home, "params", step)
        buffers = Leased(mappings[1], home, "buffers", step)
        opt_state = Leased(mappings[2], home, "opt_state", step)
        self._handed = (params, buffers, opt_state)
        return state.advance(params=params, buffers=buffers, opt_state=opt_state, **changes)

    # Where the tensors lie.

    def _is_unmoved(self) -> bool:
        return [param.data_ptr() for param in self.body.slots.params.values()] == self._addresses

    def moved_params(self) -> list[str]:
        """Return the parameters of the module that no longer lie in this memory."""
        own = self.params
        return [name for name, param in self.body.slots.params.items() if param.data_ptr() != own[name].data_ptr()]

    def follow_params(self) -> None:
        """Take over the memory that a forward, an optimizer or `.to` put in a parameter's place."""
        if self._is_unmoved():  # the usual case, in half the time
            return
        for name in self.moved_params():
            self.params[name] = self.body.slots.params[name].detach()
            self.fused = self._storages = None
            self.moves += 1
        self._addresses = [tensor.data_ptr() for tensor in self.params.values()]

    def find_buffers(self) -> None:
        """Take over the buffers that the module holds now."""
        self.buffers = {name: buffer.detach() for name, buffer in self.body.slots.buffers.items()}

    def set_buffer(self, name: str, buffer: Tensor, *, moved: bool) -> None:
        """Note that a buffer is another tensor now, and whether it lies elsewhere."""
        self.buffers[name], self._storages = buffer, None
        self.moves += moved

    def move(self) -> None:
        """Give all of it other memory; `in_place(debug=True)` finds by that who still holds some of the old."""
        for tensor in (*self.body.slots.params.values(), *self.body.slots.buffers.values()):
            tensor.data = tensor.data.clone()
        self.follow_params()
        self.find_buffers()
        self.opt_state, self.fused, self._storages = tree.clone(self.opt_state), None, None
        self.moves += 1


def check_free(body: Body) -> None:
    """Raise ValueError if a step runs in place on the model already, or on one that shares parameters with it."""
    if writers := Home.of(body.slots.params).writers:
        model = type(body.settings.model).__name__
        raise ValueError(
            f"step_fn: another step runs in place on this {model}, or on part of it, and two would "
            "overwrite each other's states; use that one, or `del` it first (after an error in an interactive "
            f"session, sys.last_traceback may hold it): {writers[0]!r}"
        )


def _is(theirs: Any, own: Any) -> bool:
    return isinstance(theirs, Tensor) and isinstance(own, Tensor) and module.same_memory(theirs, own)
