"""The command line: what is in a checkpoint, how two differ, whether all are whole; for people and for machines."""

import json
import math
import os
import subprocess
import sys

import broken_params
import pytest
import safetensors.torch
import torch
from torch import nn

import fntrain as ft
from fntrain.__main__ import main
from fntrain.shell.weights import inspect


def make_state(step=0, **fields):
    filled = {
        "params": {"fc.weight": torch.tensor([[3.0, 4.0]]), "fc.bias": torch.tensor([float(step)])},
        "buffers": {"count": torch.tensor(step)},
        "opt_state": {"fc.bias": {"step": 1}},
        "extra": {"note": "warm", "nothing": None, "none": []},
    }
    return ft.TrainState(**{"step": step, "position": step, "seed": 7, **filled, **fields})


@pytest.fixture
def runs(tmp_path):
    """A directory with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        ft.save(make_state(step), tmp_path / "runs")
    return tmp_path / "runs"


def run(capsys, *arguments):
    """Exit status, stdout and stderr of a command."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys, *arguments):
    status, out, _ = run(capsys, *arguments, "--json")
    return status, json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def flip(file, byte=-1):
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 1
    file.write_bytes(raw)


# inspect.


def test_inspect_prints_a_table(capsys, runs):
    """One line a leaf, columns aligned, the newest checkpoint of a directory."""
    status, out, err = run(capsys, "inspect", runs)
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0] == str(runs / "step_00000002")
    assert lines[1].split() == ["leaf", "shape", "dtype", "bytes", "norm", "or", "value"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:-1]}
    assert rows["params.fc.weight"] == ["(1,", "2)", "float32", "8", "5"]
    assert rows["buffers.count"] == ["()", "int64", "8", "2"]
    assert rows["step"] == ["int", "2"]
    assert rows["extra.note"] == ["str", "'warm'"]
    assert rows["opt_state.fc.bias.step"] == ["int", "1"]
    assert lines[-1] == "9 leaves, 3 tensors, 4 numbers, 20 bytes"
    assert len({line.index("float32") for line in lines if "float32" in line}) == 1
    assert run(capsys, "inspect", runs / "step_00000001")[1].startswith(str(runs / "step_00000001\n"))


def test_inspect_for_machines(capsys, runs):
    """The same facts as JSON, with every digit."""
    status, found = run_json(capsys, "inspect", runs)
    leaves = {leaf.pop("leaf"): leaf for leaf in found["leaves"]}
    assert status == 0
    assert found["path"] == str(runs / "step_00000002")
    assert list(leaves) == [name for name, _ in ft.named_leaves(make_state(2))]
    facts = {"shape": [1, 2], "dtype": "float32", "bytes": 8, "norm": 5.0, "nonfinite": 0, "value": None}
    assert leaves["params.fc.weight"] == facts
    assert leaves["step"] == {**dict.fromkeys(facts), "dtype": "int", "bytes": 0, "nonfinite": 0, "value": 2}


def test_inspect_any_safetensors_file(capsys, tmp_path):
    """A file of any dtypes, inf and nan counted and out of the norm, complex by both parts, empty ones too."""
    tensors = {
        "half": torch.tensor([3.0, 4.0], dtype=torch.float16),
        "odd": torch.tensor([3.0, math.inf, math.nan, -4.0]),
        "complex": torch.tensor([3 + 4j], dtype=torch.complex64),
        "bool": torch.tensor([True] * 9),
        "f8": torch.tensor([2.0]).to(torch.float8_e5m2),
        "empty": torch.zeros(0, 3),
        "u64": torch.tensor([3, 4], dtype=torch.uint64),
        "tiny": torch.tensor([1e-200, 1e-200], dtype=torch.float64),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    found = {leaf.leaf: leaf for leaf in inspect.summaries(tmp_path)}
    norms = {"half": 5, "odd": 5, "complex": 5, "bool": 3, "f8": 2, "empty": 0, "u64": 5, "tiny": math.sqrt(2) * 1e-200}
    assert {name: leaf.norm for name, leaf in found.items()} == pytest.approx(norms, rel=1e-12)
    assert {name: leaf.nonfinite for name, leaf in found.items() if leaf.nonfinite} == {"odd": 2}
    assert "5 (2 inf or nan)" in run(capsys, "inspect", tmp_path / "x.safetensors")[1]


def test_packed_numbers_are_listed_and_compared(capsys, tmp_path):
    """float4, which torch can't convert, has no norm; a difference in its bits is still one."""
    for name, byte in (("a", 1), ("b", 2)):
        tensor = torch.tensor([byte], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        safetensors.torch.save_file({"x": tensor}, tmp_path / name)
    assert run(capsys, "inspect", tmp_path / "a")[0] == 0
    status, found = run_json(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert (status, found["differences"][0]["max_abs"]) == (1, None)


def test_norms_of_large_tensors_are_of_all_of_them(monkeypatch):
    """Tensors are looked at in pieces; the norm, the count and the differences are of the whole."""
    monkeypatch.setattr(inspect, "_CHUNK", 7)
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    other = values.clone()
    other[-1, -1] += 1
    assert inspect._summary("x", values).norm == pytest.approx(values.double().norm().item(), rel=1e-12)
    assert inspect._max_abs(values, other) == pytest.approx(1, rel=1e-6)
    assert inspect._ulp(values, other) > 1


# diff.


def test_diff_of_equal_checkpoints(capsys, runs):
    """Bitwise equal: exit status 0."""
    assert run(capsys, "diff", runs, runs / "step_00000002") == (
        0,
        f"{runs}/step_00000002\n{runs}/step_00000002\nbitwise equal\n",
        "",
    )
    assert run_json(capsys, "diff", runs, runs)[1]["equal"] is True


def test_diff_lists_what_differs(capsys, runs):
    """Every leaf that differs and no other, by how much, and exit status 1."""
    status, out, err = run(capsys, "diff", runs / "step_00000001", runs)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[3:-1]}
    assert (status, err) == (1, "")
    assert rows["params.fc.bias"] == ["1", f"{2**23:,}", "values"]
    assert rows["buffers.count"] == ["1", "values"]
    assert rows["step"] == ["1", "and", "2"]
    assert rows.keys() == {"params.fc.bias", "buffers.count", "step", "position"}
    assert out.splitlines()[-1] == "4 leaves differ"
    status, found = run_json(capsys, "diff", runs / "step_00000001", runs)
    assert status == 1
    assert found["equal"] is False
    assert {one["leaf"]: one["ulp"] for one in found["differences"]}["params.fc.bias"] == 2**23


DIFFERENCES = {
    "only in the first": ({"extra": {"a": 1}}, {"extra": {}}, "extra.a", "only in the first"),
    "only in the second": ({"extra": {}}, {"extra": {"a": 1}}, "extra.a", "only in the second"),
    "shape": ({"extra": {"a": torch.ones(2)}}, {"extra": {"a": torch.ones(3)}}, "extra.a", "(2,) float32 and (3,) float32"),
    "dtype": ({"extra": {"a": torch.ones(2)}}, {"extra": {"a": torch.ones(2).half()}}, "extra.a", "(2,) float32 and (2,) float16"),
    "kind": ({"extra": {"a": 1}}, {"extra": {"a": 1.0}}, "extra.a", "1 and 1.0"),
    "tensor or number": ({"extra": {"a": 1.0}}, {"extra": {"a": torch.tensor(1.0)}}, "extra.a", "1.0 and () float32"),
    "sign of zero": ({"extra": {"a": torch.zeros(2)}}, {"extra": {"a": -torch.zeros(2)}}, "extra.a", "values"),
    "containers": ({"extra": {"a": [1]}}, {"extra": {"a": (1,)}}, "", "the containers around them"),
    "empty containers": ({"extra": {"a": []}}, {"extra": {}}, "", "the containers around them"),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_every_difference_is_seen(tmp_path, name):
    """Whatever `==` of states sees, diff sees, and says what it is."""
    one, other, leaf, reason = DIFFERENCES[name]
    paths = [ft.save(make_state(1, **fields), tmp_path / f"{i}") for i, fields in enumerate((one, other))]
    assert ft.load(paths[0]) != ft.load(paths[1])
    [found] = inspect.differences(*paths)
    assert found.leaf == leaf
    assert reason in found.reason
    assert inspect.differences(paths[0], paths[0]) == ()


def test_diff_of_a_checkpoint_and_a_file(capsys, runs, tmp_path):
    """Of a checkpoint beside an export of it the model's tensors are compared."""
    out = ft.export(make_state(2), tmp_path / "x.safetensors")
    assert run(capsys, "diff", runs, out)[0] == 0
    status, found = run_json(capsys, "diff", out, runs / "step_00000001")
    assert (status, [one["leaf"] for one in found["differences"]]) == (1, ["count", "fc.bias"])


def neighbours(value, steps, dtype):
    """The number so many representable numbers further up, by torch's own nextafter."""
    number = torch.tensor([value], dtype=dtype)
    for _ in range(steps):
        number = torch.nextafter(number, torch.tensor([math.inf], dtype=dtype))
    return number


def law_ulp(ulp, dtype):
    """The distance is the number of nextafter steps, also across powers of two, subnormals and zero."""
    tiny = torch.finfo(dtype).smallest_normal
    for value in (1.0, 1.0 - torch.finfo(dtype).eps, -1.0, 3.0, 1000.0, tiny, -tiny, -0.0, 0.0):
        for steps in (0, 1, 3):
            start, end = torch.tensor([value], dtype=dtype), neighbours(value, steps, dtype)
            assert ulp(start, end) == ulp(end, start) == steps, (value, steps)
    below, above = -neighbours(0.0, 2, dtype), neighbours(0.0, 3, dtype)
    assert ulp(below, above) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ulp_counts_representable_numbers(dtype):
    """ulp is a count of steps, not a rounded ratio."""
    law_ulp(inspect._ulp, dtype)


def test_law_ulp_can_fail():
    """Dividing by the spacing at one end is refused."""
    with pytest.raises(AssertionError):
        law_ulp(broken_params.ulp_by_rounding, torch.float32)


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("a", "b", "max_abs", "ulp"),
    [
        ([1.0, INF, NAN], [1.5, INF, NAN], 0.5, 2**22),
        ([INF], [-INF], INF, 2 * 0x7F800000),
        ([1.0], [NAN], NAN, None),
        ([NAN, 0.0], [NAN, 1.0], 1.0, 0x3F800000),
    ],
)
def test_diff_of_what_is_not_finite(a, b, max_abs, ulp):
    """inf and nan on both sides are no difference; on one side they are."""
    one, other = torch.tensor(a), torch.tensor(b)
    assert inspect._max_abs(one, other) == pytest.approx(max_abs, nan_ok=True)
    assert inspect._ulp(one, other) == ulp


def test_diff_of_large_numbers():
    """Integers and float64 beyond 2**53 are subtracted exactly."""
    big = torch.tensor([2**62])
    assert inspect._steps(big, big + 1) == 1
    assert inspect._max_abs(big, big - 1) == 1.0
    assert inspect._max_abs(torch.tensor([-(2**63)]), torch.tensor([2**63 - 1])) == 2.0**64
    assert inspect._ulp(torch.tensor([-1e300], dtype=torch.float64), torch.tensor([1e300], dtype=torch.float64)) > 2**62


def test_json_has_words_for_what_is_not_finite(capsys, tmp_path):
    """JSON has no inf and nan."""
    for name, value in (("a", 1.0), ("b", NAN)):
        ft.save(make_state(1, extra={"x": torch.tensor(value), "y": -INF}), tmp_path / name)
    assert run_json(capsys, "diff", tmp_path / "a", tmp_path / "b")[1]["differences"][0]["max_abs"] == "nan"
    assert run_json(capsys, "inspect", tmp_path / "b")[1]["leaves"][-1]["value"] == "-inf"


# verify.


def test_verify_prints_a_line_a_checkpoint(capsys, runs):
    """Intact ones say so, with exit status 0; one checkpoint alone can be verified too."""
    assert run(capsys, "verify", runs) == (0, "step_00000002: intact\nstep_00000001: intact\n", "")
    assert run(capsys, "verify", runs / "step_00000001")[:2] == (0, "step_00000001: intact\n")


def law_verify(verify, runs, damage):
    damage(runs / "step_00000001")
    newest, oldest = verify(runs)
    assert newest.problem is None
    assert oldest.path == runs / "step_00000001"
    assert oldest.problem
    assert "step_00000001" in oldest.problem


DAMAGE = {
    "model": lambda path: flip(path / "model.safetensors"),
    "train": lambda path: (path / "train.safetensors").write_bytes(b""),
    "manifest": lambda path: flip(path / "state.json", 40),
    "no manifest": lambda path: (path / "state.json").unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_finds_damage(capsys, runs, name):
    """Every file of every checkpoint is read; damage in an older one is exit status 1 and named."""
    law_verify(inspect.verify, runs, DAMAGE[name])
    status, out, err = run(capsys, "verify", runs)
    assert (status, err) == (1, "")
    assert out.splitlines()[0] == "step_00000002: intact"
    assert out.splitlines()[1].startswith("step_00000001: damaged: ")
    status, found = run_json(capsys, "verify", runs)
    assert (status, [one["problem"] is None for one in found]) == (1, [True, False])


def test_law_verify_can_fail(runs):
    """A look at the names alone, or at the newest alone, is refused."""
    looked = lambda runs: [inspect.Verdict(path=path) for path in ft.shell.checkpoints.save_load.checkpoints(runs)]  # noqa: E731
    with pytest.raises(AssertionError):
        law_verify(looked, runs, DAMAGE["model"])


# export.


def test_export(capsys, runs, tmp_path):
    """The newest checkpoint's model as one file; a sharded set as one file; both load."""
    out = tmp_path / "out.safetensors"
    assert run(capsys, "export", runs, out)[0] == 0
    assert set(safetensors.torch.load_file(out)) == {"fc.weight", "fc.bias", "count"}
    model = nn.Module()
    model.fc = nn.Linear(2, 1)
    model.register_buffer("count", torch.tensor(0))
    ft.load_params(out, model)
    assert model.fc.weight.tolist() == [[3.0, 4.0]]
    status, found = run_json(capsys, "export", runs / "step_00000001", out)
    assert (status, found["tensors"], found["path"]) == (0, 3, str(runs / "step_00000001"))
    assert safetensors.torch.load_file(out)["count"] == 1


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "no/such"], "no/such: no such file"),
        (["inspect", "empty"], "empty: holds no safetensors file"),
        (["inspect", "text"], "text: is damaged or no safetensors file"),
        (["diff", "text", "no"], "text"),
        (["verify", "no/such"], "no/such: no such directory"),
        (["verify", "empty"], "empty: holds no checkpoints"),
        (["export", "no/such", "x"], "no/such: no such file"),
        (["inspect"], "required"),
        (["frobnicate"], "invalid choice"),
        ([], "required"),
    ],
)
def test_errors_are_told_on_stderr(capsys, tmp_path, monkeypatch, arguments, message):
    """Exit status 2, nothing on stdout, one clear message."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_damaged_checkpoint_is_an_error_of_inspect(capsys, runs):
    """What can't be believed is not shown."""
    flip(runs / "step_00000002" / "model.safetensors")
    status, out, err = run(capsys, "inspect", runs)
    assert (status, out) == (2, "")
    assert "step_00000002/model.safetensors" in err


def test_the_module_runs(runs):
    """`python -m fntrain` has the exit statuses of main, and a reader that leaves early is no error in the shell."""
    command = [sys.executable, "-W", "error", "-m", "fntrain"]
    done = subprocess.run([*command, "diff", runs / "step_00000001", runs], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "params.fc.bias" in done.stdout
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*command, "inspect", runs], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (2, "")
