"""main: flags, what they say when they are wrong, the dry run, and what a run writes where; setup."""

import enum
import json
import logging
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Literal

import attrs
import numpy
import pytest
import torch
from test_recipe import RECIPE, Config, quiet_hooks, samples

import fntrain as ft
from fntrain.core.rng import preserved_generators
from fntrain.shell.setup import setup
from fntrain.steps.precision import FLOAT32


class Kind(enum.Enum):
    RELU = "relu"
    TANH = "tanh"


@attrs.frozen(kw_only=True)
class Model:
    width: int = 16
    """Units of the hidden layer."""
    kind: Kind = Kind.RELU
    """Its activation."""


@attrs.frozen(kw_only=True)
class Every(Config):
    """A config with a field of every kind."""

    model: Model = Model()
    """The model."""
    undocumented: int = 3
    mode: Literal["a", "b"] = "a"
    """Which of two."""
    sizes: tuple[int, ...] = (1, 2)
    """Any number of numbers."""
    pair: tuple[int, float] = (1, 2.0)
    """Two numbers."""
    path: pathlib.Path = pathlib.Path("x/y")
    """A path."""
    patience: int | None = None
    """A number of steps, or None."""
    flip: bool = False
    """Whether to."""


EVERY = attrs.evolve(RECIPE, config=Every(max_steps=6, batch_size=16, eval_every=2, checkpoint_every=2, lr=0.02))


@pytest.fixture(autouse=True)
def _handlers():
    logger = logging.getLogger("fntrain")
    before, level = list(logger.handlers), logger.level
    yield
    for handler in logger.handlers:
        if handler not in before:
            logger.removeHandler(handler)
            handler.close()
    logger.setLevel(level)


def main(*args, recipe=EVERY):
    return ft.main(recipe, [str(arg) for arg in args])


def refused(capsys, *args, recipe=EVERY):
    """The exit status, and what was written to stderr before."""
    with pytest.raises(SystemExit) as ended:
        main(*args, recipe=recipe)
    code = ended.value.code
    return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err)


# Flags.


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--num-processes", 0), "ConfigError: --num-processes: got 0, expected a whole number >= 1\n"),
        (
            ("--num-machines", 2),
            'ConfigError: --rendezvous: got None, expected "host:port" of the first of 2 machines\n',
        ),
    ],
)
def test_numbers_of_processes_that_can_t_be_are_refused_as_flags(capsys, args, told):
    """By one line, not by a traceback."""
    assert refused(capsys, *args) == (2, told)


def test_help_shows_every_field_with_its_words_and_the_recipe_s_own_default(capsys, monkeypatch):
    """Defaults are those of the recipe's config, not of its class; nested fields have dots."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in attrs.fields(Every):
        name = "model.width" if field.name == "model" else field.name.replace("_", "-")
        assert f"--{name}" in text
    for words in (
        "--lr FLOAT Learning rate at its peak. (default: 0.02)",
        "--max-steps INT Number of steps in all, those of earlier runs in the same directory included. (default: 6)",
        "--eval-every INT Steps between two evaluations; the last step is always followed by one. (default: 2)",
        "--model.width INT Units of the hidden layer. (default: 16)",
        "--undocumented INT (default: 3)",
        "--mode {a,b} Which of two. (default: a)",
        "--patience {None}|INT A number of steps, or None. (default: None)",
        "--resume, --no-resume",
        "--eval-only",
        "--dry-run",
    ):
        assert words in text


def test_every_setting_of_a_config_says_what_it_is():
    """In words after the field, which --help shows."""
    source = pathlib.Path(sys.modules["fntrain.jobs.config"].__file__).read_text().partition("class Config:")[2]
    body = source.partition("\ndef ")[0].partition('"""\n\n')[2].strip().splitlines()
    assert len(body) == 2 * len(attrs.fields(ft.Config))
    assert all(line.strip().startswith('"""') for line in body[1::2])


def test_flags_of_every_kind_reach_the_config(tmp_path):
    """As values of the field's type; and into config.json, from which the predictor has them again."""
    args = ["--output-dir", tmp_path, "--model.kind", "TANH", "--mode", "b", "--sizes", 3, 4, 5, "--pair", 6, 7.5,
            "--path", "q/r", "--patience", 8, "--flip", "--clip_grad_norm", "0.5", "--max_steps", 2]  # fmt: skip
    recipe = attrs.evolve(EVERY, build_hooks=quiet_hooks)
    assert main(*args, recipe=recipe).state.step == 2
    wanted = attrs.evolve(
        EVERY.config,
        output_dir=str(tmp_path),
        model=Model(kind=Kind.TANH),
        mode="b",
        sizes=(3, 4, 5),
        pair=(6, 7.5),
        path=pathlib.Path("q/r"),
        patience=8,
        flip=True,
        clip_grad_norm=0.5,
        max_steps=2,
    )
    assert json.loads((tmp_path / "config.json").read_text()) == ft.to_dict(wanted)
    assert ft.predictor(recipe, tmp_path).config == wanted


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--mxa-steps", "3"], 2, "--max-steps INT"),
        (["--model.widht", "3"], 2, "--model.width INT"),
        (["--lr", "fast"], 2, "could not convert string to float: 'fast'"),
        (["--max-steps", "1.5"], 2, "--max-steps"),
        (["--mode", "c"], 2, "invalid choice 'c'"),
        (["--precision", "fp8"], 2, "'bf16'"),
        (["more"], 2, "more"),
        (["--max-steps", "0"], 2, "ConfigError: max_steps: got 0, expected a whole number >= 1"),
        (["--warmup-steps", "6"], 1, "ConfigError: warmup_steps: got 6, expected fewer than max_steps=6"),
        (["--device", "cuda:17"], 1, "ConfigError: device: got 'cuda:17'"),
        (["--weights", "nope.safetensors"], 1, "CheckpointError: nope.safetensors: no such file"),
        (["--eval-only"], 1, "holds no checkpoint to evaluate"),
    ],
)
def test_flags_that_are_not_right_end_with_a_word_on_what_is(capsys, tmp_path, args, status, words):
    """Exit status 2 for what can't be a value, 1 for what does not go; no traceback, and no checkpoint or config."""
    code, told = refused(capsys, "--output-dir", tmp_path / "run", *args)
    assert code == status and words in told and "Traceback" not in told
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_directory_that_can_not_be_written_to_is_told(capsys, tmp_path):
    """As when a file is in its place."""
    (tmp_path / "file").write_text("")
    code, told = refused(capsys, "--output-dir", tmp_path / "file" / "run")
    assert code == 1 and told.startswith("ConfigError: output_dir: can't be written to") and "file" in told


def test_a_used_directory_is_not_started_in_again(capsys, tmp_path):
    """--no-resume is refused where a later checkpoint is; without it the run goes on, or has nothing left to do."""
    recipe = attrs.evolve(EVERY, build_hooks=quiet_hooks)
    first = main("--output-dir", tmp_path, recipe=recipe)
    code, told = refused(capsys, "--output-dir", tmp_path, "--no-resume", recipe=recipe)
    assert code == 1 and "is of a later step than this run's start (0)" in told
    assert main("--output-dir", tmp_path, recipe=recipe).results == first.results
    capsys.readouterr()
    evaluated = main("--output-dir", tmp_path, "--eval-only", recipe=recipe)
    assert evaluated.results == first.results
    assert capsys.readouterr().out == f"step 6\n  mse                     {first.results['mse']:.6g}\n"


# The dry run.


def test_a_dry_run_shows_every_part_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    """Settings, model, batch, step, groups, schedule, evaluation, hooks in order, one step; no file, no handler."""
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger("fntrain").handlers)
    recipe = attrs.evolve(EVERY, build_hooks=ft.default_hooks)
    assert main("--dry-run", "--output-dir", "run", "--warmup-steps", 2, recipe=recipe) is None
    assert list(tmp_path.iterdir()) == [] and logging.getLogger("fntrain").handlers == handlers
    out = capsys.readouterr().out
    parts = [line for line in out.splitlines() if not line.startswith(" ")]
    assert parts == ["config", "model", "data", "step", "optimizer", "learning rate", "evaluation", "hooks", "one step"]
    for line in (
        "  output_dir            run",
        "  model.kind            RELU",
        "  Sequential: 49 parameters, 196 bytes, on cpu",
        "  0 Linear              40",
        "  steps per epoch       6",
        "  batch.x               (16, 4) torch.float32",
        "  2 tensors             weight_decay=0.01, 0.weight, 3.weight",
        "  2 tensors             weight_decay=0.0, 0.bias, 3.bias",
        "     1    0.006667  #############",
        "     3        0.02  ########################################",
        "  1. OnSignal(",
        "  3. at_end(every(2, hook('evaluate'",
        "  6. hook('keep_config'",
        "  loss                  ",
    ):
        assert line in out, line
    assert " at 0x" not in out
    steps = out.partition("learning rate\n")[2].partition("evaluation")[0].splitlines()[1:]
    assert [int(line.split()[0]) for line in steps] == [1, 2, 3, 4, 5, 6]


class Pair:
    """A batch of a class of one's own."""

    def __init__(self):
        self.x, self.y = torch.ones(4, 4), torch.ones(4, 1)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"build_optimizer": lambda config, model: ft.optimizer(torch.optim.SGD, lr=0.25)}, "  0.25\n"),
        (
            {"build_optimizer": lambda config, model: ft.optimizer(torch.optim.SGD, lr=0.1, groups=[ft.group("0.*", frozen=True)])},
            "  frozen                0.bias, 0.weight\n",
        ),
        ({"build_data": lambda config: torch.utils.data.DataLoader(samples(), batch_size=5)}, "(5, 4)"),
        ({"build_data": lambda config: ft.data.stream(samples(), 7, seed=0, num_workers=1)}, "(7, 4)"),
        ({"build_data": lambda config: iter([{"x": torch.ones(3, 4), "y": torch.ones(3, 1)}])}, "(3, 4)"),
        (
            {"build_data": lambda config: iter([Pair()]), "loss_fn": lambda model, pair: model(pair.x).mean()},
            "  batch                 Pair\n",
        ),
        ({"build_evaluation": ft.jobs.defaults.no_evaluation}, "evaluation\n  None\n"),
    ],
)  # fmt: skip
def test_a_dry_run_knows_other_parts_than_the_usual(capsys, part, words):
    """Constant rates, frozen parameters, other data, no evaluation."""
    main("--dry-run", recipe=attrs.evolve(EVERY, **part))
    out = capsys.readouterr().out
    assert words in out and "grad_norm" in out


# What a run writes where.

SCRIPT = """
import torch, torch.nn.functional as F
import fntrain as ft

def hooks(job):
    return ft.default_hooks(job, ft.hook(after_step=lambda state: print("at", state.step, flush=True)))

recipe = ft.Recipe(
    config=ft.Config(max_steps=100_000, batch_size=8, log_every=50_000, eval_every=50_000, checkpoint_every=50_000),
    build_model=lambda config: torch.nn.Linear(4, 1), build_data=lambda config: torch.ones(64, 4),
    loss_fn=lambda model, batch: model(batch).square().mean(), build_hooks=hooks,
    build_evaluation=lambda config, model: lambda state: {"step": state.step})

if __name__ == "__main__":
    ft.main(recipe)
"""


def test_a_signal_ends_the_process_with_its_status_and_the_same_command_goes_on(tmp_path):
    """130 for Ctrl-C, 143 for SIGTERM, all saved; in a directory with spaces. Metrics on stdout, the log on stderr."""
    path = tmp_path / "my recipes" / "linear one.py"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), "--output-dir", "my runs/a"]
    reached, last = 0, None
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        seen = [process.stdout.readline() for _ in range(3)]
        assert seen[0] == f"at {reached + 1}\n"
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        last = ft.latest(tmp_path / "my runs" / "a")
        assert last.name > f"step_{reached:08}" and (last.parent / "config.json").exists()
        assert err.count(f"saved {last}") == 1 and "saved" not in out
        assert "loss" in out and "eval/step" not in out + err  # no evaluation: the time may be short
        reached = int(last.name.removeprefix("step_"))
    assert "resuming from my runs/a/step_" in (last.parent / "log.txt").read_text()
    done = subprocess.run([*command, "--max-steps", str(reached)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"step {reached} (max_steps={reached} reached)\n  step                    {reached}\n"
    assert "config changed since the last run here: max_steps: 100000 -> " in done.stderr


def test_the_log_is_on_the_console_once(tmp_path, capsys, monkeypatch):
    """By setup, again for another directory, and not where the root logger shows it already."""
    log = logging.getLogger("fntrain")
    monkeypatch.setattr(logging.root, "handlers", [])
    setup(tmp_path / "a")
    setup(tmp_path / "b", config={"lr": 0.1})
    log.info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert "once" not in (tmp_path / "a/log.txt").read_text() and "once" in (tmp_path / "b/log.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "log.txt"]
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(sys.stderr)])
    setup(tmp_path / "b")
    log.info("twice?")
    assert capsys.readouterr().err.count("twice?") == 1


def test_the_log_begins_with_command_and_environment(tmp_path):
    """What the numbers and bits of the run depend on."""
    setup(tmp_path)
    lines = [line.partition(" INFO ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines[0].startswith("command: ") and f"torch {torch.__version__}" in lines[1] and "threads" in lines[2]
    assert time.strftime("%Y-%m-%d") in (tmp_path / "log.txt").read_text()


def test_main_returns_what_run_does(tmp_path):
    """For a script to go on with."""
    recipe = attrs.evolve(EVERY, build_hooks=quiet_hooks)
    by_main = main("--output-dir", tmp_path / "a", recipe=recipe)
    by_run = ft.run(recipe, attrs.evolve(EVERY.config, output_dir=str(tmp_path / "b")))
    assert by_main.state == by_run.state and by_main.results == by_run.results


def test_setup_seeds_what_first_weights_are_drawn_from(tmp_path):
    """torch, Python and NumPy draw the same again; without a seed they are left alone."""

    def drawn():
        return torch.rand(2).tolist(), random.random(), numpy.random.rand()

    with preserved_generators():
        setup(tmp_path, seed=3)
        first = drawn()
        setup(tmp_path)
        assert drawn() != first
        setup(tmp_path, seed=3)
        assert drawn() == first


def test_setup_says_how_float32_products_round(tmp_path):
    """The switches that a step's precision='tf32' uses too; others are refused, None touches nothing."""
    before = [switch.fp32_precision for switch in FLOAT32]
    try:
        for precision in ("tf32", "ieee"):
            setup(tmp_path, float32_precision=precision)
            assert [switch.fp32_precision for switch in FLOAT32] == [precision] * len(FLOAT32)
            setup(tmp_path)
            assert [switch.fp32_precision for switch in FLOAT32] == [precision] * len(FLOAT32)
        with pytest.raises(ValueError, match="float32_precision: got 'high', expected 'ieee', 'tf32' or None"):
            setup(tmp_path, float32_precision="high")
    finally:
        for switch, was in zip(FLOAT32, before, strict=True):
            switch.fp32_precision = was


@pytest.mark.parametrize("make", [setup, ft.writers.default, lambda url: ft.writers.jsonl(f"{url}/metrics.jsonl")])
def test_logs_are_local_files(tmp_path, monkeypatch, make):
    """A URL is refused, and no directory of its name is made; file:// is the local file system."""
    monkeypatch.chdir(tmp_path)
    for url in ("s3://bucket/runs", "memory://runs"):
        with pytest.raises(
            ft.ConfigError, match=r"got '(s3|memory)://.*logs are local files; give one .*checkpoints can go"
        ):
            make(url)
    assert list(tmp_path.iterdir()) == []
    make(f"file://{tmp_path}/runs")
    assert [path.name for path in tmp_path.iterdir()] in ([], ["runs"])


def test_the_logs_of_a_run_elsewhere_are_in_a_local_directory_of_its_name(tmp_path, monkeypatch):
    """Its checkpoints and config.json are where the URL says; nothing is named like the URL."""
    monkeypatch.chdir(tmp_path)
    url = "memory://test_cli/elsewhere"
    ft.main(attrs.evolve(RECIPE, build_hooks=ft.default_hooks), ["--output-dir", url, "--max-steps", "2"])
    assert ft.latest(url).name == "step_00000002"
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")] == ["runs/test_cli"]
    names = {path.name for path in (tmp_path / "runs/test_cli/elsewhere").iterdir()}
    assert names >= {"log.txt", "metrics.jsonl"}
    assert "config.json" not in names
