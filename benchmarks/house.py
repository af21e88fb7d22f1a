"""How large are the files of fntrain, what must a reader hold to read one, and which packages import which?

    python benchmarks/house.py [TREE] [--files] [--arrows] [--check]

TREE is a checkout, a directory that holds `fntrain/`. Nothing of it is imported: ast and tokenize read the sources.

- code: lines that are not blank, not a comment alone, and not part of a docstring. Comments: the lines that are a
  comment alone. Comments per 100 lines of code count those at the end of a line too.
- body: the lines of a def after its docstring, blank lines and nested defs included; p90 is the nearest rank.
- names: what a file imports from fntrain, the functions and classes it defines, and the fields of its classes, each
  distinct name once. The `__init__.py` files, which only list names, do not count towards a maximum.
- arrows: the modules that imports name, one per statement and module. What a string names (`fntrain.lazy`) is no arrow.
"""

import argparse
import ast
import io
import math
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

NAME = "fntrain"
KINDS = ("module", "function", "type")
Kind = Literal["module", "function", "type"]
Def = ast.FunctionDef | ast.AsyncFunctionDef

# Importer: what it may import besides itself. The parts of shell/ share one row.
ALLOWED: dict[str, set[str]] = {
    # The names for users, and the command line.
    "fntrain": {
        "jobs", "hooks", "shell", "evaluation", "steps", "data", "core", "events", "metrics", "schedules", "writers",
        "testing", "lazy",
    },
    # Whole runs from one config: may import everything but the facade above.
    "jobs": {
        "hooks", "shell", "evaluation", "steps", "data", "core", "events", "metrics", "schedules", "writers", "testing",
        "lazy",
    },
    # What happens around the fold: nothing below imports them.
    "hooks": {"shell", "evaluation", "steps", "data", "core", "events", "metrics", "schedules", "writers", "lazy"},
    # The world outside: disks, processes, devices.
    "shell": {"evaluation", "steps", "data", "core", "events", "metrics", "schedules", "writers", "lazy"},
    # A fold over data that trains nothing.
    "evaluation": {"steps", "data", "core", "events", "metrics"},
    # What one step does.
    "steps": {"core", "events", "metrics"},
    # Batches in a reproducible order.
    "data": {"core"},
    # Values on their way from a step to a writer.
    "events": {"core", "metrics"},
    # How the values of a metric combine, over micro-batches and ranks.
    "metrics": {"core"},
    # Numbers as functions of the step.
    "schedules": {"core"},
    # Where events end up.
    "writers": {"core", "events", "metrics", "lazy"},
    # What the tests of users call.
    "testing": {"core", "steps", "data", "evaluation", "shell"},
    # How a package exports names whose modules are imported on first use.
    "lazy": set(),
    # The fold and its records.
    "core": set(),
}  # fmt: skip

PURE = (
    "core/",
    "steps/",
    "data/order.py",
    "data/combine.py",
    "schedules.py",
    "metrics.py",
    "events.py",
    "evaluation.py",
)
IMPURE = (
    "os", "time", "logging", "torch.distributed", "tensorboard", "torch.utils.tensorboard",
    "fntrain.shell", "fntrain.hooks", "fntrain.jobs",
)  # fmt: skip

MAX_CORE_LINES = 1500
MAX_FILE_LINES = 320
MAX_NAMES = {"core": 45, "steps": 45}
MAX_OTHER_NAMES = 55
MAX_BODY_P90 = 16
MAX_PARAMETERS = 7


@dataclass(frozen=True)
class Source:
    """One file: its path under the package, the dotted name of its module, its text, parsed."""

    path: Path
    module: str
    text: str
    node: ast.Module

    @property
    def facade(self) -> bool:
        return self.path.name == "__init__.py"


@dataclass(frozen=True)
class Import:
    """One module of the project that a statement imports, both by dotted names; kind says when it is imported."""

    importer: str
    imported: str
    line: int
    kind: Kind


@dataclass(frozen=True)
class Size:
    """The measures of one file."""

    path: str
    package: str
    facade: bool
    lines: int
    code: int
    docs: int
    comment_lines: int
    comments: int
    bodies: tuple[int, ...]
    long_signatures: int
    names: int


@dataclass(frozen=True)
class Verdict:
    """One measure against its limit, and what is over."""

    what: str
    limit: str
    over: list[str]


def package_root(tree: Path) -> Path:
    """The package of a checkout; the package itself will do too."""
    return tree / NAME if (tree / NAME).is_dir() else tree


def module_name(path: Path) -> str:
    parts = (NAME, *path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read(tree: Path) -> list[Source]:
    root = package_root(tree)
    sources = []
    for file in sorted(root.rglob("*.py")):
        text, path = file.read_text(encoding="utf-8"), file.relative_to(root)
        sources.append(Source(path, module_name(path), text, ast.parse(text, str(file))))
    return sources


def package(module: str) -> str:
    """What a module counts to: its directory under fntrain, a part of shell/, or itself at the top level."""
    parts = [part for part in module.split(".")[1:] if part != "__main__"]
    return "/".join(parts[: 2 if parts[0] == "shell" else 1]) if parts else NAME


def allowed(importer: str, imported: str) -> bool:
    """May one package import the other? A package without a row may neither import nor be imported."""
    row, column = importer.split("/")[0], imported.split("/")[0]
    return row in ALLOWED and (row == column or column in ALLOWED[row])


# Imports


def import_statements(
    nodes: Iterable[ast.AST], kind: Kind = "module"
) -> Iterator[tuple[ast.Import | ast.ImportFrom, Kind]]:
    """All of them, however deep, each with its kind."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, kind
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from import_statements(node.body, "type")
            yield from import_statements(node.orelse, kind)
        else:
            inside: Kind = "function" if isinstance(node, Def) and kind == "module" else kind
            yield from import_statements(ast.iter_child_nodes(node), inside)


def origin(node: ast.ImportFrom, source: Source) -> str:
    """The module that `from` names, dots at its start resolved."""
    if not node.level:
        return node.module or ""
    above = source.module.split(".")
    above = above[: len(above) - node.level + source.facade]
    return ".".join([*above, *([node.module] if node.module else [])])


def targets(node: ast.Import | ast.ImportFrom, source: Source) -> list[str]:
    """The dotted names of all that a statement imports: modules, or things in modules."""
    start = f"{origin(node, source)}." if isinstance(node, ast.ImportFrom) else ""
    return [start + alias.name for alias in node.names]


def within(target: str, names: Iterable[str]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in names)


def imports_of(source: Source, modules: set[str]) -> Iterator[Import]:
    for node, kind in import_statements([source.node]):
        ours = [target for target in targets(node, source) if within(target, [NAME])]
        for module in dict.fromkeys(t if t in modules else t.rpartition(".")[0] for t in ours):
            yield Import(source.module, module, node.lineno, kind)


def imports(tree: Path) -> list[Import]:
    """All imports of the project's own modules, those within a package included."""
    sources = read(tree)
    modules = {source.module for source in sources}
    return [one for source in sources for one in imports_of(source, modules)]


def arrows(found: Iterable[Import]) -> dict[tuple[str, str], Counter[str]]:
    """How often one package imports another, by kind."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for one in found:
        arrow = package(one.importer), package(one.imported)
        if arrow[0] != arrow[1]:
            counts.setdefault(arrow, Counter())[one.kind] += 1
    return dict(sorted(counts.items()))


def impurities(sources: Iterable[Source]) -> list[str]:
    """Imports of the outside world in files that should know nothing of it."""
    return [
        f"{source.path}:{node.lineno} imports {target} ({kind})"
        for source in sources
        if source.path.as_posix().startswith(PURE)
        for node, kind in import_statements([source.node])
        for target in targets(node, source)
        if within(target, IMPURE)
    ]


# Lines


def docstring(node: ast.AST) -> ast.Expr | None:
    """The statement that is a node's docstring."""
    if not isinstance(node, ast.Module | ast.ClassDef | Def) or not node.body:
        return None
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return first
    return None


def span(node: ast.expr | ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def docstring_lines(tree: ast.Module) -> set[int]:
    return {line for node in ast.walk(tree) if (doc := docstring(node)) for line in span(doc)}


def comment_starts(text: str) -> list[tuple[int, bool]]:
    """The line of every comment, and whether it stands there alone."""
    lines, tokens = list(io.StringIO(text)), tokenize.generate_tokens(io.StringIO(text).readline)
    starts = [token.start for token in tokens if token.type == tokenize.COMMENT]
    return [(row, not lines[row - 1][:column].strip()) for row, column in starts]


def body_lines(node: Def) -> int:
    end = node.end_lineno or node.lineno
    if doc := docstring(node):
        return end - span(doc)[-1]
    first = node.body[0]
    decorators = first.decorator_list if isinstance(first, Def | ast.ClassDef) else []
    return end - min([first.lineno, *(one.lineno for one in decorators)]) + 1


def parameters(node: Def) -> int:
    """How many parameters a def has, `*args` and `**kwargs` included, self and cls left out."""
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    own = bool(positional) and positional[0].arg in ("self", "cls")
    return len(positional) - own + len(args.kwonlyargs) + bool(args.vararg) + bool(args.kwarg)


# Names


def imported_names(source: Source) -> set[str]:
    """What the imports from the project are called in the file."""
    return {
        alias.asname or alias.name
        for node, _ in import_statements([source.node])
        for alias, target in zip(node.names, targets(node, source), strict=True)
        if within(target, [NAME])
    }


def attributes(init: Def) -> set[str]:
    """What `__init__` assigns to self."""
    if not (positional := [*init.args.posonlyargs, *init.args.args]):
        return set()
    own = positional[0].arg
    stored = [node for node in ast.walk(init) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == own}


def fields(node: ast.ClassDef) -> set[str]:
    names: set[str] = set()
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names.add(statement.target.id)
        elif isinstance(statement, Def) and statement.name == "__init__":
            names |= attributes(statement)
    return names


def names(source: Source) -> set[str]:
    """What a reader must hold to read the file."""
    nodes = list(ast.walk(source.node))
    defined = {node.name for node in nodes if isinstance(node, Def | ast.ClassDef)}
    return imported_names(source).union(defined, *(fields(node) for node in nodes if isinstance(node, ast.ClassDef)))


def measure(source: Source) -> Size:
    lines = list(io.StringIO(source.text))
    docs, comments = docstring_lines(source.node), comment_starts(source.text)
    alone = {line for line, whole in comments if whole}
    defs = [node for node in ast.walk(source.node) if isinstance(node, Def)]
    return Size(
        path=source.path.as_posix(),
        package=package(source.module),
        facade=source.facade,
        lines=len(lines),
        code=sum(bool(line.strip()) and n not in docs and n not in alone for n, line in enumerate(lines, start=1)),
        docs=len(docs),
        comment_lines=len(alone),
        comments=len(comments),
        bodies=tuple(body_lines(node) for node in defs),
        long_signatures=sum(parameters(node) > MAX_PARAMETERS for node in defs),
        names=len(names(source)),
    )


# What is printed


def p90(values: Iterable[int]) -> int:
    ordered = sorted(values)
    return ordered[math.ceil(0.9 * len(ordered)) - 1] if ordered else 0


def bodies(sizes: Iterable[Size]) -> list[int]:
    return [body for size in sizes for body in size.bodies]


def total(sizes: Iterable[Size], field: Callable[[Size], int]) -> int:
    return sum(map(field, sizes))


def names_limit(size: Size) -> int:
    return MAX_NAMES.get(size.package, MAX_OTHER_NAMES)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table with columns that line up, the first to the left, the others to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [
        [one[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(one[1:], widths[1:], strict=True))] for one in cells
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLUMNS = (
    "lines", "code", "docstrings", "comments", "per 100", "defs", "body median", "p90", "max",
    f">{MAX_PARAMETERS} params", "names",
)  # fmt: skip


def cells(sizes: list[Size]) -> list[str]:
    """The columns for one file or several; of several, the most names that one of them has."""
    code, lengths = total(sizes, lambda size: size.code), bodies(sizes)
    counted = sizes if len(sizes) == 1 else [size for size in sizes if not size.facade]
    return [
        f"{total(sizes, lambda size: size.lines):,}",
        f"{code:,}",
        f"{total(sizes, lambda size: size.docs):,}",
        f"{total(sizes, lambda size: size.comment_lines):,}",
        f"{100 * total(sizes, lambda size: size.comments) / code:.1f}" if code else "-",
        f"{len(lengths):,}",
        *([f"{median(lengths):g}", f"{p90(lengths)}", f"{max(lengths)}"] if lengths else ["-"] * 3),
        str(total(sizes, lambda size: size.long_signatures)),
        str(max((size.names for size in counted), default=0)),
    ]


def package_table(sizes: list[Size]) -> str:
    groups: dict[str, list[Size]] = {}
    for size in sizes:
        groups.setdefault(size.package, []).append(size)
    rows = [[name, str(len(group)), *cells(group)] for name, group in sorted(groups.items())]
    return table(["package", "files", *COLUMNS], [*rows, ["total", str(len(sizes)), *cells(sizes)]])


def file_table(sizes: Iterable[Size]) -> str:
    return table(["file", *COLUMNS], ([size.path, *cells([size])] for size in sizes))


def arrow_table(counts: dict[tuple[str, str], Counter[str]]) -> str:
    header = ["importer -> imported", "count", "at import time", "inside functions", "for types only", "allowed"]
    return table(
        header,
        (
            [
                " -> ".join(arrow),
                str(kinds.total()),
                *(str(kinds[kind]) for kind in KINDS),
                "" if allowed(*arrow) else "NO",
            ]
            for arrow, kinds in counts.items()
        ),
    )


def known(arrow: tuple[str, str]) -> bool:
    return all(name.split("/")[0] in ALLOWED for name in arrow)


def size_verdicts(sizes: list[Size]) -> list[Verdict]:
    core, all_p90 = [size for size in sizes if size.package == "core"], p90(bodies(sizes))
    core_lines = total(core, lambda size: size.lines)
    named = [size for size in sizes if not size.facade]
    core_over = core_lines > MAX_CORE_LINES
    return [
        Verdict("core/", f"{MAX_CORE_LINES} lines", [f"core/: {core_lines}"] if core_over else []),
        Verdict(
            "every file",
            f"{MAX_FILE_LINES} lines",
            [f"{size.path}: {size.lines}" for size in sizes if size.lines > MAX_FILE_LINES],
        ),
        Verdict(
            "names in a file",
            f"{', '.join(f'{limit} in {name}/' for name, limit in MAX_NAMES.items())}, {MAX_OTHER_NAMES} elsewhere",
            [f"{size.path}: {size.names} (of {names_limit(size)})" for size in named if size.names > names_limit(size)],
        ),
        Verdict("p90 of bodies", f"{MAX_BODY_P90} lines", [f"all files: {all_p90}"] if all_p90 > MAX_BODY_P90 else []),
    ]


def places(found: Iterable[Import], arrow: tuple[str, str]) -> str:
    those = (one for one in found if (package(one.importer), package(one.imported)) == arrow)
    return ", ".join(f"{one.importer}:{one.line}" for one in those)


def import_verdicts(sources: list[Source], found: list[Import]) -> list[Verdict]:
    """Arrows that are not allowed, packages that ALLOWED does not know, and impure imports: none of each."""
    counts = arrows(found)
    strangers = sorted({package(source.module) for source in sources if not known((NAME, package(source.module)))})
    refused = [
        f"{' -> '.join(arrow)} ({', '.join(f'{kind} {n}' for kind, n in kinds.items())}): {places(found, arrow)}"
        for arrow, kinds in counts.items()
        if known(arrow) and not allowed(*arrow)
    ]
    return [
        Verdict("arrows not allowed", "0", refused),
        Verdict("packages without a row in ALLOWED", "0", strangers),
        Verdict("impure imports in pure files", "0", impurities(sources)),
    ]


def summary(verdicts: Iterable[Verdict]) -> str:
    lines = []
    for verdict in verdicts:
        found = f"OVER ({len(verdict.over)})" if verdict.over else "ok"
        lines += [f"- {verdict.what}, at most {verdict.limit}: {found}", *(f"    {one}" for one in verdict.over)]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--files", action="store_true", help="print the table per file too")
    parser.add_argument("--arrows", action="store_true", help="print all arrows between packages too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if something is over its limit")
    args = parser.parse_args()
    if not (sources := read(args.tree)):
        parser.error(f"no Python files under {package_root(args.tree)}")
    sizes, found = [measure(source) for source in sources], imports(args.tree)
    verdicts = [*size_verdicts(sizes), *import_verdicts(sources, found)]
    print(f"# {package_root(args.tree)}\n\n{package_table(sizes)}\n")
    if args.files:
        print(f"## Files\n\n{file_table(sizes)}\n")
    if args.arrows:
        print(f"## Arrows\n\n{arrow_table(arrows(found))}\n")
    largest = sorted(sizes, key=lambda size: -size.lines)[:10]
    print("## Largest files\n\n" + "\n".join(f"- {s.path}: {s.lines} lines, {s.names} names" for s in largest))
    print(f"\n## Limits\n\n{summary(verdicts)}")
    print(f"- code lines in total: {total(sizes, lambda size: size.code):,}")
    return int(args.check and any(verdict.over for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
