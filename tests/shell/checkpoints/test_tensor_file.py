"""Files that other libraries read, the bits of every dtype, checksums that are zlib's."""

import json
import os
import random
import struct
import zlib

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fntrain as ft
from fntrain import CheckpointError, TrainState
from fntrain.core import tree
from fntrain.shell.checkpoints import tensor_file
from fntrain.shell.checkpoints.tensor_file import DTYPES, Reader, Writer

PACKED = "float4_e2m1fn_x2"


def bits(name, rng=None):
    """48 bytes of a dtype, nan and inf among them."""
    rng = rng or random.Random(name)
    high = 2 if name == "bool" else 256
    return torch.tensor([rng.randrange(high) for _ in range(48)], dtype=torch.uint8).view(DTYPES[name][0])


def saved(root, tensors):
    """The model file of a state with these parameters."""
    return ft.save(TrainState(step=1, position=1, seed=0, params=tensors), root) / "model.safetensors"


def read_header(file):
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    found = json.loads(raw[8 : 8 + length])
    assert found.pop("__metadata__") == {"format": "pt"}
    return 8 + length, found


@pytest.mark.parametrize("name", DTYPES)
def test_safetensors_reads_every_dtype(tmp_path, name):
    """What can be saved is loaded by safetensors itself, of the same dtype and shape, with equal bits."""
    value = bits(name)
    tensors = {"flat": value, "rows": value.view(3, -1), "empty": value[:0], "scalar": value[0], "b": torch.ones(3) > 0}
    if name != PACKED:  # torch can't copy it out of order
        tensors |= {"transposed": value.view(3, -1).t(), "strided": value[::2]}
    loaded = safetensors.torch.load_file(saved(tmp_path, tensors))
    if name == PACKED:  # half a byte is no scalar in the format
        loaded["scalar"] = loaded["scalar"].reshape(())
    assert loaded.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert tree.bitwise_equal(loaded[key], tensor), key


@pytest.mark.parametrize("name", DTYPES)
def test_what_safetensors_writes_has_the_same_header(tmp_path, name):
    """Names, dtypes, shapes and lengths are those of the library's own file."""
    tensors = {"flat": bits(name), "rows": bits(name).view(3, -1)}
    _, ours = read_header(saved(tmp_path, tensors))
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    _, theirs = read_header(tmp_path / "theirs")
    assert ours == theirs


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=9).filter(lambda key: key != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES.keys() - {PACKED})), st.integers(0, 6)),
        max_size=6,
    )
)
def test_every_tensor_is_aligned(tmp_path_factory, kinds):
    """The header ends at a multiple of 8, each tensor begins at one of its elements' size, and there are no gaps."""
    tensors = {key: bits(name)[:size] for key, (name, size) in kinds.items()}
    file = saved(tmp_path_factory.getbasetemp() / "aligned", tensors)
    begin, found = read_header(file)
    assert begin % 8 == 0
    assert found.keys() == tensors.keys()
    end = 0
    for key, entry in found.items():
        assert entry["data_offsets"][0] == end
        assert (begin + end) % tensors[key].element_size() == 0
        end = entry["data_offsets"][1]
    assert begin + end == file.stat().st_size
    assert all(tree.bitwise_equal(value, tensors[key]) for key, value in safetensors.torch.load_file(file).items())


def test_a_dtype_that_is_not_listed_is_refused(tmp_path):
    """By name, before anything is written."""
    with pytest.raises(CheckpointError, match=r"params\.w: got torch.complex128"):
        saved(tmp_path, {"w": torch.zeros(2, dtype=torch.complex128)})
    assert not any(tmp_path.iterdir())


# Checksums.


def test_checksums_are_the_same_with_and_without_the_extra():
    """isal and zlib give one number, in one piece and in several; where isal is installed it is used."""
    fast = pytest.importorskip("isal.isal_zlib").crc32
    data = random.Random(0).randbytes(99_999)
    assert tensor_file._crc32() is fast
    for cut in (0, 1, 7, 1000, len(data)):
        assert fast(data) == zlib.crc32(data) == fast(data[cut:], fast(data[:cut]))
    assert fast(b"") == zlib.crc32(b"") == 0
    for part in (memoryview(data)[3:9], bytearray(data), memoryview(data).toreadonly()):
        assert fast(part) == zlib.crc32(part)


@pytest.mark.parametrize("crc32", ["zlib", "isal.isal_zlib"])
def test_a_checkpoint_is_the_same_with_either(tmp_path, monkeypatch, crc32):
    """A file written with one is read with the other."""
    chosen = pytest.importorskip(crc32).crc32
    state = TrainState(step=1, position=1, seed=0, params={"w": torch.arange(50_000.0)})
    path = ft.save(state, tmp_path)
    monkeypatch.setattr(tensor_file, "_crc32", lambda: chosen)
    assert ft.load(path) == state
    files = [(file.name, file.read_bytes()) for file in sorted(path.iterdir())]
    again = ft.save(state, tmp_path / "again")
    assert [(file.name, file.read_bytes()) for file in sorted(again.iterdir())] == files


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 32, 33])
def test_a_tensor_has_a_checksum_for_each_part(tmp_path, monkeypatch, size):
    """Of so many bytes, the last part shorter; a flipped bit in any part is found."""
    monkeypatch.setattr(tensor_file, "PART", 16)
    for module in ("manifest", "commit"):
        monkeypatch.setattr(f"fntrain.shell.checkpoints.{module}.PART", 16)
    value = torch.arange(size, dtype=torch.uint8)
    file = saved(tmp_path, {"w": value})
    manifest = json.loads((file.parent / "state.json").read_text())["manifest"]
    data = bytes(value.tolist())
    assert manifest["part"] == 16
    sums = [zlib.crc32(data[at : at + 16]) for at in range(0, size, 16)]
    assert manifest["tensors"]["params.w"]["crc32"] == (sums or [0])
    monkeypatch.undo()
    assert ft.load(file.parent).params["w"].equal(value)  # the size of a part is in the manifest
    raw = file.read_bytes()
    for place in {size - 1, size // 2, 0} if size else ():
        at = len(raw) - size + place
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(CheckpointError, match=r"params\.w is damaged"):
            ft.load(file.parent)


# Reading and writing.


def test_a_large_tensor_is_read_by_several_threads(tmp_path):
    """Tensors of more than one part, odd sizes, and small ones between them come back in place."""
    tensors = {f"w{index}": torch.arange(size).float() for index, size in enumerate([5_000_001, 3, 0, 4_194_305, 7])}
    state = TrainState(step=1, position=1, seed=0, params=tensors)
    assert ft.load(ft.save(state, tmp_path)) == state


def test_a_system_need_not_tell_which_cores_it_gives(tmp_path, monkeypatch):
    """As macOS does not."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    state = TrainState(step=1, position=1, seed=0, params={"w": torch.ones(3)})
    assert ft.load(ft.save(state, tmp_path)) == state


def test_reads_and_writes_may_be_short(tmp_path, monkeypatch):
    """A system call that handles a part only is followed by another."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    monkeypatch.setattr(tensor_file, "_WRITE", 5)
    data = random.Random(0).randbytes(100)
    with Writer(tmp_path / "file") as out:
        out.write(data)
    assert (tmp_path / "file").read_bytes() == data
    assert out.written == 100
    with Reader(tmp_path / "file") as reader:
        found = bytearray(60)
        reader.read_into(20, memoryview(found))
        assert found == data[20:80]
        with pytest.raises(CheckpointError, match="file: ends at byte 100: truncated"):
            reader.read_into(50, memoryview(found))
