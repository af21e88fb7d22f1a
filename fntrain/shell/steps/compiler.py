"""Compiling a traced step by AOTInductor, and keeping the program on disk for the next start."""

import hashlib
import logging
import os
import platform
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.rng import preserved_generators
from fntrain.shell.disk import fsync
from fntrain.shell.steps.flat import Untraceable, flatten

if TYPE_CHECKING:
    from torch.fx import GraphModule

Run = Callable[[list[Tensor]], list[Tensor]]
_log = logging.getLogger("fntrain")
_OPTIONS = {"aot_inductor.package": True, "fallback_random": True}  # eager's kernels draw: the same bits


def compiled(graph: "GraphModule", inputs: list[Tensor], directory: Path | None) -> tuple[Run, bool]:
    """Return the program of a graph, and whether it was found in the directory."""
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
            _log.warning("compile_step: %s is damaged (%s); it is compiled anew", file, text)
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


def try_out(run: Run, inputs: list[Tensor], leaves: list[Tensor]) -> None:
    """Run a program once and undo it: operators that AOTInductor can't call fail here, while eager is possible."""
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
    """Return a hash of what a program depends on: graph, layouts, torch, number of threads, processor, devices."""
    codes = [module.code for module in graph.modules() if isinstance(getattr(module, "code", None), str)]
    devices = {tensor.device for tensor in inputs if tensor.device.type == "cuda"}
    machine = [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    machine += [str(torch.cuda.get_device_properties(device)) for device in devices]
    text = repr((codes, flatten(inputs, []), torch.__version__, sorted(_OPTIONS.items()), machine))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
