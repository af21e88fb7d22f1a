"""compile_step: the whole step as one compiled program, from forward to the optimizer's update and the metrics.

The step is recorded as a graph (`trace`), which AOTInductor compiles. A program is a function of flat tensors: the
scheduled numbers, the leaves of the state, those of the batch, and what the loss closes over. It writes the new leaves
over the old ones, as a step run in place does, and gives the metrics.
"""

import os
import sys
import time
import warnings
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor

from fntrain.core.check import whole
from fntrain.core.lease import FIELDS
from fntrain.core.state import TrainState
from fntrain.shell.steps.compiler import Run, compiled, try_out
from fntrain.shell.steps.flat import RateVector, Unsettled, Untraceable, flatten, shapes
from fntrain.shell.steps.in_place import Changes, Donated, check_step, modes, run, same_form
from fntrain.shell.steps.memory import Memory
from fntrain.steps.batch import Batch
from fntrain.steps.report import LR
from fntrain.steps.settings import Settings
from fntrain.steps.supervised import SupervisedStep

if TYPE_CHECKING:
    from fntrain.shell.steps.trace import Traced


def compile_step(
    step_fn: SupervisedStep, *, directory: str | os.PathLike[str] | None = None, max_programs: int = 8
) -> "CompiledStep":
    """Make a step that runs as one compiled program, equal to the eager one but for rounding.

    It runs in place, on a lease, as `in_place` does: the state given is consumed, one from elsewhere is copied in.
    The first update runs eagerly; it creates the optimizer's state. The next one traces (0.1 to 2 s) and compiles
    (5 to 60 s) for its structure of state and batch, train/eval flags and `requires_grad`. Learning rates and
    schedules are inputs: no value of theirs compiles anew. Other Python values that model, loss and batch hold are
    part of the program, as they were at the trace; so are tensor objects that the loss closes over, whose values are
    read at each call. Random draws
    are the eager step's, bit for bit. A learning rate of 0 counts as 1e-30; a norm above float32 as not finite. A step
    that can't be traced runs eagerly, with one warning that says why.

    Args:
      step_fn: from `ft.supervised_step`; not to be called by two threads at once.
      directory: where programs are kept; a restart traces, finds its program here and does not compile. They are
        machine code, to be trusted like the script itself. None keeps nothing.
      max_programs: what needs more (batches of ever new shapes) runs eagerly, with one warning.
    Raises:
      TypeError, ValueError: as for `in_place`; `max_programs` is no positive number.
    Example:
      >>> sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
      >>> eager = ft.supervised_step(torch.nn.Linear(2, 1), lambda model, batch: model(batch).square().mean(), sgd)
      >>> compile_step(eager)
      CompiledStep(Linear, 0 programs)
    """
    check_step(step_fn)
    max_programs = whole("max_programs", max_programs, 1)
    place = None if directory is None else Path(directory)
    form = (compile_step, place, max_programs)
    if isinstance(same := same_form(step_fn, form), CompiledStep):
        return same
    body = step_fn.body
    programs = Programs(body.settings, RateVector.of(body.bound), place, max_programs)
    return CompiledStep(Memory(body), programs, step_fn, form)


class CompiledStep(Donated):
    """A step function that runs compiled programs; made by `compile_step`."""

    execution: "Programs"

    @property
    def num_compiled(self) -> int:
        """How many programs were compiled here."""
        return self.execution.num_compiled

    @property
    def num_loaded(self) -> int:
        """How many programs were found in the directory."""
        return self.execution.num_loaded


@attrs.frozen(eq=False)
class Program:
    """A traced step with what runs it."""

    run: Run
    traced: "Traced"


@attrs.define(eq=False, repr=False)
class Programs:
    """Execution by compiled programs: traces and compiles each structure of state and batch once, eager elsewhere."""

    settings: Settings
    vector: RateVector
    directory: Path | None
    max_programs: int
    num_compiled: int = attrs.field(default=0, init=False)
    num_loaded: int = attrs.field(default=0, init=False)
    _programs: dict[Hashable, Program | None] = attrs.field(factory=dict, init=False)  # None: runs eagerly
    _leaves: list[Tensor] = attrs.field(factory=list, init=False)  # the state's, in the order of the programs' inputs
    _structures: dict[Hashable, int] = attrs.field(factory=dict, init=False)
    _current: tuple[Any, int, int] = attrs.field(default=(None, -1, -1), init=False)  # where they lie, what they are
    _stays_eager: bool = attrs.field(default=False, init=False)
    _full: bool = attrs.field(default=False, init=False)

    def described(self, _step: str) -> str:
        """What a step with this execution prints as."""
        return f"CompiledStep({type(self.settings.model).__name__}, {self.num_compiled + self.num_loaded} programs)"

    def __call__(self, memory: Memory, state: TrainState, batch: Batch) -> Changes:
        if self._stays_eager or state.step == 0:
            return run(memory, state, batch)
        try:
            inputs: list[Tensor] = []
            key = (self._structure(memory), flatten(batch, inputs), modes(memory))
            program = self._programs[key] if key in self._programs else self._build(key, memory, state, batch, inputs)
        except Untraceable as error:
            return self._give_up(memory, state, batch, error)
        if program is None:
            return run(memory, state, batch)
        return self._run(program, memory, state, batch, inputs)

    def _run(self, program: Program, memory: Memory, state: TrainState, batch: Batch, inputs: list[Tensor]) -> Changes:
        traced = program.traced
        rates = memory.body.rates(state)
        self.vector.write(rates)
        memory.body.seed(state)
        looks = traced.decides and self.settings.on_nonfinite == "raise"
        if not looks:
            memory.end_leases(state, *FIELDS)
        results = program.run([self.vector.tensor, *self._leaves, *inputs, *traced.constants])
        if looks:
            if not results[-1].item():
                return run(memory, state, batch)  # the state is as it was; this finds the names, and raises
            memory.end_leases(state, *FIELDS)
        return {"metrics": {**traced.reported(results), LR: rates.lr}}

    def _structure(self, memory: Memory) -> int:
        """A number for names, shapes and layouts of the state; looked at again only where its memory has moved."""
        opt_state, moves, structure = self._current
        if opt_state is not memory.opt_state or moves != memory.moves:
            self._leaves = []
            described = flatten((memory.params, memory.buffers, memory.opt_state), self._leaves)
            structure = self._structures.setdefault(described, len(self._structures))
            self._current = (memory.opt_state, memory.moves, structure)
        return structure

    def _build(
        self, key: Hashable, memory: Memory, state: TrainState, batch: Batch, inputs: list[Tensor]
    ) -> Program | None:
        """Trace, then load or compile; None where this call has to run eagerly."""
        if self.num_compiled + self.num_loaded >= self.max_programs:
            self._warn_of_many(inputs)
            return None
        if self.settings.precision in ("fp16", "tf32"):
            raise Untraceable(
                f"precision={self.settings.precision!r} is of eager steps and graphs; 'fp32' and 'bf16' compile"
            )
        memory.body.check_model()
        try:
            self._programs[key] = self._compile(memory, state, batch, inputs)
        except Unsettled:
            self._programs[key] = None
        return self._programs[key]

    def _compile(self, memory: Memory, state: TrainState, batch: Batch, inputs: list[Tensor]) -> Program:
        from fntrain.shell.steps.trace import reason, trace  # 0.4 s to import: only where it is used

        title = f"compile_step: {type(self.settings.model).__name__}, batch {shapes(inputs)}"
        trees = (memory.params, memory.buffers, memory.opt_state)
        start = time.perf_counter()
        try:
            self.vector.write(memory.body.rates(state))
            flat = [self.vector.tensor, *self._leaves, *inputs]
            traced = trace(memory.body, self.vector, trees, batch, flat)
            traced_at = time.perf_counter()
            print(f"{title}: traced in {traced_at - start:.1f} s, compiling ...", file=sys.stderr, flush=True)
            run, found = compiled(traced.graph, flat + traced.constants, self.directory)
            try_out(run, flat + traced.constants, [*self._leaves, *traced.constants])
        except Unsettled:
            raise
        except Exception as error:
            raise Untraceable(reason(error)) from error
        self.num_compiled, self.num_loaded = self.num_compiled + (not found), self.num_loaded + found
        seconds = time.perf_counter() - traced_at
        print(f"{title}: {'loaded' if found else 'compiled'} in {seconds:.1f} s", file=sys.stderr, flush=True)
        return Program(run, traced)

    def _give_up(self, memory: Memory, state: TrainState, batch: Batch, error: Untraceable) -> Changes:
        changes = run(memory, state, batch)  # what is wrong with the model or the batch itself is raised here
        self._stays_eager = True
        self._warn(
            f"can't be one program: {error}. It runs eagerly from here on, correct but not faster; change what is "
            "named, or leave out compile_step"
        )
        return changes

    def _warn_of_many(self, inputs: list[Tensor]) -> None:
        if not self._full:
            self._full = True
            self._warn(
                f"has {self.max_programs} programs; further ones, such as for batch {shapes(inputs)}, run eagerly. "
                "Pad batches to few shapes, leave numbers and texts that differ (ids, names) out of them, or pass "
                "a larger max_programs"
            )

    def _warn(self, text: str) -> None:
        warnings.warn(f"compile_step: {type(self.settings.model).__name__} {text}", stacklevel=4)
