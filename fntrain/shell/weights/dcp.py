"""Import from and export to torch.distributed.checkpoint (DCP), for tools that know that format and not this one.

The `.metadata` file of that format is a pickle: to read it is to run what it says. Nothing else here reads one; call
`from_dcp` on directories that you trust. Python objects in a directory, pickles too, are never read.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.state import TrainState, named_leaves
from fntrain.shell.checkpoints.contents import Contents, state_of

_GROUPS = {"params": "model", "buffers": "model", "opt_state": "optimizer"}
_STRUCTURE = "fntrain.state"  # a tensor of bytes: JSON of all that is no tensor


def to_dcp(state: TrainState, path: str | os.PathLike[str]) -> Path:
    """Write a state as a torch.distributed.checkpoint directory; returns its path.

    Parameters and buffers are under "model", what the optimizer keeps under "optimizer" by parameter name, the rest
    under "hooks" and "extra". Of a state of several ranks all must call it, each writes its part.

    Args:
      state: any state; what is no tensor is kept as JSON, for `from_dcp`.
      path: of the directory; made if it is not there.
    Raises:
      CheckpointError: the directory holds a checkpoint already or can't be written, or a leaf can't be saved (named).
    Example:
      >>> import tempfile
      >>> state = ft.TrainState(step=5, position=5, seed=0, params={"w": torch.ones(2)})
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = to_dcp(state, directory + "/dcp")
      ...     from_dcp(path) == state, from_dcp(path, "model.")
      (True, {'w': tensor([1., 1.])})

    Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
    """
    from torch.distributed.checkpoint.state_dict_saver import save  # slow, and only for those who use it

    path = Path(path)
    structure = json.dumps(Contents.of(state).structure, allow_nan=False).encode()
    content: dict[str, dict[str, Any]] = {
        "fntrain": {"state": torch.frombuffer(bytearray(structure), dtype=torch.uint8)}
    }
    for leaf, value in named_leaves(state):
        if isinstance(value, Tensor):
            field, _, name = leaf.partition(".")
            content.setdefault(_GROUPS.get(field, field), {})[name] = value.detach()
    if (path / ".metadata").exists():
        raise CheckpointError(f"{path}: holds a checkpoint of torch.distributed already; give another directory")
    with _as_checkpoint_error(path, "could not be written"):
        save(content, checkpoint_id=path, no_dist=state.run.ranks.world_size == 1)
    return path


@overload
def from_dcp(path: str | os.PathLike[str], prefix: None = None) -> TrainState: ...
@overload
def from_dcp(path: str | os.PathLike[str], prefix: str) -> dict[str, Tensor]: ...
def from_dcp(path: str | os.PathLike[str], prefix: str | None = None) -> TrainState | dict[str, Tensor]:
    """Read a torch.distributed.checkpoint directory, on the CPU: a state that `to_dcp` wrote, or tensors by name.

    Its `.metadata` is a pickle, which may run code: read only what you trust. Whole tensors come, whoever wrote them.

    Args:
      path: of the directory.
      prefix: read the tensors whose keys begin with it, "model." say, and name them by what follows; "" reads all.
        `ft.export` makes a safetensors file of them, which `ft.load_params` reads.
    Raises:
      CheckpointError: nothing there, damaged, no tensor with that prefix, or (without one) not written by `to_dcp`.
    Example:
      >>> import tempfile
      >>> one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = to_dcp(ft.init_state(one, ft.optimizer(torch.optim.SGD, lr=0.1)), directory + "/dcp")
      ...     ft.load_params(ft.export(from_dcp(path, "model."), directory + "/w.safetensors"), other)
      LoadReport: 2 matched, 0 missing, 0 unexpected, 0 mismatched
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    path = Path(path)
    if not (path / ".metadata").is_file():
        raise CheckpointError(f"{path / '.metadata'}: no such file; not a checkpoint of torch.distributed")
    with _as_checkpoint_error(path, "is damaged or can't be read"):
        listed = FileSystemReader(path).read_metadata().state_dict_metadata
        found: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in listed.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(prefix or "")
        }
        if prefix is None and _STRUCTURE not in found:
            raise CheckpointError(
                f"{path}: was not written by to_dcp; give a prefix of its keys, such as {_some(listed)}"
            )
        if not found:
            raise CheckpointError(f"{path}: no tensor has a key that begins with {prefix!r}; it has {_some(listed)}")
        load(found, checkpoint_id=path, no_dist=True)
    if prefix is not None:
        return {key.removeprefix(prefix): tensor for key, tensor in found.items()}
    with _as_checkpoint_error(path, "is damaged"):
        structure = json.loads(bytes(tree.to_bytes(found[_STRUCTURE])))
    fields = {group: [field for field in _GROUPS if _GROUPS[field] == group] for group in _GROUPS.values()}
    leaves: dict[str, Tensor] = {}
    for key, tensor in found.items():
        group, _, name = key.partition(".")
        leaves |= {f"{field}.{name}": tensor for field in fields.get(group, [group])}
    return state_of(structure, leaves, path, ".metadata")


def _some(listed: Any) -> str:
    keys = sorted(listed)
    return ", ".join(map(repr, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


@contextmanager
def _as_checkpoint_error(path: Path, what: str) -> Iterator[None]:
    """Whatever torch raises as a CheckpointError; without its warning that one process is one process."""
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:  # a damaged pickle may raise any kind
        why = str(error).strip().splitlines()[-1:] or [""]
        raise CheckpointError(f"{path}: {what}: {type(error).__name__}: {why[0]}") from error
