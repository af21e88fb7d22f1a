"""Whatever stands in manifest and headers, under right checksums: a state or a CheckpointError, and nothing else.

Neither another exception nor a crash, no memory beyond the size of the files, no file opened outside the directory.
"""

import contextlib
import copy
import io
import json
import logging
import random
import resource
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import saved
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fntrain as ft
from fntrain import CheckpointError, TrainState
from fntrain.__main__ import main
from fntrain.shell.checkpoints.local import LocalStore

BOMB = 1 << 30  # bytes of address space that a case may take beyond what the process has: all files are a few KB
DEEP = "DEEP NESTING"  # put into the tree, replaced in the text: json can't write what it should not read
NUMBERS = [
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        8,
        255,
        2**24,
        2**31 - 1,
        2**31,
        2**32,
        2**53,
        2**62,
        2**63 - 1,
        2**63,
        2**64,
        2**70,
        -(2**63),
    ),
    *(10**400, 0.0, -0.0, 0.5, 1e300, float("nan"), float("inf"), -float("inf"), True, False, None),
]
WORDS = [
    *(
        "",
        "a",
        "ab",
        ".",
        "..",
        "/",
        "../../x",
        "/etc/passwd",
        "//x",
        "model.safetensors",
        "train.safetensors",
        "state.json",
    ),
    *(
        "../step_00000001/model.safetensors",
        "model-0.safetensors",
        "model.safetensors/",
        "model.safetensors\x00",
        "\ud800",
    ),
    *(
        "float32",
        "float64",
        "bfloat16",
        "uint8",
        "bool",
        "float4_e2m1fn_x2",
        "float8_e8m0fnu",
        "complex64",
        "complex128",
    ),
    *(
        "tensor",
        "dict",
        "list",
        "tuple",
        "float",
        "7ff8000000000000",
        "step",
        "params.fc.weight",
        "__metadata__",
        "cuda",
    ),
    *("fntrain", "\x1b[2J", "%s{0}", "x" * 5000, "\u0663", "-0", "1e5"),
]
KEYS = [
    *("schema", "part", "files", "tensors", "state", "headers", "file", "name", "shape", "dtype", "stride", "device"),
    *(
        "crc32",
        "header",
        "bytes",
        "whole",
        "of",
        "at",
        "data_offsets",
        "dict",
        "list",
        "tensor",
        "step",
        "seed",
        "params",
        "extra",
    ),
]


def junk(rng, depth=0):
    """Any value that JSON can hold, and some that it can't."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice([*WORDS, DEEP]) if rng.random() < 0.97 else DEEP
    if kind == 6:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return [rng.choice(NUMBERS[:12])] * rng.choice([0, 1, 2, 3, 64, 65, 300])
    return {rng.choice(WORDS + KEYS): junk(rng, depth + 1) for _ in range(rng.randrange(4))}


def nodes(tree):
    """Every place in a tree, as (container, key or index)."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from nodes(tree[key])


def change(rng, tree):
    """Replace, delete, rename, double or exchange nodes of a tree; returns the new one."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(nodes(tree)) if isinstance(tree, dict | list) else []
        if not places or rng.random() < 0.01:
            tree = junk(rng)
            continue
        container, key = rng.choice(places)
        value, kind = container[key], rng.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(WORDS + KEYS)] = container.pop(key)
        elif kind == 2:
            other, there = rng.choice(places)
            container[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(value)
        elif kind == 3 and isinstance(container, list):
            container.extend([value] * rng.choice([1, 2, 100]))
        elif kind == 3:
            container[rng.choice(WORDS + KEYS)] = copy.deepcopy(value)
        elif kind == 4 and isinstance(value, int):
            container[key] = value + rng.choice([1, -1, 8, -8, value, 2**32, 2**64, -2 * value])
        elif kind == 5:
            container[key] = other_type(value)
        else:
            container[key] = junk(rng)
    return tree


def other_type(value):
    """The same in another type: 3 as 3.0, a list as a dict, a text as a list."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list):
        return {str(index): item for index, item in enumerate(value)}
    if isinstance(value, str):
        return list(value)
    return float(value) if isinstance(value, int) and abs(value) < 2**53 else str(value)


def written(rng, tree):
    """A tree as bytes of JSON, with deep nesting where it is marked, sometimes with a few bytes changed."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    if DEEP in text:
        depth = rng.choice([50, 300, 480, 900, 5_000, 100_000])
        opening, closing = rng.choice([('{"list": [', "]}"), ("[", "]"), ('{"dict": {"a": ', "}}"), ('{"a": ', "}")])
        text = text.replace(f'"{DEEP}"', opening * depth + "1" + closing * depth, 1)
    raw = text.encode(errors="surrogatepass")
    return bytes_changed(rng, raw) if rng.random() < 0.1 else raw


def bytes_changed(rng, raw):
    changed = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed) or 1)
        piece = rng.choice([b"", b"\x00", b"\xff", b'"', b"}", b"[", b"9", b"-", b"e9", bytes([rng.randrange(256)])])
        changed[at : at + rng.choice([0, 1, 1, 2, 30])] = piece
    return bytes(changed)


def mutate(rng, path):
    """Change manifest or headers of a checkpoint, all checksums made right; returns what was changed."""
    where = rng.choice([saved.MANIFEST, saved.MANIFEST, *saved.names(path)])
    if where == saved.MANIFEST:
        saved.seal(path, written(rng, change(rng, saved.manifest_of(path))))
        return where
    text = written(rng, change(rng, json.loads(saved.head(path / where)[8:])))
    text += b" " * (-len(text) % 8)
    length = rng.choice([len(text)] * 8 + [0, 1, len(text) - 1, len(text) + 1, 2**63, 2**64 - 1])
    saved.replace_head(path, where, length.to_bytes(8, "little") + text)
    if rng.random() < 0.2:  # the manifest of a header that lies may lie too
        saved.seal(path, written(rng, change(rng, saved.manifest_of(path))))
    return where


# Entry points: each returns what it came to, or raises what it must not.


def by_load(root, path, rng):
    return ft.load(path, verify=rng.choice(["full", "full", "structure"]))


def by_load_into(root, path, rng):
    return ft.load(path, into=saved.make_state(5))


def by_latest(root, path, rng):
    found = ft.latest(root, verify=rng.choice(["full", "structure"]))
    return None if found is None else ft.load(found, verify="structure")


def by_resume(root, path, rng):
    return ft.resume_or(saved.fresh(), root)


def by_inspect(root, path, rng):
    return by_command(["inspect", str(path)], rng)


def by_verify(root, path, rng):
    return by_command(["verify", str(root)], rng)


def by_diff(root, path, rng):
    return by_command(["diff", str(path), str(path.with_name("step_00000001"))], rng)


def by_command(arguments, rng):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        status = main([*arguments, *(["--json"] if rng.random() < 0.3 else [])])
    assert status in (0, 1, 2)


def by_weights(root, path, rng):
    from fntrain.shell.weights.files import read_weights

    for name, tensor in read_weights(path).items():
        assert isinstance(name, str) and isinstance(tensor, torch.Tensor)


def by_clean(root, path, rng):
    old = path.with_name(path.name + ".old")
    path.rename(old)
    store = LocalStore(root)
    with store.hold():
        store.clean()
    return by_latest(root, path, rng)


ENTRIES = [by_load] * 6 + [by_load_into, by_latest, by_resume, by_inspect, by_verify, by_diff, by_weights, by_clean]

_opened: list[str] | None = None  # audit hooks can't be taken away: this one listens while it is a list


def _listen(event, arguments):
    if event == "open" and _opened is not None and not isinstance(arguments[0], int):
        _opened.append(str(arguments[0]))


sys.addaudithook(_listen)


@contextlib.contextmanager
def bounded(root):
    """Memory beyond what the process has is short, and what is opened lies in the directory."""
    global _opened
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + BOMB, hard))
    _opened = opened = []
    try:
        yield
    finally:
        _opened = None
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    modules = (".py", ".pyc", ".so")  # torch imports some of its own when it has something to say
    assert [path for path in opened if not path.startswith(f"{root}/") and not path.endswith(modules)] == []
    assert [path for path in opened if ".." in path] == []


def law_state_or_refusal(base, root, rng, enter=None):
    """Change one of two checkpoints and go in by one of the entries; returns what came of it."""
    path = root / "step_00000002"
    if not root.exists():
        shutil.copytree(base, root)
    for name in saved.names(base / path.name):
        saved.write(path / name, (base / path.name / name).read_bytes())
    changed = mutate(rng, path)
    enter = enter or rng.choice(ENTRIES)
    refused, found = None, None
    with bounded(root):
        try:
            found = enter(root, path, rng)
        except CheckpointError as error:
            refused = str(error)
    if refused is not None and enter in (by_latest, by_resume):
        # An intact one is there: only a later version, or another job, is a reason not to go on from it.
        assert any(reason in refused for reason in ("later version", "of another model", "seed is", "opt_state is of"))
    if found is not None:
        assert isinstance(found, TrainState)
        ft.digest(found)  # every leaf can be reached
    result = "through" if refused is None else "refused"
    return changed, enter.__name__, result


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["schema 1", "schema 2", "schema 3"])
def base(request, tmp_path_factory):
    """A directory with checkpoints of steps 1 and 2; everything has been imported and opened once."""
    root = tmp_path_factory.mktemp("base")
    for step in (1, 2):
        saved.SAVES[request.param](saved.make_state(step), root)
    for enter in dict.fromkeys(ENTRIES):
        if enter is not by_clean:
            enter(root, root / "step_00000002", random.Random(0))
    return root


@pytest.fixture(autouse=True)
def _quiet():
    logger = logging.getLogger("fntrain")
    level, logger.level = logger.level, logging.CRITICAL
    logger.manager._clear_cache()
    yield
    logger.setLevel(level)


def test_the_mutations_start_from_what_loads(base, tmp_path):
    """Sealing anew what was not changed loses nothing: refusals are for the change."""
    shutil.copytree(base / "step_00000002", path := tmp_path / "step_00000002")
    for name in set(saved.names(path)) - {saved.MANIFEST}:
        saved.replace_head(path, name, saved.head(path / name))
    saved.seal(path, json.dumps(saved.manifest_of(path)))
    assert ft.load(path) == saved.make_state(2)


def in_state(**fields):
    return lambda manifest: manifest["state"]["dict"].update(fields)


def in_shape(shape):
    return lambda manifest: [
        entry.update(shape=shape) for leaf, entry in manifest["tensors"].items() if leaf.startswith("extra.no")
    ]


FOUND = {
    "a tensor for the state": lambda manifest: manifest.update(state={"tensor": "params.fc.weight"}),
    "a tensor for a number": in_state(step={"tensor": "params.fc.weight"}),
    "pairs of letters for a dict": in_state(extra={"list": ["ab"]}),
    "a text for a dict": in_state(hooks=""),
    "a size beyond 64 bits beside 0": in_shape([0, 2**70]),
    "a product beyond 64 bits beside 0": in_shape([0, 2**40, 2**40]),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_the_fuzzer_has_found_in_manifests_is_refused(base, tmp_path, name):
    """Each was another error than CheckpointError, or a state that is none."""
    shutil.copytree(base / "step_00000002", path := tmp_path / "step_00000002")
    manifest = saved.manifest_of(path)
    FOUND[name](manifest)
    saved.seal(path, json.dumps(manifest))
    for verify in ("full", "structure"):
        with pytest.raises(CheckpointError, match=r"step_00000002/state\.json"):
            ft.load(path, verify=verify)


@pytest.mark.parametrize("text", ['{"w": {"data_offsets": []}}', '{"w": {"data_offsets": ""}}', '{"w":' * 5000, "[]"])
def test_what_the_fuzzer_has_found_in_headers_is_refused(tmp_path, text):
    """The upgrade of schema 1 reads headers: offsets that are not there, depth without end."""
    path = saved.save_1(saved.make_state(2), tmp_path)
    saved.replace_head(path, saved.MODEL, len(text).to_bytes(8, "little") + text.encode())
    with pytest.raises(CheckpointError, match="damaged"):
        ft.load(path)


@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_a_changed_checkpoint_is_a_state_or_refused(base, tmp_path_factory, rng):
    """Structural and raw changes of manifest and headers, in both schemas, through every entry; what fails is shrunk."""
    law_state_or_refusal(base, tmp_path_factory.getbasetemp() / f"changed {base.name}", rng)


def many(base, directory, seeds):
    """The same without hypothesis, which takes twice the time of the law; returns what was seen how often."""
    seen = Counter()
    for seed in seeds:
        try:
            seen[law_state_or_refusal(base, directory / "changed", random.Random(seed))] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    return seen


def test_some_changed_checkpoints_are_states_or_refused(base, tmp_path):
    """Some hundred more; loading has had both outcomes for every file."""
    seen = many(base, tmp_path, range(600))
    assert {key for key in seen if key[1] == "by_load"} == {
        (name, "by_load", result) for name in saved.names(base / "step_00000002") for result in ("through", "refused")
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_changed_checkpoints_are_states_or_refused(base, tmp_path):
    """50,000 for each schema; every entry was gone through."""
    seen = many(base, tmp_path, range(50_000))
    assert {entry for _, entry, result in seen if result == "through"} == {entry.__name__ for entry in ENTRIES}


def test_the_law_of_the_fuzzer_can_fail(base, tmp_path, monkeypatch):
    """A reader that takes a manifest for what it says is found out."""
    monkeypatch.setattr("fntrain.shell.checkpoints.manifest._check", lambda manifest: None)
    with pytest.raises((AssertionError, LookupError, TypeError, ValueError, RuntimeError, MemoryError)):
        many(base, tmp_path, range(600))
