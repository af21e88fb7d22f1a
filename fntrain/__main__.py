"""The command line, `python -m fntrain`: look into checkpoints and safetensors files, compare, verify and export them.

Exit status: 0; 1 where `diff` finds a difference or `verify` damage; 2 for an error, which stderr names.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs

from fntrain.core.errors import FntrainError
from fntrain.shell.weights import inspect
from fntrain.shell.weights.export import export
from fntrain.shell.weights.files import read_weights

Output = tuple[int, Any, list[str]]  # exit status, what --json prints, lines for people


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    run, *_ = _COMMANDS[options.command]
    try:
        status, facts, lines = run(options)
        # JSON has no inf and nan: they are the words "inf", "-inf" and "nan".
        print(json.dumps(_finite(facts), allow_nan=False, indent=2) if options.json else "\n".join(lines))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed; the interpreter must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (FntrainError, OSError) as error:
        print(f"fntrain {options.command}: {error}", file=sys.stderr)
        return 2
    return status


def _inspect(options: argparse.Namespace) -> Output:
    path = inspect.source(options.path)
    leaves = inspect.summaries(path)
    table = _table(("leaf", "shape", "dtype", "bytes", "norm or value"), map(_cells, leaves), right=(3, 4))
    shapes = [leaf.shape for leaf in leaves if leaf.shape is not None]
    numbers, size = sum(map(math.prod, shapes)), sum(leaf.bytes for leaf in leaves)
    total = f"{len(leaves)} leaves, {len(shapes)} tensors, {numbers:,} numbers, {size:,} bytes"
    facts = {"path": str(path), "leaves": [attrs.asdict(leaf) for leaf in leaves]}
    return 0, facts, [str(path), *table, total]


def _diff(options: argparse.Namespace) -> Output:
    a, b = inspect.source(options.a), inspect.source(options.b)
    found = inspect.differences(a, b)
    facts = {"a": str(a), "b": str(b), "equal": not found, "differences": [attrs.asdict(one) for one in found]}
    if not found:
        return 0, facts, [str(a), str(b), "bitwise equal"]
    rows = [(one.leaf, _text(one.max_abs, ".6g"), _text(one.ulp, ","), one.reason) for one in found]
    table = _table(("leaf", "max abs", "ulp", "what differs"), rows, right=(1, 2))
    return 1, facts, [str(a), str(b), *table, f"{len(found)} leaves differ"]


def _verify(options: argparse.Namespace) -> Output:
    verdicts = inspect.verify(options.directory)
    facts = [{"path": str(one.path), "problem": one.problem} for one in verdicts]
    lines = [f"{one.path.name}: {f'damaged: {one.problem}' if one.problem else 'intact'}" for one in verdicts]
    return int(any(one.problem is not None for one in verdicts)), facts, lines


def _export(options: argparse.Namespace) -> Output:
    path = inspect.source(options.path)
    tensors = read_weights(path)
    out = export(tensors, options.out)
    number, size = len(tensors), out.stat().st_size
    facts = {"path": str(path), "out": str(out), "tensors": number, "bytes": size}
    return 0, facts, [f"{out}: {number} tensors of {path}, {size:,} bytes"]


_PATH = (
    "a checkpoint, a directory of them (the newest counts), a safetensors file, an index of several, or their directory"
)
_OTHER = "likewise; of a checkpoint beside other files only the model is compared"
_DIRECTORY = "a directory of checkpoints, or one checkpoint"
# By name: the function, its help, and the help of its arguments.
_COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Output], str, dict[str, str]]] = {
    "inspect": (_inspect, "list every leaf: shape, dtype, bytes, norm", {"path": _PATH}),
    "diff": (_diff, "list the leaves that differ, by how much; exit status 1 if any does", {"a": _PATH, "b": _OTHER}),
    "verify": (_verify, "read every byte of every checkpoint; exit status 1 on damage", {"directory": _DIRECTORY}),
    "export": (
        _export,
        "write parameters and buffers to one safetensors file",
        {"path": _PATH, "out": "the file to write"},
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fntrain", description="Look into checkpoints and weights.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (_, text, arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print JSON for machines")
        for argument, meaning in arguments.items():
            command.add_argument(argument, help=meaning)
    return parser


def _cells(leaf: inspect.LeafSummary) -> tuple[str, ...]:
    """The row of the table for one leaf: of a tensor with its norm, of anything else with its value."""
    if leaf.shape is None:
        value = repr(leaf.value)
        return leaf.leaf, "", leaf.dtype, "", value if len(value) <= 40 else f"{value[:37]}..."
    nonfinite = f" ({leaf.nonfinite:,} inf or nan)" if leaf.norm is not None and leaf.nonfinite else ""
    return leaf.leaf, str(leaf.shape), leaf.dtype, f"{leaf.bytes:,}", _text(leaf.norm, ".6g") + nonfinite


def _text(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def _table(header: tuple[str, ...], body: Iterable[tuple[str, ...]], *, right: tuple[int, ...]) -> list[str]:
    """Lay out rows in columns as wide as their widest entry, those in `right` flush right."""
    rows = [header, *body]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    forms = [f"{'>' if index in right else '<'}{width}" for index, width in enumerate(widths)]
    return ["  ".join(map(format, row, forms)).rstrip() for row in rows]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
