"""hooks.memory_stats: how much memory the run takes."""

import torch

from fntrain.core import gates
from fntrain.core.hook import AnyHook, hook
from fntrain.core.state import TrainState
from fntrain.events import MetricName
from fntrain.writers.process import process_memory


def _named(name: str) -> MetricName:
    return MetricName(f"memory/{name}", reduce="max", smooth="latest")


CUDA = {
    _named("allocated"): "allocated_bytes.all.current",
    _named("reserved"): "reserved_bytes.all.current",
    _named("peak_allocated"): "allocated_bytes.all.peak",
    _named("alloc_retries"): "num_alloc_retries",
    _named("ooms"): "num_ooms",
}


def memory_stats(*, every: int = 20, name: str = "memory_stats") -> AnyHook:
    """Report memory in bytes every n steps and after the last one; list it before `write_metrics`, with its period.

    With parameters on CUDA, of their device (the first, if there are several): `memory/allocated` by tensors now,
    `memory/reserved` by torch, `memory/peak_allocated` since the last report, and how often the process has run short
    so far: `memory/alloc_retries`, `memory/ooms`. It resets torch's peak, which the console's `mem` then shows too.
    Without CUDA, of the process without its children: `memory/rss` now, which Linux alone tells, and `memory/peak_rss`
    since it began. The counters are the host's own: nothing synchronises.

    Args:
      every: number of steps between two reports.
      name: unique in a run.
    Raises:
      ValueError: `every` is not positive.
      RuntimeError: (when the run starts) without CUDA, on a platform that tells neither (Windows).
    Example:
      >>> memory_stats(every=100).every
      100

    Source: detectron2's TorchMemoryStats
    """
    reporting = hook(before_train=_start, after_step=_report, name=name, stops=False, makes="metrics")
    return gates.at_end(gates.every(every, reporting))


def _start(state: TrainState) -> None:
    """Begin the first peak with this run, and raise before the first step if memory can't be measured here."""
    _measured(state)


def _report(state: TrainState) -> TrainState:
    return state.replace(metrics={**state.metrics, **_measured(state)})


def _measured(state: TrainState) -> dict[MetricName, int]:
    device = next((leaf.device for leaf in state.params.values() if leaf.is_cuda), None)
    if device is not None:
        stats = torch.cuda.memory_stats(device)
        torch.cuda.reset_peak_memory_stats(device)  # so that each report has the peak of its own period
        return {name: stats[key] for name, key in CUDA.items()}
    if not (found := process_memory()):
        raise RuntimeError("memory_stats: this platform tells no memory of a process; leave it out on CPU")
    return {_named(name): size for name, size in found.items()}
