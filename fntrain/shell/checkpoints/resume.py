"""resume_or: go on from the newest intact checkpoint of a directory, in the memory of a fresh state."""

import logging
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from fntrain.core import tree
from fntrain.core.errors import CheckpointError
from fntrain.core.lease import FIELDS, Home, Leased
from fntrain.core.ranks import ALONE
from fntrain.core.state import TrainState
from fntrain.shell.checkpoints.commit import store_at
from fntrain.shell.checkpoints.manifest import MANIFEST, MODEL, TRAIN
from fntrain.shell.checkpoints.paths import AnyPath, path_of
from fntrain.shell.checkpoints.reading import Verify, Wanted, copied, read_state
from fntrain.shell.checkpoints.save_load import newest, without_aliases
from fntrain.shell.checkpoints.store import as_checkpoint_error, gather_or_raise
from fntrain.shell.distributed.connected import ranks

_log = logging.getLogger("fntrain")


def resume_or(state: TrainState, directory: str | os.PathLike[str], *, verify: Verify = "full") -> TrainState:
    """Return the newest intact checkpoint of a directory as a state like `state`, or `state` if there is none.

    Damaged checkpoints are passed over with a warning in the log. Tensors get the device and layout of `state`'s. If
    `state` is on a module's own memory (of `ft.init_state`, or of a step run in place), so is the result, as after
    `ft.load_into`: one copy of the weights, not two; `state` is consumed then. From a local disk the weights are read
    twice then, first to check them: nothing of `state` is written over before all is found intact. If parameters of
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
    wanted = Wanted(verify=verify)
    if not isinstance(state, TrainState):
        raise TypeError(f"state: got {type(state).__name__}, expected a TrainState (ft.init_state makes one)")
    store = store_at(path_of(directory))
    with as_checkpoint_error(store.root, "can't be looked into", store.errors):
        if store.root.is_file() or (store.root / MANIFEST).exists():
            why = "is no directory of checkpoints; give the one that holds the step_... ones"
            raise CheckpointError(f"{store.root}: {why}")
    target = _Target.of(state)
    found = newest(store, partial(target.read, wanted=wanted))
    if found is None:
        _log.info("no checkpoint in %s: starting from the state given", store.root)
        return state
    path, loaded = found
    _log.info("resuming from %s", path)
    if problem := target.other_job(loaded, path):
        raise CheckpointError(problem)
    return target.filled(loaded)


@attrs.frozen(eq=False)
class _Target:
    """What a checkpoint is resumed into.

    Args:
      seed: of the fresh state.
      tensors: its parameters and buffers, copied out of the state, which may be consumed while this goes on.
      home: the module whose own memory they are, if there is one.
    """

    seed: int
    tensors: dict[str, dict[str, Tensor]]
    home: Home | None

    @classmethod
    def of(cls, state: TrainState) -> "_Target":
        home = state.params.home if type(state.params) is Leased else None
        here = home is not None and home.leased(state.params, "params") and home.leased(state.buffers, "buffers")
        tensors = {"params": dict(state.params), "buffers": dict(state.buffers)}
        return cls(state.seed, tensors, home if here else None)

    def read(self, path: AnyPath, wanted: Wanted) -> TrainState:
        """Read a checkpoint; of parameters that are split over ranks this rank's rows, on all ranks."""
        params = self.tensors["params"]
        device = next((param.device for param in params.values()), None)
        split = {name: param for name, param in params.items() if tree.local(param) is not param}
        memory = self._memory() if isinstance(path, Path) else {}  # a network should not be asked twice
        accept = partial(self._accept, path) if memory else None
        wanted = attrs.evolve(wanted, device=device, split=split, into=memory, accept=accept)
        found: list[TrainState] = []
        # Each rank reads other bytes: what one finds damaged, all have to pass over.
        gather_or_raise(ranks() if split else ALONE, lambda: found.append(read_state(path, wanted)))
        return found[0]

    def _memory(self) -> dict[str, Tensor]:
        """By dotted path, what may be written over: all of a module that is whole and on the CPU."""
        if self.home is None:
            return {}
        found = {f"{field}.{name}": tensor for field, named in self.tensors.items() for name, tensor in named.items()}
        here = all(tensor.device.type == "cpu" and tree.local(tensor) is tensor for tensor in found.values())
        return without_aliases(found) if here else {}

    def _accept(self, path: AnyPath, found: TrainState) -> bool:
        """Whether an intact checkpoint may be read over the module's memory; if so, its states are consumed."""
        if self.other_job(found, path):
            return False
        self._consume()
        return True

    def _consume(self) -> None:
        if self.home is not None:
            self.home.end("ft.resume_or", *FIELDS)

    def other_job(self, found: TrainState, path: AnyPath) -> str | None:
        """What says that a checkpoint is of another job than the fresh state; values do not matter."""
        if found.seed != self.seed:
            return f"{path}: seed is {found.seed}, this run has {self.seed}; a resumed run keeps its seed"
        for field, want in self.tensors.items():
            if problems := list(_differences(field, getattr(found, field), want)):
                return f"{path / MODEL}: of another model:\n  " + "\n  ".join(problems)
        if unknown := sorted(found.opt_state.keys() - self.tensors["params"].keys()):
            return f"{path / TRAIN}: opt_state is of parameters the model does not have: {unknown}"
        return None

    def filled(self, found: TrainState) -> TrainState:
        """The loaded state on the module's memory, or on new memory with the devices and layouts of the fresh state."""
        self._consume()
        put = _laid_out if self.home is None else copied
        fields: dict[str, Any] = {}
        for field, want in self.tensors.items():
            have = getattr(found, field)
            fields[field] = {name: put(tensor, have[name]) for name, tensor in want.items()}
        if self.home is None:
            return found.replace(**fields)
        fields["opt_state"] = dict(found.opt_state)
        return found.replace(**{field: Leased(fields[field], self.home, field, found.step) for field in fields})


def _laid_out(want: Tensor, have: Tensor) -> Tensor:
    """A copy of a tensor that was read, in new memory with the device and layout of the wanted one."""
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
            ours, theirs = (f"{tuple(one[name].shape)} {one[name].dtype}" for one in (want, have))
            yield f"{path}: checkpoint has {theirs}, model has {ours}"
