"""hooks.profile: traces of torch.profiler over chosen steps."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import profiler
from torch.profiler import ProfilerActivity

from fntrain.core import gates
from fntrain.core.check import function, whole
from fntrain.core.hook import AnyHook, Hook, Predicate, hook, resource
from fntrain.core.state import TrainState

_log = logging.getLogger("fntrain")


@attrs.frozen
class Profile:
    """The parameters of the hook; called, it gives the live one, which holds the profiler."""

    directory: str
    when: Predicate = attrs.field(repr=lambda function: getattr(function, "__qualname__", repr(function)))
    activities: tuple[ProfilerActivity, ...] | None
    options: Mapping[str, Any]
    gzip: bool
    top_ops: int

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        if missing := set(self.activities or ()) - profiler.supported_activities():  # type: ignore[no-untyped-call]
            raise ValueError(f"activities: {sorted(one.name for one in missing)} can't be profiled on this machine")
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        tracer = Tracer(self)
        decide = tracer.decide
        yield hook(before_train=decide, after_step=decide, after_train=tracer.finish, wrap_data=tracer.wrap_data)


def profile(
    directory: str | os.PathLike[str],
    *,
    when: Predicate,
    activities: ProfilerActivity | Sequence[ProfilerActivity] | None = None,
    record_shapes: bool = False,
    with_stack: bool = False,
    profile_memory: bool = False,
    gzip: bool = False,
    top_ops: int = 0,
    name: str = "profile",
) -> AnyHook:
    """Write a trace of every stretch of steps for which a predicate holds; list it first, but after roll-backs.

    A step is traced from the reading of its batch to its end; between two steps of a stretch the hooks after it are in
    the trace too. `trace_step.00000010.pt.trace.json`, named by its first step, is for Perfetto, chrome://tracing and
    TensorBoard's profiler plug-in (`--logdir directory`). It is also written when the run stops or raises within the
    stretch; a run that comes by again overwrites it. Starting takes up to seconds, so trace two steps or more; between
    stretches a step costs 2 us more. It runs on rank 0 only.

    Args:
      directory: of the traces; made if it is not there.
      when: asked about each step with the state before it, but with `step` as gates count it: the number of the coming
        step, from 1. To be used in place of gates, which would keep a trace from ending.
      activities: one or several of torch.profiler.ProfilerActivity; None is the CPU, and CUDA where there is one.
      record_shapes, with_stack, profile_memory: as in torch.profiler.profile; each makes steps slower.
      gzip: compress the file, which then ends in `.gz`.
      top_ops: rows of a table of operators that is logged with the path.
      name: unique in a run.
    Raises:
      TypeError: `when` can't be called, or an activity is none.
      ValueError: no activity, a negative `top_ops`, or (when the run starts) an activity this machine lacks.
      RuntimeError: (in the run) another torch profiler is running, whose trace would be lost.
      OSError: (in the run) torch could not write the trace.
    Example:
      >>> hook = profile("runs/digits/traces", when=lambda state: 10 <= state.step < 20)
      >>> hook.open.directory, hook.name
      ('runs/digits/traces', 'profile')

    Source: detectron2's TorchProfiler
    """
    function("when", when, "a function such as lambda state: state.step < 20")
    several: Any = activities if isinstance(activities, list | tuple) else (activities,)
    members = "expected members of torch.profiler.ProfilerActivity"
    if not several:
        raise ValueError(f"activities: got none, {members}, or None")
    if activities is not None and (wrong := [one for one in several if not isinstance(one, ProfilerActivity)]):
        raise TypeError(f"activities: got {wrong[0]!r}, {members}")
    chosen = None if activities is None else tuple(several)
    options = {"record_shapes": record_shapes, "with_stack": with_stack, "profile_memory": profile_memory}
    record = Profile(os.fspath(directory), when, chosen, options, gzip, whole("top_ops", top_ops, 0))
    return gates.on_main(resource(record, name=name))


class Tracer:
    """What the hook holds during one run: the profiler, while steps are traced."""

    def __init__(self, settings: Profile) -> None:
        self.settings = settings
        self.coming = 0  # number of the coming step, 0 if it is not to be profiled
        self.first = self.last = 0  # steps in the trace; one whose batch could not be read does not count
        self.profiler: Any = None
        self.span = ExitStack()  # closes the span of the step under way

    def decide(self, state: TrainState) -> None:
        """Ask about the coming step when this one is done, as a step begins with the reading of its batch."""
        self.span.close()
        number, run = state.step + 1, state.run
        ends = run.stop is not None or (run.max_steps is not None and number > run.max_steps)
        self.coming = number if not ends and self.settings.when(state.replace(step=number)) else 0
        if not self.coming:
            self.finish(state)

    def wrap_data(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            if self.coming:
                self.begin_step()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.first, self.last = self.first or self.coming, self.coming
            yield batch
            del batch  # drop our reference now, or two batches are alive while the next is read

    def begin_step(self) -> None:
        if self.profiler is None:
            if torch._C._autograd._profiler_enabled():
                raise RuntimeError("profile: another torch profiler is running; end it, or leave this hook out")
            starting = profiler.profile(activities=self.settings.activities, **self.settings.options)
            starting.start()
            self.profiler = starting  # only now: one that did not start can't be stopped
        # TensorBoard's plug-in knows steps by this name.
        self.span.enter_context(profiler.record_function(f"ProfilerStep#{self.coming}"))

    def finish(self, _: TrainState) -> None:
        """End the trace and write it, unless no step was done in it."""
        self.span.close()
        running, first = self.profiler, self.first
        self.profiler, self.first = None, 0
        if running is not None:
            running.stop()
            if first:
                self.write(running, first)

    def write(self, done: Any, first: int) -> None:
        path = Path(self.settings.directory, f"trace_step.{first:08d}.pt.trace.json{'.gz' * self.settings.gzip}")
        path.unlink(missing_ok=True)
        done.export_chrome_trace(str(path))
        if not path.exists():  # torch prints that it failed, and does not raise
            steps = f"steps {first} to {self.last}"
            raise OSError(f"{path}: torch could not write the trace of {steps}; its output says why")
        _log.info("profile: steps %d to %d in %s", first, self.last, path)
        if self.settings.top_ops:
            key = "self_cuda_time_total" if ProfilerActivity.CUDA in done.activities else "self_cpu_time_total"
            _log.info("%s", done.key_averages().table(sort_by=key, row_limit=self.settings.top_ops))
