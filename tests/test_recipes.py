"""The recipes and the README's examples run as printed, on real data."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import attrs

import fntrain as ft

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))


def python(*args, cwd, **kwargs):
    return subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, check=True, capture_output=True, text=True, **kwargs
    )


def test_the_readme_example_runs_as_printed(tmp_path):
    """Pasted into a file it trains; run again it resumes and has nothing left to do."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    (tmp_path / "example.py").write_text(example)
    first = python("example.py", cwd=tmp_path)
    assert "step 1000/1000" in first.stdout
    assert "step 50/1000" not in python("example.py", cwd=tmp_path).stdout


def test_digits_reaches_its_accuracy(tmp_path):
    """The recipe as it stands reaches 98.5% on the test digits."""
    import digits

    config = attrs.evolve(digits.recipe.config, output_dir=str(tmp_path))
    assert ft.run(digits.recipe, config).state.hooks["best"] >= 0.985


def test_digits_killed_half_way_ends_with_the_same_bits(tmp_path):
    """SIGKILL in the middle, the same command again: bitwise the weights of a run that was never stopped."""
    steps = ["--max-steps", "240", "--checkpoint-every", "20", "--warmup-steps", "16"]
    whole = python(ROOT / "recipes/digits.py", *steps, "--output-dir", "whole", cwd=tmp_path).stdout.splitlines()[-1]
    command = [sys.executable, str(ROOT / "recipes/digits.py"), *steps, "--output-dir", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while ft.latest(tmp_path / "killed") is None or ft.latest(tmp_path / "killed").name < "step_00000080":
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert ft.latest(tmp_path / "killed").name < "step_00000240"
    assert python(*command[1:], cwd=tmp_path).stdout.splitlines()[-1] == whole
    rows = [line.split(",")[0] for line in (tmp_path / "killed/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(set(rows))


def test_the_raw_loop_has_the_losses_of_the_recipe():
    """recipes/plain_train.py, at most 100 lines without the fold, gives every loss of recipes/digits.py, bit for bit."""
    import digits
    import plain_train

    _, by_hand = plain_train.train(20, report_every=1000)
    config = attrs.evolve(digits.recipe.config, max_steps=20, warmup_steps=20 // 15)
    job = ft.build(digits.recipe, config)
    run = ft.states(job.step_fn, state=job.state, data=job.data, max_steps=20)
    assert [state.metrics["loss"].item() for state in run] == by_hand
    assert len((ROOT / "recipes/plain_train.py").read_text().splitlines()) <= 100


def test_recipes_do_not_import_each_other():
    """Each recipe is a file to copy."""
    names = [path.stem for path in (ROOT / "recipes").glob("*.py")]
    for path in (ROOT / "recipes").glob("*.py"):
        assert not re.search(rf"^(import|from) ({'|'.join(names)})\b", path.read_text(), re.MULTILINE)
