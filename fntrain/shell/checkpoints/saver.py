"""Saves in the background: the training thread copies the state into host memory, another thread writes the copy."""

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
from fntrain.shell.checkpoints.commit import Keep, commit, retain, store_at
from fntrain.shell.checkpoints.contents import Contents
from fntrain.shell.checkpoints.paths import AnyPath
from fntrain.shell.checkpoints.store import gather_or_raise
from fntrain.shell.checkpoints.tensor_file import PART

_log = logging.getLogger("fntrain")
_open: set["Saver"] = set()
Waits = Sequence[Callable[[], object]]


class Saver:
    """Saves states to one directory, which it holds while it is open; one save at a time.

    Args:
      root: the directory.
      asynchronous: save in a thread. At most one save is under way: the next waits for it. What goes wrong there is
        raised by the next call of `save`, `check` or `wait`.
      ranks: that save together, each its part; the first holds the directory. All ranks raise at the same calls.
    """

    def __init__(self, root: AnyPath, *, asynchronous: bool = True, ranks: Ranks = ALONE) -> None:
        self.store = store_at(root.absolute())  # the process may change its current directory meanwhile
        self.buffers = HostBuffers() if asynchronous else None
        self.ranks = ranks
        self.pending: Future[None] | None = None
        self.steps: set[int] = set()  # of all saves
        self.stack = ExitStack()

    def __enter__(self) -> "Saver":
        with self.stack:
            self.channel = self.ranks.channel()  # before anything that may fail: all ranks have to make one
            self.stack.callback(self.channel.close)
            if self.ranks.rank == 0:
                self.stack.enter_context(self.store.hold(alone=True))
                self.store.clean()
            self.thread = ThreadPoolExecutor(1, thread_name_prefix="fntrain-checkpoint")
            self.stack = self.stack.pop_all()
        _open.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.discard(self)
        with self.stack:
            self.thread.shutdown()
            self.wait()

    def save(self, state: TrainState, keep: Keep | None = None) -> None:
        """Save a state; after the commit delete the checkpoints that are not to be kept.

        Args:
          state: only its saved fields count; it is not held until it is on the disk.
          keep: as of `retain`, of which the first rank's counts; without it nothing is deleted. Steps later than this
            one that were saved here are deleted: they are of a branch that the run has left by a roll-back.
        """
        begin = time.perf_counter()
        self.wait()
        contents = Contents.of(state)
        if contents.ranks.world_size > 1:
            contents = attrs.evolve(contents, ranks=self.channel)
        left = {step for step in self.steps if step > state.step}
        self.steps.add(state.step)
        if self.buffers is None:
            self._commit(contents, map(tree.to_bytes, contents.tensors), keep, left)
        else:
            data, copied = self.buffers.copy(contents.tensors, self.thread)
            contents.tensors.clear()  # or a state of the pure step would stay in memory until it is on the disk
            # This state may remember what other hooks have saved: that must be on the disk first.
            others = [saver.pending for saver in tuple(_open) if saver is not self and saver.pending is not None]
            before = [event.synchronize for event in copied] + [save.exception for save in others]
            self.pending = self.thread.submit(self._commit, contents, data, keep, left, before)
            _log.debug("step %s: copied in %.3f s", state.step, time.perf_counter() - begin)

    def check(self) -> None:
        """Raise what went wrong with a save that has ended; of several ranks' saves the next `save` or `wait` does."""
        if self.ranks.world_size == 1 and self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way; raises what went wrong."""
        pending = self.pending
        if pending is not None:
            error = pending.exception()  # Ctrl-C may end this call: then it stays pending
            self.pending = None
            if error is not None:
                raise error

    def _commit(
        self, contents: Contents, data: Iterable[memoryview], keep: Keep | None, left: set[int], before: Waits = ()
    ) -> None:
        begin = time.perf_counter()
        for wait in before:
            wait()
        path = commit(self.store, contents, data)
        _log.info("saved %s in %.3f s", path, time.perf_counter() - begin)

        def delete() -> None:
            if keep is not None and contents.ranks.rank == 0:
                retain(self.store, contents.step, keep, left)

        gather_or_raise(contents.ranks, delete)


class HostBuffers:
    """Host memory for one copy of a state, allocated once: a copy into fresh memory takes three times as long."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.kinds: list[Any] = []
        self.views: list[Tensor] = []
        self.data: list[memoryview] = []  # the bytes of the views

    def copy(self, tensors: list[Tensor], helper: ThreadPoolExecutor) -> tuple[list[memoryview], list[Any]]:
        """Copy tensors; returns the bytes of the copies, and events to wait for until they are there.

        The next call writes over the copies. From a CUDA device they are made in the order of its stream, so a step
        that writes to the tensors after this call need not wait; from elsewhere they are complete at once. Where torch
        has one thread only, the helper, which is idle, copies too.
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
        return self.data, [torch.cuda.current_stream(device).record_event() for device in devices]

    def _lay_out(self, tensors: list[Tensor]) -> None:
        sizes = [-(-tensor.nbytes // 64) * 64 for tensor in tensors]
        end = sum(sizes)
        pinned = any(tensor.device.type == "cuda" for tensor in tensors)
        if end > self.memory.numel() or pinned != self.memory.is_pinned():
            self.views, self.data = [], []
            self.memory = torch.empty(0, dtype=torch.uint8)  # free the old memory before the new is allocated
            self.memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        rooms = zip(self.memory[:end].split_with_sizes(sizes), tensors, strict=True)
        self.views = [room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for room, tensor in rooms]
        self.data = [tree.to_bytes(view) for view in self.views]


def _pieces(views: list[Tensor], tensors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets and sources; large ones are cut, so that two threads can copy one tensor."""
    for view, tensor in zip(views, tensors, strict=True):
        if view.nbytes > PART and tensor.is_contiguous():
            parts = -(-view.nbytes // PART)
            yield from zip(view.view(-1).chunk(parts), tensor.view(-1).chunk(parts), strict=True)
        else:
            yield view, tensor


def _copy(left: "deque[tuple[Tensor, Tensor]]") -> None:
    """Copy until nothing is left; several threads may do it at once."""
    with suppress(IndexError), torch.no_grad():
        while True:
            view, tensor = left.popleft()
            view.copy_(tensor, non_blocking=tensor.device.type == "cuda")
