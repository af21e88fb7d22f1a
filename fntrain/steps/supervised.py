"""supervised_step: the step function most jobs need, as a frozen callable record.

One body does the work: seed, forward and backward of each micro-batch, decide whether the result is finite, clip,
update. The pure step is that body on fresh copies of the state's leaves, lent to the module's slots for the call.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from itertools import chain, pairwise
from operator import add
from types import MappingProxyType
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from fntrain import events
from fntrain.core import tree
from fntrain.core.check import whole
from fntrain.core.errors import NonFiniteError
from fntrain.core.metrics import WEIGHT
from fntrain.core.ranks import ALONE, Ranks
from fntrain.core.rng import other_states, seed_generators
from fntrain.core.state import TrainState
from fntrain.events import Collector, MetricName, Reduce, Scalar
from fntrain.steps import grads
from fntrain.steps.batch import Batch, split_batch
from fntrain.steps.exchange import Exchange, Sums
from fntrain.steps.loss import Loss, Objective, Weighted, WeightsFn, objective
from fntrain.steps.module import Slots
from fntrain.steps.optim import BoundOptimizer, Optimizer, lr_scale
from fntrain.steps.precision import (
    LOSS_SCALE,
    PRECISIONS,
    Precision,
    autocast,
    loss_scale,
    next_loss_scale,
    tf32,
    unscale_,
)

LossFn = Callable[[nn.Module, Batch], Loss | Weighted]
TransformGrads = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
LR = MetricName("lr", reduce="same", smooth="latest")
LOSS, GRAD_NORM = MetricName("loss", reduce="same"), MetricName("grad_norm", reduce="same")
SKIPPED = MetricName("skipped_steps", reduce="same", smooth="sum")
SCALE = MetricName("loss_scale", reduce="same", smooth="latest")
_RESERVED = frozenset({LOSS, LR, GRAD_NORM, SKIPPED, SCALE, WEIGHT, "step"})
_LAST: Any = object()
CHECK_EVERY = 100  # steps after which a layer put into the model later is noticed


@attrs.frozen(eq=False)
class Work:
    """What forward and backward of a step come to, before anything is updated."""

    leaves: dict[str, Tensor]  # the parameters to update, gradients in `.grad`, clipped if healthy
    healthy: bool | Tensor  # whether to update; a tensor where the host would have to wait
    changes: dict[str, Any]  # fields of the next state that hold whether it updates or not: metrics, extra


@attrs.frozen(eq=False)
class SupervisedStep:
    """A pure step function from a model, a loss and an optimizer: `ft.supervised_step` is its name in use.

    The model's train/eval flags are taken as they are. torch's default generators are seeded from (seed, step, rank).
    Reports `loss`, each term of a dict of losses, `lr`, `grad_norm` and `skipped_steps` in `state.metrics`. A skipped
    update counts as a step: schedules go on with `state.step`, the optimizer's own count stays behind.

    Args:
      model: its parameters and persistent buffers are lent the state's tensors for each call. A parameter that shares
        memory with another tensor, and a sparse persistent buffer, are refused.
      loss_fn: (model, batch) -> scalar tensor, dict of them (summed), or `ft.weighted(sum, weight)`.
      optimizer: from `ft.optimizer`.
      accumulate: number of micro-batches a batch is split into; exact for ragged ones, each weighs its samples.
      clip_grad_norm: largest global 2-norm of the gradients; not together with `clip_grad_value`.
      clip_grad_value: largest absolute value of a gradient element.
      precision: "bf16" and "fp16" run model and loss under autocast; fp16 scales the loss by `state.extra`'s
        `loss_scale`, halved when gradients overflow (a skipped step), doubled after 2000 good steps. "tf32" lets
        float32 products on an NVIDIA GPU round their factors. "fp32" leaves torch's switches as they are.
      on_nonfinite: "skip" keeps everything but the counters if loss or gradients are inf or nan; "raise" raises
        NonFiniteError with the names; "allow" does not look (saves the norm when not clipping).
      transform_grads: pure function of the gradients by name, before clipping; names left out are not updated.
      weights: batch -> {term: denominator}, for a dict of loss *sums* with denominators of their own.
      seeds: "all" seeds Python's and NumPy's default generators too, for a loss that draws from them (20 us); a first
        step that does without is warned of.
      split: (batch, num) -> micro-batches, for batches that `ft.split_batch` can't split.
      rank, exchange: of several processes, set by `ft.shell.distribute`.
    Raises:
      ValueError, TypeError: an argument out of range or of the wrong kind; what the loss or the batch lacks.
    Example:
      >>> import fntrain as ft
      >>> model = nn.Linear(2, 1)
      >>> sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
      >>> step_fn = supervised_step(model, lambda model, batch: model(batch).square().mean(), sgd)
      >>> state = step_fn(ft.init_state(model, sgd), torch.ones(4, 2))
      >>> state.step, sorted(state.metrics)
      (1, ['grad_norm', 'loss', 'lr', 'skipped_steps'])
    """

    model: nn.Module = attrs.field(repr=lambda model: type(model).__name__)
    loss_fn: LossFn = attrs.field(repr=lambda fn: getattr(fn, "__qualname__", repr(fn)))
    optimizer: Optimizer
    accumulate: int = attrs.field(default=1, kw_only=True)
    clip_grad_norm: float | None = attrs.field(default=None, kw_only=True)
    clip_grad_value: float | None = attrs.field(default=None, kw_only=True)
    precision: Precision = attrs.field(default="fp32", kw_only=True)
    on_nonfinite: Literal["skip", "raise", "allow"] = attrs.field(default="skip", kw_only=True)
    transform_grads: TransformGrads | None = attrs.field(default=None, kw_only=True)
    weights: WeightsFn | None = attrs.field(default=None, kw_only=True)
    split: Callable[[Batch, int], Iterable[Batch]] | None = attrs.field(default=None, kw_only=True)
    seeds: Literal["torch", "all"] = attrs.field(default="torch", kw_only=True)
    rank: int = attrs.field(default=0, kw_only=True)
    exchange: Exchange | None = attrs.field(default=None, kw_only=True, repr=False)
    slots: Slots = attrs.field(init=False, repr=False)
    bound: BoundOptimizer = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "slots", Slots.of(self.model))
        self.slots.check_memory()
        detached = {name: param.detach() for name, param in self.slots.params.items()}
        object.__setattr__(self, "bound", self.optimizer.bind(detached))
        self.bound.template.state.clear()  # what Adagrad and others make at once is of use to init only
        for one in self.bound.template.param_groups:
            one["params"] = []  # options are what it is for; a model that is moved leaves no memory behind

    @property
    def ranks(self) -> Ranks:
        """The processes that do this step together."""
        return ALONE if self.exchange is None else self.exchange.ranks

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        if self.exchange is not None:
            raise TypeError("step_fn: the pure form of a distributed step would not synchronise; call the one in place")
        if state.step % CHECK_EVERY == 0 or not self.bound.seen:
            self.check_model()
        if state.params.keys() != self.slots.params.keys() or state.buffers.keys() != self.slots.buffer_names:
            self.slots.check(state)
        params, buffers = tree.clone((state.params, state.buffers))
        lease = self.slots.lend(params, buffers, self.bound.frozen)
        try:
            self.seed(state)
            work = self.work(state, batch)
            if work.healthy is False:
                return state.advance(**work.changes)
            opt_state = self.bound.apply_(
                self.slots.params, tree.clone(state.opt_state), state.step, lr_scale=lr_scale(state)
            )
            params, buffers = self.slots.written(lease, params, buffers)
        finally:
            self.slots.take_back(lease)
        if isinstance(work.healthy, Tensor):
            # On a GPU nobody waits for the decision: both outcomes are there, and the device chooses.
            old = {"params": state.params, "buffers": state.buffers, "opt_state": state.opt_state}
            new = {"params": params, "buffers": buffers, "opt_state": opt_state}
            if alike(new, old, work.healthy.device):
                params, buffers, opt_state = choose(work.healthy, new, old).values()
            elif not bool(work.healthy):
                # The update created state, or keeps some elsewhere (step counters on the host): this one waits.
                return state.advance(**work.changes)
        return state.advance(
            params=MappingProxyType(params),
            buffers=MappingProxyType(buffers),
            opt_state=MappingProxyType(opt_state),
            **work.changes,
        )

    def _check(self) -> None:
        optimizer: Any = self.optimizer
        if not isinstance(optimizer, Optimizer):
            got = type(optimizer).__name__
            raise TypeError(f"optimizer: got {got}, expected ft.optimizer(torch.optim.AdamW, lr=...)")
        whole("accumulate", self.accumulate, 1)
        for name in ("loss_fn", "transform_grads", "weights", "split"):
            fn = getattr(self, name)
            if not callable(fn) and (fn is not None or name == "loss_fn"):
                raise TypeError(f"{name}: got {type(fn).__name__}, expected a function")
        for name in ("clip_grad_norm", "clip_grad_value"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: got {value!r}, expected a number > 0 or None")
        if self.clip_grad_norm is not None and self.clip_grad_value is not None:
            raise ValueError("clip_grad_norm and clip_grad_value: got both, expected at most one")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, expected one of {PRECISIONS}")
        if self.on_nonfinite not in ("skip", "raise", "allow"):
            raise ValueError(f"on_nonfinite: got {self.on_nonfinite!r}, expected 'skip', 'raise' or 'allow'")
        if self.seeds not in ("torch", "all"):
            raise ValueError(f"seeds: got {self.seeds!r}, expected 'torch' or 'all'")
        if self.precision == "fp16" and self.on_nonfinite != "skip":
            raise ValueError(
                f"on_nonfinite: got {self.on_nonfinite!r} with precision 'fp16', expected 'skip': gradients that "
                "overflow are how the loss scale is found"
            )

    def check_model(self) -> None:
        """Raise ValueError if a layer was put in after the step was made: it would never be trained."""
        now, known = Slots.of(self.model).params, self.slots.params
        known = known if self.exchange is None else self.exchange.registered(known)
        if now.keys() != known.keys() or any(now[name] is not known[name] for name in now):
            raise ValueError(
                f"model: {type(self.model).__name__} has other parameters than when the step was made; call "
                "supervised_step after the model is complete"
            )

    def seed(self, state: TrainState) -> None:
        """Seed the default generators for this step."""
        seed_generators(state.seed, state.step, self.rank, others=self.seeds == "all")

    def work(self, state: TrainState, batch: Batch) -> Work:
        """Forward, backward and decision on whatever memory the slots hold; every form of the step begins with it."""
        device = next(iter(self.slots.params.values())).device
        watched = None if self.bound.seen or self.seeds == "all" else other_states()
        scale = loss_scale(state.extra, device) if self.precision == "fp16" else None
        if self.precision == "tf32":
            with tf32(device):
                parts, totals = self._backward(batch, device)
        else:
            parts, totals = self._backward(batch, device, None if scale is None else scale["scale"])
        if watched is not None:
            _warn_of_draws(watched, other_states())
        leaves = self._reduced_leaves(parts, None if scale is None else scale["scale"], totals)
        metrics = _report(parts, totals)
        if self.exchange is not None:
            self.exchange.share(list(self.slots.buffers.values()))
        metrics[LR] = self.lr(state)
        norm = self._norm(leaves)
        if norm is not None:
            metrics[GRAD_NORM] = norm
        counts = _sum([part.counts for part, _ in parts]) if totals is None else totals.counts
        healthy = self._healthy(state, metrics["loss"], norm, counts)
        if self.on_nonfinite != "allow" or healthy is False:
            metrics[SKIPPED] = (~healthy).float() if isinstance(healthy, Tensor) else float(not healthy)
        changes: dict[str, Any] = {"metrics": metrics}
        if scale is not None:
            metrics[SCALE] = scale["scale"]
            changes["extra"] = {**state.extra, LOSS_SCALE: next_loss_scale(scale, healthy)}
        if healthy is not False:
            self._clip(leaves, norm)
        return Work(leaves, healthy, changes)

    def _backward(
        self, batch: Batch, device: torch.device, scale: Tensor | None = None
    ) -> tuple[list[tuple[Objective, Collector]], "Totals | None"]:
        """Run forward and backward of every micro-batch, gradients adding up in `.grad`, over ranks in the last one."""
        exchange, totals = self.exchange, None
        denominators = None if self.weights is None else self.weights(batch)
        if exchange is not None and denominators is not None:
            sums = exchange.sums(list(denominators.values()), device)
            denominators = dict(zip(denominators, sums.wait(), strict=True))
        micro_batches = [batch] if self.accumulate == 1 else (self.split or split_batch)(batch, self.accumulate)
        parts: list[tuple[Objective, Collector]] = []
        fp32 = self.precision in ("fp32", "tf32")
        idle = 0  # micro-batches that only other ranks have
        if exchange is not None and self.accumulate > 1:
            micro_batches = list(micro_batches)
            idle = exchange.missing(len(micro_batches))
            micro_batches = micro_batches[:1] * idle + micro_batches
        for micro_batch, following in pairwise(chain(micro_batches, [_LAST])):  # one ahead: the last must know
            last = following is _LAST
            forward = self.loss_fn if exchange is None else partial(exchange.forward, last=last)
            with events.collecting() as collector:
                if fp32:
                    output = forward(self.model, micro_batch)
                else:
                    # Entered per micro-batch: autocast's cache of cast weights must not outlive an update.
                    with autocast(self.precision, device):
                        output = forward(self.model, micro_batch)
            alone = last and not parts and exchange is None
            part = objective(output, micro_batch, alone=alone, denominators=denominators)
            if idle:
                idle -= 1
                grads.backward(part.total * 0)
                continue
            parts.append((part.detached(), collector))
            if last and exchange is not None:
                totals = Totals.begun(exchange, [one for one, _ in parts], device)
            grads.backward(part.total if scale is None else part.total * scale)
        if exchange is not None and totals is not None:
            exchange.finish()
            totals.wait()
        if not parts:
            raise ValueError("split: returned no micro-batch, expected at least one")
        return parts, totals

    def _reduced_leaves(
        self,
        parts: list[tuple[Objective, Collector]],
        scale: Tensor | None = None,
        totals: "Totals | None" = None,
    ) -> dict[str, Tensor]:
        """The parameters that got a gradient, scale and weights divided out, after `transform_grads`."""
        leaves: dict[str, Tensor] = {name: p for name, p in self.slots.params.items() if p.grad is not None}
        if not leaves:
            raise ValueError("loss_fn: no parameter got a gradient; the loss does not depend on the model")
        if scale is not None:
            unscale_(_grads(leaves), scale)
        divisor = totals.divisor if totals is not None else _total_weight(parts) if parts[0][0].divide else None
        if divisor is not None:
            torch._foreach_div_(_grads(leaves), divisor)
        if self.transform_grads is None:
            return leaves
        before = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        after = self.transform_grads(MappingProxyType(before))
        if not isinstance(after, Mapping) or (after.keys() - before.keys()) or None in after.values():
            raise ValueError(f"transform_grads: got {after!r:.80}, expected a mapping of some of {sorted(before)}")
        for name, leaf in leaves.items():
            if name not in after or after[name] is not before[name]:
                # A copy: what the function returned may be anyone's memory, and clipping writes in place.
                leaf.grad = grads.own_layout(name, after[name], leaf, None) if name in after else None
        return {name: leaf for name, leaf in leaves.items() if name in after}

    def lr(self, state: TrainState) -> Any:
        """The learning rate that a step reports: the optimizer's own, before the factors of groups."""
        lr, scale = self.optimizer.lr, lr_scale(state)
        now = lr(state.step) if callable(lr) else lr
        return now if scale == 1.0 else now * scale

    def _norm(self, leaves: dict[str, Tensor]) -> float | Tensor | None:
        wanted = self.clip_grad_norm is not None or self.on_nonfinite != "allow"
        if not leaves or not wanted:
            return None
        norm = grads.global_norm(_grads(leaves))
        return norm if self.exchange is None else self.exchange.norm(norm)

    def _healthy(
        self, state: TrainState, loss: Tensor, norm: float | Tensor | None, counts: Tensor | float
    ) -> bool | Tensor:
        """Whether to update: loss and gradients finite, weight not 0; a tensor where the host would have to wait."""
        stalls = grads.stalls(loss) and self.on_nonfinite != "raise"
        weighs: bool | Tensor = counts != 0
        if isinstance(weighs, Tensor) and not stalls:
            weighs = bool(weighs)
        if self.on_nonfinite == "allow" or norm is None:
            return weighs
        if stalls:
            return torch.isfinite(torch.as_tensor(norm)) & torch.isfinite(loss) & weighs
        healthy = bool(weighs) and math.isfinite(norm) and math.isfinite(loss.item())
        if self.on_nonfinite == "raise" and weighs and not healthy:
            bad = [n for n, p in self.slots.params.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
            raise NonFiniteError(
                f"step {state.step + 1}: loss is {loss.item()}, gradients are not finite in {bad or 'no parameter'}; "
                "the state before this step is unchanged"
            )
        return healthy

    def _clip(self, leaves: dict[str, Tensor], norm: float | Tensor | None) -> None:
        if self.clip_grad_norm is not None and norm is not None:
            grads.clip_by_norm_(_grads(leaves), norm, self.clip_grad_norm)
        if self.clip_grad_value is not None:
            grads.clip_by_value_(_grads(leaves), self.clip_grad_value)


supervised_step = SupervisedStep


def _warn_of_draws(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    drawn = [name for name, was, now in zip(("random", "numpy.random"), before, after, strict=True) if was != now]
    if drawn:
        warnings.warn(
            f"loss_fn: draws from {' and '.join(drawn)}, which the step does not seed, so a resumed run would differ; "
            "draw from torch, or pass seeds='all' to the step",
            stacklevel=4,
        )


def _grads(leaves: dict[str, Tensor]) -> list[Any]:
    return [leaf.grad for leaf in leaves.values()]


def _sum(values: Sequence[Any]) -> Any:
    return reduce(add, values)  # not sum(): 0 + value is one operation more


def _total_weight(parts: list[tuple[Objective, Collector]]) -> Any:
    return _sum([part.weight for part, _ in parts])


@attrs.define(eq=False)
class Totals:
    """What the ranks' parts of a step add up to."""

    divide: bool
    sums: Sums
    loss: Scalar = attrs.field(init=False)  # divided like the gradients
    divisor: Scalar | None = attrs.field(init=False)  # of the gradients; None: they are as they should be
    counts: Scalar = attrs.field(init=False)  # is 0 if nothing counts

    @classmethod
    def begun(cls, exchange: Exchange, parts: list[Objective], device: torch.device) -> "Totals":
        """Begin to add up what the forwards gave."""
        divide = parts[0].divide
        mine = [_sum([getattr(part, name) for part in parts]) for name in ("total", "weight", "counts")]
        sums = exchange.totals(mine, device)
        exchange.divide((lambda: sums.wait()[1]) if divide else None)
        return cls(divide, sums)

    def wait(self) -> None:
        loss, weight, self.counts = self.sums.wait()
        divisor = weight if self.divide else self.sums.share
        self.loss = loss / divisor if isinstance(divisor, Tensor) or divisor else loss * math.inf
        self.divisor = None if self.sums.divided or (not self.divide and divisor == 1.0) else divisor


def _report(parts: list[tuple[Objective, Collector]], totals: Totals | None) -> dict[str, Any]:
    """Metrics of a step: what was reported inside, then the losses, divided like the gradients.

    Of several ranks the loss is that of all; the rest is this rank's, to be combined when it is written.
    """
    metrics = events.merge([(collector, part.weight) for part, collector in parts])
    terms = parts[0][0].terms
    if totals is None and len(parts) == 1 and not parts[0][0].divide and not metrics and len(terms) == 1:
        return {"loss": parts[0][0].total, **terms}  # what most steps have: no detour
    if metrics or len(terms) > 1:
        taken = (_RESERVED | terms.keys()) & metrics.keys() | (_RESERVED - {"loss"}) & terms.keys()
        if taken:
            raise ValueError(
                f"metrics: {sorted(taken)} are reported by the step or the loss; rename put_scalar or term"
            )
    divisor = _total_weight(parts) if parts[0][0].divide else None
    sums = {name: _sum([part.terms[name] for part, _ in parts]) for name in terms}
    if totals is None:
        sums = {"loss": _sum([part.total for part, _ in parts]), **sums}
    losses = sums if divisor is None else {name: value / divisor for name, value in sums.items()}
    if totals is None:
        return {**metrics, **losses}
    kind: Reduce = "mean" if parts[0][0].divide else "sum"  # terms with denominators of all ranks are parts of sums
    named: dict[str, Any] = {MetricName(name, kind): value for name, value in losses.items()}
    weight = float(_total_weight(parts)) if divisor is None or not isinstance(divisor, Tensor) else divisor
    named.pop(LOSS, None)  # the key stays that of the first writer
    total = parts[0][0].total
    loss = torch.as_tensor(totals.loss, dtype=total.dtype, device=total.device)
    return {LOSS: loss, **metrics, **named, WEIGHT: weight}


def alike(new: Any, old: Any, device: torch.device) -> bool:
    """Whether two trees have the same structure, all tensors, all on the device that chooses."""
    if isinstance(new, Tensor):
        return isinstance(old, Tensor) and new.device == device and (new.shape, new.dtype) == (old.shape, old.dtype)
    if isinstance(new, Mapping):
        return isinstance(old, Mapping) and new.keys() == old.keys() and all(alike(new[k], old[k], device) for k in new)
    return False


def choose(healthy: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return torch.where(healthy, new, old)
    return {key: choose(healthy, value, old[key]) for key, value in new.items()}
