"""One NVIDIA GPU: its streams, its graphs, and how batches come to it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from fntrain.steps.batch import Batch, map_batch


def checked_device(device: str | torch.device) -> torch.device:
    """Return a CUDA device with its index.

    Raises:
      ValueError: it is of another kind.
      RuntimeError: this machine does not have it.
    """
    wanted = torch.device(device)
    if wanted.type != "cuda":
        raise ValueError(f"device: got {str(wanted)!r}, expected a CUDA device; on the CPU use ft.shell.in_place")
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or (wanted.index or 0) >= count:
        built = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        raise RuntimeError(
            f"device: got {str(wanted)!r}, but torch {torch.__version__} ({built}) sees {count} CUDA devices; "
            "use ft.shell.in_place(step_fn) on the CPU"
        )
    return torch.device("cuda", torch.cuda.current_device() if wanted.index is None else wanted.index)


class Engine(Protocol):
    """What a graph needs of a device."""

    device: torch.device

    def side_stream(self) -> AbstractContextManager[Any]:
        """Run a block on the stream on which graphs are captured, in order with what is queued before and after it."""

    def capture(self, fn: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record what `fn` queues, without running it; returns what runs it, and fn's result in its static memory."""

    def fetch(self, batch: Batch, *, channels_last: bool) -> Batch:
        """Copy a batch to the device without waiting."""


class CudaEngine:
    """Streams and graphs of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        main = torch.cuda.current_stream(self.device)
        self.side.wait_stream(main)
        try:
            with torch.cuda.stream(self.side):
                yield
        finally:
            main.wait_stream(self.side)

    def capture(self, fn: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # thread_local: a loader's thread that pins memory meanwhile must not make the capture fail.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
                result = fn()
        except BaseException:
            torch.cuda.set_stream(main)
            self._recover()
            raise
        return graph.replay, result

    def _recover(self) -> None:
        """Clean up after a capture that failed, which torch before 2.12 leaves half open.

        The memory pool stays marked as recorded to, and the generator as captured: the next capture, and the next draw,
        would raise. So the recording is ended, the pool left, and a graph of one operation captured, which resets it.
        """
        failed, self.pool = self.pool, torch.cuda.graph_pool_handle()
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with suppress(RuntimeError):  # it has been ended already
                end(self.device.index, failed)
        one = torch.zeros((), device=self.device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.side, capture_error_mode="thread_local"):
            one.add_(1)

    def fetch(self, batch: Batch, *, channels_last: bool) -> Batch:
        main = torch.cuda.current_stream(self.device)

        def to_device(tensor: Tensor) -> Tensor:
            layout = torch.channels_last if channels_last and tensor.dim() == 4 else torch.preserve_format
            if tensor.device == self.device:
                return tensor
            source = tensor if tensor.device.type != "cpu" or tensor.is_pinned() else tensor.pin_memory()
            copy = source.to(self.device, non_blocking=True, memory_format=layout)
            copy.record_stream(main)
            return copy

        with torch.cuda.stream(self.copying):
            batch = map_batch(to_device, batch)
        main.wait_stream(self.copying)
        if channels_last:  # what was on the device already
            batch = map_batch(lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t, batch)
        return batch
