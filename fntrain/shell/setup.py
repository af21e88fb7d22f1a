"""setup: what a run does to its process and directory before it trains: logs, environment report, config."""

import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from fntrain.core.check import one_of
from fntrain.core.errors import ConfigError
from fntrain.core.rng import seed_all
from fntrain.shell.checkpoints.paths import RemotePath, path_of
from fntrain.steps.precision import FLOAT32
from fntrain.writers.row import local_path

_log = logging.getLogger("fntrain")


def setup(
    directory: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    level: int = logging.INFO,
    seed: int | None = None,
    float32_precision: Literal["ieee", "tf32"] | None = None,
) -> None:
    """Send the log to the console and to `log.txt` in the run's directory, report the environment, keep the config.

    Call it once, from the script. The logger is "fntrain"; calling it again for another directory changes the file.
    Where the root logger has handlers already, as in some notebooks, the console is left to them. Of several ranks
    each has a file of its own, `log_rank1.txt` and so on, and the first alone the console and the config; others show
    warnings.

    Args:
      directory: of the run, on the local file system; made if it is not there.
      config: plain values, as of `ft.to_dict(config)`; written to `config.json`, see `keep_config`. `ft.default_hooks`
        does that when the run has begun.
      level: of the log.
      seed: for the default generators of torch, Python and NumPy (if it is loaded), for first weights. What a step or
        `ft.data.stream` draws derives from the seed of the state and of the stream alone.
      float32_precision: how float32 products on a GPU round, for the whole process: "ieee" exactly, "tf32" faster.
        None leaves torch's switches as they are. It sets torch's newer switches (`torch.backends.cuda.matmul.
        fp32_precision`); don't use the older `torch.set_float32_matmul_precision` beside it.
    Raises:
      ConfigError: the directory can't be written to, or is a URL.
      ValueError: an unknown precision.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     setup(directory, config={"lr": 0.1}, level=logging.ERROR)
      ...     sorted(os.listdir(directory))
      ['config.json', 'log.txt']

    Source: detectron2's default_setup
    """
    one_of("float32_precision", float32_precision, ("ieee", "tf32", None))
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    root = local_path("directory", directory)
    _log_to(root, rank)
    _log.setLevel(level)
    for line in (f"command: {' '.join(sys.argv)}", *environment()):
        _log.info(line)
    if config is not None and rank == 0:
        keep_config(root, config)
    if seed is not None:
        seed_all(seed)
    if float32_precision is not None:
        for switch in FLOAT32:
            switch.fp32_precision = float32_precision


def log_directory(output_dir: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the directory for the logs of a run: its own or, if that is a URL, a local one named after it.

    Example:
      >>> log_directory("runs/digits"), log_directory("s3://bucket/digits")
      ('runs/digits', 'runs/bucket/digits')
    """
    _, found, path = os.fspath(output_dir).removeprefix("file://").partition("://")
    return f"runs/{path.strip('/')}" if found else output_dir


def environment() -> list[str]:
    """Describe what a run's numbers and bits depend on: versions, devices, threads; one line each.

    Example:
      >>> environment()[0].startswith("python ")
      True
    """
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF")
    version = torch.version.cuda
    return [
        f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}",
        f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads",
        *(f"cuda:{i} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {version}" for i, gpu in enumerate(gpus)),
        *(f"{name}={os.environ[name]}" for name in names if name in os.environ),
    ]


def keep_config(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Write a config to `config.json` in a run's directory; what differs from the one there is logged, line by line.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     keep_config(directory, {"lr": 0.1})
      ...     pathlib.Path(directory, "config.json").read_text().split()
      ['{', '"lr":', '0.1', '}']
    """
    path = path_of(directory) / "config.json"
    text = json.dumps(config, indent=2) + "\n"
    if path.exists():
        try:
            changed = differences(json.loads(path.read_bytes()), config)
        except (ValueError, AttributeError):  # no JSON, or no object at the top
            changed = [f"{path} was no config"]
        for line in changed:
            _log.warning("config changed since the last run here: %s", line)
    if isinstance(path, RemotePath):
        path.write_bytes(text.encode())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: a reader, or the next run after a kill, never sees half a file.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings that differ, one line each, nested ones by dotted name.

    Example:
      >>> differences({"lr": 0.1, "model": {"width": 8}}, {"lr": 0.1, "model": {"width": 16}})
      ['model.width: 8 -> 16']
    """
    lines = []
    for name in [*old, *(name for name in new if name not in old)]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            lines.append(f"{prefix}{name}: {a!r} -> {b!r}")
    return lines


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """The console handler that setup adds; a class of its own, so that the next call finds and removes it."""


class _File(logging.FileHandler):
    """The handler of `log.txt`, likewise."""


def _log_to(root: Path, rank: int) -> None:
    """Replace the handlers of an earlier call by a file in the directory, and by the console if nothing logs there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        handlers: list[logging.Handler] = [
            _File(root / (f"log_rank{rank}.txt" if rank else "log.txt"), encoding="utf-8")
        ]
    except OSError as error:
        raise ConfigError(f"output_dir: can't be written to: {error}") from error
    if not logging.getLogger().handlers:  # the root logger's handlers show it already
        handlers.append(_Console(sys.stderr))
        handlers[-1].setLevel(logging.WARNING if rank else logging.NOTSET)
    for former in [one for one in _log.handlers if isinstance(one, _Console | _File)]:
        _log.removeHandler(former)
        former.close()
    formatter = logging.Formatter(f"%(asctime)s %(levelname)s {f'rank {rank}: ' if rank else ''}%(message)s")
    for handler in handlers:
        handler.setFormatter(formatter)
        _log.addHandler(handler)
