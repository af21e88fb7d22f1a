"""Captured: one CUDA graph of a step, the memory it reads from, and what it leaves.

It holds forward, backward, decision and, with fused Adam or AdamW, the update too. What changes from step to step
(batch, learning rate, loss scale) lies in memory that is filled before each replay, and the generators are seeded
before it as before an eager step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import GraphError
from fntrain.core.lease import FIELDS
from fntrain.core.rng import other_states
from fntrain.core.state import TrainState
from fntrain.events import Histogram, Image
from fntrain.shell.steps.device import Engine
from fntrain.shell.steps.kernels import FusedAdam
from fntrain.shell.steps.memory import Memory
from fntrain.shell.steps.writing import Writing
from fntrain.steps import containers
from fntrain.steps.batch import Batch, map_batch
from fntrain.steps.body import Gradients
from fntrain.steps.precision import LOSS_SCALE, loss_scale
from fntrain.steps.rates import Rates
from fntrain.steps.report import LR


@attrs.frozen(eq=False)
class Inputs:
    """The memory that a graph reads: filled before each replay."""

    batch: list[Tensor]
    scale: dict[str, Tensor]  # of fp16
    lrs: list[Tensor]  # learning rates of the groups, on the device; of a whole step only

    def fill(self, state: TrainState, batch: Batch, rates: Rates) -> None:
        """Copy in what this step is about, without waiting."""
        _copy_all(self.batch, _tensors(batch))
        if self.scale:
            now = loss_scale(state.extra, self.scale["scale"].device)
            _copy_all(list(self.scale.values()), [now[key] for key in self.scale])
        for place, now in zip(self.lrs, rates.groups, strict=bool(self.lrs)):
            place.fill_(now["lr"])


@attrs.frozen(eq=False)
class Captured:
    """One graph: what runs it, what it reads, and what it leaves."""

    run: Callable[[], None]
    inputs: Inputs
    work: Gradients
    grads: dict[str, Tensor]  # where the optimizer runs after the graph
    fused: FusedAdam | None  # what the graph updates with; None: the optimizer runs after it
    moves: int

    @classmethod
    def make(cls, memory: Memory, engine: Engine, state: TrainState, batch: Batch) -> "Captured":
        """Capture the step for batches like this one; the state is neither read nor written.

        Raises:
          GraphError: the step does something that can't be captured.
        """
        recording = _Recording(memory, state, batch, engine.device)
        try:
            run, work = engine.capture(recording)
        except Exception as error:  # whatever the model does that a graph can't hold
            raise _refusal(recording.error or error) from error
        return cls(run, recording.inputs, work, recording.grads, recording.fused, recording.moves)

    def is_valid(self, memory: Memory) -> bool:
        """Whether the memory of the state is still that of the capture."""
        return self.moves == memory.moves and (self.fused is None or self.fused is memory.fused)

    def replay(self, memory: Memory, state: TrainState, batch: Batch) -> dict[str, Any]:
        """Run the graph on a state that is the memory's own, and a batch like the captured one.

        Leases end before the graph runs: while it runs, nothing can end them at its first write.
        """
        rates = memory.body.rates(state)
        self.inputs.fill(state, batch, rates)
        memory.body.seed(state)
        memory.end_leases(state, *(FIELDS if self.fused is not None else ("buffers",)))
        self.run()
        if self.fused is None:
            self._update(memory, state, rates)
        return self._changes(state, rates)

    def _update(self, memory: Memory, state: TrainState, rates: Rates) -> None:
        """The optimizer's update by the gradients that the graph left."""
        healthy = memory.decision(self.work)
        if healthy is False:
            return
        memory.end_leases(state, "params", "opt_state")
        params = memory.body.slots.params
        try:
            for name, grad in self.grads.items():
                params[name].grad = grad
            memory.update(self.work.leaves, healthy, rates)
        finally:
            for param in params.values():
                param.grad = None

    def _changes(self, state: TrainState, rates: Rates) -> dict[str, Any]:
        """What the graph left, in memory that the next replay does not write to."""
        left = self.work.changes["metrics"]
        names = [name for name, value in left.items() if isinstance(value, Tensor)]
        copies = tree.clone_tensors([left[name] for name in names])
        metrics = {name: _copied(value) for name, value in left.items()} | dict(zip(names, copies, strict=True))
        metrics[LR] = rates.lr
        if not self.inputs.scale:
            return {"metrics": metrics}
        scale = tree.clone(self.work.changes["extra"][LOSS_SCALE])
        return {"metrics": metrics, "extra": {**state.extra, LOSS_SCALE: scale}}


class _Recording:
    """What is called while a graph is captured: one step that reads the graph's inputs and changes no state."""

    def __init__(self, memory: Memory, state: TrainState, batch: Batch, device: torch.device) -> None:
        self.batch = map_batch(torch.clone, batch)
        scale: dict[str, Tensor] = {}
        if memory.body.settings.precision == "fp16":
            scale = tree.clone(loss_scale(state.extra, device))
            state = state.replace(extra={**state.extra, LOSS_SCALE: scale})
        self.memory, self.state, self.device = memory, state, device
        self.rates = memory.body.rates(state)
        self.moves = memory.moves
        self.fused = memory.fused if memory.fused is not None and memory.fused.only_lr else None
        lrs = [now["lr"] for now in self.rates.groups] if self.fused is not None else []
        on_device = [torch.full((), lr, dtype=torch.float32, device=device) for lr in lrs]
        self.inputs = Inputs(_tensors(self.batch), scale, on_device)
        self.grads: dict[str, Tensor] = {}
        self.error: BaseException | None = None  # the first one: that of the capture hides it
        self.drawn = _host_draws(device)

    def __call__(self) -> Gradients:
        with self.memory.writing(runs=False) as writing:
            try:
                return self._step(writing)
            except BaseException as error:
                self.error = error
                raise

    def _step(self, writing: Writing) -> Gradients:
        memory = self.memory
        work = memory.body.gradients(self.state, self.batch, self.rates)
        if work.healthy is False:
            raise GraphError("the batch's weights are numbers that add up to 0; give tensors")
        writing.keep_buffers(work.healthy)
        if memory.moves != self.moves or memory.moved_params():
            raise GraphError("the forward puts other tensors in the place of parameters or buffers")
        if self.fused is not None and self.fused.takes(work.leaves) and work.leaves.keys() <= memory.updated:
            on_device = tuple({"lr": lr} for lr in self.inputs.lrs)
            memory.update(work.leaves, work.healthy, Rates(self.rates.lr, on_device))
        else:
            self.fused = None
            self.inputs.lrs.clear()
            self.grads = {name: leaf.grad for name, leaf in work.leaves.items() if leaf.grad is not None}
        if _host_draws(self.device) != self.drawn:
            raise GraphError(
                "the loss draws from a generator of the host, and a graph would repeat the draw of its "
                "capture; draw on the device: torch.rand(..., device=...)"
            )
        return work


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


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in containers.leaves(batch) if isinstance(leaf, Tensor)]


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)


def _copied(value: Any) -> Any:
    """Media of the step in memory of their own; tensors are copied together elsewhere."""
    return type(value)(value.tensor.clone()) if isinstance(value, Image | Histogram) else value
