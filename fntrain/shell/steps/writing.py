"""Writing: one step on a memory, from its forward to its update, and what is put back when it fails or is skipped."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fntrain.core import tree
from fntrain.steps.module import Place, storages

if TYPE_CHECKING:
    from fntrain.shell.steps.memory import Memory

# A buffer from before the forward: its place, the tensor that lay there, its memory, and a copy of its values.
SavedBuffer = tuple[Place, Tensor | None, Tensor | None, Tensor | None]


class Writing:
    """A context for one step: begun without gradients, ended by keeping what the forward wrote, or by putting it back.

    A block that ends without `keep` leaves the state as it was, whether by an error or because its update is skipped.
    """

    def __init__(self, memory: "Memory", runs: bool) -> None:
        self.memory = memory
        self.runs = runs
        self.kept = False
        self.frozen: list[nn.Parameter] = []
        self.buffers: list[SavedBuffer] = []

    def __enter__(self) -> "Writing":
        self.begin()
        return self

    def begin(self) -> None:
        """Drop gradients, let frozen parameters ask for none, copy the buffers, which the forward may write to."""
        slots = self.memory.body.slots
        for param in slots.params.values():
            param.grad = None
        frozen = [slots.params[name] for name in self.memory.body.bound.frozen]
        if slots.places:
            buffers = [owner[key] for _, owner, key in slots.places]
            memory = [None if buffer is None else buffer.data for buffer in buffers]
            self.buffers = list(zip(slots.places, buffers, memory, tree.clone(memory), strict=True))
        self.frozen = [param for param in frozen if param.requires_grad]
        for param in self.frozen:  # last: what failed before this has changed nothing
            param.requires_grad_(False)

    def keep(self, healthy: bool | Tensor) -> None:
        """Keep what the forward wrote to buffers or assigned in their place, and tensors that it gave parameters."""
        if self.buffers:
            self.keep_buffers(healthy)
        self.memory.follow_params()
        self.kept = True

    def keep_buffers(self, healthy: bool | Tensor) -> None:
        """Keep the buffers in the memory of the state; on a device's decision their values from before, or from now."""
        persistent = [one for one in self.buffers if one[0].name is not None]
        found = [(saved[0].assigned(saved[1], saved[2]), saved) for saved in persistent]
        assigned = [(value, saved) for value, saved in found if value is not None]
        if assigned:
            written = storages([memory for _, _, memory, _ in persistent])
            # `self.previous = self.current` assigns memory that is written here too: take its value first.
            taken = [(v.clone() if v.untyped_storage().data_ptr() in written else v, one) for v, one in assigned]
            for value, saved in taken:
                self._copy_in(value, *saved)
        if isinstance(healthy, Tensor):
            for saved in persistent:
                self._choose(healthy, *saved)

    def _copy_in(self, value: Tensor, place: Place, buffer: Any, memory: Any, _copy: Any) -> None:
        """Copy a value that was assigned into the buffer's memory; one of another shape or dtype gets its own."""
        fits = value.shape == memory.shape and value.dtype == memory.dtype
        buffer.data = memory.copy_(value) if fits else value.clone()
        place.owner[place.key] = buffer
        self.memory.set_buffer(str(place.name), buffer.detach(), moved=not fits)

    def _choose(self, healthy: Tensor, place: Place, buffer: Tensor | None, _memory: Any, copy: Any) -> None:
        if buffer is None:
            return
        if buffer.shape == copy.shape:
            torch.where(healthy, buffer.data, copy, out=buffer.data)
        elif not bool(healthy):  # it has grown: nothing to choose from element by element
            buffer.data = copy
            self.memory.set_buffer(str(place.name), buffer.detach(), moved=False)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.kept if self.runs else error is None:
            self.end(keep_buffers=True)
            return
        if error is not None:
            self.memory.body.exchange.reset()
        self.undo()

    def undo(self) -> None:
        """Leave the state as it was: buffers get the values back that the forward wrote over."""
        for name in self.memory.moved_params():
            self.memory.body.slots.params[name].data = self.memory.params[name]
        self.end(keep_buffers=False)
        self.memory.find_buffers()

    def end(self, *, keep_buffers: bool) -> None:
        """Drop gradients and casts, put scratch buffers back; without `keep_buffers` the persistent ones too."""
        torch.clear_autocast_cache()  # a caller's autocast would go on with casts of the weights before the update
        for param in self.memory.body.slots.params.values():
            param.grad = None
        for param in self.frozen:
            param.requires_grad_(True)
        if not self.buffers:
            return
        back = [one for one in self.buffers if one[0].name is None or not keep_buffers]
        for place, buffer, memory, _ in back:  # all places before any value: copying may fail
            place.put_back(buffer, memory)
        for _, _, memory, copy in back if self.runs or keep_buffers else ():
            if memory is not None and copy is not None:
                memory.copy_(copy)  # not to `buffer`: `memory` is its `.data`, of which autograd knows nothing
