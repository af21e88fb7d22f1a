"""setup: what a run does to its process and directory before it trains: logs, environment report, config."""

import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fntrain.config import differences
from fntrain.errors import ConfigError
from fntrain.shell.remote import RemotePath, place

_log = logging.getLogger("fntrain")


def setup(
    directory: str | os.PathLike[str], *, config: Mapping[str, Any] | None = None, level: int = logging.INFO
) -> None:
    """Send the log to the console and to `log.txt` in the run's directory, report the environment, keep the config.

    Call it once, from the script. The logger is "fntrain"; calling it again for another directory changes the file.
    Where the root logger has handlers already, as in some notebooks, the console is left to them.

    Args:
      directory: of the run, on the local file system; made if it is not there.
      config: plain values, as of `ft.to_dict(config)`; written to `config.json`, see `keep_config`. `ft.default_hooks`
        does that when the run has begun.
      level: of the log.
    Raises:
      ConfigError: the directory can't be written to.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     setup(directory, config={"lr": 0.1}, level=logging.ERROR)
      ...     sorted(path.name for path in Path(directory).iterdir())
      ['config.json', 'log.txt']

    Source: detectron2's default_setup
    """
    root = Path(directory)
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = _File(root / "log.txt", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir: can't be written to: {error}") from error
    for handler in list(_log.handlers):
        if isinstance(handler, _Console | _File):
            _log.removeHandler(handler)
            handler.close()
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handlers: list[logging.Handler] = [file]
    if not logging.getLogger().handlers:  # the root logger's show it already
        handlers.append(_Console(sys.stderr))
    for handler in handlers:
        handler.setFormatter(formatter)
        _log.addHandler(handler)
    _log.setLevel(level)
    _log.info("command: %s", " ".join(sys.argv))
    for line in environment():
        _log.info(line)
    if config is not None:
        keep_config(root, config)


def environment() -> list[str]:
    """Describe what a run's numbers and bits depend on: versions, devices, threads; one line each.

    Example:
      >>> environment()[0].startswith("python ")
      True
    """
    lines = [f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"]
    lines.append(f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF")
    lines += [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return lines


def keep_config(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Write a config to `config.json` in a run's directory; what differs from the one there is logged, line by line.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     keep_config(directory, {"lr": 0.1})
      ...     Path(directory, "config.json").read_text().split()
      ['{', '"lr":', '0.1', '}']
    """
    path = place(directory) / "config.json"
    text = json.dumps(config, indent=2) + "\n"
    if path.exists():
        try:
            changed = differences(json.loads(path.read_bytes()), config)
        except (ValueError, AttributeError):
            changed = [f"{path} was no config"]
        for line in changed:
            _log.warning("config changed since the last run here: %s", line)
    if isinstance(path, RemotePath):
        path.write_bytes(text.encode())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """The handler that setup has added, to be found again."""


class _File(logging.FileHandler):
    """The handler that setup has added, to be found again."""
