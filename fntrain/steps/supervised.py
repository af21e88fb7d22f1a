"""supervised_step: the step function most jobs need, as plain settings with a pure call.

The body (`fntrain.steps.body`) does the work: seed, forward and backward of each micro-batch, decide whether the result
is finite, clip. The pure step runs it on fresh copies of the state's leaves, which it lends to the module's slots.
"""

from types import MappingProxyType
from typing import Any

import attrs
from torch import Tensor

from fntrain.core import tree
from fntrain.core.state import TrainState
from fntrain.steps.batch import Batch
from fntrain.steps.body import Body
from fntrain.steps.decision import choose
from fntrain.steps.settings import Settings, check


def _body(step: "SupervisedStep") -> Body:
    check(step)
    return Body.of(Settings(**{field.name: getattr(step, field.name) for field in attrs.fields(Settings)}))


@attrs.frozen(eq=False)
class SupervisedStep(Settings):
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
    Raises:
      ValueError, TypeError: an argument out of range or of the wrong kind; what the loss or the batch lacks.
    Example:
      >>> import fntrain as ft
      >>> model = torch.nn.Linear(2, 1)
      >>> sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
      >>> step_fn = supervised_step(model, lambda model, batch: model(batch).square().mean(), sgd)
      >>> state = step_fn(ft.init_state(model, sgd), torch.ones(4, 2))
      >>> state.step, sorted(state.metrics)
      (1, ['grad_norm', 'loss', 'lr', 'skipped_steps'])
    """

    body: Body = attrs.field(init=False, repr=False, default=attrs.Factory(_body, takes_self=True))

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        slots, bound = self.body.slots, self.body.bound
        self.body.check_now_and_then(state)
        if state.params.keys() != slots.params.keys() or state.buffers.keys() != slots.buffer_names:
            slots.check(state)
        params, buffers = tree.clone((state.params, state.buffers))
        lease = slots.lend(params, buffers, bound.frozen)
        try:
            self.body.seed(state)
            rates = self.body.rates(state)
            work = self.body.gradients(state, batch, rates)
            if work.healthy is False:
                return state.advance(**work.changes)
            opt_state = bound.apply_(slots.params, tree.clone(state.opt_state), rates)
            params, buffers = slots.written(lease, params, buffers)
        finally:
            slots.take_back(lease)
        new: dict[str, Any] = {"params": params, "buffers": buffers, "opt_state": opt_state}
        if isinstance(work.healthy, Tensor):
            old = {name: getattr(state, name) for name in new}
            new = choose(work.healthy, new, old)
            if new is old:
                return state.advance(**work.changes)
        return state.advance(**{name: MappingProxyType(value) for name, value in new.items()}, **work.changes)


supervised_step = SupervisedStep
