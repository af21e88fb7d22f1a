"""save, load and latest: what users call; resume.py has resume_or.

saver.py saves in the background. A save goes from here or there to contents.py (what is to be written), commit.py (the
order of effects) and tensor_file.py; a load to reading.py, manifest.py and tensor_file.py.
"""

import logging
import os
from bisect import bisect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.lease import FIELDS, Leased
from fntrain.core.state import TrainState, check_state, named_leaves
from fntrain.shell.checkpoints.commit import commit, store_at
from fntrain.shell.checkpoints.contents import Contents
from fntrain.shell.checkpoints.paths import AnyPath, path_of
from fntrain.shell.checkpoints.reading import Verify, Wanted, read_state
from fntrain.shell.checkpoints.store import Store, committed, gather_or_raise, name_of
from fntrain.shell.checkpoints.upgrade import SchemaError

T = TypeVar("T")
_log = logging.getLogger("fntrain")


def save(state: TrainState, directory: str | os.PathLike[str]) -> AnyPath:
    """Write a state to `directory/step_XXXXXXXX`, whole or not at all; returns that path once it is on the disk.

    A checkpoint of the same step is replaced only once the new one is complete. If `ft.fit` made the state on several
    ranks, all must call it: with "ddp" the first rank writes and the others wait, with "fsdp" each writes its part.

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
    check_state("state", state)
    store, ranks = store_at(path_of(directory)), state.run.ranks

    def write() -> None:
        contents = Contents.of(state)
        commit(store, contents, map(tree.to_bytes, contents.tensors))

    if ranks.sharded:
        write()
    else:
        gather_or_raise(ranks, lambda: write() if ranks.rank == 0 else None)
    return store.root / name_of(state.step)


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
    wanted = Wanted(verify=verify)
    if into is None:
        return read_state(path_of(path), wanted)
    memory = without_aliases({leaf: value for leaf, value in named_leaves(into) if isinstance(value, Tensor)})
    mappings: dict[str, Any] = {field: getattr(into, field) for field in FIELDS}
    homes = {field: mapping.home for field, mapping in mappings.items() if type(mapping) is Leased}
    names = {field: {f"{field}.{name}" for name in mappings[field]} for field in homes if field != "opt_state"}
    for field, home in homes.items():
        home.end(f"ft.load({os.fspath(path)!r}, into=...)", field)
    loaded = read_state(path_of(path), attrs.evolve(wanted, into=memory))
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
    wanted = Wanted(verify=verify, values=False)
    found = newest(store_at(path_of(directory)), lambda path: read_state(path, wanted))
    return found and found[0]


def checkpoints(directory: str | os.PathLike[str]) -> list[AnyPath]:
    """List the checkpoints of a directory, newest step first; their bytes are not read.

    Example:
      >>> checkpoints("no/such/directory")
      []
    """
    return committed(store_at(path_of(directory)))


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
        why = f"all {len(problems)} checkpoints are damaged; move them away to start afresh"
        raise CheckpointError("\n  ".join([f"{store.root}: {why}", *problems]))
    return None


def without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that can be written over one by one: of some that share memory only the first.

    An average, for instance, may have begun as the parameters themselves: one write would change both.

    Example:
      >>> a = torch.zeros(4)
      >>> list(without_aliases({"a": a, "part of a": a[2:], "b": torch.zeros(4)}))
      ['a', 'b']
    """
    found: dict[str, Tensor] = {}
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
            found[leaf] = tensor
            if begin < end:
                others.insert(at, (begin, end))
    return found


def _length(tensor: Tensor) -> int | None:
    """Elements from the first to the last, gaps counted; None if some may lie on one another."""
    length = int(tensor.numel() > 0)
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and length:
            if stride < length:
                return None
            length += stride * (size - 1)
    return length
