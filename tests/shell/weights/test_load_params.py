"""Weights from elsewhere: what fits is written, what does not is named, and an error leaves the module as it was."""

import json
import os
from pathlib import Path

import broken_params
import cases
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import fntrain as ft
from fntrain import CheckpointError, StateConsumedError, TrainState
from fntrain.shell.weights import convert
from fntrain.shell.weights import files as weights
from fntrain.shell.weights.load import _FLOATS
from fntrain.shell.weights.report import LoadReport, rename_hint


class Tied(nn.Module):
    """Embedding and head share one weight, one sub-module is reached by two paths."""

    def __init__(self, tie=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.norm, self.scale = nn.BatchNorm1d(3), nn.LayerNorm(3)
        self.again = self.scale
        if tie:
            self.head.weight = self.embed.weight


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


EVERY = {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}  # fmt: skip


def filled(make, seed):
    """A module with other values in every parameter and buffer for every seed."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn(tensor.shape) * 10)
    return model


def values(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write(tensors, path):
    """A file as any other library writes it."""
    safetensors.torch.save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, path)
    return path


def files_in(directory):
    return sorted(path.name for path in directory.iterdir())


def shard(tensors, directory, num=3):
    """The common sharded layout."""
    names = list(tensors)
    weight_map = {name: f"model-{i % num + 1:05d}-of-{num:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        write({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


# Reading.


def law_round_trip(export, load, make, directory):
    """What one module exports, a fresh one of the kind loads: the same bits, ties and parameter objects."""
    model, other = filled(make, 1), filled(make, 2)
    before = {name: id(param) for name, param in other.named_parameters(remove_duplicate=False)}
    load(export(model, directory / "model.safetensors"), other)
    assert cases.same(values(other), values(model))
    assert {name: id(param) for name, param in other.named_parameters(remove_duplicate=False)} == before


@pytest.mark.parametrize("name", [*cases.MODELS, "tied with buffers"])
def test_export_and_load_round_trip(tmp_path, name):
    """Parameters and persistent buffers of every kind of module come back bit for bit, tied ones still tied."""
    law_round_trip(ft.export, ft.load_params, cases.MODELS.get(name, Tied), tmp_path)


@pytest.mark.parametrize(
    ("export", "load"),
    [(broken_params.export_without_buffers, ft.load_params), (ft.export, broken_params.load_by_assignment)],
)
def test_law_round_trip_can_fail(tmp_path, export, load):
    """An export without buffers and a loader that unties weights are refused."""
    with pytest.raises((AssertionError, CheckpointError)):
        law_round_trip(export, load, Tied, tmp_path)


@pytest.mark.parametrize("layout", ["file", "directory", "index", "directory with index", "checkpoint"])
def test_every_layout_loads(tmp_path, layout):
    """A file, an index, a directory with one of them and a checkpoint give the same weights and report."""
    source, model = filled(network, 1), filled(network, 2)
    if layout == "checkpoint":
        path = ft.save(ft.init_state(source, ft.optimizer(torch.optim.SGD, lr=0.1)), tmp_path)
    elif "index" in layout:
        path = shard(source.state_dict(), tmp_path)
    else:
        path = write(source.state_dict(), tmp_path / "weights.safetensors")
    report = ft.load_params(tmp_path if layout.startswith("directory") else path, model)
    assert cases.same(values(model), values(source))
    assert set(report.matched) == EVERY
    assert report == LoadReport(matched=report.matched)


def test_links_to_files_are_followed(tmp_path):
    """A directory of links into a store elsewhere, as download caches keep them, loads."""
    (tmp_path / "store").mkdir()
    (tmp_path / "links").mkdir()
    source, model = filled(network, 1), filled(network, 2)
    shard(source.state_dict(), tmp_path / "store")
    for file in (tmp_path / "store").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    ft.load_params(tmp_path / "links", model)
    assert cases.same(values(model), values(source))


def test_a_loaded_module_does_not_need_the_file(tmp_path):
    """Values are copied: deleting or overwriting the file afterwards changes nothing."""
    source, model = filled(network, 1), filled(network, 2)
    path = write(source.state_dict(), tmp_path / "a.safetensors")
    ft.load_params(path, model)
    path.write_bytes(b"\x00" * path.stat().st_size)
    assert cases.same(values(model), values(source))


# What does not fit.


def pieces(path, changes):
    """Weights of the network, some left out (None), changed or added."""
    tensors = {**filled(network, 1).state_dict(), **changes}
    return write({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


MISFITS = {
    "missing": ({"0.bias": None}, ["missing     0.bias"]),
    "missing buffer": ({"1.running_mean": None}, ["missing     1.running_mean"]),
    "unexpected": ({"extra": torch.ones(1)}, ["unexpected  extra"]),
    "shape": ({"2.weight": torch.ones(5, 3)}, ["2.weight: file has (5, 3) float32, module has (2, 3) float32"]),
    "transposed": ({"2.weight": torch.ones(3, 2)}, ["2.weight: file has (3, 2)"]),
    "same size": ({"2.weight": torch.ones(6)}, ["2.weight: file has (6,)"]),
    "broadcast": ({"0.bias": torch.ones(1)}, ["0.bias: file has (1,)"]),
    "integer": ({"0.bias": torch.ones(3, dtype=torch.int64)}, ["file has (3,) int64", "only float16"]),
    "float8": ({"0.bias": torch.ones(3).to(torch.float8_e4m3fn)}, ["float8_e4m3fn"]),
    "complex": ({"0.bias": torch.ones(3, dtype=torch.complex64)}, ["complex64"]),
    "fraction of a count": ({"1.num_batches_tracked": torch.tensor(1.5)}, ["1.num_batches_tracked: file has () float32"]),
    "overflow": ({"0.bias": torch.tensor([1.0, 1e300, 0.0], dtype=torch.float64)}, ["too large"]),
    "several": (
        {"0.bias": None, "2.bias": torch.ones(7), "a": torch.ones(1), "b": torch.ones(1)},
        ["1 missing, 2 unexpected, 1 mismatched", "0.bias", "2.bias", "  a", "  b", "strict=False"],
    ),
}  # fmt: skip


def law_all_or_nothing(load, path, messages):
    """An error lists what does not fit, and the module has every bit that it had, also where names did fit."""
    model = filled(network, 2)
    before = values(model)
    state = ft.init_state(model, ft.optimizer(torch.optim.SGD, lr=0.1))
    with pytest.raises(CheckpointError) as error:
        load(path, model)
    for message in (str(path), *messages):
        assert message in str(error.value)
    assert cases.same(values(model), before)
    assert state.params.keys()  # not consumed


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_changes_nothing(tmp_path, name):
    """Strict loading is all or nothing."""
    changes, messages = MISFITS[name]
    law_all_or_nothing(ft.load_params, pieces(tmp_path / "x.safetensors", changes), messages)


@pytest.mark.parametrize("name", ["unexpected", "shape"])
def test_law_all_or_nothing_can_fail(tmp_path, name):
    """A loader that writes while it checks is refused."""
    path = pieces(tmp_path / "x.safetensors", MISFITS[name][0])
    with pytest.raises(AssertionError):
        law_all_or_nothing(broken_params.load_as_it_goes, path, [])


@pytest.mark.parametrize("name", MISFITS)
def test_not_strict_writes_the_rest_and_reports(tmp_path, name):
    """strict=False writes exactly what the report calls matched, with the file's values; the rest keeps its own."""
    changes, _ = MISFITS[name]
    path = pieces(tmp_path / "x.safetensors", changes)
    model = filled(network, 2)
    before, source = values(model), filled(network, 1).state_dict()
    report = ft.load_params(path, model, strict=False)
    misfits = {one.name for one in report.mismatched}
    assert set(report.missing) == {name for name, tensor in changes.items() if tensor is None}
    assert set(report.unexpected) == changes.keys() - EVERY
    assert misfits == (changes.keys() & EVERY) - set(report.missing)
    assert set(report.matched) == EVERY - misfits - set(report.missing)
    for key, value in values(model).items():
        assert cases.same({key: value}, {key: source[key] if key in report.matched else before[key]})


def test_nothing_that_matches_is_an_error(tmp_path):
    """strict=False with no name in common is a mistake, not a load."""
    path = write({"x.y": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="nothing in it fits Sequential"):
        ft.load_params(path, network(), strict=False)


# rename.


def test_rename_takes_a_backbone(tmp_path):
    """Names are renamed or left out before they are compared, and the report tells which."""
    source, model = filled(network, 1), filled(network, 2)
    tensors = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    path = write({**tensors, "head.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    before = values(model)
    report = ft.load_params(
        path,
        model,
        rename=lambda name: None if ".2." in name else name.removeprefix("backbone."),
        strict=False,
    )
    assert set(report.dropped) == {"backbone.2.weight", "backbone.2.bias"}
    assert report.missing == ("2.weight", "2.bias")
    assert report.unexpected == ("head.weight",)
    for name, value in values(model).items():
        assert cases.same({name: value}, {name: before[name] if "2." in name[:2] else source.state_dict()[name]})


def test_two_names_become_one(tmp_path):
    """A rename that gives two names one is refused, strict or not."""
    path = write({"a.0.bias": torch.ones(3), "b.0.bias": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"'a\.0\.bias' and 'b\.0\.bias' one name, '0\.bias'"):
        ft.load_params(path, network(), rename=lambda name: name[2:], strict=False)


@pytest.mark.parametrize("rename", ["x", lambda name: 5])
def test_a_rename_that_is_none_is_refused(tmp_path, rename):
    """rename is a function that gives names."""
    path = write(network().state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(TypeError, match="rename"):
        ft.load_params(path, network(), rename=rename)


@pytest.mark.parametrize(
    ("theirs", "ours", "hint"),
    [
        (["module.a", "module.b"], ["a", "b"], "DataParallel and DistributedDataParallel put it there): rename=lambda name: name.removeprefix('module.')"),
        (["_orig_mod.a"], ["a"], "torch.compile puts it there): rename=lambda name: name.removeprefix('_orig_mod.')"),
        (["_orig_mod.module.a", "x"], ["a"], "name.removeprefix('_orig_mod.module.')"),
        (["net._orig_mod.a", "net._orig_mod.b"], ["net.a", "net.b"], "name.replace('_orig_mod.', '')"),
        (["backbone.x.a", "backbone.x.b", "head.a"], ["x.a", "x.b", "fc"], "name.removeprefix('backbone.')"),
        (["a", "b"], ["module.a", "module.b"], "give model.module"),
        (["a", "b"], ["net.a", "net.b"], "rename=lambda name: 'net.' + name"),
        (["a"], ["b"], None),
        ([], ["b"], None),
    ],
)  # fmt: skip
def test_hints(theirs, ours, hint):
    """A prefix that keeps names apart is told, with the rename that takes it away; nothing is made up."""
    got = rename_hint(ours, theirs)
    assert (hint is None and got is None) or hint in got


def test_the_hint_is_in_the_error_and_works(tmp_path):
    """The rename that the message gives, pasted, loads the file."""
    path = write({f"module.{k}": v for k, v in network().state_dict().items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as error:
        ft.load_params(path, network())
    rename = eval(str(error.value).partition("rename=")[2])
    assert len(ft.load_params(path, network(), rename=rename).matched) == 9


# dtypes, ties, memory.


@pytest.mark.parametrize("theirs", _FLOATS, ids=str)
@pytest.mark.parametrize("ours", _FLOATS, ids=str)
def test_floats_are_converted_as_by_to(tmp_path, theirs, ours):
    """Floating dtypes become the module's, rounded as .to does, inf and nan kept; the report lists what was converted."""
    values = torch.tensor([[1.0, 1 / 3, -0.0, 1e-7], [torch.inf, -torch.inf, torch.nan, 60000.0]]).to(theirs)
    model = nn.Linear(4, 2, bias=False).to(ours)
    report = ft.load_params(write({"weight": values}, tmp_path / "x.safetensors"), model)
    assert cases.same({"w": model.weight.detach()}, {"w": values.to(ours)})
    assert report.converted == (() if theirs == ours else ("weight",))


TIES = {
    "first name": lambda w: {"embed.weight": w},
    "other name": lambda w: {"head.weight": w},
    "both names": lambda w: {"head.weight": w, "embed.weight": w},
}


@pytest.mark.parametrize("name", TIES)
def test_tied_weights_load_from_any_of_their_names(tmp_path, name):
    """One name or all with the same bits: the tie stays, and the weight is reported once."""
    model = filled(Tied, 2)
    path = write(TIES[name](torch.arange(15.0).view(5, 3)), tmp_path / "x.safetensors")
    report = ft.load_params(path, model, strict=False)
    assert report.matched == ("embed.weight",)
    assert report.unexpected == ()
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, torch.arange(15.0).view(5, 3))


@pytest.mark.parametrize(
    ("embed", "head"),
    [
        (torch.ones(5, 3), torch.zeros(5, 3)),
        (torch.zeros(5, 3), -torch.zeros(5, 3)),
        (torch.ones(5, 3), torch.ones(2)),
        (torch.ones(5, 3), torch.ones(5, 3).double()),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_tied_names_that_differ_are_refused(tmp_path, embed, head, strict):
    """Values, a sign of zero, a shape or dtype: two tensors for one weight are an error, strict or not."""
    model = filled(Tied, 2)
    before, tensors = values(model), filled(lambda: Tied(tie=False), 1).state_dict()
    tensors = {**tensors, "embed.weight": embed, "head.weight": head}
    with pytest.raises(
        CheckpointError, match=r"embed\.weight.*head\.weight.*differ|head\.weight.*embed\.weight.*differ"
    ):
        ft.load_params(write(tensors, tmp_path / "x.safetensors"), model, strict=strict)
    assert cases.same(values(model), before)


def test_both_names_of_a_tied_weight_fit_a_module_without_the_tie(tmp_path):
    """An untied module has two weights: each is loaded from its own name, and one alone is missing."""
    source = filled(Tied, 1)
    model = filled(lambda: Tied(tie=False), 2)
    path = ft.export(source, tmp_path / "x.safetensors")
    assert ft.load_params(path, model, strict=False).missing == ("head.weight",)
    ft.load_params(write(values(source), path), model, rename=lambda n: None if n.startswith("again.") else n)
    assert torch.equal(model.head.weight, source.head.weight)
    assert model.head.weight is not model.embed.weight


def law_ends_leases(load, path):
    """A state that shares the module's memory says that it is gone; one made afterwards has the new values."""
    model = filled(network, 2)
    optimizer = ft.optimizer(torch.optim.SGD, lr=0.1)
    state = ft.init_state(model, optimizer)
    kept = ft.snapshot(state)
    load(path, model)
    for field in (state.params, state.buffers):
        with pytest.raises(StateConsumedError, match=r"consumed by ft\.load_params"):
            dict(field)
    assert ft.init_state(model, optimizer) != kept


def test_states_that_share_memory_are_consumed(tmp_path):
    """Loading ends leases as ft.load_into does."""
    law_ends_leases(ft.load_params, pieces(tmp_path / "x.safetensors", {}))


def test_law_ends_leases_can_fail(tmp_path):
    """A plain load_state_dict leaves states that silently hold other values."""
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        law_ends_leases(broken_params.load_without_leases, pieces(tmp_path / "x.safetensors", {}))


def test_training_goes_on_from_loaded_weights(tmp_path):
    """In-place steps and the pure step from loaded weights agree bit for bit."""
    path = ft.export(cases.make("tied", seed=1), tmp_path / "x.safetensors")
    finals = []
    for wrap in (lambda step: step, ft.shell.in_place):
        model = cases.make("tied", seed=2)
        optimizer = ft.optimizer(torch.optim.AdamW, lr=0.1)
        step = wrap(ft.supervised_step(model, cases.square_loss, optimizer))
        ft.load_params(path, model)
        finals.append(ft.snapshot(ft.fit(step, state=ft.init_state(model, optimizer), data=cases.batches("tied", 3))))
    assert finals[0] == finals[1]


def expanded():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.zeros(1).expand(3))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2, device="meta"), "meta device"),
        (lambda: nn.LazyLinear(2), "no shape yet"),
        (expanded, "'mask' is expanded"),
        (lambda: nn.ReLU(), "no parameters"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_modules_that_cannot_be_written_are_refused(tmp_path, make, message):
    """Where a copy would be lost or stop half-way, nothing is begun."""
    path = write(nn.Linear(2, 2).state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        ft.load_params(path, make(), strict=False)


def test_a_compiled_module_has_its_plain_names(tmp_path):
    """What torch.compile puts in front of names is not asked for."""
    source = filled(network, 1)
    wrapped = nn.Module()
    wrapped._orig_mod = filled(network, 2)  # as torch.compile's wrapper names it
    ft.load_params(ft.export(source, tmp_path / "x.safetensors"), wrapped)
    assert cases.same(values(wrapped._orig_mod), values(source))


# Damage and odd sets.


def sharded(directory, change):
    """A sharded set with its index or files changed."""
    index = shard(filled(network, 1).state_dict(), directory)
    content = json.loads(index.read_text())
    changed = change(content, directory)
    index.write_text(changed if isinstance(changed, str) else json.dumps(content if changed is None else changed))


FIRST = "model-00001-of-00003.safetensors"
SETS = {
    "shard missing": (lambda c, d: (d / FIRST).unlink(), "no such file"),
    "shard cut": (lambda c, d: (d / FIRST).write_bytes((d / FIRST).read_bytes()[:-1]) and None, "damaged"),
    "shard empty": (lambda c, d: (d / FIRST).write_text("") or None, "damaged"),
    "shard of another set": (lambda c, d: write({"0.weight": torch.ones(1)}, d / FIRST) and None, "disagree"),
    "name not in its shard": (lambda c, d: c["weight_map"].update({"0.bias": FIRST}), "disagree"),
    "name nowhere": (lambda c, d: c["weight_map"].update({"new": FIRST}), "disagree on ['new']"),
    "name not listed": (lambda c, d: c["weight_map"].pop("0.weight") and None, "disagree on ['0.weight']"),
    "stale shard": (lambda c, d: write({"a": torch.ones(1)}, d / "model-00004-of-00004.safetensors") and None, "give the path of one"),
    "file outside": (lambda c, d: c["weight_map"].update(x="../x.safetensors"), "outside"),
    "file absolute": (lambda c, d: c["weight_map"].update(x="/x.safetensors"), "outside"),
    "file a number": (lambda c, d: c["weight_map"].update(x=5), "no weight_map"),
    "no map": (lambda c, d: {}, "no weight_map"),
    "a list": (lambda c, d: [1], "no weight_map"),
    "no json": (lambda c, d: "{", "can't be read"),
    "deep": (lambda c, d: "[" * 100_000, "can't be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_not_whole_is_refused(tmp_path, name):
    """An index and its files must agree on every name; nothing outside of the directory is read."""
    change, message = SETS[name]
    sharded(tmp_path, change)
    model = filled(network, 2)
    before = values(model)
    with pytest.raises(CheckpointError) as error:
        ft.load_params(tmp_path, model, strict=False)
    assert message in str(error.value)
    assert cases.same(values(model), before)


def torch_file(path):
    torch.save({"a": torch.ones(1)}, path)


PATHS = {
    "missing": (lambda p: p / "no.safetensors", "no such file"),
    "missing index": (lambda p: p / "model.safetensors.index.json", "no such file"),
    "empty directory": (lambda p: p, "holds no safetensors file"),
    "torch file": (lambda p: (torch_file(p / "a.pt"), p / "a.pt")[1], "ft.shell.weights.convert(torch_file, out)"),
    "text": (lambda p: ((p / "a").write_text("hello"), p / "a")[1], "damaged or no safetensors file"),
    "two files": (lambda p: [write({"a": torch.ones(1)}, p / f"{n}.safetensors") for n in "ab"] and p, "['a.safetensors', 'b.safetensors']"),
    "checkpoints": (lambda p: ft.save(TrainState(step=1, position=1, seed=0, params={}), p).parent, "step_00000001"),
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_cannot_be_read_says_why(tmp_path, name):
    """A missing, ambiguous or foreign path is a CheckpointError with the next move."""
    make, message = PATHS[name]
    with pytest.raises(CheckpointError) as error:
        ft.load_params(make(tmp_path), network())
    assert message in str(error.value)


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    """The model file of a checkpoint is read under its checksums; its other tensors are not read."""
    model = filled(network, 1)
    path = ft.save(ft.init_state(model, ft.optimizer(torch.optim.AdamW, lr=0.1)), tmp_path)
    (path / "train.safetensors").unlink()
    ft.load_params(path, model)
    raw = bytearray((path / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="checksum"):
        ft.load_params(path, model)


# The report.


def test_the_report_reads_well(tmp_path):
    """Counts first, then names and reasons; long lists are cut in the repr and whole in the error."""
    report = LoadReport(matched=("a",), missing=tuple(f"layer.{i}" for i in range(30)), dropped=("x",))
    assert repr(report).startswith("LoadReport: 1 matched, 30 missing, 0 unexpected, 0 mismatched, 1 dropped\n")
    assert repr(report).endswith("missing     ... and 20 more")
    path = write({f"x{i}": torch.ones(1) for i in range(30)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as error:
        ft.load_params(path, network())
    for i in range(30):
        assert f"unexpected  x{i}\n" in str(error.value) + "\n"


# export.


def test_exports_load_elsewhere(tmp_path):
    """The file has the format that others ask for, plain names, contiguous values, and torch loads it strictly."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(3))
    path = ft.export(model, tmp_path / "deep" / "x.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    other = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    other.load_state_dict(safetensors.torch.load_file(path), strict=True)
    assert cases.same(values(other), values(model))
    assert files_in(path.parent) == ["x.safetensors"]


def test_tied_weights_are_written_once_and_noted(tmp_path):
    """safetensors' own load_model restores the tie, and its save_model's files load here."""
    model, other = filled(Tied, 1), filled(Tied, 2)
    path = ft.export(model, tmp_path / "x.safetensors")
    with safetensors.safe_open(path, framework="pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118
        assert file.metadata()["head.weight"] == "embed.weight"
        assert file.metadata()["again.bias"] == "scale.bias"
    assert safetensors.torch.load_model(other, path) == (set(), [])
    assert cases.same(values(other), values(model))
    again = filled(Tied, 3)
    safetensors.torch.save_model(model, tmp_path / "theirs.safetensors")
    ft.load_params(tmp_path / "theirs.safetensors", again)
    assert cases.same(values(again), values(model))


def test_a_state_is_exported_as_its_module(tmp_path):
    """A state, the module it is of, and the model file of its checkpoint have the same tensors."""
    model = filled(Tied, 1)
    state = ft.init_state(model, ft.optimizer(torch.optim.SGD, lr=0.1))
    files = [
        ft.export(state, tmp_path / "state.safetensors"),
        ft.export(model, tmp_path / "module.safetensors"),
        ft.save(state, tmp_path) / "model.safetensors",
    ]
    contents = [safetensors.torch.load_file(file) for file in files]
    assert cases.same(contents[0], contents[1])
    assert cases.same(contents[0], contents[2])


def test_names_of_a_state_that_share_memory_are_all_written(tmp_path):
    """Two parameters that start as one tensor, views and overlapping parts each get their values."""
    base = torch.arange(10.0)
    tensors = {"a": base, "b": base, "part": base[2:5], "step": base[::3], "wide": base[:1].expand(4)}
    state = TrainState(step=0, position=0, seed=0, params=tensors)
    assert cases.same(safetensors.torch.load_file(ft.export(state, tmp_path / "x.safetensors")), tensors)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({"x": torch.ones(1).to_sparse()}, CheckpointError, "'x' is a torch.sparse_coo tensor"),
        ({"x": torch.ones(1, device="meta")}, CheckpointError, "'x' is a meta tensor"),
        ({"x": torch.ones(1, dtype=torch.complex128)}, CheckpointError, "'x': the dtype torch.complex128"),
        ({"__metadata__": torch.ones(1)}, CheckpointError, "the name can't be kept"),
        ({"x": 5}, CheckpointError, "'x' is int"),
        ([torch.ones(1)], TypeError, "source: got list"),
        (
            TrainState(step=0, position=0, seed=0, params={"w": torch.ones(1)}, buffers={"w": torch.ones(1)}),
            CheckpointError,
            r"both have \['w'\]",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, source, error, message):
    """Nothing is written, and the message names the tensor."""
    with pytest.raises(error, match=message):
        ft.export(source, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


SEAMS = {"save_file": (weights, "save_file"), "fsync": (weights, "fsync"), "replace": (Path, "replace")}


def law_atomic(export, directory, monkeypatch):
    """A failure before the rename leaves the former file whole and nothing beside it."""
    for seam, (owner, name) in SEAMS.items():
        path = write({"old": torch.ones(1)}, directory / "x.safetensors")
        with monkeypatch.context() as patch:

            def fail(*args, **kwargs):
                raise OSError(28, "No space left on device")

            patch.setattr(owner, name, fail)
            with pytest.raises(CheckpointError, match="No space left"):
                export({"new": torch.zeros(2)}, path)
        assert list(safetensors.torch.load_file(path)) == ["old"], seam
        assert files_in(directory) == ["x.safetensors"], seam


def test_export_is_whole_or_not_at_all(tmp_path, monkeypatch):
    """Write, fsync, rename: whichever fails, the former file is as it was."""
    law_atomic(ft.export, tmp_path, monkeypatch)


def test_law_atomic_can_fail(tmp_path, monkeypatch):
    """Writing over the former file is refused."""
    with pytest.raises((AssertionError, safetensors.SafetensorError)):
        law_atomic(broken_params.export_in_place, tmp_path, monkeypatch)


# convert.


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", [None, "model"])
def test_torch_files_are_converted(tmp_path, key, zipped):
    """Of today's and of the old format, bare or under a key; tied names are written once."""
    model, other = filled(Tied, 1), filled(Tied, 2)
    content = model.state_dict() if key is None else {key: model.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    path = convert(tmp_path / "x.pt", tmp_path / "x.safetensors", key=key)
    assert "head.weight" not in safetensors.torch.load_file(path)
    ft.load_params(path, other)
    assert cases.same(values(other), values(model))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


CONTENTS = {
    "nested": ({"model": {"a": torch.ones(1)}, "epoch": 3}, None, "give key='model'"),
    "wrong key": ({"model": {"a": torch.ones(1)}}, "state_dict", "no key 'state_dict'; it holds 0 tensors, 'model' (dict)"),
    "not all tensors": ({"a": torch.ones(1), "epoch": 3}, None, "1 tensors, 'epoch' (int)"),
    "a tensor": (torch.ones(1), None, "got a Tensor"),
    "a tensor with a key": (torch.ones(1), "a", "it holds a Tensor"),
    "empty": ({}, None, "an empty dict"),
    "names are numbers": ({0: torch.ones(1)}, None, "0 (Tensor)"),
    "sparse": ({"a": torch.ones(2).to_sparse()}, None, "'a' is a torch.sparse_coo tensor"),
    "module": (nn.Linear(1, 1), None, "give its tensors to ft.export"),
    "code": ({"a": Evil()}, None, "UnpicklingError"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning")  # of torch 2.11
@pytest.mark.parametrize("name", CONTENTS)
def test_torch_files_of_something_else_are_refused(tmp_path, name, monkeypatch):
    """What is there is told, nothing is left out silently, and no code of the file runs."""
    monkeypatch.chdir(tmp_path)
    content, key, message = CONTENTS[name]
    torch.save(content, "x.pt")
    with pytest.raises(CheckpointError) as error:
        convert("x.pt", "x.safetensors", key=key)
    assert message in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's advice to run the file's code
    assert files_in(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("raw", [None, b"", b"hello", b"PK\x03\x04xxxx", b"\x80\x02junk", b"\x80\x04junk"])
def test_damaged_torch_files_are_refused(tmp_path, raw):
    """Whatever the bytes, a CheckpointError names the file."""
    if raw is not None:
        (tmp_path / "x.pt").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"x\.pt: "):
        convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
