"""evaluation: a function of the state that measures it on data and leaves no trace."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain, count, islice, repeat
from typing import Any

import attrs
import torch
from toolz import merge, merge_with, valmap
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fntrain import events
from fntrain.core.ranks import Ranks
from fntrain.core.rng import preserved_generators, seed_generators
from fntrain.core.state import TrainState
from fntrain.steps.batch import Batch, move_batch, num_samples
from fntrain.steps.loss import Weighted
from fntrain.steps.module import bound

MetricsFn = Callable[[nn.Module, Batch], Mapping[str, Any]]
Metrics = dict[str, tuple[Any, Any]]  # name -> sum over the samples of a batch, and weight
UNCOUNTED = -1  # number of a batch that another rank has counted
# Keep the draws of an evaluation, and of its reading, apart from those of the training step of the same number.
_USE, _READ = 0x6576616C, 0x65726561


@attrs.frozen(kw_only=True)
class Evaluation:
    """A function state -> {name: float}; made by `evaluation`."""

    model: nn.Module = attrs.field(repr=lambda model: type(model).__name__)
    fn: MetricsFn = attrs.field(repr=lambda fn: getattr(fn, "__qualname__", repr(fn)))
    data: Iterable[Batch] = attrs.field(repr=lambda data: f"<{type(data).__name__}>")
    own: bool = attrs.field(default=False, repr=False)  # whether the loader was made here, and reads in order

    def __call__(self, state: TrainState) -> dict[str, float]:
        ranks = state.run.ranks
        with preserved_generators(), bound(self.model, state), _eval_mode(self.model), torch.no_grad():
            found = dict(self._measured(state))
        found.pop(UNCOUNTED, None)
        if ranks.world_size > 1:
            found = merge(*ranks.gather(_on_host(found)))
        # In the order of the data, so that the bits of a sum do not depend on the number of ranks.
        parts = merge_with(list, *(found[number] for number in sorted(found)))
        if not parts:
            raise ValueError("evaluation: the data gave no batch, or fn no metric")
        means: dict[str, float] = valmap(_mean, parts)
        return means

    def _measured(self, state: TrainState) -> Iterator[tuple[int, Metrics]]:
        """Yield the number of each batch of this rank, with the sum and the weight of every metric."""
        device = next(iter(state.params.values())).device
        for number, batch in alongside(self._share(state), self.data, state.run.ranks):
            seed_generators(state.seed, state.step, _USE, max(number, 0))
            batch = batch if device.type == "cpu" else move_batch(batch, device)
            with events.collecting():  # what the model reports while evaluating belongs to no step
                results = self.fn(self.model, batch)
            if not isinstance(results, Mapping):
                raise TypeError(f"evaluation: fn returned {type(results).__name__}, expected a dict of metrics")
            yield number, {name: _sum_and_weight(name, value, batch) for name, value in flattened(results).items()}

    def _share(self, state: TrainState) -> Iterator[tuple[int, Batch]]:
        """The batches of this rank with their numbers: whole ones, the same as for one process."""
        ranks = state.run.ranks
        if isinstance(self.data, DataLoader) and self.own and ranks.world_size > 1:
            loader = self.data
            numbers = range(ranks.rank, len(loader), ranks.world_size)
            size, length = loader.batch_size or 1, len(loader.dataset)  # type: ignore[arg-type]
            spans: Any = (list(range(number * size, min((number + 1) * size, length))) for number in numbers)
            loader = DataLoader(loader.dataset, batch_sampler=spans, num_workers=loader.num_workers)
            return _read(loader, numbers, state)
        return islice(_read(self.data, count(), state), ranks.rank, None, ranks.world_size)


def alongside(
    share: Iterable[tuple[int, Batch]], data: Iterable[Batch], ranks: Ranks, *, sharded: bool = False
) -> Iterator[tuple[int, Batch]]:
    """Yield a rank's numbered batches; where forwards need all ranks, some batch again while others have more.

    They do if ranks hold parts, or if `sharded` says so.

    Example:
      >>> list(alongside([(0, "a"), (1, "b")], ["a", "b"], Ranks()))
      [(0, 'a'), (1, 'b')]
    """
    if not (ranks.sharded or (sharded and ranks.world_size > 1)):
        yield from share
        return
    for one in chain(share, repeat(None)):
        if not ranks.max(one is not None):
            return
        yield one or (UNCOUNTED, next(iter(data)))


def evaluation(
    model: nn.Module, fn: MetricsFn, data: Any, *, batch_size: int = 256, num_workers: int = 0
) -> Evaluation:
    """Make a function of the state that evaluates it: mean of `fn` over the samples of `data`.

    It moves batches to the state's device, binds the state's tensors to the module, sets eval mode without gradients,
    and puts buffers, the train/eval flag of every sub-module, and the generators back. Several ranks share the batches
    of the data, each once, and have bit for bit the result of one process; of a loader of your own each reads all. All
    ranks of the run that the state is of must call it. What is drawn, for reading too, is a function of the state and
    the number of the batch. A hand-written evaluation must bind the state itself, with `ft.bound(model, state)`: the
    model alone has its first weights when the step is pure.

    Args:
      model: the module of the step.
      fn: (model, batch) -> dict (nested names join with "/") of means over the batch, which are weighted by its
        samples, or of `ft.weighted(sum, weight)`. Values stay on their device until the end.
      data: a map-style data set (also a list or tensor of samples), read in order; or a DataLoader or other
        re-iterable of batches.
      batch_size, num_workers: how a data set is read.
    Raises:
      TypeError: the data can be read only once, or (when called) fn returns no dict.
      ValueError: (when called) the data is empty, or a result is no number.
    Example:
      >>> model = torch.nn.Linear(1, 1)
      >>> error = lambda model, batch: {"mse": model(batch).square().mean()}
      >>> test = evaluation(model, error, torch.zeros(5, 1), batch_size=2)
      >>> sorted(test(ft.init_state(model, ft.optimizer(torch.optim.SGD, lr=0.1))))
      ['mse']
    """
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, DataLoader):
        loader: Any = DataLoader(data, batch_size=batch_size, num_workers=num_workers)
        return Evaluation(model=model, fn=fn, data=loader, own=True)
    if isinstance(data, Iterator) or not hasattr(data, "__iter__"):
        raise TypeError(
            f"data: got {type(data).__name__}, expected a data set or a re-iterable of batches (it is read many times)"
        )
    return Evaluation(model=model, fn=fn, data=data)


def _read(batches: Iterable[Batch], numbers: Iterable[int], state: TrainState) -> Iterator[tuple[int, Batch]]:
    """Batches with their numbers; what is drawn for order and samples is alike whoever reads them."""
    seed_generators(state.seed, state.step, _READ)
    iterator = iter(batches)
    for number in numbers:
        seed_generators(state.seed, state.step, _READ, number)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        yield number, batch


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards the flag of every sub-module as it was (frozen ones stay frozen)."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:  # not model.eval(): what a module overrides there would not be undone
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def flattened(results: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested results by the names of all levels, joined with "/".

    Example:
      >>> flattened({"box": {"ap": 0.5, "by_size": {"small": 0.25}}})
      {'box/ap': 0.5, 'box/by_size/small': 0.25}

    Source: detectron2's flatten_results_dict
    """
    nested = (
        flattened(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        for name, value in results.items()
    )
    flat: dict[str, Any] = merge({}, *nested)
    return flat


def _sum_and_weight(name: str, value: Any, batch: Batch) -> tuple[Any, Any]:
    weighs = isinstance(value, Weighted)
    number, weight = (value.loss_sum, value.weight) if weighs else (value, num_samples(batch))
    if isinstance(number, Mapping) or (isinstance(number, Tensor) and number.numel() != 1):
        raise ValueError(f"evaluation: {name!r} is {number!r:.80}, expected a number")
    number, weight = (  # sums of many batches: not in the model's precision
        one.detach().reshape(()).double() if isinstance(one, Tensor) else one for one in (number, weight)
    )
    return (number, weight) if weighs else (number * weight, weight)


def _on_host(found: dict[int, Metrics]) -> dict[int, Metrics]:
    """Sums and weights as numbers, for the other ranks, by one transfer."""
    waiting = [one for parts in found.values() for part in parts.values() for one in part if isinstance(one, Tensor)]
    numbers = iter(torch.stack([one.to(waiting[0].device) for one in waiting]).tolist() if waiting else [])

    def on_host(part: tuple[Any, Any]) -> tuple[Any, Any]:
        number, weight = (next(numbers) if isinstance(one, Tensor) else one for one in part)
        return number, weight

    numbered: dict[int, Metrics] = valmap(partial(valmap, on_host), found)
    return numbered


def _mean(parts: list[tuple[Any, Any]]) -> float:
    total, weight = (sum((part[i] for part in parts[1:]), start=parts[0][i]) for i in (0, 1))
    return float(total) / float(weight) if float(weight) else float("nan")
