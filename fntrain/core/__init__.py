"""The fold and its words: what every other part of the library is built around.

May import: torch, attrs, toolz, nothing else of fntrain; no clocks, files, logs or processes.
Read first: `state` (the record that a step maps to the next one), then `fold` (the loop), then `hook`.
"""

from fntrain.core import check, errors, fold, gates, hook, lease, ranks, rng, source, state, tree, wrapping

__all__ = [
    "check",
    "errors",
    "fold",
    "gates",
    "hook",
    "lease",
    "ranks",
    "rng",
    "source",
    "state",
    "tree",
    "wrapping",
]
