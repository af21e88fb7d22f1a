"""The command line, `python -m fntrain`: look into checkpoints and safetensors files, compare, verify and export them.

Exit status: 0; 1 where `diff` finds a difference or `verify` damage; 2 for an error, which stderr names.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import attrs

from fntrain.core.errors import FntrainError
from fntrain.shell.weights import inspect
from fntrain.shell.weights.export import export
from fntrain.shell.weights.files import read_weights

_PATH = (
    "a checkpoint, a directory of them (the newest counts), a safetensors file, an index of several, or their directory"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed; the interpreter must not flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (FntrainError, OSError) as error:
        print(f"fntrain {options.command}: {error}", file=sys.stderr)
        return 2
    return status


def _inspect(options: argparse.Namespace) -> int:
    path = inspect.source(options.path)
    leaves = inspect.summaries(path)
    if options.json:
        _print_json({"path": str(path), "leaves": [attrs.asdict(leaf) for leaf in leaves]})
        return 0
    print(path)
    rows = [
        (leaf.leaf, str(leaf.shape), leaf.dtype, f"{leaf.bytes:,}", _norm(leaf))
        if leaf.shape is not None
        else (leaf.leaf, "", leaf.dtype, "", _shortened(leaf.value))
        for leaf in leaves
    ]
    _print_table(("leaf", "shape", "dtype", "bytes", "norm or value"), rows, right=(3, 4))
    tensors = [leaf for leaf in leaves if leaf.shape is not None]
    numbers, size = sum(math.prod(leaf.shape or ()) for leaf in tensors), sum(leaf.bytes for leaf in tensors)
    print(f"{len(leaves)} leaves, {len(tensors)} tensors, {numbers:,} numbers, {size:,} bytes")
    return 0


def _diff(options: argparse.Namespace) -> int:
    a, b = inspect.source(options.a), inspect.source(options.b)
    found = inspect.differences(a, b)
    if options.json:
        _print_json({"a": str(a), "b": str(b), "equal": not found, "differences": [attrs.asdict(one) for one in found]})
        return int(bool(found))
    print(f"{a}\n{b}")
    if not found:
        print("bitwise equal")
        return 0
    blank = ""
    rows = [
        (one.leaf, blank if one.max_abs is None else f"{one.max_abs:.6g}", _count(one.ulp), one.reason) for one in found
    ]
    _print_table(("leaf", "max abs", "ulp", "what differs"), rows, right=(1, 2))
    print(f"{len(found)} leaves differ")
    return 1


def _verify(options: argparse.Namespace) -> int:
    verdicts = inspect.verify(options.directory)
    if options.json:
        _print_json([{"path": str(one.path), "problem": one.problem} for one in verdicts])
    else:
        for one in verdicts:
            print(f"{one.path.name}: " + ("intact" if one.problem is None else f"damaged: {one.problem}"))
    return int(any(one.problem is not None for one in verdicts))


def _export(options: argparse.Namespace) -> int:
    path = inspect.source(options.path)
    tensors = read_weights(path)
    out = export(tensors, options.out)
    if options.json:
        _print_json({"path": str(path), "out": str(out), "tensors": len(tensors), "bytes": out.stat().st_size})
    else:
        print(f"{out}: {len(tensors)} tensors of {path}, {out.stat().st_size:,} bytes")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fntrain", description="Look into checkpoints and weights.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command = _command(commands, "inspect", _inspect, "list every leaf: shape, dtype, bytes, norm")
    command.add_argument("path", help=_PATH)
    command = _command(commands, "diff", _diff, "list the leaves that differ, by how much; exit status 1 if any does")
    command.add_argument("a", help=_PATH)
    command.add_argument("b", help="likewise; of a checkpoint beside other files only the model is compared")
    command = _command(commands, "verify", _verify, "read every byte of every checkpoint; exit status 1 on damage")
    command.add_argument("directory", help="a directory of checkpoints, or one checkpoint")
    command = _command(commands, "export", _export, "write parameters and buffers to one safetensors file")
    command.add_argument("path", help=_PATH)
    command.add_argument("out", help="the file to write")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.add_argument("--json", action="store_true", help="print JSON for machines")
    command.set_defaults(run=run)
    return command


def _norm(leaf: inspect.LeafSummary) -> str:
    if leaf.norm is None:
        return ""
    return f"{leaf.norm:.6g}" + (f" ({leaf.nonfinite:,} inf or nan)" if leaf.nonfinite else "")


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...]) -> None:
    """Columns as wide as their widest entry, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            text.rjust(w) if i in right else text.ljust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _print_json(value: Any) -> None:
    """JSON has no inf and nan: they are the words "inf", "-inf" and "nan"."""
    print(json.dumps(_finite(value), allow_nan=False, indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
