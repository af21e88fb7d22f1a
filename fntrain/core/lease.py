"""Leases: a state whose tensors are a module's own memory may be read until a step writes there.

`init_state` and steps run in place hand their tensors out as `Leased` mappings. The lease of all of them ends at the
next write to that memory; from then on any access says so, where a bare alias would silently hold other values.
"""

from collections.abc import Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from torch import nn

from fntrain.core.errors import StateConsumedError

_homes: "WeakValueDictionary[tuple[tuple[str, int], ...], Home]" = WeakValueDictionary()


FIELDS = ("params", "buffers", "opt_state")


class Lease:
    """What several mappings share; `ended` names what wrote to their memory, None while nothing did."""

    ended: str | None = None


class Home:
    """The memory of one module: who runs in place there, and the leases of the states that share it now.

    Modules that share some parameters only (heads on one backbone) have homes of their own, which know each other.
    """

    __slots__ = ("__weakref__", "binder", "leases", "neighbours", "params", "writer")

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self.params = {id(param): param for param in params.values()}  # kept, so that their ids stay taken
        self.leases = {field: Lease() for field in FIELDS}
        self.writer: Any = None  # a weak reference to the step that runs in place
        self.binder: Any = None  # how a state is lent to a module that is split over ranks
        self.neighbours: WeakSet[Home] = WeakSet(
            home for home in list(_homes.values()) if home.params.keys() & self.params.keys()
        )
        for home in self.neighbours:
            home.neighbours.add(self)

    @classmethod
    def of(cls, params: Mapping[str, nn.Parameter]) -> "Home":
        """The home of a module with these parameters; the same one as long as any state or step holds it."""
        key = tuple((name, id(param)) for name, param in params.items())
        home = _homes.get(key)
        if home is None:
            home = _homes[key] = cls(params)
        return home

    def join(self, other: "Home") -> None:
        """Declare two homes one memory: what ends leases of one ends those of the other."""
        both = self.params | other.params
        for one, neighbour in ((self, other), (other, self)):
            one.params = both
            one.neighbours.add(neighbour)

    @property
    def writers(self) -> list[Any]:
        """The steps that run in place on this memory, or on part of it."""
        found = [home.writer and home.writer() for home in (self, *self.neighbours)]
        return [one for one in found if one is not None]

    def leased(self, mapping: Any, field: str) -> bool:
        """Whether a state's mapping is this memory as it is now."""
        return type(mapping) is Leased and mapping.lease is self.leases[field]

    def end(self, reason: str, *fields: str, written: Collection[nn.Parameter] | None = None) -> None:
        """Declare these fields of all states that share the memory consumed, and begin new leases.

        States of a neighbour stay valid if none of its parameters is `written`; optimizer state is never shared.
        """
        homes = [self]
        if self.neighbours:
            ids = self.params.keys() if written is None else set(map(id, written))
            homes += [home for home in self.neighbours if ids & home.params.keys()]
        for home in homes:
            for field in fields:
                if home is self or field != "opt_state":
                    home.leases[field].ended = reason
                    home.leases[field] = Lease()


class Leased(Mapping[str, Any]):
    """A mapping that can be read while its lease lasts.

    Raises:
      StateConsumedError: on every access after the memory was written to.
    Example:
      >>> model = nn.Linear(1, 1)
      >>> home = Home.of(dict(model.named_parameters()))
      >>> params = Leased(dict(model.named_parameters()), home, "params", step=0)
      >>> home.end("step 1", "params")
      >>> params["weight"]
      Traceback (most recent call last):
      fntrain.StateConsumedError: the state of step 0 was consumed by step 1, which wrote to its memory; ...
    """

    __slots__ = ("home", "lease", "step", "tensors")

    def __init__(self, tensors: dict[str, Any], home: Home, field: str, step: int) -> None:
        self.tensors = tensors
        self.home = home  # kept alive by the states that share its memory
        self.lease = home.leases[field]
        self.step = step

    @property
    def open(self) -> bool:
        """Whether the lease lasts."""
        return self.lease.ended is None

    def _open(self) -> dict[str, Any]:
        if self.lease.ended is not None:
            raise StateConsumedError(
                f"the state of step {self.step} was consumed by {self.lease.ended}, which wrote to its memory; keep "
                "what you need with ft.snapshot(state) before the next step, or run the pure step"
            )
        return self.tensors

    def __getitem__(self, name: str) -> Any:
        return self._open()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open())

    def __len__(self) -> int:
        return len(self._open())

    def keys(self) -> KeysView[str]:
        return self._open().keys()

    def values(self) -> ValuesView[Any]:
        return self._open().values()

    def items(self) -> ItemsView[str, Any]:
        return self._open().items()

    def __repr__(self) -> str:
        return repr(self.tensors) if self.lease.ended is None else f"<consumed by {self.lease.ended}>"
