"""A step as a graph: its own helpers run once on fake tensors, while `make_fx` records what they do."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from fntrain import events
from fntrain.core import tree
from fntrain.core.lease import FIELDS
from fntrain.core.rng import other_states, preserved_generators
from fntrain.core.state import TrainState
from fntrain.shell.steps.flat import (
    DECOMPOSED,
    RateVector,
    TensorsForNumbers,
    Unsettled,
    Untraceable,
    filler,
    traceable,
)
from fntrain.steps.batch import Batch
from fntrain.steps.body import Body
from fntrain.steps.module import Slots, storages
from fntrain.steps.rates import Rates

_NO_STATE = TrainState(step=0, position=0, seed=0, params={})  # a traced step reads nothing of it
_ABSENT = object()
_DRAWS = torch.Tag.nondeterministic_seeded  # of operations that draw random numbers
# Frames of torch and of this package, which tell a reader nothing about his loss.
_INNER = re.compile(r"[\\/]torch[\\/](?!optim)|[\\/]fntrain[\\/](shell|steps)[\\/]")


@attrs.frozen(eq=False)
class Traced:
    """A step as a graph of flat tensors, and what its results are.

    The new leaves are written over the old ones. The results are the tensors that the step reports, then whether it
    is healthy, if that is a tensor.
    """

    graph: GraphModule
    constants: list[Tensor]  # what the step closes over, the last inputs
    metrics: dict[str, Any]  # in order; numbers with their value, None where a tensor is among the results
    kinds: dict[str, type]  # of the metrics that are among the results, in their order
    decides: bool  # whether the last result says that the step is healthy

    def reported(self, results: list[Tensor]) -> dict[str, Any]:
        """Return the metrics of a step by the results of its program."""
        metrics = self.metrics.copy()
        for (name, kind), result in zip(self.kinds.items(), results, strict=False):
            metrics[name] = result if kind is Tensor else kind(result)
        return metrics


def trace(body: Body, rates: RateVector, trees: tuple[Any, ...], batch: Batch, flat: list[Tensor]) -> Traced:
    """Record the step on fake tensors; `flat` is the vector of rates, then the leaves of the trees and of the batch."""
    found: dict[str, Any] = {}

    def run(vector: Tensor, *inputs: Tensor) -> list[Tensor]:
        values = iter(inputs)
        fake = [filler(one)(values) for one in trees]
        outputs, notes = _step(body, rates.read(vector), vector, fake, filler(batch)(values))
        found.update(notes)
        return outputs

    generators = other_states()
    model = body.settings.model
    with preserved_generators(), _untouched(model), _compiling(), _RefuseWrites(), _rng_states_read() as read:
        graph = make_fx(run, DECOMPOSED, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
        if other_states() != generators:
            raise Untraceable("it draws from Python's or NumPy's generator, which a program can't")
        if read and any(_DRAWS in getattr(node.target, "tags", ()) for node in graph.graph.nodes):
            raise Untraceable(
                "it draws, and saves a generator's state to draw again (torch.utils.checkpoint does): a program can't"
            )
    constants = _lift_constants(graph, body.slots)
    return Traced(graph, constants, **found)


def _step(
    body: Body, rates: Rates, vector: Tensor, trees: list[Any], batch: Batch
) -> tuple[list[Tensor], dict[str, Any]]:
    """One step on traced tensors, without a decision of the host: results, and fields of `Traced` about them."""
    params = {
        name: nn.Parameter(trees[0][name].clone(), param.requires_grad and name not in body.bound.frozen)
        for name, param in body.slots.params.items()
    }
    buffers = tree.map_tensors(Tensor.clone, trees[1])
    _place(body, params, buffers)
    traced = attrs.evolve(body, slots=attrs.evolve(body.slots, params=params), bound=traceable(body.bound))
    work = traced.gradients(_NO_STATE, batch, rates)
    with TensorsForNumbers([item for group in rates.groups for item in group.items()]):
        opt_state = traced.bound.apply_(params, tree.map_tensors(Tensor.clone, trees[2]), rates)
    idle = {name for name, param in params.items() if name not in work.leaves and param._version == 0}
    new = ({name: param.detach() for name, param in params.items()}, _assigned(body.slots, buffers), opt_state)
    _write(trees, new, work.healthy, idle)
    return _results(work.changes["metrics"], work.healthy, vector)


def _results(metrics: dict[str, Any], healthy: bool | Tensor, vector: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """The results of a step, and the fields of `Traced` about them."""
    reported = {name: one for name, one in metrics.items() if isinstance(one, Tensor | events.Image | events.Histogram)}
    # Inductor takes copies for needless, even of what is written over: a report on a parameter would show the new one.
    true = vector[0] == vector[0]
    results = [
        torch.where(true, one, torch.zeros_like(one)) if isinstance(one, Tensor) else one.tensor
        for one in reported.values()
    ]
    decision = [healthy] if isinstance(healthy, Tensor) else []
    kinds = {name: Tensor if isinstance(one, Tensor) else type(one) for name, one in reported.items()}
    numbers = {name: None if name in reported else value for name, value in metrics.items()}
    return results + decision, {"metrics": numbers, "kinds": kinds, "decides": bool(decision)}


def _write(old: list[Any], new: tuple[Any, ...], healthy: bool | Tensor, idle: set[str]) -> None:
    """Write the new value of every tensor of the state over the old one, where the step is healthy."""
    before, after = [dict(tree.named_leaves(dict(zip(FIELDS, trees, strict=True)))) for trees in (old, new)]
    if before.keys() != after.keys():
        raise Unsettled
    stay = {f"params.{name}" for name in idle} if healthy is not False else before.keys()
    written: list[tuple[Tensor, Tensor]] = []
    for path, was in before.items():
        value = after[path]
        if not (isinstance(was, Tensor) and isinstance(value, Tensor)):
            if value is not was and value != was:
                raise Untraceable(f"{path} is a number on the host that changes with every step; make it a tensor")
            continue
        if (value.shape, value.dtype) != (was.shape, was.dtype):
            raise Untraceable(f"{path} goes from {was.dtype} {tuple(was.shape)} to {value.dtype} {tuple(value.shape)}")
        if path not in stay:
            written.append((was, torch.where(healthy, value, was) if isinstance(healthy, Tensor) else value))
    for was, value in written:  # last: until here everything reads the old ones
        was.copy_(value)


def _place(body: Body, params: dict[str, nn.Parameter], buffers: dict[str, Tensor]) -> None:
    """Put traced tensors into the module's slots; writing `param.data`, as an eager step does, can't be traced."""
    mine = {id(param): params[name] for name, param in body.slots.params.items()}
    for module in body.settings.model.modules():
        for key, param in list(module._parameters.items()):
            if param is not None:
                setattr(module, key, mine[id(param)])  # by setattr: an LSTM keeps a list of its weights
    for name, owner, key in body.slots.places:
        if (buffer := owner[key]) is not None:
            owner[key] = buffers[name] if name is not None else buffer.clone()


def _assigned(slots: Slots, lent: dict[str, Tensor]) -> dict[str, Tensor]:
    """The persistent buffers after the forward: those lent and written to, or what was assigned in their place."""
    buffers = dict(lent)
    for name, owner, key in slots.places:
        value = owner[key]
        if name is not None and (value is None) == (name in lent):
            raise Untraceable(f"buffer {name!r} turns from a tensor to None or back in a step")
        if name is not None and value is not None and value is not lent[name]:
            buffers[name] = value.detach()
    return buffers


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put back every slot and attribute of the module's parts, whatever a traced forward left in them."""
    before = [(one, dict(one.__dict__), dict(one._parameters), dict(one._buffers)) for one in model.modules()]
    try:
        yield
        changed = [
            f"{type(module).__name__}.{name}"
            for module, attributes, _, _ in before
            for name, value in module.__dict__.items()
            if not name.startswith("_flat_weight") and attributes.get(name, _ABSENT) is not value
        ]
        if changed:
            raise Untraceable(f"the forward sets {', '.join(changed[:3])}, which a program would not")
    finally:
        for module, attributes, params, buffers in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for slots, contents in ((module._parameters, params), (module._buffers, buffers)):
                slots.clear()
                slots.update(cast("Any", contents))
            for key, param in params.items():
                if param is not None:
                    setattr(module, key, param)  # last: an LSTM has a list of its weights again


@contextmanager
def _compiling() -> Iterator[None]:
    """Let torch's optimizers, and `fntrain.steps.grads`, take it that no value can be read on the host."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


class _RefuseWrites(TorchFunctionMode):
    """Refuse what writes to a tensor of the closure: tracing and trying out would write to it too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        if writes and args and type(args[0]) is Tensor and not isinstance(args[0], FakeTensor):
            raise Untraceable(
                f"it writes ({name}) to a tensor of shape {tuple(args[0].shape)} that is not the module's own"
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def _rng_states_read() -> Iterator[list[bool]]:
    """Give a list that is empty until somebody asks for the state of torch's generator."""
    read: list[bool] = []
    original = torch.get_rng_state

    def noted() -> Tensor:
        read.append(True)
        return original()

    torch.get_rng_state = noted
    try:
        yield read
    finally:
        torch.get_rng_state = original


def _lift_constants(graph: GraphModule, slots: Slots) -> list[Tensor]:
    """Make what the graph holds inputs of it, so that tensors changed in place outside are read anew."""
    own = storages([slots.params, slots.buffers])
    constants: dict[str, Tensor] = {}
    nodes: dict[str, Any] = {}
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        value = getattr(graph, node.target)
        if not isinstance(value, Tensor):
            continue
        if value.requires_grad or (value.numel() and value.untyped_storage().data_ptr() in own):
            raise Untraceable(
                f"the loss reaches a tensor of shape {tuple(value.shape)} that asks for a gradient, but not by the "
                "module's own attribute (kept in a list or a closure, or of another model)"
            )
        if node.target not in constants:
            constants[node.target] = value
            with graph.graph.inserting_before(first):
                nodes[node.target] = graph.graph.placeholder(node.target)
            nodes[node.target].meta = node.meta
        node.replace_all_uses_with(nodes[node.target])
        graph.graph.erase_node(node)
    graph.recompile()
    return list(constants.values())


def reason(error: Exception) -> str:
    """Return why a trace failed, as a clause."""
    if isinstance(error, GuardOnDataDependentSymNode | DataDependentOutputException):
        every = traceback.extract_tb(error.__traceback__)
        frames = [frame for frame in every if not _INNER.search(frame.filename)] or every
        place = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
        return f"it decides by the value of a tensor (if, .item(), min) at {place}"
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, Untraceable) else f"{type(error).__name__}: {line:.200}"
