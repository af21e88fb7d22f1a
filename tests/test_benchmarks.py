"""The scripts of benchmarks/ run, in their smallest form; whether they measure well is for people to judge."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FACTS = {"date", "hardware", "versions", "command"}


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, BENCHMARKS / f"{script}.py", *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)


def written(script: str, file: Path, *args: str) -> dict:
    """The raw numbers of a run that went well, which stand beside the facts that it also prints."""
    result = run(script, *args, "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    assert {line.removeprefix("- ").split(":")[0] for line in result.stdout.splitlines()} >= FACTS
    numbers = json.loads(file.read_text())
    assert numbers.keys() > FACTS
    return numbers


def test_overhead_times_every_section_without_other_libraries(tmp_path):
    options = ["--rounds", "2", "--steps", "4", "--models", "mlp", "--sections", "plain,logs,clips,empty", "--no-peers"]
    times = written("overhead", tmp_path / "times.json", *options)["seconds_per_step"]
    assert list(times) == ["mlp, plain", "mlp, logs", "mlp, clips", "empty"]
    assert {"raw loop", "raw loop, tuned", "ours, pure", "ours, pure, fit, 0 hooks"} <= times["mlp, plain"].keys()
    assert all(len(rounds) == 2 and min(rounds) > 0 for section in times.values() for rounds in section.values())


def test_memory_counts_every_byte(tmp_path):
    used = written("memory", tmp_path / "bytes.json", "--models", "mlp", "--accumulate", "1,2")["bytes"]
    weights = 64 * 64 + 64 + 64 * 10 + 10
    # Parameters, gradients and two moments of 4 bytes each, and a count of 4 bytes for each of 4 parameters.
    assert {name: one["raw loop"]["held"] for name, one in used.items()} == {
        "mlp, accumulate=1": 4 * (4 * weights + 4),
        "mlp, accumulate=2": 4 * (4 * weights + 4),
    }


def test_checkpoint_times_saves_and_loads(tmp_path):
    options = ["--size-mb", "2", "--rounds", "1", "--only", "save,load", "--directory", str(tmp_path)]
    seconds = written("checkpoint", tmp_path / "seconds.json", *options)["seconds"]
    assert list(seconds) == ["save", "load"]
    assert {"one memcpy", "raw write + fsync", "ours, asynchronous, zlib", "ours, ft.save, zlib"} <= seconds[
        "save"
    ].keys()
    assert {"raw read", "ours, ft.load, zlib", "torch.load"} <= seconds["load"].keys()
    assert all(len(rounds) == 2 for section in seconds.values() for rounds in section.values())
    assert [path.name for path in tmp_path.iterdir()] == ["seconds.json"]  # what it wrote is gone


def test_gpu_step_runs_on_a_cpu_what_needs_no_gpu(tmp_path):
    options = ["--device", "cpu", "--quick", "--no-compile", "--sizes", "tiny", "--rounds", "2"]
    results = written("gpu_step", tmp_path / "steps.json", *options)["results"]
    assert list(results) == ["mlp, tiny", "resnet18, tiny", "gpt, tiny"]
    # Forward and backward of every layer are 6 FLOPs per weight and sample; the first needs no gradient of its input.
    assert results["mlp, tiny"]["flops"] == 4 * (4 * 784 * 64 + 6 * (64 * 64 + 64 * 10))


def test_hooks_are_timed_alone_and_together(tmp_path):
    times = written("hooks", tmp_path / "times.json", "--rounds", "2", "--steps", "25")["seconds_per_step"]
    assert {"no hooks", "checkpoint", "ema", "all default hooks, idle"} <= times.keys()
    assert all(len(rounds) == 2 for rounds in times.values())


def test_gpu_step_without_a_gpu_says_so():
    result = run("gpu_step")
    assert result.returncode == 2
    assert "no CUDA device" in result.stderr


def test_a_peer_that_is_not_installed_is_left_out_with_the_remedy(monkeypatch):
    """As if none could be found: the harness itself needs none of them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    peers, harness = importlib.import_module("peers"), importlib.import_module("harness")
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    built, left_out = harness.build(peers.bare_entries(), harness.make_case("mlp", 1))
    assert list(built) == ["detectron2-style SimpleTrainer"]
    assert set(left_out.values()) == {"not installed: pip install -e '.[bench]'"}
    for name in ("peers", "harness", "d2_style"):
        monkeypatch.delitem(sys.modules, name)
