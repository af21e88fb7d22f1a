"""cuda_step: the step in place on an NVIDIA GPU, replayed as a CUDA graph where it can be.

A graph is captured once for each shape of batch, after a few real steps have warmed up what torch makes on first use.
It holds forward, backward, decision and, with fused Adam or AdamW, the update too; what changes from step to step
(batch, learning rate, loss scale) lies in memory that is filled before each replay, and the generators are seeded
before it as before an eager step.
"""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, Literal, Protocol

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.check import whole
from fntrain.core.errors import GraphError
from fntrain.core.lease import FIELDS
from fntrain.core.ranks import Ranks
from fntrain.core.rng import other_states
from fntrain.core.state import TrainState
from fntrain.events import Histogram, Image
from fntrain.shell.steps.in_place import InPlace, check_free, check_step, in_place
from fntrain.shell.steps.kernels import FusedAdam
from fntrain.steps.batch import Batch, map_batch, signature
from fntrain.steps.precision import LOSS_SCALE, loss_scale
from fntrain.steps.supervised import LR, SupervisedStep, Work

GraphMode = Literal["auto", "always", "never"]
WARMUP = 3  # real steps of a shape before it is captured
_log = logging.getLogger("fntrain")


def cuda_step(
    step_fn: SupervisedStep,
    *,
    device: str | torch.device = "cuda",
    graph: GraphMode = "auto",
    compile: bool = False,  # noqa: A002  # torch's word for it
    channels_last: bool = False,
    max_graphs: int = 8,
) -> "CudaStep":
    """Make the form of a step that runs in place on a GPU; the model is moved there, so make the state after it.

    Batches may come from the host: they are copied on a stream of their own while the device is still at the step
    before (pin them, `pin_memory=True`, to spare a copy on the host). Reading a metric waits for the device; the step
    itself never does, if the optimizer is fused or capturable.

    Whole steps are captured with torch.optim.Adam and AdamW with `fused=True`, no option but `lr` scheduled; the graph
    takes the learning rate as a float32 tensor, so it agrees with the eager step up to that rounding. With other
    optimizers forward and backward are captured, bitwise the eager step, and the optimizer runs eagerly. Numbers that
    Python computes inside the loss must not change from step to step: a graph would repeat those of its capture.

    Args:
      step_fn: from `ft.supervised_step`.
      device: which GPU.
      graph: "auto" captures each shape of batch after 3 eager steps and says in the log, once for each reason, where it
        goes on eagerly; "always" raises there instead; "never" runs eagerly.
      compile: run model and loss through torch.compile; its kernels are captured too.
      channels_last: keep weights and batches of 4 dimensions in that layout, faster for convolutions in half precision.
      max_graphs: how many shapes are captured; further ones run eagerly. Graphs share one memory pool.
    Raises:
      RuntimeError: there is no such device.
      TypeError, ValueError: as for `in_place`; an argument out of range.
      GraphError: (when called, under "always") the step can't be captured; the state is as it was.
    Example:
      >>> model = torch.nn.Linear(2, 1)
      >>> adam = ft.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)
      >>> step_fn = ft.supervised_step(model, lambda model, batch: model(batch).square().mean(), adam)
      >>> if torch.cuda.is_available():
      ...     state = cuda_step(step_fn)(ft.init_state(model, adam), torch.ones(4, 2))

    Source: torch.cuda.graphs; Ng et al. 2021, "Accelerating PyTorch with CUDA Graphs"
    """
    if graph not in ("auto", "always", "never"):
        raise ValueError(f"graph: got {graph!r}, expected 'auto', 'always' or 'never'")
    whole("max_graphs", max_graphs, 1)
    check_step(step_fn)
    engine = CudaEngine(checked_device(device))
    check_free(step_fn)  # before the model is moved
    step_fn.model.to(engine.device)
    if channels_last:
        step_fn.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    moved = in_place(attrs.evolve(step_fn), compile=compile)  # a new record: it keeps nothing of the host's memory
    return CudaStep(moved, engine, graph, channels_last, max_graphs)


def checked_device(device: str | torch.device) -> torch.device:
    """Return a CUDA device with its index.

    Raises:
      ValueError: it is of another kind.
      RuntimeError: this machine has it not.
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
        """Run on the stream on which graphs are captured, after what was queued before and before what comes after."""

    def capture(self, fn: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record what `fn` queues, without running it; returns what runs it, and fn's result in its static memory."""

    def fetch(self, batch: Batch, *, channels_last: bool) -> Batch:
        """Copy a batch to the device without waiting."""


class CudaStep:
    """A step in place on a GPU; made by `cuda_step`."""

    def __init__(
        self, step: InPlace, engine: Engine, graph: GraphMode, channels_last: bool = False, max_graphs: int = 8
    ) -> None:
        self.eager = step
        self.engine = engine
        self.graph = graph
        self.channels_last = channels_last
        self.max_graphs = max_graphs
        self.graphs: dict[Hashable, Captured] = {}
        self.warm: dict[Hashable, list[dict[str, Any]]] = {}  # numbers that the eager steps of a shape reported
        self.refused: dict[Hashable, str] = {}  # why a shape is not captured
        self.said: set[str] = set()

    @property
    def ranks(self) -> Ranks:
        """The processes that do this step together, for the fold."""
        return self.eager.ranks

    def __repr__(self) -> str:
        return f"cuda_step({self.eager.step!r}, device={str(self.engine.device)!r}, graph={self.graph!r})"

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        batch = self.engine.fetch(batch, channels_last=self.channels_last)
        if self.graph == "never":
            return self.eager(state, batch)
        key = (signature(batch), self.eager.modes())
        if key in self.refused:
            return self._eagerly(state, batch, self.refused[key])
        captured = self.graphs.get(key)
        state = self.eager.own(state)
        self.eager.settle_params()  # somebody may have put other tensors into the module
        if captured is not None and captured.is_valid(self.eager):
            return captured.replay(self.eager, state, batch)
        if captured is not None:  # the state lies elsewhere now
            for stale in [other for other, graph in self.graphs.items() if not graph.is_valid(self.eager)]:
                del self.graphs[stale], self.warm[stale]
        if len(self.warm.get(key, ())) < WARMUP or not self.eager.updated:
            return self._warm_up(key, state, batch)
        try:
            self.graphs[key] = self._capture(state, batch, self.warm[key])
        except GraphError as error:
            self.refused[key] = str(error)
            return self._eagerly(state, batch, str(error))
        return self.graphs[key].replay(self.eager, state, batch)

    def _warm_up(self, key: Hashable, state: TrainState, batch: Batch) -> TrainState:
        """A real step, on the stream on which it will be captured."""
        if key not in self.warm and len(self.warm) >= 8 * self.max_graphs:
            return self._eagerly(state, batch, self._too_many())
        with self.engine.side_stream():
            new = self.eager(state, batch)
        self.warm.setdefault(key, []).append(_numbers(new.metrics, self.engine.device))
        return new

    def _eagerly(self, state: TrainState, batch: Batch, reason: str) -> TrainState:
        if self.graph == "always":
            raise GraphError(f"step {state.step + 1}: {reason}; graph='auto' goes on eagerly where this happens")
        if reason not in self.said:
            self.said.add(reason)
            _log.warning("cuda_step: goes on eagerly at step %d: %s", state.step + 1, reason)
        return self.eager(state, batch)

    def _too_many(self) -> str:
        return f"batches come in more than max_graphs={self.max_graphs} shapes; pad them to a few, or raise max_graphs"

    def _capture(self, state: TrainState, batch: Batch, warm: list[dict[str, Any]]) -> "Captured":
        if len(self.graphs) >= self.max_graphs:
            raise GraphError(self._too_many())
        if self.eager.step.on_nonfinite == "raise":
            raise GraphError("on_nonfinite='raise' looks at every step's result on the host; use 'skip' or 'allow'")
        first, *others = warm
        if changing := sorted(name for name in first if any(first[name] != other.get(name) for other in others)):
            raise GraphError(
                f"{changing} are computed by Python and change from step to step, and a graph would repeat the first; "
                "compute them from tensors, or report them from a hook"
            )
        captured = Captured.make(self.eager, self.engine, state, batch)
        kind = "the whole step" if captured.fused else "forward and backward; the optimizer runs eagerly"
        _log.info("cuda_step: captured %s at step %d (graph %d)", kind, state.step + 1, len(self.graphs) + 1)
        return captured


@attrs.frozen(eq=False)
class Captured:
    """One graph, the memory it reads from, and what it leaves."""

    run: Callable[[], None]
    batch: list[Tensor]
    scale: dict[str, Tensor]
    lrs: list[Tensor]  # learning rates of the groups, on the device; of a whole step only
    work: Work
    grads: dict[str, Tensor]
    fused: FusedAdam | None  # what the graph updates with; None: the optimizer runs after it
    moves: int

    @classmethod
    def make(cls, step: InPlace, engine: Engine, state: TrainState, batch: Batch) -> "Captured":
        """Capture the step for batches like this one; the state is neither read nor written.

        Raises:
          GraphError: the step does something that can't be captured.
        """
        static: list[Tensor] = []
        batch = map_batch(lambda tensor: static.append(tensor.clone()) or static[-1], batch)  # type: ignore[func-returns-value]
        fp16 = step.step.precision == "fp16"
        scale = tree.clone(loss_scale(state.extra, engine.device)) if fp16 else {}
        inputs = state.replace(extra={**state.extra, **({LOSS_SCALE: scale} if fp16 else {})})
        fused, moves = step.fused, step.moves
        rates = None if fused is None else fused.lrs(state)
        lrs = [torch.full((), rate, dtype=torch.float32, device=engine.device) for rate in rates or []]
        grads: dict[str, Tensor] = {}
        kept: list[FusedAdam | None] = []
        first: list[BaseException] = []
        drawn = _host_draws(engine.device)

        def body() -> Work:
            before = step.begin()
            try:
                work = step.step.work(inputs, batch)
                if work.healthy is False:
                    raise GraphError("the batch's weights are numbers that add up to 0; give tensors")
                step.settle_buffers(before, work.healthy)
                if step.moves != moves or step.strays():
                    raise GraphError("the forward puts other tensors in the place of parameters or buffers")
                everything = fused is not None and rates is not None and fused.takes(work.leaves)
                if everything and work.leaves.keys() <= step.updated:
                    step.update(work.leaves, work.healthy, state, lrs)
                    kept.append(fused)
                else:
                    grads.update({name: leaf.grad for name, leaf in work.leaves.items() if leaf.grad is not None})
                if _host_draws(engine.device) != drawn:
                    raise GraphError(
                        "the loss draws from a generator of the host, and a graph would repeat the draw of its "
                        "capture; draw on the device: torch.rand(..., device=...)"
                    )
            except BaseException as error:
                first.append(error)
                step.undo(before, ran=False)
                raise
            step.end(before)
            return work

        try:
            run, work = engine.capture(body)
        except Exception as error:  # whatever the model does that a graph can't hold
            raise _refusal(first[0] if first else error) from error
        whole_step = kept[0] if kept else None
        return cls(run, static, scale, lrs, work, {} if whole_step else grads, whole_step, moves)

    def is_valid(self, step: InPlace) -> bool:
        """Whether the memory of the state is still that of the capture."""
        return self.moves == step.moves and (self.fused is None or self.fused is step.fused)

    def replay(self, step: InPlace, state: TrainState, batch: Batch) -> TrainState:
        """Run the graph on a state that is the step's own, and a batch like the captured one."""
        tensors: list[Tensor] = []
        map_batch(lambda tensor: tensors.append(tensor) or tensor, batch)  # type: ignore[func-returns-value]
        _copy_all(self.batch, tensors)
        if self.scale:
            now = loss_scale(state.extra, self.scale["scale"].device)
            _copy_all([self.scale[key] for key in self.scale], [now[key] for key in self.scale])
        if self.fused is not None:
            for place, rate in zip(self.lrs, self.fused.lrs(state) or [], strict=True):
                place.fill_(rate)
        step.step.seed(state)
        reason = f"step {state.step + 1}"
        if self.fused is not None:
            step.home.end(reason, *FIELDS)
            self.run()
        else:
            step.home.end(reason, "buffers")
            self.run()
            self._update(step, state, reason)
        return step.advanced(state, self._changes(step, state))

    def _update(self, step: InPlace, state: TrainState, reason: str) -> None:
        """The optimizer's update by the gradients that the graph left."""
        params = step.step.slots.params
        healthy = self.work.healthy
        if isinstance(healthy, Tensor) and not step.decides_on_device(self.work.leaves):
            healthy = bool(healthy)
        if healthy is False:
            return
        step.home.end(reason, "params", "opt_state")
        try:
            for name, grad in self.grads.items():
                params[name].grad = grad
            step.update(self.work.leaves, healthy, state)
        finally:
            for param in params.values():
                param.grad = None

    def _changes(self, step: InPlace, state: TrainState) -> dict[str, Any]:
        """What the graph left, in memory that the next replay does not write to."""
        work = self.work.changes
        names = [name for name, value in work["metrics"].items() if isinstance(value, Tensor)]
        copies = tree.clone_tensors([work["metrics"][name] for name in names])
        metrics = {name: _kept(value) for name, value in work["metrics"].items()} | dict(
            zip(names, copies, strict=True)
        )
        metrics[LR] = step.step.lr(state)
        if not self.scale:
            return {"metrics": metrics}
        return {"metrics": metrics, "extra": {**state.extra, LOSS_SCALE: tree.clone(work["extra"][LOSS_SCALE])}}


def _refusal(error: BaseException) -> GraphError:
    """What went wrong in a capture, in words."""
    if isinstance(error, GraphError):
        return error
    first = "".join(str(error).strip().splitlines()[:1])
    return GraphError(
        f"the step can't be captured ({type(error).__name__}: {first}); look for .item(), .cpu(), printing of tensors "
        "or control flow that depends on them in model and loss"
    )


def _host_draws(device: torch.device) -> Any:
    """What tells whether a generator of the host was drawn from."""
    return other_states(), None if device.type == "cpu" else torch.default_generator.get_state().tolist()


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)


def _kept(value: Any) -> Any:
    """Media of the step in memory of their own; tensors are copied together elsewhere."""
    if isinstance(value, Image):
        return Image(value.tensor.clone())
    return Histogram(value.tensor.clone()) if isinstance(value, Histogram) else value


def _numbers(metrics: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What the host computed of a step's metrics: a graph would repeat it."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor) and value.device != device and value.is_cpu and value.numel() == 1:
            found[name] = value.item()
        elif isinstance(value, int | float) and name != LR:
            found[name] = value
    return found


class CudaEngine:
    """Streams and graphs of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def side_stream(self) -> "_SideStream":
        return _SideStream(self.side)

    def capture(self, fn: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph, main = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # thread_local: what a loader's thread does meanwhile (pinning memory) is no concern of the capture.
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


class _SideStream:
    """Run on another stream, ordered with what the current one does before and after."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.context = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        self.context.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
