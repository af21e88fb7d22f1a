"""What became of every name when weights were loaded, and which rename would have matched more."""

from collections import Counter
from collections.abc import Collection, Iterator

import attrs

_WRAPPERS = {
    "module.": " (DataParallel and DistributedDataParallel put it there)",
    "_orig_mod.": " (torch.compile puts it there)",
}


@attrs.frozen(kw_only=True)
class Mismatch:
    """A name that both the file and the module have, and why the file's tensor does not fit the module's."""

    name: str
    reason: str


@attrs.frozen(kw_only=True, repr=False)
class LoadReport:
    """What became of every name; printing it says so.

    Args:
      matched: the module's names that were written; a tied weight once, under its first name.
      missing: the module's names that the file does not have: they keep their values.
      unexpected: names of the file that the module does not have.
      mismatched: names of both with another shape, or a dtype that is not converted: they keep their values.
      converted: those of `matched` whose dtype in the file was another.
      dropped: names of the file for which `rename` returned None.
      hint: a `rename` that would match more, or None.
    Example:
      >>> LoadReport(matched=("fc.weight",), missing=("fc.bias",))
      LoadReport: 1 matched, 1 missing, 0 unexpected, 0 mismatched
        missing     fc.bias
    """

    matched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    converted: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    hint: str | None = None

    def __repr__(self) -> str:
        return self.text(most=10)

    def text(self, most: int | None = None) -> str:
        """Return a readable form, with at most so many names of each kind."""
        counts = [f"{len(self._lines(kind))} {kind}" for kind in ("matched", "missing", "unexpected", "mismatched")]
        counts += [f"{len(self._lines(kind))} {kind}" for kind in ("converted", "dropped") if self._lines(kind)]
        lines = ["LoadReport: " + ", ".join(counts)]
        for kind in ("missing", "unexpected", "mismatched"):
            names = self._lines(kind)
            lines += [f"  {kind:<10}  {name}" for name in names[:most]]
            if most is not None and len(names) > most:
                lines.append(f"  {kind:<10}  ... and {len(names) - most} more")
        return "\n".join(lines + ([f"  hint: {self.hint}"] if self.hint else []))

    def _lines(self, kind: str) -> list[str]:
        return [f"{one.name}: {one.reason}" if isinstance(one, Mismatch) else one for one in getattr(self, kind)]


def rename_hint(missing: Collection[str], unexpected: Collection[str]) -> str | None:
    """Return in words the rename under which most of the unexpected names would be missing ones, or None.

    Example:
      >>> rename_hint(missing=["fc.bias"], unexpected=["net.fc.bias"])
      "the file's names begin with 'net.': rename=lambda name: name.removeprefix('net.')"
    """
    wanted, given = set(missing), set(unexpected)
    surplus = Counter(prefix for name in given for prefix, rest in _splits(name) if rest in wanted)
    lacking = Counter(prefix for name in wanted for prefix, rest in _splits(name) if rest in given)
    if surplus and surplus.most_common(1)[0][1] >= max(lacking.values(), default=0):
        prefix = _most(surplus)
        why = "".join(text for wrapper, text in _WRAPPERS.items() if wrapper in prefix)
        return f"the file's names begin with {prefix!r}{why}: rename=lambda name: name.removeprefix({prefix!r})"
    if lacking:
        prefix = _most(lacking)
        if prefix == "module.":
            return f"the module's names begin with 'module.'{_WRAPPERS[prefix]}: give model.module"
        return f"the module's names begin with {prefix!r}: rename=lambda name: {prefix!r} + name"
    if any("_orig_mod." in name and name.replace("_orig_mod.", "") in wanted for name in given):
        why = _WRAPPERS["_orig_mod."]
        return f"the file's names have '_orig_mod.' in them{why}: rename=lambda name: name.replace('_orig_mod.', '')"
    return None


def _most(counts: Counter[str]) -> str:
    """The prefix that fits most names; among equals the first in the alphabet, so that the hint is always the same."""
    return min(counts, key=lambda prefix: (-counts[prefix], prefix))


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to split a name behind a dot: the prefix, and the rest."""
    parts = name.split(".")
    for index in range(1, len(parts)):
        yield ".".join(parts[:index]) + ".", ".".join(parts[index:])
