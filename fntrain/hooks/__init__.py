"""The standard hooks, one file for each or for a close family: what happens around the steps of a run.

A hook of your own is `ft.hook(after_step=...)` or `ft.stateful(...)`.

May import: all but `fntrain.jobs`. What a hook holds open lives in the context manager that its record opens.
Read first: `stopping` (callbacks with memory), then `timer` (a hook that holds a resource).
"""

from fntrain.hooks.checkpoint import best_checkpoint, checkpoint
from fntrain.hooks.ema import averaged, ema
from fntrain.hooks.evaluate import evaluate
from fntrain.hooks.memory import memory_stats
from fntrain.hooks.metrics import write_metrics
from fntrain.hooks.plateau import reduce_lr_on_plateau
from fntrain.hooks.precise_bn import precise_bn
from fntrain.hooks.profile import profile
from fntrain.hooks.progress import progress_bar
from fntrain.hooks.replicas import check_replicas
from fntrain.hooks.retention import keep_best
from fntrain.hooks.rollback import rollback_on_spike
from fntrain.hooks.signal import on_signal
from fntrain.hooks.stopping import early_stopping, stop_when
from fntrain.hooks.timed import timed
from fntrain.hooks.timer import iteration_timer

__all__ = [  # noqa: RUF022 (by theme)
    # stopping and going back
    "early_stopping", "on_signal", "rollback_on_spike", "stop_when",
    # checkpoints
    "best_checkpoint", "checkpoint", "keep_best",
    # what is trained and measured
    "averaged", "check_replicas", "ema", "evaluate", "precise_bn", "reduce_lr_on_plateau",
    # reports
    "iteration_timer", "memory_stats", "profile", "progress_bar", "timed", "write_metrics",
]  # fmt: skip
