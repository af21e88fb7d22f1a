"""Files cut, flipped, exchanged, mixed up or grown: a CheckpointError that names the file, never other bits."""

import json
import random
import shutil

import pytest
import saved

import fntrain as ft
from fntrain import CheckpointError
from fntrain.shell.checkpoints.tensor_file import nbytes

STATE = saved.make_state(2)


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["schema 1", "schema 2", "schema 3"])
def base(request, tmp_path_factory):
    """A directory with checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("base")
    for step in (1, 2):
        saved.SAVES[request.param](saved.make_state(step), root)
    return root


@pytest.fixture
def path(base, tmp_path):
    """The newer checkpoint of a copy, to damage; the older beside it is intact."""
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    return tmp_path / "step_00000002"


def law_refused(path, name):
    """The damage is found, in the file where it is, by whatever reads; resuming goes on from the other checkpoint."""
    for read in (ft.load, lambda path: ft.load(path, into=saved.make_state(2))):
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert f"step_00000002/{name}" in str(error.value)
    assert ft.resume_or(saved.fresh(), path.parent) == saved.make_state(1)


def lengths(path, name, rng):
    """Lengths to cut a file to: short ones, those at an edge of header and tensors, and some between."""
    size, edges = (path / name).stat().st_size, set(range(16))
    if name != saved.MANIFEST:
        end = len(saved.head(path / name))
        edges |= {end}
        for entry in json.loads(saved.head(path / name)[8:]).values():
            edges |= {end + offset for offset in entry.get("data_offsets", ())}
    edges |= {edge + by for edge in edges for by in (-1, 1)} | {size - by for by in range(1, 17)}
    edges |= {rng.randrange(size) for _ in range(20)}
    return sorted(edge for edge in edges if 0 <= edge < size)


def cut(path, amount):
    rng = random.Random(0)
    for name in saved.names(path):
        raw = (path / name).read_bytes()
        for length in range(len(raw)) if amount is None else rng.sample(lengths(path, name, rng), amount):
            saved.write(path / name, raw[:length])
            yield name
        (path / name).unlink()
        yield name
        saved.write(path / name, raw)


def flipped(path, amount):
    rng = random.Random(1)
    for _ in range(amount):
        name = rng.choice(saved.names(path))
        raw = (path / name).read_bytes()
        at, bit = rng.randrange(len(raw)), rng.randrange(8)
        saved.write(path / name, raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        yield name
        saved.write(path / name, raw)


def law_all_refused(path, damage, amount):
    """Every one of the damages is refused, and the files are again what they were."""
    names = [law_refused(path, name) for name in damage(path, amount)]
    assert ft.load(path) == STATE
    return len(names)


@pytest.mark.parametrize(("damage", "amount"), [(cut, 30), (flipped, 60)])
def test_cuts_and_flipped_bits_are_found(path, damage, amount):
    """Any file cut anywhere, and any bit flipped anywhere."""
    assert law_all_refused(path, damage, amount) >= 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("damage", "amount"), [(cut, None), (flipped, 5000)])
def test_all_cuts_and_many_flipped_bits_are_found(path, damage, amount):
    """Every length of every file, and 5,000 bits."""
    assert law_all_refused(path, damage, amount) >= 2000


def test_the_law_of_damage_can_fail(path, monkeypatch):
    """A reader that takes every checksum for right is found out."""
    monkeypatch.setattr(
        "fntrain.shell.checkpoints.reading._Piece.read", lambda part, _: part.reader.read_into(part.start, part.view)
    )
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        law_all_refused(path, flipped, 60)


@pytest.mark.parametrize("name", saved.NAMES)
def test_files_of_two_checkpoints_are_not_mixed(path, name):
    """A file of another step, of the same length and with a right header of its own, is found."""
    shutil.copy(path.with_name("step_00000001") / name, path / name)
    with pytest.raises(CheckpointError, match=r"step_00000002/(model|train)\.safetensors"):
        ft.load(path)
    assert ft.resume_or(saved.fresh(), path.parent) == saved.make_state(1)


def test_files_of_another_step_that_are_not_listed_do_not_matter(path):
    """Stale shards beside the files are not read."""
    for name in (saved.MODEL, saved.TRAIN):
        shutil.copy(path.with_name("step_00000001") / name, path / name.replace(".", "-0123abcd."))
    assert ft.load(path) == STATE


@pytest.mark.parametrize("name", saved.NAMES)
@pytest.mark.parametrize("more", [b"\x00", b"\x00" * 8, b"\x00" * 4096, b"\n", b" ", None])
def test_grown_files_are_found(path, name, more):
    """A file that goes on with zeros or spaces, or with itself once more."""
    raw = (path / name).read_bytes()
    saved.write(path / name, raw + (raw if more is None else more))
    law_refused(path, name)


@pytest.mark.parametrize("name", saved.NAMES)
def test_a_zeroed_file_is_found(path, name):
    """What a file system may leave after a power cut: the right length, but zeros, or zeros in its second half."""
    raw = (path / name).read_bytes()
    for keep in (0, len(raw) // 2):
        saved.write(path / name, raw[:keep] + bytes(len(raw) - keep))
        law_refused(path, name)


def test_exchanged_tensors_are_found(path):
    """The bytes of two leaves of one shape and dtype in each other's place."""
    head = saved.head(path / saved.MODEL)
    raw, listed = bytearray((path / saved.MODEL).read_bytes()), json.loads(head[8:])
    size, starts = (
        nbytes("float32", [3, 4]),
        [len(head) + listed[name]["data_offsets"][0] for name in ("fc.weight", "other.weight")],
    )
    one, other = (bytes(raw[start : start + size]) for start in starts)
    assert one != other
    for start, data in zip(starts, (other, one), strict=True):
        raw[start : start + size] = data
    saved.write(path / saved.MODEL, raw)
    law_refused(path, saved.MODEL)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{" * 100_000, None])
def test_the_file_of_the_lock_does_not_matter(path, content):
    """Only that it is held counts: without it, or with anything in it, one reads, resumes and saves."""
    lock = path.with_name(".lock")
    lock.unlink(missing_ok=True)
    if content is not None:
        lock.write_bytes(content)
    assert ft.load(ft.latest(path.parent)) == STATE
    start = ft.resume_or(saved.fresh(), path.parent)
    kept = ft.stateful("best", lambda state: None)
    hooks = [kept, ft.hooks.checkpoint(path.parent, every=1)]
    final = ft.fit(lambda state, batch: state.advance(), hooks, state=start, data=iter([0]), max_steps=3)
    assert ft.load(ft.latest(path.parent)) == final


def test_a_checkpoint_of_a_later_version_is_not_taken_for_damaged(path):
    """Between two renames of a later version the run was killed: what it wrote stays where it is, and is told of."""
    shutil.copytree(path, path.with_name(path.name + ".old"))
    saved.seal(path, json.dumps(saved.manifest_of(path) | {"schema": 99}))
    with pytest.raises(CheckpointError, match="later version"):
        ft.fit(lambda s, b: s, ft.hooks.checkpoint(path.parent, every=1), state=saved.fresh(), data=iter([0]))
    assert saved.manifest_of(path)["schema"] == 99
