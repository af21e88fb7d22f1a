"""cuda_step: the step in place on an NVIDIA GPU, replayed as a CUDA graph where it can be.

A graph is captured once for each shape of batch, after a few real steps have warmed up what torch makes on first use.
"""

import logging
import warnings
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from fntrain.core.check import one_of, whole
from fntrain.core.errors import GraphError
from fntrain.core.state import TrainState
from fntrain.shell.steps.captured import Captured
from fntrain.shell.steps.device import CudaEngine, Engine, checked_device
from fntrain.shell.steps.in_place import Changes, Donated, check_step, modes, run, same_form
from fntrain.shell.steps.memory import Memory, check_free
from fntrain.steps.batch import Batch, signature
from fntrain.steps.report import LR
from fntrain.steps.supervised import SupervisedStep

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
) -> Donated:
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
      graph: "auto" captures each shape of batch after 3 eager steps; where that can't be it goes on eagerly and warns,
        once for each reason; "always" raises there instead; "never" runs eagerly.
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
    one_of("graph", graph, ("auto", "always", "never"))
    whole("max_graphs", max_graphs, 1)
    check_step(step_fn)
    engine = CudaEngine(checked_device(device))
    form = (cuda_step, engine.device, graph, compile, channels_last, max_graphs)
    if (same := same_form(step_fn, form)) is not None:
        return same
    check_free(step_fn.body)  # before the model is moved
    step_fn.model.to(engine.device)
    if channels_last:
        step_fn.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss_fn = torch.compile(step_fn.loss_fn) if compile else step_fn.loss_fn
    moved = attrs.evolve(step_fn, loss_fn=loss_fn)  # a new record: it keeps nothing of the host's memory
    return Donated(Memory(moved.body), Graphs(engine, graph, channels_last, max_graphs), step_fn, form)


@attrs.define(eq=False)
class Graphs:
    """Execution by CUDA graphs: each shape of batch is warmed up, captured, replayed; eager where that can't be."""

    engine: Engine
    mode: GraphMode
    channels_last: bool = False
    max_graphs: int = 8
    graphs: dict[Hashable, Captured] = attrs.field(factory=dict, init=False)
    warm: dict[Hashable, list[dict[str, Any]]] = attrs.field(factory=dict, init=False)  # see `_numbers`
    refused: dict[Hashable, str] = attrs.field(factory=dict, init=False)  # why a shape is not captured
    warned: set[str] = attrs.field(factory=set, init=False)

    def described(self, step: str) -> str:
        """What a step with this execution prints as."""
        return f"cuda_step({step}, device={str(self.engine.device)!r}, graph={self.mode!r})"

    def __call__(self, memory: Memory, state: TrainState, batch: Batch) -> Changes:
        batch = self.engine.fetch(batch, channels_last=self.channels_last)
        if self.mode == "never":
            return run(memory, state, batch)
        key = (signature(batch), modes(memory))
        if key in self.refused:
            return self._eagerly(memory, state, batch, self.refused[key])
        self._drop_stale(memory)
        if key not in self.graphs:
            if len(self.warm.get(key, ())) < WARMUP or not memory.updated:
                return self._warm_up(key, memory, state, batch)
            try:
                self.graphs[key] = self._capture(memory, state, batch, self.warm[key])
            except GraphError as error:
                self.refused[key] = str(error)
                return self._eagerly(memory, state, batch, str(error))
        return self.graphs[key].replay(memory, state, batch)

    def _drop_stale(self, memory: Memory) -> None:
        """Drop the graphs of a state that lies elsewhere now; their shapes are warmed up anew."""
        for key in [key for key, graph in self.graphs.items() if not graph.is_valid(memory)]:
            del self.graphs[key], self.warm[key]

    def _warm_up(self, key: Hashable, memory: Memory, state: TrainState, batch: Batch) -> Changes:
        """A real step, on the stream on which it will be captured."""
        if key not in self.warm and len(self.warm) >= 8 * self.max_graphs:
            return self._eagerly(memory, state, batch, self._too_many())
        with self.engine.side_stream():
            changes = run(memory, state, batch)
        self.warm.setdefault(key, []).append(_numbers(changes["metrics"], self.engine.device))
        return changes

    def _eagerly(self, memory: Memory, state: TrainState, batch: Batch, reason: str) -> Changes:
        if self.mode == "always":
            raise GraphError(f"step {state.step + 1}: {reason}; graph='auto' goes on eagerly where this happens")
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"cuda_step: goes on eagerly at step {state.step + 1}: {reason}", stacklevel=4)
        return run(memory, state, batch)

    def _too_many(self) -> str:
        return f"batches come in more than max_graphs={self.max_graphs} shapes; pad them to a few, or raise max_graphs"

    def _capture(self, memory: Memory, state: TrainState, batch: Batch, warm: list[dict[str, Any]]) -> Captured:
        if len(self.graphs) >= self.max_graphs:
            raise GraphError(self._too_many())
        if memory.body.settings.on_nonfinite == "raise":
            raise GraphError("on_nonfinite='raise' looks at every step's result on the host; use 'skip' or 'allow'")
        first, *others = warm
        if changing := sorted(name for name in first if any(first[name] != other.get(name) for other in others)):
            raise GraphError(
                f"{changing} are computed by Python and change from step to step, and a graph would repeat the first; "
                "compute them from tensors, or report them from a hook"
            )
        captured = Captured.make(memory, self.engine, state, batch)
        kind = "the whole step" if captured.fused else "forward and backward; the optimizer runs eagerly"
        _log.info("cuda_step: captured %s at step %d (graph %d)", kind, state.step + 1, len(self.graphs) + 1)
        return captured


def _numbers(metrics: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What the host computed of a step's metrics: a graph would repeat it."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    on_host = {n: t.item() for n, t in tensors.items() if t.device != device and t.is_cpu and t.numel() == 1}
    return on_host | {n: value for n, value in metrics.items() if isinstance(value, int | float) and n != LR}
