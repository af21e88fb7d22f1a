"""The house: which package imports which, read from the sources; DESIGN's arrows, and no effect in the pure paths."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
house = importlib.util.module_from_spec(spec)
sys.modules["house"] = house  # its records look their module up
spec.loader.exec_module(house)


def refused(tree):
    """The arrows of a tree that ALLOWED does not have."""
    return {arrow for arrow in house.arrows(house.imports(tree)) if not house.allowed(*arrow)}


def test_no_arrow_runs_back():
    """Jobs, hooks, shell, evaluation, steps and data, core: each imports what is below it, nothing above."""
    assert refused(ROOT) == set()


def test_pure_paths_import_no_effects():
    """core, steps, data/order, schedules, events and evaluation know no clocks, files, logs, processes and shell."""
    assert house.impurities(house.read(ROOT)) == []


def in_a_circle(below):
    """The names from which arrows lead back to themselves; `below` has the arrows of each name."""
    reachable = {name: set(near) for name, near in below.items()}
    for _ in reachable:
        for name in reachable:
            reachable[name] |= {far for near in reachable[name] for far in reachable.get(near, ())}
    return {name for name, far in reachable.items() if name in far}


def shell_rooms(tree):
    """The rooms of shell/ (steps, checkpoints, setup ...), and which of them each imports."""
    rooms = {}
    for importer, imported in house.arrows(house.imports(tree)):
        if importer.startswith("shell/") and imported.startswith("shell/"):
            rooms.setdefault(importer.removeprefix("shell/"), set()).add(imported.removeprefix("shell/"))
    return rooms


def test_the_arrows_have_no_circle():
    """Of two packages that ALLOWED lets import each other none is below the other."""
    assert in_a_circle(house.ALLOWED) == set()


def test_the_rooms_of_the_shell_have_no_circle():
    """ALLOWED has one row for all of shell/; among its rooms, too, no arrow runs back."""
    rooms = shell_rooms(ROOT)
    assert {"checkpoints", "distributed", "weights", "setup"} <= rooms.keys()
    assert in_a_circle(rooms) == set()


@pytest.mark.parametrize(
    "line", ["from fntrain.shell.checkpoints import files", "def f():\n    import fntrain.shell.checkpoints.files"]
)
def test_a_circle_among_the_rooms_is_found(tmp_path, line):
    """The one that was there: checkpoints -> distributed -> steps -> checkpoints; setup only looks into it."""
    lines = {
        "checkpoints/files": "from fntrain.shell.distributed.connected import ranks",
        "distributed/connected": "from fntrain.shell.steps.memory import Memory",
        "steps/memory": line,
        "setup": "from fntrain.shell.checkpoints.files import path_of",
    }
    for name, text in lines.items():
        file = tmp_path / "fntrain" / "shell" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert in_a_circle(shell_rooms(tmp_path)) == {"checkpoints", "distributed", "steps"}


@pytest.mark.parametrize(
    ("path", "line", "arrow"),
    [
        ("core/state.py", "from fntrain.steps.batch import Batch", ("core", "steps")),
        ("core/fold.py", "import fntrain.events", ("core", "events")),
        ("steps/body.py", "from fntrain.shell.setup import setup", ("steps", "shell/setup")),
        ("shell/launching/launch.py", "def f():\n    from fntrain.hooks.signal import on_signal", ("shell/launching", "hooks")),
        ("shell/setup.py", "from fntrain.jobs import config", ("shell/setup", "jobs")),
        ("hooks/ema.py", "if TYPE_CHECKING:\n    from fntrain.jobs.recipe import Job", ("hooks", "jobs")),
        ("data/order.py", "from fntrain.steps.batch import num_samples", ("data", "steps")),
        ("writers/jsonl.py", "from fntrain.hooks import ema", ("writers", "hooks")),
    ],
)  # fmt: skip
def test_an_arrow_that_runs_back_is_found(tmp_path, path, line, arrow):
    """At module level, inside a function, and for types only."""
    for name in (
        path,
        "steps/batch.py",
        "events.py",
        "shell/setup.py",
        "hooks/signal.py",
        "hooks/ema.py",
        "jobs/recipe.py",
        "jobs/config.py",
    ):
        file = tmp_path / "fntrain" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    (tmp_path / "fntrain" / path).write_text(line + "\n")
    assert arrow in refused(tmp_path)


@pytest.mark.parametrize(
    "line", ["import os.path", "def f():\n    from torch import distributed", "import time", "import logging"]
)
def test_an_effect_in_a_pure_path_is_found(tmp_path, line):
    """Also inside a function."""
    file = tmp_path / "fntrain" / "core" / "state.py"
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert len(house.impurities(house.read(tmp_path))) == 1
