"""SIGKILL at any instant of a run that saves every step: what is in view is whole, and no bit of the result differs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIANTS = ("in_place", "pure", "best", "keep_best")


def kill(directory, variants, kills, timeout, seed=0):
    """Run killed.py; returns the newest steps after each kill, for each variant, or what it found wrong."""
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), directory, variants, kills, seed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout, env=environment)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


def test_sigkill_changes_nothing(tmp_path):
    """Killed while it starts, resumes, saves and deletes, the run ends in the bits of the undisturbed one."""
    runs = kill(tmp_path, "in_place,best", 8, timeout=100)
    assert isinstance(runs, list), runs
    assert [len(steps) for steps in runs] == [8, 8]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sigkill_at_many_instants_changes_nothing(tmp_path, variant):
    """The same at 200 instants, half of them drawn in time, half before one of the changes of a directory."""
    runs = kill(tmp_path, variant, 200, timeout=3500)
    assert isinstance(runs, list), runs
    assert [len(steps) for steps in runs] == [200]


def test_the_law_of_sigkill_can_fail(tmp_path):
    """Writing into the visible directory does not survive the kills (it may take a few)."""
    problem = kill(tmp_path, "broken", 100, timeout=100)
    assert isinstance(problem, str)
    assert "state.json: no such file" in problem
