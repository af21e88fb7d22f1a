"""Checkpoints: what is saved is loaded bit for bit; what is damaged is refused; what is visible is whole."""

import json
import logging
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import textwrap
import zlib
from itertools import count
from pathlib import Path

import broken_io
import pytest
import safetensors.torch
import torch
from torch import nn

import fntrain as ft
from fntrain import CheckpointError, TrainState
from fntrain.shell.checkpoints import save_load as files
from fntrain.shell.checkpoints import tensor_file
from fntrain.shell.checkpoints.commit import retain, store_at
from fntrain.shell.checkpoints.store import step_of

NAMES = ("model.safetensors", "train.safetensors", "state.json")
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
]
wide = torch.arange(120.0).reshape(2, 3, 4, 5)
LAYOUTS = {
    "0-d": torch.tensor(1.5),
    "empty": torch.zeros(0, 3),
    "channels_last": wide.to(memory_format=torch.channels_last),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "permuted": wide.permute(3, 0, 2, 1),
    "view of a larger storage": torch.arange(100.0)[10:20],
    "strided view": torch.arange(100.0).reshape(10, 10)[:, ::2],
    "expanded": torch.arange(3.0).reshape(3, 1).expand(3, 4),
    "overlapping": torch.arange(6.0).unfold(0, 3, 1),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "negative view": torch.randn(3, dtype=torch.complex64).conj().imag,
    "needs a gradient": torch.ones(2, requires_grad=True),
    "nonfinite": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-324]),
    "parameter": nn.Parameter(torch.ones(2)),
}
TREES = {
    "scalars": [1, True, False, None, 2**70, -1.5, "", "text\n\u00e9\U0001f600\x00", 1e-310, 0.1],
    "nonfinite": [math.nan, math.inf, -math.inf, -0.0],
    "negative nan": struct.unpack("<d", b"\x00\x00\x00\x00\x00\x00\xf8\xff")[0],
    "nested": {"a": [1, (2.0, {"b": None}), []], "c": ((),), "d": {}, "e": [[], {}]},
    "odd keys": {"": 1, "a.b": 2, "tensor": "x", "dict": {}, "float": [], "list": (), "0": torch.ones(1)},
    "empty key of a tensor": {"": torch.ones(1)},
    "tensors in containers": [torch.ones(2), (torch.zeros(()), {"x": torch.arange(3)})],
}


def make_state(step=0, **fields):
    """A small state with something in every saved field."""
    generator = torch.Generator().manual_seed(step)
    filled = {
        "params": {"fc.weight": torch.randn(3, 4, generator=generator), "fc.bias": torch.randn(3, generator=generator)},
        "buffers": {"bn.mean": torch.randn(3, generator=generator).double()},
        "opt_state": {
            "fc.weight": {"step": torch.tensor(float(step)), "exp_avg": torch.randn(4, 3, generator=generator).t()}
        },
        "hooks": {"best": {"score": 0.5 + step, "history": [1.0, 2.0]}},
        "extra": {"ema": {"fc.weight": torch.randn(3, 4, generator=generator)}, "note": "warm"},
    }
    return TrainState(**{"step": step, "position": step, "seed": 7, **filled, **fields})


SAVED_1, SAVED_2 = make_state(1), make_state(2)


def fresh(**fields):
    return make_state(0, **{"opt_state": {}, "hooks": {}, "extra": {}, **fields})


def step_fn(state, batch):
    """A step with noise of its own and a state that grows."""
    ft.seed_generators(state.seed, state.step)
    new = {name: value * 0.9 + torch.randn(value.shape) * 0.01 + batch for name, value in state.params.items()}
    return state.advance(params=new, metrics={"loss": torch.tensor(1.0)})


def names(root):
    """What lies in a directory beside the lock."""
    return sorted(path.name for path in root.iterdir() if path.name != ".lock")


def steps(root):
    """The steps in view, newest first."""
    return [step_of(path) for path in files.checkpoints(root)]


def assert_same_layouts(a, b):
    for (name, one), (_, other) in zip(ft.named_leaves(a), ft.named_leaves(b), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.stride() == other.stride(), name
            assert one.dtype == other.dtype, name


def law_round_trip(save, load, state, root):
    loaded = load(save(state, root))
    assert loaded == state
    assert ft.digest(loaded) == ft.digest(state)
    kept = state.params.get("channels_last", torch.ones(1))
    assert loaded.params.get("channels_last", torch.ones(1)).stride() == kept.stride()


# Round trip.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_of_every_dtype(tmp_path, dtype):
    """Tensors of every ordinary dtype come back bit for bit, in every field."""
    value = (torch.arange(6).reshape(2, 3) % 2).to(dtype)
    state = make_state(3, params={"w": value}, buffers={"b": value[0]}, extra={"e": (value[0, 0],)})
    law_round_trip(files.save, files.load, state, tmp_path)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("field", ["params", "extra"])
def test_round_trip_of_every_layout(tmp_path, name, field):
    """Any view can be saved and comes back with its values; the saved state itself is untouched."""
    state = make_state(3, **{field: {name.replace(" ", "_"): LAYOUTS[name]}})
    before = ft.digest(state)
    law_round_trip(files.save, files.load, state, tmp_path)
    assert ft.digest(state) == before
    tensor = next(iter(getattr(files.load(tmp_path / "step_00000003"), field).values()))
    if LAYOUTS[name].is_contiguous() or name in ("channels_last", "transposed", "permuted"):
        assert tensor.stride() == LAYOUTS[name].stride()
    assert tensor.untyped_storage().nbytes() == tensor.nbytes  # no gaps of the larger storage it was a view of
    assert not tensor.requires_grad


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("field", ["extra", "hooks"])
def test_round_trip_of_every_tree(tmp_path, name, field):
    """Nested and empty containers, numbers with their sign and kind, text and None come back as they were."""
    state = make_state(3, **{field: {"value": TREES[name]}})
    law_round_trip(files.save, files.load, state, tmp_path)
    assert list(getattr(files.load(tmp_path / "step_00000003"), field)) == ["value"]


def test_tensors_that_share_storage(tmp_path):
    """Two names of one tensor, and views of one storage, are saved each with its own values and loaded apart."""
    base = torch.arange(10.0)
    state = make_state(3, extra={"a": base, "b": base, "c": base[2:5], "d": base.view(2, 5)})
    law_round_trip(files.save, files.load, state, tmp_path)
    loaded = files.load(tmp_path / "step_00000003").extra
    loaded["a"].zero_()
    assert loaded["b"].sum() == 45
    assert loaded["d"].sum() == 45


def test_loaded_tensors_are_not_views_of_the_file(tmp_path):
    """A loaded state outlives its files and can be written to."""
    state = make_state(3)
    path = files.save(state, tmp_path)
    loaded = files.load(path)
    shutil.rmtree(path)
    assert loaded == state
    loaded.params["fc.weight"].add_(1)


@pytest.mark.parametrize(
    "broken", [broken_io.save_without_strides, broken_io.save_without_signs, broken_io.save_tensors_only]
)
def test_law_round_trip_can_fail(tmp_path, broken):
    """Savers that lose layouts, signs of zero, or the numbers beside the tensors are refused."""
    state = make_state(3, params={"channels_last": LAYOUTS["channels_last"]}, extra={"zero": -0.0})
    law_round_trip(files.save, files.load, state, tmp_path / "good")
    with pytest.raises(AssertionError):
        law_round_trip(broken, files.load, state, tmp_path / "bad")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extra": {"x": {"y": {1, 2}}}}, r"extra\.x\.y"),
        ({"hooks": {"h": [object()]}}, r"hooks\.h\.0"),
        ({"extra": {"x": {3: 1}}}, r"extra\.x.*3"),
        ({"extra": {"x": torch.ones(2).to_sparse()}}, r"extra\.x"),
        ({"extra": {"x": torch.ones(2, dtype=torch.complex128)}}, r"extra\.x"),
        ({"extra": {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}}, r"extra\.a\.b"),
        ({"params": {"w": torch.ones(2)}, "buffers": {"w": torch.zeros(2)}}, r"buffers\.w"),
        ({"extra": {"x": torch.ones(2, device="meta")}}, r"extra\.x"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, fields, message):
    """A leaf that can't be saved is a CheckpointError that names it, and leaves nothing visible."""
    with pytest.raises(CheckpointError, match=message):
        files.save(make_state(3, **fields), tmp_path)
    assert names(tmp_path) == []


# The model file.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, batch):
        return self.head(self.embed(batch))


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(2), nn.Linear(4, 3))


def test_the_model_file_loads_anywhere(tmp_path):
    """model.safetensors holds the module's plain names and loads strictly without fntrain."""
    model = convolutional()
    path = ft.save(ft.init_state(model, ft.optimizer(torch.optim.AdamW, lr=0.1)), tmp_path)
    contents = safetensors.torch.load_file(path / "model.safetensors")
    other = convolutional()
    other.load_state_dict(contents, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_tied_weights_round_trip(tmp_path):
    """Tied weights are saved once, train on after a resume bit for bit, and load into a tied module."""
    model = Tied()
    optimizer = ft.optimizer(torch.optim.AdamW, lr=0.1)
    loss_fn = lambda model, batch: model(batch).square().mean()  # noqa: E731
    step = ft.supervised_step(model, loss_fn, optimizer)
    data = ft.data.stream(torch.arange(5), 2, seed=0)
    start = ft.init_state(model, optimizer)
    whole = ft.fit(step, state=start, data=data, max_steps=4)
    half = ft.fit(step, ft.hooks.checkpoint(tmp_path, every=2), state=start, data=data, max_steps=2)
    resumed = ft.resume_or(start, tmp_path)
    assert resumed == half
    assert ft.fit(step, state=resumed, data=data, max_steps=4) == whole
    other = Tied()
    assert safetensors.torch.load_model(other, ft.latest(tmp_path) / "model.safetensors") == (set(), [])
    assert torch.equal(other.head.weight, half.params["embed.weight"])


# resume_or.


def test_resume_from_nothing_is_the_fresh_state(tmp_path):
    """Without a checkpoint the given state is returned itself."""
    state = fresh()
    assert ft.resume_or(state, tmp_path / "none") is state
    assert ft.resume_or(state, tmp_path) is state
    assert ft.latest(tmp_path) is None


def test_resume_takes_the_newest_and_the_layout_of_the_given_state(tmp_path):
    """The newest step is resumed, with every saved field, in the memory format of the fresh model."""
    for step in (2, 10, 9):
        files.save(make_state(step), tmp_path)
    layout = torch.zeros(4, 3).t()
    resumed = ft.resume_or(fresh(params={"fc.weight": layout, "fc.bias": torch.zeros(3)}), tmp_path)
    assert resumed == files.load(tmp_path / "step_00000010")
    assert resumed.params["fc.weight"].stride() == layout.stride()


W, B = torch.zeros(3, 4), torch.zeros(3)


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"params": {"fc.weight": W}}, ["params['fc.bias']: only in the checkpoint"]),
        ({"params": {"fc.weight": W, "fc.bias": B, "x": B}}, ["params['x']: only in the model"]),
        (
            {"params": {"fc.weight": W.t(), "fc.bias": B.half()}},
            ["(3, 4) torch.float32", "(4, 3) torch.float32", "(3,) torch.float32", "(3,) torch.float16"],
        ),
        ({"params": {"a": W, "fc.bias": B}}, ["['a']: only in the model", "['fc.weight']: only in the checkpoint"]),
        ({"buffers": {}}, ["buffers['bn.mean']: only in the checkpoint"]),
        ({"seed": 8}, ["seed is 7", "has 8"]),
    ],
)
def test_resume_refuses_another_job(tmp_path, fields, messages):
    """Another model or seed is an error that lists both sides of every difference."""
    files.save(make_state(1), tmp_path)
    with pytest.raises(CheckpointError) as error:
        ft.resume_or(fresh(**fields), tmp_path)
    for message in messages:
        assert message in str(error.value)


def test_resume_refuses_optimizer_state_of_unknown_parameters(tmp_path):
    """opt_state under a name that the model does not have is an error naming it."""
    files.save(make_state(1, opt_state={"old.name": {"step": torch.ones(())}}), tmp_path)
    with pytest.raises(CheckpointError, match=r"opt_state.*old\.name"):
        ft.resume_or(fresh(), tmp_path)


# Damage.


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A directory with checkpoints of steps 1 and 2, to copy and damage."""
    root = tmp_path_factory.mktemp("pair")
    for step in (1, 2):
        files.save(make_state(step), root)
    return root


def outcome(load, path):
    """The kind of error that load raises, or what it believed."""
    try:
        return "same bits" if load(path) == SAVED_2 else "other bits"
    except CheckpointError:
        return "CheckpointError"
    except Exception as error:
        return type(error).__name__


def damages(size, name, amount):
    """Truncations to sampled lengths and single flipped bits of one file, reproducibly."""
    rng = random.Random(name)
    lengths = {0, 1, 7, 8, 9, size // 2, size - 2, size - 1, *rng.sample(range(size), 8)}
    for length in sorted(lengths):
        yield f"{name} cut to {length}", lambda raw, length=length: raw[:length]
    for _ in range(amount):
        where, bit = rng.randrange(size), rng.randrange(8)

        def flip(raw, where=where, bit=bit):
            return raw[:where] + bytes([raw[where] ^ (1 << bit)]) + raw[where + 1 :]

        yield f"{name} bit {bit} of byte {where}", flip


def law_damage(load, path, amount=20):
    wrong = {}
    for name in NAMES:
        raw = (path / name).read_bytes()
        for label, damage in damages(len(raw), name, amount):
            (path / name).write_bytes(damage(raw))
            if (result := outcome(load, path)) != "CheckpointError":
                wrong[label] = result
        (path / name).unlink()
        if (result := outcome(load, path)) != "CheckpointError":
            wrong[f"{name} missing"] = result
        (path / name).write_bytes(raw)
    assert outcome(load, path) == "same bits"
    assert wrong == {}


@pytest.mark.parametrize("name", NAMES)
def test_every_damage_is_found(pair, tmp_path, name, monkeypatch):
    """A file that is cut anywhere, missing, or has one flipped bit is a CheckpointError, never a wrong state."""
    shutil.copytree(pair / "step_00000002", tmp_path / "step_00000002")
    monkeypatch.setattr(sys.modules[__name__], "NAMES", (name,))
    law_damage(files.load, tmp_path / "step_00000002", amount=60)


def test_law_damage_can_fail(pair, tmp_path):
    """A reader that believes every byte is refused."""
    shutil.copytree(pair / "step_00000002", tmp_path / "step_00000002")
    with pytest.raises(AssertionError, match="other bits"):
        law_damage(broken_io.load_unchecked, tmp_path / "step_00000002")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["cut", "flipped", "missing"])
def test_resume_passes_over_a_damaged_checkpoint_and_says_so(pair, tmp_path, caplog, name, kind):
    """The newest intact checkpoint is resumed, and the log names the damaged file."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "step_00000002" / name, kind)
    with caplog.at_level(logging.WARNING, logger="fntrain"):
        resumed = ft.resume_or(fresh(), tmp_path)
    assert resumed == SAVED_1
    assert f"step_00000002/{name}" in caplog.text


def damage(file, kind):
    raw = file.read_bytes()
    if kind == "missing":
        file.unlink()
    else:
        middle = len(raw) // 2
        flipped = raw[:middle] + bytes([raw[middle] ^ 0x80]) + raw[middle + 1 :]
        file.write_bytes(raw[:-1] if kind == "cut" else flipped)


def test_when_all_are_damaged_all_are_named(pair, tmp_path):
    """Nothing is silently started afresh: the error names every damaged checkpoint."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "step_00000001" / "model.safetensors", "cut")
    damage(tmp_path / "step_00000002" / "state.json", "missing")
    with pytest.raises(CheckpointError) as error:
        ft.resume_or(fresh(), tmp_path)
    for text in ("step_00000001/model.safetensors", "step_00000002/state.json"):
        assert text in str(error.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep_last", [None, 1, 2])
@pytest.mark.filterwarnings("ignore:state.hooks")
def test_a_run_goes_on_after_falling_back(pair, tmp_path, name, keep_last):
    """After a fall back the run saves again, and retention never deletes the only intact checkpoints."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "step_00000002" / name, "missing" if name == "state.json" else "cut")
    hook = ft.hooks.checkpoint(tmp_path, every=1, keep_last=keep_last)
    start = ft.resume_or(fresh(), tmp_path)
    final = ft.fit(step_fn, hook, state=start, data=iter([0.1]), max_steps=2)
    assert final.step == 2
    assert ft.resume_or(fresh(), tmp_path) == final
    intact = [path for path in files.checkpoints(tmp_path) if outcome(files.load, path) != "CheckpointError"]
    assert len(intact) == (1 if keep_last == 1 else 2)


def test_retention_counts_only_what_is_complete(pair, tmp_path):
    """A newer directory without a manifest does not make retention delete the last whole checkpoint."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    (tmp_path / "step_00000009").mkdir()
    retain(store_at(tmp_path), 2, lambda steps: steps[:1])
    assert ft.resume_or(fresh(), tmp_path) == SAVED_2


# Hostile manifests.


def entry(manifest, key, value):
    next(iter(manifest["tensors"].values()))[key] = value


def each_stride(manifest, stride):
    for one in manifest["tensors"].values():
        if len(one["shape"]) == 2:
            one["stride"] = stride


def nested(depth, close=True):
    return '{"list": [' * depth + ("]}" * depth if close else "")


HOSTILE = {
    "no json": lambda m: "hello",
    "a list": lambda m: [1],
    "a number": lambda m: 5,
    "null": lambda m: None,
    "another format": lambda m: {**m, "format": "other"},
    "newer schema": lambda m: {**m, "schema": 99},
    "schema of a wrong kind": lambda m: {**m, "schema": []},
    "no tensors": lambda m: {**m, "tensors": None},
    "tensors a list": lambda m: {**m, "tensors": [1, 2]},
    "entry a number": lambda m: m["tensors"].update(x=5),
    "shape a string": lambda m: entry(m, "shape", "big"),
    "huge shape": lambda m: entry(m, "shape", [2**62, 2**62]),
    "crc a string": lambda m: entry(m, "crc32", "0"),
    "name a number": lambda m: entry(m, "name", 5),
    "file outside": lambda m: entry(m, "file", "../../x"),
    "file absolute": lambda m: entry(m, "file", "/etc/passwd"),
    "stride a string": lambda m: each_stride(m, "ab"),
    "stride null": lambda m: each_stride(m, None),
    "stride of strings": lambda m: each_stride(m, ["a", "b"]),
    "stride negative": lambda m: each_stride(m, [-1, 1]),
    "stride too long": lambda m: each_stride(m, [1, 1, 1]),
    "stride overlapping": lambda m: each_stride(m, [0, 0]),
    "stride huge": lambda m: each_stride(m, [2**60, 1]),
    "stride beyond 64 bits": lambda m: each_stride(m, [2**70, 1]),
    "no state": lambda m: m.pop("state") and None,
    "state a number": lambda m: {**m, "state": 5},
    "state of an unknown kind": lambda m: {**m, "state": {"set": []}},
    "dict of a number": lambda m: {**m, "state": {"dict": 5}},
    "list of a number": lambda m: m["state"]["dict"].update(extra={"list": 5}),
    "extra a dict of a list": lambda m: m["state"]["dict"].update(extra={"dict": [1]}),
    "two kinds": lambda m: m["state"]["dict"].update(extra={"dict": {}, "list": []}),
    "no kind": lambda m: m["state"]["dict"].update(extra={}),
    "tensor a list": lambda m: m["state"]["dict"].update(extra={"tensor": []}),
    "tensor unknown": lambda m: m["state"]["dict"].update(extra={"dict": {"x": {"tensor": "nowhere"}}}),
    "float a word": lambda m: m["state"]["dict"].update(extra={"dict": {"x": {"float": "word"}}}),
    "step a string": lambda m: m["state"]["dict"].update(step="5"),
    "step missing": lambda m: m["state"]["dict"].pop("step") and None,
    "params a number": lambda m: m["state"]["dict"].update(params=5),
    "params of numbers": lambda m: m["state"]["dict"].update(params={"dict": {"fc.weight": 5}}),
    "opt_state of numbers": lambda m: m["state"]["dict"].update(opt_state={"dict": {"fc.weight": 5}}),
    "deep nesting": lambda m: nested(100_000),
    "deep nesting, unclosed": lambda m: nested(100_000, close=False),
    **{f"nesting of {depth}": lambda m, depth=depth: ("deep", depth) for depth in (300, 900, 5_000)},
}


def opened(path):
    """The manifest, without the checksum around it if there is one."""
    whole = json.loads((path / "state.json").read_text())
    return whole.get("manifest", whole)


def sealed(path, text):
    """Write a changed manifest, with a right checksum where the format has one."""
    if "manifest" in json.loads((path / "state.json").read_text()):
        text = f'{{"crc32": {zlib.crc32(text.encode())}, "manifest": {text}}}'
    (path / "state.json").write_text(text)


def test_sealing_is_faithful(pair, tmp_path):
    """A manifest that these tests take apart and put together unchanged is accepted."""
    shutil.copytree(pair / "step_00000002", tmp_path / "step_00000002")
    sealed(tmp_path / "step_00000002", json.dumps(opened(tmp_path / "step_00000002")))
    assert outcome(files.load, tmp_path / "step_00000002") == "same bits"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused(pair, tmp_path, name):
    """Whatever is in state.json, load gives a CheckpointError, and reads no file outside the checkpoint."""
    path = tmp_path / "step_00000002"
    shutil.copytree(pair / "step_00000002", path)
    manifest = opened(path)
    changed = HOSTILE[name](manifest)
    if isinstance(changed, tuple):
        manifest["state"]["dict"]["extra"] = {"dict": {"x": "HERE"}}
        changed = json.dumps(manifest).replace('"HERE"', nested(changed[1]))
    text = changed if isinstance(changed, str) else json.dumps(manifest if changed is None else changed)
    sealed(path, "null" if name == "null" else text)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own; torch's compiler raises it
    try:
        assert outcome(files.load, path) in ("CheckpointError", "other bits" if name == "nesting of 300" else None)
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"\x00" * 10, b"", b'{"a": NaN}', b"1" * 5000])
def test_a_manifest_that_is_no_text_is_refused(pair, tmp_path, raw):
    """Bytes that are no UTF-8, no JSON or an absurd number are a CheckpointError."""
    shutil.copytree(pair / "step_00000002", tmp_path / "step_00000002")
    (tmp_path / "step_00000002" / "state.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        files.load(tmp_path / "step_00000002")


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_in_place_of_a_file_is_refused(pair, tmp_path, name):
    """A directory where a file should be is a CheckpointError too."""
    shutil.copytree(pair / "step_00000002", tmp_path / "step_00000002")
    (tmp_path / "step_00000002" / name).unlink()
    (tmp_path / "step_00000002" / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        files.load(tmp_path / "step_00000002")


# Atomicity.


class Counted:
    """Calls through until the k-th call, which raises."""

    def __init__(self, fn, k, error):
        self.fn, self.left, self.error = fn, k, error

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.fn(*args, **kwargs)


class Killed(BaseException):
    """Ends the process as far as the code can tell."""


SEAMS = {
    "fsync": (os, "fsync"),
    "rename": (Path, "rename"),
    "write": (tensor_file.Writer, "write"),
    "mkdir": (Path, "mkdir"),
    "open": (Path, "open"),
    "rmtree": (shutil, "rmtree"),
}


def law_atomic(save, parent, monkeypatch, new, seams=SEAMS):
    """At whatever call it fails, the old checkpoints stay whole, and the newest visible one is whole."""
    old = [make_state(1), SAVED_2]
    for seam, error in ((seam, error) for seam in seams for error in (OSError("disk full"), Killed())):
        for k in count(1):
            root = parent / f"{seam}-{type(error).__name__}-{k}"
            for state in old:
                files.save(state, root)
            with monkeypatch.context() as patch:
                owner, name = seams[seam]
                counted = Counted(getattr(owner, name), k, error)
                # A plain function is bound to the instance, which keeps methods of Path methods.
                patch.setattr(owner, name, lambda *args, counted=counted, **kwargs: counted(*args, **kwargs))
                try:
                    save(new, root)
                    failed = False
                except (CheckpointError, Killed):
                    failed = True
            expected = {make.step: [ft.digest(make)] for make in old}
            expected.setdefault(new.step, []).append(ft.digest(new))
            found = {step_of(path): ft.digest(files.load(path)) for path in files.checkpoints(root)}
            assert found.keys() >= {1, 2}, (seam, k)
            assert all(digest in expected[step] for step, digest in found.items()), (seam, k)
            newest = ft.latest(root)
            assert newest is not None
            assert step_of(newest) == max(found)
            if not failed:
                assert found[new.step] == ft.digest(new)
            if counted.left > 0:
                break
            assert k < 50
            store_at(root).clean()
            assert not list(root.glob(".partial-*"))
        assert k > 1, f"{seam} was never called"


@pytest.mark.parametrize("step", [2, 3])
def test_a_failing_save_leaves_the_visible_checkpoints_whole(tmp_path, monkeypatch, step):
    """A failure at any fsync, rename, write or delete leaves all visible checkpoints loadable, also when replacing."""
    new = make_state(step, extra={"new": torch.ones(3)})
    seams = SEAMS if step == 2 else {name: SEAMS[name] for name in ("fsync", "rename", "write", "mkdir", "open")}
    law_atomic(files.save, tmp_path, monkeypatch, new, seams)


@pytest.mark.parametrize("step", [2, 3])
def test_law_atomic_can_fail(tmp_path, monkeypatch, step):
    """Writing straight into the visible directory is refused."""
    with pytest.raises((AssertionError, CheckpointError)):
        law_atomic(
            broken_io.save_in_place,
            tmp_path,
            monkeypatch,
            make_state(step, extra={"new": 1}),
            {"fsync": SEAMS["fsync"]},
        )


def test_a_failed_save_leaves_no_partial_directory(tmp_path, monkeypatch):
    """An OSError while writing is a CheckpointError that says so, and cleans up after itself."""
    counted = Counted(tensor_file.Writer.write, 3, OSError(28, "No space left on device"))
    monkeypatch.setattr(tensor_file.Writer, "write", lambda writer, *data: counted(writer, *data))
    with pytest.raises(CheckpointError, match="No space left on device"):
        files.save(make_state(1), tmp_path)
    assert names(tmp_path) == []


def law_order_of_effects(save, root, monkeypatch):
    """Files, then their directory are on disk before the rename; the parent after it."""
    effects = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(descriptor):
        effects.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def logged_rename(self, target):
        effects.append("rename")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", logged_fsync)
        patch.setattr(Path, "rename", logged_rename)
        save(make_state(1), root)
    at = effects.index("rename")
    assert set(NAMES) <= set(effects[:at])
    assert effects[at - 2] == "state.json"
    assert effects[at - 1].startswith(".partial-")
    assert root.name in effects[at:]


def test_files_are_on_disk_before_they_are_visible(tmp_path, monkeypatch):
    """fsync of files, manifest last, then of the directory; rename; fsync of the parent."""
    law_order_of_effects(files.save, tmp_path, monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        law_order_of_effects(
            lambda state, _: broken_io.save_in_place(state, tmp_path / "b"), tmp_path / "b", monkeypatch
        )


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    """Saving a step again leaves one checkpoint of it, the new one."""
    for value in (1, 2, 3):
        path = files.save(make_state(4, extra={"value": value}), tmp_path)
    assert files.load(path).extra["value"] == 3
    assert names(tmp_path) == ["step_00000004"]


def test_an_old_checkpoint_between_two_renames_is_found(tmp_path):
    """step_X.old, left by a kill in the middle of a replacement, is the latest until X is saved again."""
    path = files.save(make_state(2), tmp_path)
    files.save(make_state(1), tmp_path)
    path.rename(path.with_name(path.name + ".old"))
    assert ft.resume_or(fresh(), tmp_path) == SAVED_2
    files.save(make_state(2, extra={}), tmp_path)
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_retention_deletes_a_left_old_checkpoint_with_its_step(tmp_path):
    """A step_X.old that a kill left beside X does not come back into view when X is deleted."""
    path = files.save(make_state(1), tmp_path)
    shutil.copytree(path, path.with_name(path.name + ".old"))
    for step in (2, 3):
        files.save(make_state(step), tmp_path)
    retain(store_at(tmp_path), 3, lambda steps: steps[:2])
    assert steps(tmp_path) == [3, 2]


# The hook.


def run(root, max_steps, *, every=1, keep_last=None, start=None):
    start = ft.resume_or(fresh(), root) if start is None else start
    hook = ft.hooks.checkpoint(root, every=every, keep_last=keep_last)
    return ft.fit(step_fn, hook, state=start, data=iter([0.1] * 100), max_steps=max_steps)


def test_an_unwritable_directory_is_found_before_the_first_step(tmp_path):
    """A path below a regular file is a CheckpointError when fit starts, not at the first save."""
    (tmp_path / "file").write_text("")
    begun = []
    with pytest.raises(CheckpointError, match="can't be written to"):
        ft.fit(
            lambda state, batch: begun.append(1) or step_fn(state, batch),
            ft.hooks.checkpoint(tmp_path / "file" / "runs", every=5),
            state=fresh(),
            data=iter([0.1] * 9),
            max_steps=9,
        )
    assert begun == []
    with pytest.raises(CheckpointError, match="can't be written to"):
        files.save(fresh(), tmp_path / "file" / "runs")


@pytest.mark.parametrize(
    ("max_steps", "every", "keep_last", "kept"),
    [
        (7, 3, None, [7, 6, 3]),
        (6, 3, None, [6, 3]),
        (7, 3, 1, [7]),
        (7, 3, 2, [7, 6]),
        (2, 5, None, [2]),
        (7, 1, 3, [7, 6, 5]),
    ],
)
def test_saves_every_n_steps_and_at_the_end(tmp_path, max_steps, every, keep_last, kept):
    """Checkpoints stand at every n-th step and after the last one; only the newest keep_last stay."""
    final = run(tmp_path, max_steps, every=every, keep_last=keep_last)
    assert steps(tmp_path) == kept
    assert files.load(ft.latest(tmp_path)) == final
    assert len(names(tmp_path)) == len(kept)


def test_resuming_at_every_step_ends_in_the_same_bits(tmp_path):
    """Ten runs of one step each are one run of ten."""
    whole = run(tmp_path / "whole", 10, every=10)
    for step in range(1, 11):
        final = run(tmp_path / "parts", step, keep_last=2)
    assert final == whole
    assert ft.digest(final) == ft.digest(whole)


def test_a_finished_run_started_again_does_nothing(tmp_path):
    """Resuming at max_steps returns the same state and touches no file."""
    final = run(tmp_path, 4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("step_*/*")}
    assert run(tmp_path, 4) == final
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("step_*/*")} == before
    assert before


def test_refuses_a_directory_with_later_checkpoints(tmp_path):
    """A run that starts afresh beside a later checkpoint is refused: that one would be resumed, not its own."""
    run(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"step_00000004.*later step than this run's start \(0\)"):
        run(tmp_path, 6, start=fresh())


def test_leftovers_of_dead_writers_are_removed(tmp_path):
    """Partial directories of killed saves are gone after the next run has started; checkpoints and logs are not."""
    run(tmp_path, 2)
    (tmp_path / ".partial-step_00000003-abc").mkdir()
    (tmp_path / ".partial-step_00000003-abc" / "model.safetensors").write_text("half")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert ft.resume_or(fresh(), tmp_path).step == 2
    run(tmp_path, 2)
    assert names(tmp_path) == ["metrics.jsonl", "step_00000001", "step_00000002"]


@pytest.mark.parametrize(
    ("every", "keep_last"), [(0, None), (-1, None), (2.5, None), (5, 0), (5, -1), (5, 1.5), (5, "a")]
)
def test_periods_must_be_positive(tmp_path, every, keep_last):
    """Periods that are no whole positive number are a ValueError when the hook is built."""
    with pytest.raises(ValueError, match="every" if keep_last is None else "keep_last"):
        ft.hooks.checkpoint(tmp_path, every=every, keep_last=keep_last)


KILLED = """
    import json, os, signal, sys, time, torch
    import fntrain as ft
    from fntrain.shell.checkpoints.save_load import checkpoints

    directory, kills = sys.argv[1], int(sys.argv[2])
    if sys.argv[3:]:
        sys.path.insert(0, sys.argv[3])
        import broken_io
        from fntrain.shell.checkpoints import saver
        saver.commit = broken_io.commit_in_place
    torch.set_num_threads(1)

    def step_fn(state, batch):
        ft.seed_generators(state.seed, state.step)
        new = {name: value * 0.99 + torch.randn(value.shape) * batch for name, value in state.params.items()}
        return state.advance(params=new, metrics={})

    def train(directory, max_steps):
        start = ft.TrainState(step=0, position=0, seed=3, params={"w": torch.ones(300, 300), "b": torch.ones(7)})
        data = ft.data.stream(torch.arange(17.0), 1, seed=0)
        hook = ft.hooks.checkpoint(directory, every=1, keep_last=2)
        return ft.fit(step_fn, hook, state=ft.resume_or(start, directory), data=data, max_steps=max_steps)

    def forked(fn):
        if pid := os.fork():
            return pid
        fn()
        os._exit(0)

    seen = []
    for k in range(kills):
        before = checkpoints(directory)[:1]
        pid = forked(lambda: train(directory, 10**6))
        while checkpoints(directory)[:1] == before:  # it has saved something, however busy the machine is
            time.sleep(0.001)
        time.sleep(0.0137 * (k % 6))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        newest = checkpoints(directory)[0]  # not latest, which passes over a damaged one
        seen.append(ft.load(newest).step)  # raises if it is not whole
    end = seen[-1] + 3
    final = train(directory, end)
    start = ft.TrainState(step=0, position=0, seed=3, params={"w": torch.ones(300, 300), "b": torch.ones(7)})
    data = ft.data.stream(torch.arange(17.0), 1, seed=0)
    undisturbed = ft.fit(step_fn, state=start, data=data, max_steps=end)
    left = sorted(name for name in os.listdir(directory) if name != ".lock")
    print(json.dumps({"seen": seen, "end": end, "digests": [ft.digest(final), ft.digest(undisturbed)], "left": left}))
"""


def run_and_kill(parent, kills, *broken):
    """Fork, kill and load again and again in a process of its own."""
    script = parent / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, script, parent / "runs", str(kills), *broken]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_sigkill_leaves_a_loadable_latest_and_the_run_ends_in_the_same_bits(tmp_path):
    """A process killed again and again while saving every step loses nothing: latest loads, the digest is the same."""
    done = run_and_kill(tmp_path, 6)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["digests"][0] == said["digests"][1]
    assert said["seen"] == sorted(said["seen"])
    assert said["seen"][-1] > 0
    assert said["left"] == [f"step_{said['end'] - 1:08d}", f"step_{said['end']:08d}"]


def test_the_sigkill_test_can_fail(tmp_path):
    """Saving straight into the visible directory does not survive the kills (it may take a few)."""
    done = run_and_kill(tmp_path, 80, str(Path(broken_io.__file__).parent))
    assert done.returncode != 0
    assert "CheckpointError" in done.stderr


def test_after_a_roll_back_the_branch_left_is_gone(tmp_path):
    """Checkpoints later than the one just saved are of no past of this run: resuming goes on from the newest save."""
    kept = {}

    def back(state):
        kept.setdefault(state.step, state)
        return kept[2].replace(position=state.position) if state.position == 11 else None

    state = ft.TrainState(step=0, position=0, seed=0, params={})
    hooks = [ft.hook(after_step=back), ft.hooks.checkpoint(tmp_path, every=2, keep_last=1)]
    run = ft.states(lambda s, b: s.advance(), hooks, state=state, data=iter(range(100)), max_steps=20)
    next(s for s in run if s.position == 15)
    run.close()
    assert steps(tmp_path) == [6]


def test_resume_or_refuses_what_is_no_directory_of_checkpoints(tmp_path):
    """A single checkpoint or a file given for the directory is an error, not a fresh start."""
    path = files.save(ft.TrainState(step=1, position=1, seed=0, params={"w": torch.ones(1)}), tmp_path)
    state = ft.TrainState(step=0, position=0, seed=0, params={"w": torch.ones(1)})
    for wrong in (path, path / "state.json"):
        with pytest.raises(CheckpointError, match="is no directory of checkpoints"):
            ft.resume_or(state, wrong)
