"""Checkpoints: a directory of `step_XXXXXXXX` directories, each whole or not in view; files.py has what is in one.

Order of a save: write the files and fsync them, then the manifest, fsync the directory, rename it into view, fsync
the parent; only then retention. A kill at any moment leaves the newest visible checkpoint complete.
"""

import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fntrain.errors import CheckpointError
from fntrain.shell.files import MANIFEST, MODEL, TRAIN, fsync, read_files, write_files
from fntrain.state import TrainState

_NAME = re.compile(r"step_(\d{8,})(\.old)?")
_log = logging.getLogger("fntrain")


def save(state: TrainState, directory: str | os.PathLike[str]) -> Path:
    """Write a state to `directory/step_XXXXXXXX`, whole or not at all; returns that path.

    A checkpoint of the same step is replaced only once the new one is complete.

    Args:
      state: any state; its saved fields are written (not `metrics`, not `run`).
      directory: of all checkpoints of the run; made if it is not there.
    Raises:
      CheckpointError: the directory can't be written, the disk is full, or a leaf can't be saved (named).
    Example:
      >>> import tempfile
      >>> state = ft.TrainState(step=5, position=5, seed=0, params={"w": torch.zeros(2)})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save(state, directory)
      ...     path.name, load(path) == state
      ('step_00000005', True)
    """
    root = Path(directory)
    target = root / f"step_{state.step:08d}"
    partial = root / f".partial-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        try:
            write_files(state, partial)
            _publish(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone already if it was published
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target}: could not be written: {error}; earlier checkpoints are as they were"
        ) from error
    return target


def load(path: str | os.PathLike[str]) -> TrainState:
    """Read one checkpoint and check every byte of it; tensors come on the CPU.

    Args:
      path: a `step_XXXXXXXX` directory.
    Raises:
      CheckpointError: missing, truncated, damaged or of an unknown schema; the message names file and leaf.
    Example:
      >>> load("no/such/step_00000001")
      Traceback (most recent call last):
      fntrain.errors.CheckpointError: no/such/step_00000001/state.json: no such file; not a complete checkpoint
    """
    return read_files(Path(path))


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint of a directory by step, or None; its bytes are not read.

    Example:
      >>> latest("no/such/directory") is None
      True
    """
    return next((path for path in checkpoints(directory) if (path / MANIFEST).is_file()), None)


def checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """List the checkpoints of a directory, newest step first.

    Example:
      >>> checkpoints("no/such/directory")
      []
    """
    root = Path(directory)
    if not root.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir(), key=lambda path: path.name, reverse=True):
        # step_X.old is the former checkpoint of a step that a kill left between two renames.
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir() and (match[2] is None or int(match[1]) not in found):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found, reverse=True)]


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name.

    Example:
      >>> step_of(Path("runs/step_00000500"))
      500
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"path: got {path.name!r}, expected step_ and at least 8 digits")
    return int(match[1])


def resume_or(state: TrainState, directory: str | os.PathLike[str]) -> TrainState:
    """Return the newest intact checkpoint of a directory as a state like `state`, or `state` if there is none.

    Damaged checkpoints are passed over with a warning in the log. Tensors get the device and layout of `state`'s.

    Args:
      state: a fresh state of the same job; params and buffers must match by name, shape and dtype, opt_state by
        parameter name, and the seed must be the same. Memory of hooks is sorted out when `fit` starts.
      directory: of the run's checkpoints; may not exist yet.
    Raises:
      CheckpointError: all checkpoints are damaged, or the newest intact one is of another model or seed.
    Example:
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(2)})
      >>> resume_or(state, "no/such/directory") is state
      True
    """
    if Path(directory).is_file() or (Path(directory) / MANIFEST).exists():
        raise CheckpointError(f"{directory}: is no directory of checkpoints; give the one that holds the step_... ones")
    found = checkpoints(directory)
    problems = []
    for path in found:
        try:
            loaded = read_files(path, next((param.device for param in state.params.values()), None))
        except CheckpointError as error:
            problems.append(str(error))
            _log.warning("passed over a damaged checkpoint: %s", error)
            continue
        _log.info("resuming from %s", path)
        return _fitted(loaded, state, path)
    if problems:
        raise CheckpointError(
            f"{directory}: all {len(problems)} checkpoints are damaged; move them away to start afresh\n  "
            + "\n  ".join(problems)
        )
    _log.info("no checkpoint in %s: starting from the state given", directory)
    return state


def newest_intact_after(directory: str | os.PathLike[str], step: int) -> Path | None:
    """Return the newest intact checkpoint later than a step, or None; damaged ones later than it are put out of view.

    Example:
      >>> newest_intact_after("no/such/directory", 0) is None
      True
    """
    for path in checkpoints(directory):
        if step_of(path) <= step:
            break
        try:
            load(path)
        except CheckpointError as error:
            aside = path.rename(path.with_name(f"damaged_{path.name}-{uuid.uuid4().hex[:8]}"))
            _log.warning("put a damaged checkpoint aside as %s: %s", aside, error)
        else:
            return path
    return None


def prune(directory: str | os.PathLike[str], keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints; each vanishes from view in one rename before it is deleted.

    Example:
      >>> prune("no/such/directory", keep_last=3)
    """
    complete = [path for path in checkpoints(directory) if (path / MANIFEST).is_file()]
    for path in complete[keep_last:]:
        _remove(path)


def drop_after(directory: str | os.PathLike[str], step: int) -> None:
    """Delete checkpoints later than a step: after a roll-back they are of a branch the run has left.

    Example:
      >>> drop_after("no/such/directory", 0)
    """
    for path in checkpoints(directory):
        if step_of(path) > step:
            _remove(path)


def _remove(path: Path) -> None:
    for one in (path.with_name(path.name + ".old"), path):
        if one.exists():
            doomed = path.with_name(f".partial-deleted-{uuid.uuid4().hex[:8]}")
            one.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def clean(directory: str | os.PathLike[str]) -> None:
    """Make the directory writable for checkpoints and remove what dead writers left in it.

    Raises:
      CheckpointError: it can't be made or written to.
    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     clean(directory + "/run")
    """
    root = Path(directory)
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".partial-{uuid.uuid4().hex[:8]}"
        probe.mkdir()
    except OSError as error:
        raise CheckpointError(f"{root}: can't be written to: {error}; give another directory") from error
    for leftover in root.glob(".partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _publish(partial: Path, target: Path) -> None:
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)  # still found, as step_X.old, should the process end here
    partial.rename(target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fitted(loaded: TrainState, like: TrainState, path: Path) -> TrainState:
    """The loaded state with the devices and layouts of a fresh one, after checking that it is of the same job."""
    if loaded.seed != like.seed:
        raise CheckpointError(f"{path}: seed is {loaded.seed}, this run has {like.seed}; a resumed run keeps its seed")
    fitted: dict[str, Any] = {}
    for field in ("params", "buffers"):
        have, want = getattr(loaded, field), getattr(like, field)
        if problems := list(_differences(field, have, want)):
            raise CheckpointError(f"{path / MODEL}: of another model:\n  " + "\n  ".join(problems))
        fitted[field] = {name: torch.empty_like(want[name]).copy_(have[name]) for name in want}
    if unknown := sorted(loaded.opt_state.keys() - like.params.keys()):
        raise CheckpointError(f"{path / TRAIN}: opt_state is of parameters the model does not have: {unknown}")
    return loaded.replace(**fitted)


def _differences(field: str, have: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(have.keys() | want.keys()):
        path = f"state.{field}[{name!r}]"
        if name not in want:
            yield f"{path}: only in the checkpoint"
        elif name not in have:
            yield f"{path}: only in the model"
        elif (have[name].shape, have[name].dtype) != (want[name].shape, want[name].dtype):
            yield (
                f"{path}: checkpoint has {tuple(have[name].shape)} {have[name].dtype}, "
                f"model has {tuple(want[name].shape)} {want[name].dtype}"
            )
