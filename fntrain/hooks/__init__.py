"""The standard hooks; a hook of your own is `ft.hook(after_step=...)` or `ft.stateful(...)`."""

from fntrain.hooks.checkpoint import best_checkpoint, checkpoint, keep_best
from fntrain.hooks.evaluate import evaluate
from fntrain.hooks.memory import memory_stats
from fntrain.hooks.metrics import write_metrics
from fntrain.hooks.plateau import reduce_lr_on_plateau
from fntrain.hooks.precise_bn import precise_bn
from fntrain.hooks.profile import profile
from fntrain.hooks.progress import progress_bar
from fntrain.hooks.signal import on_signal
from fntrain.hooks.timed import timed
from fntrain.hooks.timer import iteration_timer

__all__ = [
    "best_checkpoint",
    "checkpoint",
    "evaluate",
    "iteration_timer",
    "keep_best",
    "memory_stats",
    "on_signal",
    "precise_bn",
    "profile",
    "progress_bar",
    "reduce_lr_on_plateau",
    "timed",
    "write_metrics",
]
