"""writers.memory: everything kept in memory, for notebooks and tests."""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager

import attrs

from fntrain.writers.history import History
from fntrain.writers.row import Row, WriteRow


@attrs.frozen(eq=False, repr=False)
class Memory:
    """Keeps rows and the values behind them; made by `memory`. It is equal to itself only."""

    rows: list[Row] = attrs.field(factory=list, init=False)
    _values: dict[str, list[tuple[int, float]]] = attrs.field(factory=dict, init=False)

    @contextmanager
    def open(self, start_step: int) -> Iterator[WriteRow]:
        self._forget(start_step)
        yield self._write

    def __getitem__(self, name: str) -> History:
        if name not in self._values:
            raise KeyError(f"{name}: no such metric was written; there are {', '.join(self._values) or 'none'}")
        steps, numbers = zip(*self._values[name], strict=True)
        return History(steps, numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __repr__(self) -> str:
        return f"memory({', '.join(self._values)})"

    def _write(self, row: Row) -> None:
        self._forget(row.valid_step)
        self.rows.append(row)
        for name, value in row.scalars.items():
            values = self._values.setdefault(name, [])
            last = values[-1][0] if values else 0
            gathered = row.histories[name].values() if name in row.histories else [(row.step, value)]
            values.extend(pair for pair in gathered if pair[0] > last)

    def _forget(self, step: int) -> None:
        self.rows[:] = [row for row in self.rows if row.step <= step]
        for name, values in list(self._values.items()):
            del values[bisect_right(values, step, key=lambda pair: pair[0]) :]
            if not values:
                del self._values[name]


def memory() -> Memory:
    """Keep what a run writes, to look at it afterwards: `kept["loss"]` is the `ft.History` of a metric.

    It has every value that a write has read: of a metric shown as a median or mean those of the last `window` steps,
    so of all steps while `window` is at least `every`; of one shown as its latest value the value at each write; of an
    evaluation every result. Steps that were rolled back, or that a resumed run does again, are in it once. The rows as
    other writers get them are in `kept.rows`.

    Example:
      >>> def step_fn(state, batch):
      ...     return state.advance(metrics={"loss": 1 / batch})
      >>> start, kept = ft.TrainState(step=0, position=0, seed=0, params={}), memory()
      >>> _ = ft.fit(step_fn, [ft.hooks.write_metrics(kept)], state=start, data=[1, 2, 4], max_steps=3)
      >>> kept["loss"].values(), kept["loss"].median(20)
      ([(1, 1.0), (2, 0.5), (3, 0.25)], 0.5)

    Source: detectron2's EventStorage
    """
    return Memory()
