"""Saving in the background: the training thread pays for a copy into host memory, a thread for the disk."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.ranks import ALONE, Ranks
from fntrain.core.state import TrainState
from fntrain.shell.checkpoints.directory import agreed, clean, commit, writing
from fntrain.shell.checkpoints.manifest import Contents
from fntrain.shell.checkpoints.remote import Place, RemotePath
from fntrain.shell.checkpoints.tensor_file import PART

_log = logging.getLogger("fntrain")
_open: set["Saver"] = set()


class Saver:
    """Saves states to one directory, which it holds while it is open; one save at a time.

    Args:
      root: the directory.
      asynchronous: save in a thread. At most one save is under way: the next waits for it. What goes wrong there is
        raised by the next call of `save`, `check` or `wait`.
      ranks: who saves together, each its part; the first holds the directory. All ranks raise at the same calls.
    """

    def __init__(self, root: Place, *, asynchronous: bool = True, ranks: Ranks = ALONE) -> None:
        self.root = root if isinstance(root, RemotePath) else root.absolute()  # a chdir while it is open moves nothing
        self.buffers = HostBuffers() if asynchronous else None
        self.ranks = ranks
        self.pending: Future[None] | None = None
        self.steps: set[int] = set()  # of all saves
        self.stack = ExitStack()

    def __enter__(self) -> "Saver":
        with self.stack:
            self.channel = self.ranks.channel()  # first: all ranks come to it
            self.stack.callback(self.channel.close)
            if self.ranks.rank == 0:
                self.stack.enter_context(writing(self.root, alone=True))
                clean(self.root)
            self.thread = ThreadPoolExecutor(1, thread_name_prefix="fntrain-checkpoint")  # starts with the first save
            self.stack = self.stack.pop_all()
        _open.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.discard(self)
        with self.stack:
            self.thread.shutdown()
            self.wait()

    def save(self, state: TrainState, then: Callable[[], None]) -> None:
        """Save a state; `then` is called after the commit, by the same thread."""
        begin = time.perf_counter()
        self.wait()
        contents = Contents.of(state)
        if contents.ranks.world_size > 1:
            contents = attrs.evolve(contents, ranks=self.channel)
        self.steps.add(state.step)
        if self.buffers is None:
            self._commit(contents, map(tree.to_bytes, contents.tensors), then)
        else:
            data, copied = self.buffers.copy(contents.tensors, self.thread)
            contents.tensors.clear()  # a state of the pure step would live until it is on the disk
            earlier = [saver.pending for saver in tuple(_open) if saver is not self and saver.pending is not None]
            self.pending = self.thread.submit(self._commit, contents, data, then, copied, earlier)
            _log.debug("step %s: copied in %.3f s", state.step, time.perf_counter() - begin)

    def check(self) -> None:
        """Raise what went wrong with a save that has ended; of several ranks' saves the next `save` or `wait` does."""
        if self.ranks.world_size == 1 and self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way; raises what went wrong."""
        pending = self.pending
        if pending is not None:
            error = pending.exception()  # Ctrl-C while waiting leaves it pending
            self.pending = None
            if error is not None:
                raise error

    def _commit(
        self,
        contents: Contents,
        data: Iterable[memoryview],
        then: Callable[[], None],
        copied: Sequence[Any] = (),
        earlier: Sequence[Future[None]] = (),
    ) -> None:
        begin = time.perf_counter()
        for event in copied:
            event.synchronize()
        for save in earlier:
            save.exception()  # what this state remembers of other hooks' saves must be on the disk before it
        path = commit(self.root, contents, data)
        _log.info("saved %s in %.3f s", path, time.perf_counter() - begin)
        agreed(contents.ranks, then)


class HostBuffers:
    """Host memory for one copy of a state, made once: into fresh memory a copy takes three times as long."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.kinds: list[Any] = []
        self.views: list[Tensor] = []
        self.data: list[memoryview] = []  # the bytes of the views

    def copy(self, tensors: list[Tensor], helper: ThreadPoolExecutor) -> tuple[list[memoryview], list[Any]]:
        """Copy tensors; returns the bytes of the copies, and events to wait for until they are there.

        The copies are written over by the next call. From a CUDA device they are made in the order of its stream, so
        what writes to the tensors after this call need not wait; from elsewhere they are there at once. Where torch
        has one thread only, the helper, which is idle, copies along.
        """
        kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        if kinds != self.kinds:
            self._lay_out(tensors)
            self.kinds = kinds
        devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
        with torch.no_grad():
            if devices and len({tensor.device.type for tensor in tensors}) == 1:
                torch._foreach_copy_(self.views, tensors, non_blocking=True)
            else:
                left = deque(_pieces(self.views, tensors))
                helped = helper.submit(_copy, left) if torch.get_num_threads() == 1 and not devices else None
                _copy(left)
                if helped is not None:
                    helped.result()
        events = []
        for device in devices:
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        return self.data, events

    def _lay_out(self, tensors: list[Tensor]) -> None:
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // 64) * 64
        pinned = any(tensor.device.type == "cuda" for tensor in tensors)
        if end > self.memory.numel() or pinned != self.memory.is_pinned():
            self.views, self.data = [], []
            self.memory = torch.empty(0, dtype=torch.uint8)  # the old before the new
            self.memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        self.views = [
            self.memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=True)
        ]
        self.data = [tree.to_bytes(view) for view in self.views]


def _pieces(views: list[Tensor], tensors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets and sources, large ones in parts that two threads can share."""
    for view, tensor in zip(views, tensors, strict=True):
        if view.nbytes > PART and tensor.is_contiguous():
            parts = -(-view.nbytes // PART)
            yield from zip(view.view(-1).chunk(parts), tensor.view(-1).chunk(parts), strict=True)
        else:
            yield view, tensor


def _copy(left: "deque[tuple[Tensor, Tensor]]") -> None:
    """Copy what is left, until nothing is; several threads may do it at once."""
    with suppress(IndexError), torch.no_grad():
        while True:
            view, tensor = left.popleft()
            view.copy_(tensor, non_blocking=tensor.device.type == "cuda")
