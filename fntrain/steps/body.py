"""The body of a step: forward, backward and decision, on whatever memory the slots of its module hold.

Every form of a step runs this one body: the pure step on fresh copies that are lent to the slots, a step in place on
the module's own tensors, a compiled one on the tensors of a trace.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, pairwise
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from fntrain import events
from fntrain.core.rng import other_states, seed_generators
from fntrain.core.state import TrainState
from fntrain.events import Collector
from fntrain.steps import decision, grads, precision, report
from fntrain.steps.batch import Batch, split_batch
from fntrain.steps.exchange import Alone, Exchange, Totals
from fntrain.steps.loss import Objective, objective
from fntrain.steps.module import Slots
from fntrain.steps.rates import Rates
from fntrain.steps.settings import Settings
from fntrain.steps.update import BoundOptimizer

CHECK_EVERY = 100  # steps after which a layer that was put into the model later is noticed
_LAST: Any = object()


@attrs.frozen(eq=False)
class Gradients:
    """What forward and backward of a step come to, before anything is updated."""

    leaves: dict[str, Tensor]  # the parameters to update, gradients in `.grad`, clipped if healthy
    healthy: bool | Tensor  # whether to update; a tensor where the host would have to wait
    changes: dict[str, Any]  # fields of the next state that hold whether it updates or not: metrics, extra


@attrs.frozen(eq=False)
class Body:
    """The working parts of a step, made once from its settings.

    Args:
      slots: where the module keeps the tensors that the step works on.
      bound: the optimizer, its groups resolved for these parameters.
      exchange: what the step asks of other ranks.
      registered: the parameters that the module shows; others than those in the slots if ranks hold parts of them.
    """

    settings: Settings
    slots: Slots
    bound: BoundOptimizer
    exchange: Exchange
    registered: Mapping[str, nn.Parameter]

    @classmethod
    def of(cls, settings: Settings) -> "Body":
        """Make the body of a step that trains alone.

        Raises:
          ValueError, TypeError: the model has no parameters or such that a state can't hold; a group of the optimizer
            selects none of them.
        """
        slots = Slots.of(settings.model)
        slots.check_memory()
        bound = settings.optimizer.bind({name: param.detach() for name, param in slots.params.items()})
        bound.template.state.clear()  # what Adagrad and others make at once is of use to `Optimizer.init` only
        for group in bound.template.param_groups:
            group["params"] = []  # a model that is moved must leave no memory behind; the options are what it is for
        return cls(settings, slots, bound, Alone(settings.loss_fn), slots.params)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.slots.params.values())).device

    def check_now_and_then(self, state: TrainState) -> None:
        """Check the model at the first update and at every 100th step, since that walks over all of it."""
        if state.step % CHECK_EVERY == 0 or not self.bound.seen:
            self.check_model()

    def check_model(self) -> None:
        """Raise ValueError if a layer was put in after the step was made: it would never be trained."""
        now, known = Slots.of(self.settings.model).params, self.registered
        if now.keys() != known.keys() or any(now[name] is not known[name] for name in now):
            raise ValueError(
                f"model: {type(self.settings.model).__name__} has other parameters than when the step was made; call "
                "supervised_step after the model is complete"
            )

    def rates(self, state: TrainState) -> Rates:
        """Return the learning rates and scheduled options of the step that starts at a state."""
        return self.bound.schedules.of(state)

    def seed(self, state: TrainState) -> None:
        """Seed the default generators for the step that starts at a state."""
        seed_generators(state.seed, state.step, self.exchange.ranks.rank, others=self.settings.seeds == "all")

    def gradients(self, state: TrainState, batch: Batch, rates: Rates) -> Gradients:
        """Run forward and backward, and decide whether to update; nothing but gradients and buffers is written to."""
        draws = None if self.bound.seen or self.settings.seeds == "all" else other_states()
        now = precision.loss_scale(state.extra, self.device) if self.settings.precision == "fp16" else None
        scale = None if now is None else now["scale"]
        parts, collected, totals = self._backward(batch, scale)
        if draws is not None:
            _warn_of_draws(draws, other_states())
        leaves = self._reduced(totals, scale)
        metrics = report.metrics(parts, collected, totals, alone=self.exchange.ranks.world_size == 1)
        self.exchange.broadcast_buffers(self.slots)
        norm = decision.norm(self.settings, self.exchange, leaves)
        healthy = decision.healthy(self.settings, metrics["loss"], norm, totals)
        if healthy is False:
            decision.check(self.settings, state.step + 1, metrics["loss"], totals, self.slots.params)
        else:
            decision.clip(self.settings, leaves, norm)
        looked = self.settings.on_nonfinite != "allow" or healthy is False
        report.add_update(metrics, rates.lr, norm, healthy if looked else None)
        changes: dict[str, Any] = {"metrics": metrics}
        if now is not None:
            metrics[report.SCALE] = scale
            changes["extra"] = {**state.extra, precision.LOSS_SCALE: precision.next_loss_scale(now, healthy)}
        return Gradients(leaves, healthy, changes)

    def _backward(self, batch: Batch, scale: Tensor | None) -> tuple[list[Objective], list[Collector], Totals]:
        if self.settings.precision != "tf32":
            return self._micro_steps(batch, scale)
        with precision.tf32(self.device):
            return self._micro_steps(batch, scale)

    def _micro_steps(self, batch: Batch, scale: Tensor | None) -> tuple[list[Objective], list[Collector], Totals]:
        """Run forward and backward of every micro-batch; gradients add up in `.grad`, over ranks in the last one."""
        parts: list[Objective] = []
        collected: list[Collector] = []
        totals: Callable[[], Totals] | None = None
        device, weights = self.device, self.settings.weights
        denominators = None if weights is None else self.exchange.sums(weights(batch), device)
        for (micro_batch, counts), following in self._micro_batches(batch):
            last = following is _LAST  # ranks add their gradients up in the last backward
            with events.collecting() as collector:
                output = self._forward(micro_batch, last, device)
            only = last and not parts and self.exchange.ranks.world_size == 1
            part = objective(output, micro_batch, alone=only, denominators=denominators)
            if not counts:
                grads.backward(part.total * 0)
                continue
            parts.append(part.detached())
            collected.append(collector)
            if last:
                totals = self.exchange.totals(parts, device)
            grads.backward(part.total if scale is None else part.total * scale)
        if totals is None:
            raise ValueError("split: returned no micro-batch, expected at least one")
        return parts, collected, totals()

    def _micro_batches(self, batch: Batch) -> Iterable[tuple[tuple[Batch, bool], Any]]:
        """Each micro-batch, whether it counts, and what follows: read one ahead, as the last one must be known."""
        if self.settings.accumulate == 1:
            return (((batch, True), _LAST),)
        parts = (self.settings.split or split_batch)(batch, self.settings.accumulate)
        return pairwise(chain(self.exchange.padded(parts), [_LAST]))

    def _forward(self, batch: Batch, last: bool, device: torch.device) -> Any:
        if self.settings.precision in ("fp32", "tf32"):
            return self.exchange.forward(self.settings.model, batch, last)
        # Entered per micro-batch: autocast's cache of cast weights must not outlive an update.
        with precision.autocast(self.settings.precision, device):
            return self.exchange.forward(self.settings.model, batch, last)

    def _reduced(self, totals: Totals, scale: Tensor | None) -> dict[str, Tensor]:
        """The parameters that got a gradient, loss scale and weights divided out, after `transform_grads`."""
        leaves: dict[str, Tensor] = {name: p for name, p in self.slots.params.items() if p.grad is not None}
        if not leaves:
            raise ValueError("loss_fn: no parameter got a gradient; the loss does not depend on the model")
        if scale is not None:
            precision.unscale_(grads.of(leaves), scale)
        if totals.divisor is not None:
            torch._foreach_div_(grads.of(leaves), totals.divisor)
        transform = self.settings.transform_grads
        return leaves if transform is None else grads.transformed(transform, leaves)


def _warn_of_draws(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    drawn = [name for name, was, now in zip(("random", "numpy.random"), before, after, strict=True) if was != now]
    if drawn:
        warnings.warn(
            f"loss_fn: draws from {' and '.join(drawn)}, which the step does not seed, so a resumed run would differ; "
            "draw from torch, or pass seeds='all' to the step",
            stacklevel=4,
        )
