"""Checkpoints of other versions: older ones are read and checked as ever, later ones are left alone and said to be so."""

import json
import math
import random
import shutil
import zlib
from pathlib import Path

import attrs
import pytest
import torch

import fntrain as ft
from fntrain import CheckpointError, TrainState
from fntrain.__main__ import main
from fntrain.shell.checkpoints import manifest
from fntrain.shell.checkpoints.upgrade import SCHEMA, SchemaError
from fntrain.shell.weights import inspect

OLD = {number: Path(__file__).parent / "old" / f"schema_{number}" / "step_00000003" for number in (1, 2)}
DIGESTS = {1: "c11db569a3a13b5b", 2: "c11db569a3a13b5b"}  # of the state that was saved, by the version that saved it
NAMES = ("model.safetensors", "train.safetensors", "state.json")


@pytest.fixture(params=sorted(OLD))
def old(request, tmp_path):
    """A copy of a checkpoint of an older schema, in a directory of its own, and its digest."""
    path = tmp_path / "runs" / OLD[request.param].name
    shutil.copytree(OLD[request.param], path)
    return path, DIGESTS[request.param]


def test_there_is_a_checkpoint_of_every_older_schema():
    """Whoever raises SCHEMA adds one; together they stay small."""
    assert sorted(OLD) == list(range(1, SCHEMA))
    for schema, path in OLD.items():
        assert json.loads((path / "state.json").read_text())["manifest"]["schema"] == schema
        assert sum(file.stat().st_size for file in path.iterdir()) < 20_000


@pytest.mark.parametrize("verify", ["full", "structure"])
def test_an_old_checkpoint_is_read_bit_for_bit(old, verify):
    """All dtypes, layouts, containers and numbers are what they were when it was written."""
    path, digest = old
    state = ft.load(path, verify=verify)
    assert ft.digest(state) == digest
    assert ft.digest(ft.load(path, into=ft.load(path), verify=verify)) == digest
    assert state.params["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert state.opt_state["fc.weight"]["exp_avg"].stride() == (1, 3)
    assert len(state.extra["dtypes"]) == 16
    assert math.copysign(1, state.extra["floats"][3]) == -1
    assert state.extra["nested"]["a"][1] == (2.0, {"b": None})


def test_an_old_checkpoint_saved_again_is_the_same_state(old, tmp_path):
    """In the form of this version, nothing is lost."""
    path, digest = old
    assert ft.digest(ft.load(ft.save(ft.load(path), tmp_path / "new"))) == digest


def test_a_run_goes_on_from_an_old_checkpoint(old):
    """It is the latest, is resumed, retained and replaced like any other."""
    path, digest = old
    saved = ft.load(path)
    like = {
        field: {n: torch.zeros_like(t) for n, t in getattr(saved, field).items()} for field in ("params", "buffers")
    }
    start = ft.resume_or(TrainState(step=0, position=0, seed=7, **like), path.parent)
    assert ft.digest(start) == digest
    assert ft.latest(path.parent) == path
    hook = ft.hooks.checkpoint(path.parent, every=1, keep_last=2)
    start = start.replace(hooks={})
    ft.fit(lambda state, batch: state.advance(), hook, state=start, data=iter(range(9)), max_steps=4)
    assert [one.name for one in ft.shell.checkpoints.save_load.checkpoints(path.parent)] == [
        "step_00000004",
        "step_00000003",
    ]
    assert ft.load(ft.latest(path.parent)).params["fc.bias"].equal(saved.params["fc.bias"])


def test_the_command_line_reads_old_checkpoints(old, capsys, tmp_path):
    """inspect, verify and diff."""
    path, _ = old
    assert [one.problem for one in inspect.verify(path.parent)] == [None]
    assert {leaf.leaf for leaf in inspect.summaries(path)} == {leaf for leaf, _ in ft.named_leaves(ft.load(path))}
    assert main(["diff", str(path), str(ft.save(ft.load(path), tmp_path / "new"))]) == 0
    assert main(["export", str(path), str(tmp_path / "model.safetensors")]) == 0
    capsys.readouterr()


def damages(raw, name):
    """Cut to every length of some, and bits flipped, reproducibly."""
    rng = random.Random(name)
    for length in {0, 1, 7, 8, 9, len(raw) // 2, len(raw) - 1, *rng.sample(range(len(raw)), 12)}:
        yield f"cut to {length}", raw[:length]
    yield "longer", raw + b"x"
    places = [*range(12), *rng.sample(range(len(raw)), 60)]  # the length of the header is in no checksum of schema 1
    for place in places:
        yield f"flipped at {place}", raw[:place] + bytes([raw[place] ^ (1 << rng.randrange(8))]) + raw[place + 1 :]


@pytest.mark.parametrize("name", NAMES)
def test_damage_of_an_old_checkpoint_is_found(old, name):
    """Cut anywhere, longer, missing, or with one bit flipped, it is refused, as when it was new."""
    path, digest = old
    raw = (path / name).read_bytes()
    for label, damaged in damages(raw, name):
        (path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="step_00000003"):
            pytest.fail(f"{label}: believed {ft.load(path)}")
        assert inspect.verify(path)[0].problem
    (path / name).unlink()
    with pytest.raises(CheckpointError, match="step_00000003"):
        ft.load(path)
    (path / name).write_bytes(raw)
    assert ft.digest(ft.load(path)) == digest


HOSTILE = {
    "file outside": lambda m: listed(m).update({"../../x": 5}),
    "file that is not listed": lambda m: next(iter(m["tensors"].values())).update(file="other.safetensors"),
    "no files": lambda m: m.pop("headers" if "headers" in m else "files"),
    "files a list": lambda m: m.update({"headers" if "headers" in m else "files": [1]}),
    "no tensors": lambda m: m.pop("tensors"),
    "huge shape": lambda m: next(iter(m["tensors"].values())).update(shape=[2**62, 2**62]),
    "unknown name": lambda m: next(iter(m["tensors"].values())).update(name="nobody" if "headers" in m else None),
    "schema a float": lambda m: m.update(schema=1.0),
    "schema true": lambda m: m.update(schema=True),
    "schema 0": lambda m: m.update(schema=0),
    "schema of the next": lambda m: m.update(schema=m["schema"] + 1),
}


def listed(manifest):
    """What it says of files."""
    return manifest["headers" if "headers" in manifest else "files"]


def reseal(path, change):
    """Change a manifest, with a right checksum."""
    manifest = json.loads((path / "state.json").read_text())["manifest"]
    change(manifest)
    text = json.dumps(manifest)
    (path / "state.json").write_text(f'{{"crc32": {zlib.crc32(text.encode())}, "manifest": {text}}}')


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_old_manifest_is_refused(old, name):
    """Whatever it says, it is a CheckpointError, and no file outside is read."""
    reseal(old[0], HOSTILE[name])
    with pytest.raises(CheckpointError, match=r"state\.json"):
        ft.load(old[0])


# Later versions.


def make_state(step):
    return TrainState(step=step, position=step, seed=0, params={"w": torch.full((2,), float(step))})


@pytest.fixture
def later(tmp_path):
    """Checkpoints of steps 1 and 2, the second of a schema to come, with fields nobody knows."""
    for step in (1, 2):
        path = ft.save(make_state(step), tmp_path / "runs")
    reseal(path, lambda manifest: manifest.update(schema=SCHEMA + 1, tensors={"new": "form"}))
    return tmp_path / "runs"


MESSAGE = rf"step_00000002: written by a later version of fntrain \(schema {SCHEMA + 1}; .* {SCHEMA}\); upgrade"


def test_a_later_schema_is_not_passed_over(later):
    """It is not damaged: going on from an older checkpoint would lose what was trained since."""
    for read in (
        lambda: ft.load(later / "step_00000002"),
        lambda: ft.latest(later),
        lambda: ft.latest(later, verify="full"),
        lambda: ft.resume_or(make_state(0), later),
    ):
        with pytest.raises(SchemaError, match=MESSAGE):
            read()
    shutil.move(later / "step_00000002", later.parent)
    assert ft.resume_or(make_state(0), later).step == 1


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("left", [False, True])
def test_a_later_schema_is_not_put_aside(later, start, left):
    """A run that starts before it is refused, and leaves it as it is, also beside what a kill has left of it."""
    if left:
        shutil.copytree(later / "step_00000002", later / "step_00000002.old")
    before = {path: path.read_bytes() for path in later.rglob("step_*/*")}
    hook = ft.hooks.checkpoint(later, every=1, keep_last=1)
    with pytest.raises(SchemaError, match=MESSAGE):
        ft.fit(lambda s, b: s.advance(), hook, state=make_state(start), data=iter(range(9)), max_steps=5)
    assert {path: path.read_bytes() for path in later.rglob("step_*/*")} == before


def test_the_command_line_says_that_it_is_later(later, capsys):
    """verify tells what to do."""
    assert main(["verify", str(later)]) == 1
    assert "written by a later version" in capsys.readouterr().out
    assert main(["inspect", str(later)]) == 2
    assert "written by a later version" in capsys.readouterr().err


def test_records_come_back_from_a_manifest(tmp_path):
    """What is written of tensors, one with strides and one split over two ranks, is read as the same records."""
    files = {
        name: manifest.File(8, 1, 8 + size) for name, size in (("model.safetensors", 32), ("model-1.safetensors", 8))
    }
    plain = manifest.Stored("params.a", "a", "float32", (3, 2), (), stride=(1, 3), device="cuda")
    part = manifest.Part("params.a", "model.safetensors", (3, 2), 0, 8, (5,))
    split = manifest.Stored("params.b", "b", "float32", (2, 2), ())
    parts = (
        manifest.Part("params.b@0", "model.safetensors", (1, 2), 0, 32, (6,)),
        manifest.Part("params.b@1", "model-1.safetensors", (1, 2), 1, 8, (7,)),
    )
    plain, split = attrs.evolve(plain, parts=(part,)), attrs.evolve(split, parts=parts)
    first, second = (attrs.evolve(split, parts=(one,)) for one in parts)
    written = [plain, first, second]
    (tmp_path / "state.json").write_bytes(manifest.dumps({"dict": {}}, files, written))
    found = manifest.read_manifest(tmp_path)
    assert found == manifest.Manifest({"dict": {}}, 1 << 24, files, {"params.a": plain, "params.b": split})
    assert (found.tensors["params.a"].split, found.tensors["params.b"].split) == (False, True)
    for wrong in (
        written[:2],
        [plain, second, attrs.evolve(split, parts=(attrs.evolve(parts[0], row=1),))],
    ):  # rows that are missing
        (tmp_path / "state.json").write_bytes(manifest.dumps({"dict": {}}, files, wrong))
        with pytest.raises(CheckpointError, match=r"state\.json: its list of tensors is damaged.*missing"):
            manifest.read_manifest(tmp_path)
