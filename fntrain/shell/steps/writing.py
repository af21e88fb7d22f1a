"""Writing: one step on a memory, from its forward to its update, and what is put back when it fails or is skipped."""

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from fntrain.core import tree
from fntrain.core.tree import PyTree
from fntrain.steps.module import buffer_changed_kind

if TYPE_CHECKING:
    from fntrain.shell.steps.memory import Memory


@attrs.frozen(eq=False)
class SavedBuffer:
    """A buffer as it was before the forward."""

    name: str | None  # None: scratch memory of the module, no part of the state
    owner: dict[str, Tensor | None]
    key: str
    buffer: Tensor | None
    home: Tensor | None  # its memory
    copy: Tensor | None  # its values

    @property
    def assigned(self) -> Tensor | None:
        """What the forward put in its place, if it did.

        Raises:
          ValueError: the buffer went from None to a tensor, or back.
        """
        value = self.owner[self.key]
        if value is None and self.buffer is None:
            return None
        if value is None or self.buffer is None or self.home is None:
            raise buffer_changed_kind(str(self.name), self.buffer, value)
        moved = value is not self.buffer or value.data_ptr() != self.home.data_ptr()
        return value.detach() if moved else None

    def put_back(self) -> None:
        """Put the tensor that it was into the module again; its values are another matter."""
        self.owner[self.key] = self.buffer
        if self.buffer is not None and self.home is not None:
            self.buffer.data = self.home


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
        body = self.memory.body
        for param in body.slots.params.values():
            param.grad = None
        frozen = [body.slots.params[name] for name in body.bound.frozen]
        if body.slots.places:
            buffers = [owner[key] for _, owner, key in body.slots.places]
            homes = [None if buffer is None else buffer.data for buffer in buffers]
            kept = zip(body.slots.places, buffers, homes, tree.clone(homes), strict=True)
            self.buffers = [SavedBuffer(*place, *rest) for place, *rest in kept]
        self.frozen = [param for param in frozen if param.requires_grad]
        for param in self.frozen:  # last: what failed before this has changed nothing
            param.requires_grad_(False)

    def keep(self, healthy: bool | Tensor) -> None:
        """Keep what the forward wrote to buffers or assigned in their place, and tensors that it gave parameters."""
        self.keep_buffers(healthy)
        self.memory.follow_params()
        self.kept = True

    def keep_buffers(self, healthy: bool | Tensor) -> None:
        """Keep the buffers in the memory of the state; on a device's decision their values from before, or from now."""
        mine = [one for one in self.buffers if one.name is not None]
        values = [(one, value) for one in mine if (value := one.assigned) is not None]
        if values:
            homes = storages([one.home for one in mine])
            # `self.previous = self.current` assigns memory that is written here too: take its value first.
            taken = [(one, v.clone() if v.untyped_storage().data_ptr() in homes else v) for one, v in values]
            for one, value in taken:
                self._settle(one, value)
        if isinstance(healthy, Tensor):
            for one in mine:
                self._choose(one, healthy)

    def _settle(self, one: SavedBuffer, value: Tensor) -> None:
        """Copy a value that was assigned into the buffer's memory; one of another shape or dtype gets its own."""
        assert one.name is not None
        assert one.buffer is not None
        assert one.home is not None
        fits = value.shape == one.home.shape and value.dtype == one.home.dtype
        one.buffer.data = one.home.copy_(value) if fits else value.clone()
        one.owner[one.key] = one.buffer
        self.memory.set_buffer(one.name, one.buffer.detach(), moved=not fits)

    def _choose(self, one: SavedBuffer, healthy: Tensor) -> None:
        if one.name is None or one.buffer is None or one.copy is None:
            return
        if one.buffer.shape == one.copy.shape:
            torch.where(healthy, one.buffer.data, one.copy, out=one.buffer.data)
        elif not bool(healthy):  # it has grown: nothing to choose from element by element
            one.buffer.data = one.copy
            self.memory.set_buffer(one.name, one.buffer.detach(), moved=False)

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
        self.memory.buffers = {name: buffer.detach() for name, buffer in self.memory.body.slots.buffers.items()}

    def end(self, *, keep_buffers: bool) -> None:
        """Drop gradients and casts, put scratch buffers back; without `keep_buffers` the persistent ones too."""
        torch.clear_autocast_cache()  # a caller's autocast would go on with casts of the weights before the update
        for param in self.memory.body.slots.params.values():
            param.grad = None
        for param in self.frozen:
            param.requires_grad_(True)
        back = [one for one in self.buffers if one.name is None or not keep_buffers]
        for one in back:  # all places before any value: copying may fail
            one.put_back()
        for one in back if self.runs or keep_buffers else ():
            if one.home is not None and one.copy is not None:
                one.home.copy_(one.copy)  # memory apart from autograd: `.data`


def storages(tensors: PyTree) -> set[int]:
    """Return the addresses of the memory in which the tensors of a tree lie."""
    return {tree.local(tensor).untyped_storage().data_ptr() for tensor in tree.tensors(tensors)}
