"""hooks.precise_bn: population statistics in BatchNorm's buffers, instead of a moving average of batches."""

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from itertools import islice
from typing import Any

import attrs
import torch
from toolz import merge_with
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from fntrain import events
from fntrain.core import gates, tree
from fntrain.core.check import whole
from fntrain.core.hook import AnyHook, hook
from fntrain.core.rng import preserved_generators, seed_generators
from fntrain.core.state import TrainState
from fntrain.evaluation import UNCOUNTED, alongside
from fntrain.steps.batch import Batch, move_batch
from fntrain.steps.module import bound

Moments = tuple[int, Tensor, Tensor]  # count, mean and sum of squared differences from it, by channel
_USE = 0x707265_626E  # part of the seed, so that these forwards do not draw what the step draws


@attrs.frozen
class PreciseBN:
    """The callback: measures mean and variance of what the layers are given, and returns a state with them."""

    model: nn.Module = attrs.field(repr=lambda model: type(model).__name__)
    data: Iterable[Batch] = attrs.field(repr=lambda data: f"<{type(data).__name__}>")
    num_batches: int
    forward: Callable[[nn.Module, Batch], Any]

    def __call__(self, state: TrainState) -> TrainState | None:
        layers, ranks = self._layers(state), state.run.ranks
        if not layers:
            return None  # all layers are in eval mode
        given, found = self._measured(state, layers.values())
        measured = {name: found[module] for name, module in layers.items() if module in found}
        if ranks.world_size > 1:
            mine = {name: tree.map_tensors(Tensor.cpu, parts) for name, parts in measured.items()}
            measured = merge_with(partial(reduce, _merged), *ranks.gather(mine))
            given = ranks.max(given)
        if not given:
            raise ValueError("precise_bn: the data gave no batch")
        buffers = dict(state.buffers)
        for name, (count, mean, squares) in measured.items():  # without layers that no forward has reached
            variance = name.removesuffix("mean") + "var"
            buffers[name] = mean.to(buffers[name])
            buffers[variance] = (squares / max(count - 1, 1)).to(buffers[variance])
        return state.replace(buffers=buffers)

    def _layers(self, state: TrainState) -> dict[str, nn.Module]:
        """Return the layers that are in training mode, by the names of their means in the state."""
        modules = {f"{name}.running_mean".lstrip("."): module for name, module in self.model.named_modules()}
        return {
            name: one
            for name, one in modules.items()
            if _has_statistics(one) and one.training and name in state.buffers
        }

    def _measured(self, state: TrainState, layers: Iterable[nn.Module]) -> tuple[int, dict[nn.Module, Moments]]:
        """Return how many batches this rank has read, and the moments of each layer's inputs in them."""
        device, ranks = next(iter(state.params.values())).device, state.run.ranks
        # Ranks that share statistics need each other in every forward: one without a batch runs along, uncounted.
        syncs = any(isinstance(one, nn.SyncBatchNorm) and one.training for one in self.model.modules())
        given, counted = 0, {}
        with preserved_generators(), bound(self.model, state), torch.no_grad(), events.collecting():
            seed_generators(state.seed, state.step, _USE)
            share = islice(enumerate(self.data), ranks.rank, self.num_batches, ranks.world_size)  # a loader draws here
            with _measuring(layers) as found:
                for number, batch in alongside(share, self.data, ranks, sharded=syncs):
                    seed_generators(state.seed, state.step, _USE, max(number, 0))
                    self.forward(self.model, move_batch(batch, device))
                    if number != UNCOUNTED:
                        given, counted = given + 1, dict(found)
        return given, counted


def precise_bn(
    model: nn.Module,
    data: Any,
    *,
    every: int,
    num_batches: int = 200,
    batch_size: int = 64,
    forward: Callable[[nn.Module, Batch], Any] | None = None,
    name: str = "precise_bn",
) -> AnyHook:
    """Put mean and variance over many batches into BatchNorm's buffers, every n steps and after the last one.

    The layers' moving averages follow weights that have changed since, and weigh the last batches most. Here the
    weights stand still, and every element of every batch counts the same, in float64; the variance is the unbiased
    one, as in training. Layers that are in eval mode are left alone, and so are generators. List it before `evaluate`.
    Several ranks share the batches and merge what they measured, in one order: their buffers are equal.
    A run that was stopped between two measurements goes on, when resumed, with the buffers measured where it stopped:
    what it evaluates until the next one is not bitwise that of a run never stopped, nor what hooks make of that.

    Args:
      model: the module of the step.
      data: training samples, from which nothing else reads at that time: a map-style data set, read in order, or a
        re-iterable of batches.
      every: number of steps between two.
      num_batches: how many to read at most.
      batch_size: how a data set is read; as in training, for deeper layers see normalised batches.
      forward: (model, batch) -> anything; the step's loss function will do. `model(batch)` by default.
      name: unique in a run.
    Raises:
      TypeError: the data can be read only once.
      ValueError: the model has no BatchNorm with running statistics, a number is not positive, or (in the run) the data
        is empty.
    Example:
      >>> model = nn.BatchNorm1d(1)
      >>> samples = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
      >>> optimizer = ft.optimizer(torch.optim.SGD, lr=0.0)
      >>> step_fn = ft.supervised_step(model, lambda model, batch: model(batch).square().mean(), optimizer)
      >>> final = ft.fit(step_fn, [precise_bn(model, samples, every=5, batch_size=2)],
      ...                state=ft.init_state(model, optimizer), data=[samples], max_steps=1)
      >>> final.buffers["running_mean"], final.buffers["running_var"]
      (tensor([3.]), tensor([4.6667]))

    Source: detectron2's PreciseBN; Wu and Johnson, Rethinking "Batch" in BatchNorm, https://arxiv.org/abs/2105.07576
    """
    if not any(map(_has_statistics, model.modules())):
        raise ValueError(f"model: {type(model).__name__} has no BatchNorm with running statistics; leave the hook out")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, DataLoader):
        data = DataLoader(data, batch_size=whole("batch_size", batch_size, 1))
    elif isinstance(data, Iterator) or not hasattr(data, "__iter__"):
        expected = "a data set or a re-iterable of batches (it is read many times)"
        raise TypeError(f"data: got {type(data).__name__}, expected {expected}")
    record = PreciseBN(model, data, whole("num_batches", num_batches, 1), forward or operator.call)
    return gates.at_end(gates.every(every, hook(after_step=record, name=name, communicates=True, stops=False)))


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


@contextmanager
def _measuring(layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Moments]]:
    """Measure the inputs of each layer in float64, while the block runs."""
    found: dict[nn.Module, Moments] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].detach().double().transpose(0, 1).flatten(1)
        new = (values.shape[1], values.mean(1), values.var(1, correction=0) * values.shape[1])
        found[module] = _merged(found[module], new) if module in found else new

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(look).remove)
        yield found


def _merged(a: Moments, b: Moments) -> Moments:
    """Merge the moments of two parts, by Chan's formula, which does not cancel as sums of squares do."""
    count, delta = a[0] + b[0], b[1] - a[1]
    return count, a[1] + delta * (b[0] / count), a[2] + b[2] + delta.square() * (a[0] * b[0] / count)
