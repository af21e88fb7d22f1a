"""The package as a whole: what it imports, exports and promises."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import fntrain as ft
import fntrain.testing

ROOT = pathlib.Path(ft.__file__).parent
FORBIDDEN = re.compile(
    r"(os|time|logging|torch\.distributed|tensorboard|torch\.utils\.tensorboard|fntrain\.shell)(\.|$)"
)
PURE = [
    path
    for path in ROOT.glob("*.py")
    if path.name not in ("__init__.py", "__main__.py", "testing.py", "recipe.py", "cli.py", "predictor.py", "worker.py")
]


def imports(source):
    """Every module a source imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.name)
def test_the_pure_ring_imports_no_effects(path):
    """Neither os, time, logging, torch.distributed, tensorboard nor the shell."""
    assert [name for name in imports(path.read_text()) if FORBIDDEN.match(name)] == []


def test_the_import_check_can_fail():
    """It sees imports in functions and of sub-modules."""
    source = "def f():\n    import os.path\n    from torch import distributed\n"
    assert len([name for name in imports(source) if FORBIDDEN.match(name)]) == 2


def test_imports_are_the_five_packages():
    """Outside the standard library: torch, attrs, toolz, safetensors, tensorboard; extras only inside functions."""
    extras = {"fsspec", "isal", "mlflow", "tqdm", "trackio", "tyro", "wandb"}
    allowed = {"torch", "attrs", "toolz", "safetensors", "tensorboard", "fntrain"} | extras
    for path in ROOT.rglob("*.py"):
        roots = {name.partition(".")[0] for name in imports(path.read_text())}
        assert roots - set(sys.stdlib_module_names) <= allowed, path


PUBLIC = {f"{m.__name__}.{n}": getattr(m, n) for m in (ft.hooks, ft.writers, ft.schedules, ft.data, ft.testing) for n in getattr(m, "__all__", vars(m)) if not n.startswith("_")}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n for n, f in PUBLIC.items() if inspect.isfunction(f) and f.__module__.startswith("fntrain")]
)
def test_every_public_function_of_a_module_has_an_example(name):
    """hooks, writers, schedules, data and testing document every function with an example that runs."""
    assert ">>>" in inspect.getdoc(PUBLIC[name])


@pytest.mark.parametrize("name", ft.__all__)
def test_every_export_is_documented_with_an_example(name):
    """Functions and records have a docstring; functions and factories an example that runs."""
    thing = getattr(ft, name)
    if inspect.ismodule(thing) or name == "identity":
        return
    if name == "StepFn":
        return
    assert inspect.getdoc(thing), name
    if inspect.isfunction(thing):
        assert ">>>" in inspect.getdoc(thing), name
        assert len(thing.__doc__.splitlines()) <= 36, name


PACKAGES = (ft, ft.shell, ft.writers)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_package_shows_its_exports_and_nothing_else(package):
    """`dir` lists `__all__`, every name of it is there, and any other is an AttributeError."""
    assert dir(package) == sorted(set(package.__all__))
    assert all(hasattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def typed_imports(source):
    """Module -> names of what a source imports for type checkers only."""
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    found = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {node.module: {alias.name for alias in node.names} for node in found}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_type_checkers_see_what_is_imported_on_first_use(package):
    """The same names from the same modules, all of them exports."""
    table = {f"{package.__name__}.{module}": set(names.split()) for module, names in package._ON_FIRST_USE.items()}
    assert typed_imports(pathlib.Path(package.__file__).read_text()) == table
    assert set().union(*table.values()) <= set(package.__all__)


def test_sub_packages_are_there_on_first_use():
    """Before anything else has imported them: in a new process."""
    code = (
        "import fntrain as ft; print(ft.jobs.recipe.__name__, ft.shell.weights.__name__, ft.shell.launching.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["fntrain.jobs.recipe", "fntrain.shell.weights", "fntrain.shell.launching"]


def test_importing_changes_nothing():
    """Logging, environment, generators, default settings and CUDA are as before; what training does not need is not loaded."""
    code = """
import logging, os, sys, torch, types
def facts():
    named = {k: id(v) for k, v in {**vars(torch), **vars(torch.Tensor)}.items() if not isinstance(v, types.ModuleType)}
    return (list(logging.root.handlers), logging.root.level, dict(os.environ), torch.get_rng_state().sum().item(),
            torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.cuda.is_initialized(),
            torch.get_num_threads(), torch.backends.cudnn.benchmark, named)
before, loaded = facts(), set(sys.modules)
import fntrain
after = facts()
if len(sys.argv) > 1:
    torch.Tensor.evil = 1
    after = facts()
assert before == after, [b for a, b in zip(before, after) if a != b]
heavy = {"tensorboard", "torch.utils.tensorboard", "torch.distributed.checkpoint", "tqdm", "sklearn", "wandb", "mlflow", "trackio"}
later = {f"fntrain.shell.launching.{name}" for name in ("launch", "local", "machines", "network")}
later |= {"fntrain.jobs", "fntrain.shell.weights"}
too_early = (heavy | later) & (set(sys.modules) - loaded)
assert not too_early, too_early
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert subprocess.run([sys.executable, "-c", code, "break it"], capture_output=True).returncode == 1


PRINTS = {"__main__.py", "jobs/cli.py", "shell/steps/programs.py", "writers/console.py"}


def calls(source):
    """Every call of a source, as it is written: `print`, `warnings.warn`."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}


def test_what_is_said_goes_by_its_channel():
    """core.errors has the rule: print in few places, one logger, and warnings where there is no log."""
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.rglob("*.py")}
    assert {name for name, source in sources.items() if "print" in calls(source)} <= PRINTS
    loggers = {line for source in sources.values() for line in re.findall(r"getLogger\((.*?)\)", source)}
    assert loggers == {'"fntrain"', ""}  # without a name: setup looks whether the root logger shows it already
    assert "print" in calls("def f():\n    print(1)\n")
