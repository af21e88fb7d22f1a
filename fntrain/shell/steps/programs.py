"""compile_step: the whole step as one compiled program, from forward to the optimizer's update and the metrics.

The step is recorded as a graph (`trace`), which AOTInductor compiles. A program is a function of flat tensors: the
scheduled numbers, the leaves of the state, those of the batch, and what the loss closes over. It writes the new leaves
over the old ones, as a step run in place does, and gives the metrics.
"""

import hashlib
import os
import platform
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.check import whole
from fntrain.core.lease import FIELDS
from fntrain.core.ranks import Ranks
from fntrain.core.rng import preserved_generators
from fntrain.core.state import TrainState
from fntrain.shell.checkpoints.tensor_file import fsync
from fntrain.shell.steps.flat import Rates, Unsettled, Untraceable, flatten, shapes
from fntrain.shell.steps.in_place import InPlace, check_step, in_place
from fntrain.steps.batch import Batch
from fntrain.steps.supervised import LR, SupervisedStep

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from fntrain.shell.steps.trace import Traced

Run = Callable[[list[Tensor]], list[Tensor]]
_OPTIONS = {"aot_inductor.package": True, "fallback_random": True}  # eager's kernels draw: the same bits


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
    return CompiledStep(in_place(step_fn), None if directory is None else Path(directory), max_programs)


@attrs.frozen(eq=False)
class Program:
    """A traced step with what runs it."""

    run: Run
    traced: "Traced"


@attrs.define(eq=False, repr=False)
class CompiledStep:
    """A step function that runs compiled programs; made by `compile_step`.

    `num_compiled` counts the programs compiled here, `num_loaded` those found in the directory.
    """

    eager: InPlace
    directory: Path | None
    max_programs: int
    num_compiled: int = attrs.field(default=0, init=False)
    num_loaded: int = attrs.field(default=0, init=False)
    _rates: Rates = attrs.field(init=False)
    _programs: dict[Hashable, Program | None] = attrs.field(factory=dict, init=False)  # None: runs eagerly
    _leaves: list[Tensor] = attrs.field(factory=list, init=False)  # the state's, in the order of the programs' inputs
    _structures: dict[Hashable, int] = attrs.field(factory=dict, init=False)
    _current: tuple[Any, int, int] = attrs.field(default=(None, -1, -1), init=False)  # where they lie, what they are
    _stays_eager: bool = attrs.field(default=False, init=False)
    _full: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._rates = Rates.of(self.eager.step)

    @property
    def ranks(self) -> Ranks:
        """The processes that do this step together, for the fold."""
        return self.eager.ranks

    def __repr__(self) -> str:
        return f"CompiledStep({type(self.eager.step.model).__name__}, {self.num_compiled + self.num_loaded} programs)"

    def __call__(self, state: TrainState, batch: Batch) -> TrainState:
        if self._stays_eager or state.step == 0:
            return self.eager(state, batch)
        state = self.eager.own(state)
        self.eager.settle_params()  # somebody may have put other tensors into the module
        try:
            inputs: list[Tensor] = []
            key = (self._structure(), flatten(batch, inputs), self.eager.modes())
            program = self._programs[key] if key in self._programs else self._build(key, state, batch, inputs)
        except Untraceable as error:
            return self._give_up(state, batch, error)
        if program is None:
            return self.eager(state, batch)
        return self._run(program, state, batch, inputs)

    def _run(self, program: Program, state: TrainState, batch: Batch, inputs: list[Tensor]) -> TrainState:
        step, traced = self.eager.step, program.traced
        rates = self._rates.at(state)
        step.seed(state)
        looked_at = traced.healthy if step.on_nonfinite == "raise" else None
        if looked_at is None:
            self.eager.home.end(f"step {state.step + 1}", *FIELDS)
        results = program.run([self._rates.vector, *self._leaves, *inputs, *traced.constants])
        if looked_at is not None:
            if not results[looked_at].item():
                return self.eager(state, batch)  # which is as it was; finds the names, and raises
            self.eager.home.end(f"step {state.step + 1}", *FIELDS)
        metrics = traced.metrics.copy()
        for name, index in traced.tensors:
            metrics[name] = results[index]
        for name, index, kind in traced.media:
            metrics[name] = kind(results[index])
        metrics[LR] = step.lr(state) if self._rates.lr is None else rates[self._rates.lr]
        return self.eager.advanced(state, {"metrics": metrics})

    def _structure(self) -> int:
        """A number for names, shapes and layouts of the state; looked at again only where its memory has moved."""
        opt_state, moves, structure = self._current
        if opt_state is not self.eager.opt_state or moves != self.eager.moves:
            self._leaves = []
            described = flatten((self.eager.params, self.eager.buffers, self.eager.opt_state), self._leaves)
            structure = self._structures.setdefault(described, len(self._structures))
            self._current = (self.eager.opt_state, self.eager.moves, structure)
        return structure

    def _build(self, key: Hashable, state: TrainState, batch: Batch, inputs: list[Tensor]) -> Program | None:
        """Trace, then load or compile; None where this call has to run eagerly."""
        if self.num_compiled + self.num_loaded >= self.max_programs:
            if not self._full:
                self._warn(
                    f"has {self.max_programs} programs; further ones, such as for batch {shapes(inputs)}, run eagerly. "
                    "Pad batches to few shapes, leave numbers and texts that differ (ids, names) out of them, or pass "
                    "a larger max_programs"
                )
            self._full = True
            return None
        from fntrain.shell.steps.trace import reason, trace  # 0.4 s to import: only where it is used

        step = self.eager.step
        if step.precision in ("fp16", "tf32"):
            raise Untraceable(f"precision={step.precision!r} is of eager steps and graphs; 'fp32' and 'bf16' compile")
        step.check_model()
        title = f"compile_step: {type(step.model).__name__}, batch {shapes(inputs)}"
        trees = (self.eager.params, self.eager.buffers, self.eager.opt_state)
        start = time.perf_counter()
        try:
            self._rates.at(state)
            flat = [self._rates.vector, *self._leaves, *inputs]
            traced = trace(step, self._rates, trees, batch, flat)
            seconds = time.perf_counter() - start
            print(f"{title}: traced in {seconds:.1f} s, compiling ...", file=sys.stderr, flush=True)
            run, found = _compiled(traced.graph, flat + traced.constants, self.directory)
            _try(run, flat + traced.constants, [*self._leaves, *traced.constants])
        except Unsettled:
            self._programs[key] = None
            return None
        except Exception as error:
            raise Untraceable(reason(error)) from error
        self.num_compiled, self.num_loaded = self.num_compiled + (not found), self.num_loaded + found
        seconds = time.perf_counter() - start - seconds
        print(f"{title}: {'loaded' if found else 'compiled'} in {seconds:.1f} s", file=sys.stderr, flush=True)
        self._programs[key] = Program(run, traced)
        return self._programs[key]

    def _give_up(self, state: TrainState, batch: Batch, error: Untraceable) -> TrainState:
        new = self.eager(state, batch)  # what is wrong with the model or the batch itself is raised here
        self._stays_eager = True
        self._warn(
            f"can't be one program: {error}. It runs eagerly from here on, correct but not faster; change what is "
            "named, or leave out compile_step"
        )
        return new

    def _warn(self, text: str) -> None:
        warnings.warn(f"compile_step: {type(self.eager.step.model).__name__} {text}", stacklevel=4)


def _compiled(graph: "GraphModule", inputs: list[Tensor], directory: Path | None) -> tuple[Run, bool]:
    """A graph's program, and whether it was found in the directory."""
    if directory is None:
        with tempfile.TemporaryDirectory() as temporary:
            return _load(_compile(graph, inputs, Path(temporary), "program")), False
    name = _fingerprint(graph, inputs)
    for file in directory.glob(f"{name}-*.pt2"):
        try:
            if file.stem != f"{name}-{_checksum(file)}":
                raise RuntimeError("its checksum is another")
            return _load(file), True
        except RuntimeError as error:
            text = str(error).partition("\n")[0]
            warnings.warn(f"compile_step: {file} is damaged ({text}); it is compiled anew", stacklevel=5)
            file.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    return _load(_compile(graph, inputs, directory, name)), False


def _compile(graph: "GraphModule", inputs: list[Tensor], directory: Path, name: str) -> Path:
    """Compile a graph into a file that is there whole or not at all; its name ends in a checksum."""
    import torch._inductor
    from torch._inductor.package.package import package_aoti

    temporary = directory / f".{name}.{os.getpid()}.pt2"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about itself: nothing of the user's runs here
            files = torch._inductor.aot_compile(graph, tuple(inputs), options=dict(_OPTIONS))
            package_aoti(str(temporary), {"model": cast("Any", files)})
        fsync(temporary)
        return temporary.replace(directory / f"{name}-{_checksum(temporary)}.pt2")
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(file: Path) -> str:
    return f"{zlib.crc32(file.read_bytes()):08x}"  # torch's loader runs what it is given, flipped bits and all


def _load(file: Path) -> Run:
    # One runner without locks; the thread-safe one costs twice as much a call.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", True, 1, -1)
    return cast("Run", loader.boxed_run)


def _try(run: Run, inputs: list[Tensor], leaves: list[Tensor]) -> None:
    """Run a program once for nothing: operators that AOTInductor can't call fail here, where the way back is open."""
    before = tree.clone_tensors(leaves)
    try:
        with preserved_generators():
            run(list(inputs))
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        raise Untraceable(
            f"AOTInductor can't run it ({line:.200}); an operator may lack what it calls, as an LSTM on the CPU does"
        ) from error
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, before, strict=True):
                leaf.copy_(value)


def _fingerprint(graph: "GraphModule", inputs: list[Tensor]) -> str:
    """What a program depends on: the graph and its layouts, torch, number of threads, and the processor."""
    codes = [module.code for module in graph.modules() if isinstance(getattr(module, "code", None), str)]
    devices = {tensor.device for tensor in inputs if tensor.device.type == "cuda"}
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    machine += [str(torch.cuda.get_device_properties(device)) for device in devices]
    text = repr((codes, flatten(inputs, []), torch.__version__, sorted(_OPTIONS.items()), machine))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
