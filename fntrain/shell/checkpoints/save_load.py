"""save, load, latest and resume_or: what users call.

saver.py saves in the background. A save goes from here or there to contents.py (what is to be written), commit.py (the
order of effects), writing.py and tensor_file.py; a load to reading.py, manifest.py and tensor_file.py.
"""

import logging
import os
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.lease import FIELDS, Home, Leased
from fntrain.core.ranks import ALONE
from fntrain.core.state import TrainState, named_leaves
from fntrain.shell.checkpoints.commit import commit, store_at
from fntrain.shell.checkpoints.contents import Contents
from fntrain.shell.checkpoints.manifest import MANIFEST, MODEL, TRAIN
from fntrain.shell.checkpoints.paths import AnyPath, path_of
from fntrain.shell.checkpoints.reading import Verify, check, check_verify, read_state
from fntrain.shell.checkpoints.store import Store, as_checkpoint_error, committed, gather_or_raise
from fntrain.shell.checkpoints.upgrade import SchemaError
from fntrain.shell.distributed.connected import ranks

T = TypeVar("T")
_log = logging.getLogger("fntrain")


def save(state: TrainState, directory: str | os.PathLike[str]) -> AnyPath:
    """Write a state to `directory/step_XXXXXXXX`, whole or not at all; returns that path once it is on the disk.

    A checkpoint of the same step is replaced only once the new one is complete.

    Args:
      state: any state; its saved fields are written (not `metrics`, not `run`).
      directory: of all checkpoints of the run; made if it is not there. A path, or a URL that fsspec knows (s3://...).
    Raises:
      CheckpointError: the directory can't be written, another process writes there, the disk is full, or a leaf can't
        be saved (named).
    Example:
      >>> import tempfile
      >>> state = ft.TrainState(step=5, position=5, seed=0, params={"w": torch.zeros(2)})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save(state, directory)
      ...     path.name, load(path) == state
      ('step_00000005', True)
    """
    contents = Contents.of(state)
    return commit(store_at(path_of(directory)), contents, map(tree.to_bytes, contents.tensors))


def load(path: str | os.PathLike[str], *, into: TrainState | None = None, verify: Verify = "full") -> TrainState:
    """Read one checkpoint; tensors come on the CPU.

    Args:
      path: a `step_XXXXXXXX` directory.
      into: a state whose memory is used again: tensors of the same path, shape and dtype are written over, on whatever
        device; of those that share memory only the first. It is consumed; if the checkpoint is damaged, its values are
        lost.
      verify: "full" checks every byte; "structure" all but the values of the tensors.
    Raises:
      ValueError: `verify` is none of the two.
      CheckpointError: missing, truncated, damaged or of a later schema; the message names file and leaf.
    Example:
      >>> load("no/such/step_00000001")
      Traceback (most recent call last):
      fntrain.CheckpointError: no/such/step_00000001/state.json: no such file; not a complete checkpoint
    """
    check_verify(verify)
    if into is None:
        return read_state(path_of(path), verify=verify)
    memory = _without_aliases({leaf: value for leaf, value in named_leaves(into) if isinstance(value, Tensor)})
    homes = {}
    for field in FIELDS:
        mapping: Any = getattr(into, field)
        if type(mapping) is Leased:
            homes[field] = mapping.home
    names = {field: {f"{field}.{name}" for name in getattr(into, field)} for field in homes if field != "opt_state"}
    for field, home in homes.items():
        home.end(f"ft.load({os.fspath(path)!r}, into=...)", field)
    loaded = read_state(path_of(path), verify=verify, into=memory)
    leased = {}
    for field, home in homes.items():
        tensors = dict(getattr(loaded, field))
        # A lease says that all tensors are the module's: without this check a step in place would trust it.
        here = {f"{field}.{name}" for name in tensors if memory.get(f"{field}.{name}") is tensors[name]}
        if field == "opt_state" or here == names[field]:
            leased[field] = Leased(tensors, home, field, loaded.step)
    return loaded.replace(**leased)


def latest(directory: str | os.PathLike[str], *, verify: Verify = "structure") -> AnyPath | None:
    """Return the newest intact checkpoint of a directory, or None if it has none.

    Damaged ones are passed over with a warning in the log.

    Args:
      directory: of the run's checkpoints; may not exist.
      verify: "structure" checks all but the values of the tensors; "full" reads every byte.
    Raises:
      ValueError: `verify` is none of the two.
      CheckpointError: all are damaged, or the newest is of a later schema.
    Example:
      >>> latest("no/such/directory") is None
      True
    """
    check_verify(verify)
    found = newest(store_at(path_of(directory)), lambda path: check(path, verify=verify))
    return found and found[0]


def checkpoints(directory: str | os.PathLike[str]) -> list[AnyPath]:
    """List the checkpoints of a directory, newest step first; their bytes are not read.

    Example:
      >>> checkpoints("no/such/directory")
      []
    """
    return committed(store_at(path_of(directory)))


def resume_or(state: TrainState, directory: str | os.PathLike[str], *, verify: Verify = "full") -> TrainState:
    """Return the newest intact checkpoint of a directory as a state like `state`, or `state` if there is none.

    Damaged checkpoints are passed over with a warning in the log. Tensors get the device and layout of `state`'s. If
    `state` is on a module's own memory (of `ft.init_state`, or of a step run in place), so is the result, as after
    `ft.load_into`: one copy of the weights, not two; `state` is consumed then. Files on a local disk are then read
    twice, first to check them, for nothing of `state` may be written over before all is found intact. If parameters of
    `state` are split over ranks, each reads its rows alone, and all must call it.

    Args:
      state: a fresh state of the same job; params and buffers must match by name, shape and dtype, opt_state by
        parameter name, and the seed must be the same. Memory of hooks is sorted out when `fit` starts.
      directory: of the run's checkpoints; may not exist yet. A path, or a URL that fsspec knows.
      verify: "full" checks every byte; "structure" all but the values of the tensors.
    Raises:
      ValueError: `verify` is none of the two.
      CheckpointError: all checkpoints are damaged, or the newest intact one is of another model or seed, or of a later
        schema.
    Example:
      >>> state = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.zeros(2)})
      >>> resume_or(state, "no/such/directory") is state
      True
    """
    check_verify(verify)
    if not isinstance(state, TrainState):
        raise TypeError(f"state: got {type(state).__name__}, expected a TrainState (ft.init_state makes one)")
    store = store_at(path_of(directory))
    with as_checkpoint_error(store.root, "can't be looked into", store.errors):
        if store.root.is_file() or (store.root / MANIFEST).exists():
            raise CheckpointError(
                f"{store.root}: is no directory of checkpoints; give the one that holds the step_... ones"
            )
    memory = _own_memory(state) if isinstance(store.root, Path) else {}  # a network should not be asked twice
    found = newest(store, lambda path: check(path, verify=verify) if memory else _read_like(state, path, verify))
    if found is None:
        _log.info("no checkpoint in %s: starting from the state given", store.root)
        return state
    path, loaded = found
    _log.info("resuming from %s", path)
    _check_job(loaded, state, path)
    home = _home(state)
    if home is None:
        return _laid_out_like(loaded, state)
    own = {"params": dict(state.params), "buffers": dict(state.buffers)}
    home.end("ft.resume_or", *FIELDS)
    return _on_module(_read_over(memory, path, verify) if memory else loaded, own, home)


def newest(store: Store, read: Callable[[AnyPath], T]) -> tuple[AnyPath, T] | None:
    """Return the newest checkpoint that can be read, and what was read; those passed over are logged.

    Raises:
      CheckpointError: there are some, and none can be read; or one is of a later schema, which is no damage.
    """
    problems = []
    for path in store.claimed():
        try:
            return path, read(path)
        except SchemaError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
            _log.warning("passed over a damaged checkpoint: %s", error)
    if problems:
        raise CheckpointError(
            f"{store.root}: all {len(problems)} checkpoints are damaged; move them away to start afresh\n  "
            + "\n  ".join(problems)
        )
    return None


def _home(state: TrainState) -> Home | None:
    """The memory of the module that a state is on, None if it is on its own or on memory that was written since."""
    home = state.params.home if type(state.params) is Leased else None
    here = home is not None and home.leased(state.params, "params") and home.leased(state.buffers, "buffers")
    return home if here else None


def _own_memory(state: TrainState) -> dict[str, Tensor]:
    """Parameters and buffers that a checkpoint may be read straight into, by dotted path: a module's, on the CPU."""
    if _home(state) is None:
        return {}
    tensors = {f"params.{name}": param for name, param in state.params.items()}
    tensors |= {f"buffers.{name}": buffer for name, buffer in state.buffers.items()}
    if any(tensor.device.type != "cpu" or tree.local(tensor) is not tensor for tensor in tensors.values()):
        return {}
    return _without_aliases(tensors)


def _read_like(state: TrainState, path: AnyPath, verify: Verify) -> TrainState:
    """Read a checkpoint into new memory; of parameters that are split over ranks this rank's rows, on all ranks."""
    device = next((param.device for param in state.params.values()), None)
    split = {name: param for name, param in state.params.items() if tree.local(param) is not param}
    found: list[TrainState] = []
    read = partial(read_state, path, verify=verify, device=device, split=split)
    # Each rank reads other bytes: what one finds damaged, all have to pass over.
    gather_or_raise(ranks() if split else ALONE, lambda: found.append(read()))
    return found[0]


def _read_over(memory: Mapping[str, Tensor], path: AnyPath, verify: Verify) -> TrainState:
    """Read a checkpoint that has just been checked over the memory of a state."""
    try:
        return read_state(path, verify=verify, into=memory)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; it was intact just before, so the state given has lost its values: make it anew, and call again"
        ) from error


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that can be written one by one, of some that share memory the first.

    An average, for instance, may have begun as the parameters themselves: written over once, both would change.
    """
    apart: dict[str, Tensor] = {}
    taken: dict[torch.device, list[tuple[int, int]]] = {}
    for leaf, tensor in tensors.items():
        part = tree.local(tensor)
        length = _length(part)
        if length is None or part.is_meta:
            continue
        begin, others = part.data_ptr(), taken.setdefault(part.device, [])
        end = begin + length * part.element_size()
        at = bisect(others, (begin, end))
        if begin == end or ((not at or others[at - 1][1] <= begin) and (at == len(others) or end <= others[at][0])):
            apart[leaf] = tensor
            if begin < end:
                others.insert(at, (begin, end))
    return apart


def _length(tensor: Tensor) -> int | None:
    """Elements from the first to the last, gaps counted; None if some may lie on one another."""
    length = int(tensor.numel() > 0)
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and length:
            if stride < length:
                return None
            length += stride * (size - 1)
    return length


def _check_job(loaded: TrainState, like: TrainState, path: AnyPath) -> None:
    """Raise CheckpointError unless a checkpoint is of the same job as a fresh state; values do not matter."""
    if loaded.seed != like.seed:
        raise CheckpointError(f"{path}: seed is {loaded.seed}, this run has {like.seed}; a resumed run keeps its seed")
    for field in ("params", "buffers"):
        if problems := list(_differences(field, getattr(loaded, field), getattr(like, field))):
            raise CheckpointError(f"{path / MODEL}: of another model:\n  " + "\n  ".join(problems))
    if unknown := sorted(loaded.opt_state.keys() - like.params.keys()):
        raise CheckpointError(f"{path / TRAIN}: opt_state is of parameters the model does not have: {unknown}")


def _on_module(loaded: TrainState, own: Mapping[str, Mapping[str, Tensor]], home: Home) -> TrainState:
    """The loaded state on a module's own parameters and buffers."""
    with torch.no_grad():
        for field, tensors in own.items():
            for name, tensor in tensors.items():
                read = getattr(loaded, field)[name]
                if read is not tensor:  # it was not read straight into that memory
                    tree.local(tensor).copy_(tree.local(tree.split_like(tensor, read)))
    fields: dict[str, Any] = {**own, "opt_state": loaded.opt_state}
    return loaded.replace(**{field: Leased(dict(fields[field]), home, field, loaded.step) for field in fields})


def _laid_out_like(loaded: TrainState, like: TrainState) -> TrainState:
    """The loaded state with the devices and layouts of a fresh one."""
    laid_out = {}
    for field in ("params", "buffers"):
        have, want = getattr(loaded, field), getattr(like, field)
        laid_out[field] = {name: _laid_out(want[name], have[name]) for name in want}
    return loaded.replace(**laid_out)


def _laid_out(want: Tensor, have: Tensor) -> Tensor:
    part = tree.local(want)
    return tree.relocated(want, torch.empty_like(part).copy_(tree.local(tree.split_like(want, have))))  # type: ignore[no-any-return]


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
