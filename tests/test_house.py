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


def test_the_arrows_have_no_circle():
    """Of two packages that ALLOWED lets import each other none is below the other."""
    reachable = {name: set(below) for name, below in house.ALLOWED.items()}
    for _ in reachable:
        for name in reachable:
            reachable[name] |= {far for near in reachable[name] for far in reachable[near]}
    assert [name for name, below in reachable.items() if name in below] == []


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
