"""States, checkpoints of all schemas and ways to change their files, for the tests of this directory."""

import json
from pathlib import Path

import attrs
import safetensors.torch
import torch

import fntrain as ft
from fntrain import TrainState
from fntrain.core.tree import to_bytes
from fntrain.shell.checkpoints.commit import write_tensors
from fntrain.shell.checkpoints.contents import Contents
from fntrain.shell.checkpoints.manifest import Part, dumps
from fntrain.shell.checkpoints.tensor_file import crc32

MODEL, TRAIN, MANIFEST = NAMES = ("model.safetensors", "train.safetensors", "state.json")


def make_state(step=0, **fields):
    """A small state with something in every saved field, several dtypes, and two tensors of one kind in each file."""
    generator = torch.Generator().manual_seed(step)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    filled = {
        "params": {"fc.weight": randn(3, 4), "other.weight": randn(3, 4), "fc.bias": randn(3).bfloat16()},
        "buffers": {"bn.mean": randn(3).double(), "bn.count": torch.tensor(step)},
        "opt_state": {
            name: {"step": torch.tensor(float(step)), "exp_avg": randn(4, 3).t(), "exp_avg_sq": randn(3, 4)}
            for name in ("fc.weight", "other.weight")
        },
        "hooks": {"best": {"score": 0.5 + step, "history": [1.0, (2.0, float("nan"))], "seen": 2**70}},
        "extra": {
            "ema": {"fc.weight": randn(3, 4)},
            "flags": (torch.tensor([True, False]), None),
            "empty": {},
            "no": torch.zeros(0, 3),
        },
    }
    return TrainState(**{"step": step, "position": step, "seed": 7, **filled, **fields})


def fresh():
    """What a run of the same job starts from."""
    return make_state(0, opt_state={}, hooks={}, extra={})


def save_1(state, directory):
    """Write a checkpoint as the first version of the format did; returns its path."""
    contents = Contents.of(state)
    path = Path(directory) / f"step_{state.step:08d}"
    path.mkdir(parents=True)
    files, entries = {MODEL: {}, TRAIN: {}}, {}
    for stored, tensor in zip(contents.stored, contents.tensors, strict=True):
        [part] = stored.parts
        files[part.file][stored.name] = plain = tensor.contiguous().clone()
        entries[stored.leaf] = {
            "file": part.file,
            "name": stored.name,
            "shape": list(part.shape),
            "dtype": stored.dtype,
        }
        entries[stored.leaf] |= {"stride": stored.stride} if stored.stride else {}
        entries[stored.leaf]["crc32"] = crc32(to_bytes(plain))
    headers = {}
    for file, tensors in files.items():
        safetensors.torch.save_file(tensors, path / file, metadata={"format": "pt"})
        headers[file] = crc32(head(path / file)[8:])
    manifest = {"format": "fntrain", "schema": 1, "versions": {"torch": torch.__version__}}
    manifest |= {"state": contents.structure, "headers": headers, "tensors": entries}
    seal(path, json.dumps(manifest))
    return path


def save_3(state, directory, size=2):
    """Write a checkpoint as ranks do that each hold rows of what has any; returns its path."""
    path = Path(directory) / f"step_{state.step:08d}"
    path.mkdir(parents=True)
    contents, files, written = Contents.of(state), {}, []
    for rank in range(size):
        mine, values = [], []
        for stored, tensor in zip(contents.stored, contents.tensors, strict=True):
            if tensor.ndim:
                rows = -(-len(tensor) // size)
                value = tensor[rank * rows : (rank + 1) * rows]
                row = min(rank * rows, len(tensor))
                part = Part(f"{stored.leaf}@{rank}", stored.parts[0].file, tuple(value.shape), row)
                mine.append(attrs.evolve(stored, parts=(part,)))
                values.append(value)
            elif rank == 0:
                mine.append(stored)
                values.append(tensor)
        own = attrs.evolve(contents, stored=mine, tensors=values)
        one = write_tensors(own, map(to_bytes, values), path, f"-rank{rank}" if rank else "")
        files |= one.files
        written += one.tensors
    (path / MANIFEST).write_bytes(dumps(contents.structure, files, written))
    return path


def names(path):
    """The files of a checkpoint."""
    return sorted(file.name for file in path.iterdir())


SAVES = {1: save_1, 2: ft.save, 3: save_3}


def head(file):
    """The header of a safetensors file, with its length before it."""
    raw = file.read_bytes()
    return raw[: 8 + int.from_bytes(raw[:8], "little")]


def manifest_of(path):
    return json.loads((path / MANIFEST).read_text())["manifest"]


def write(file, raw):
    """Make a file anew: ext4 waits for the disk when one that is there is written over."""
    file.unlink(missing_ok=True)
    file.write_bytes(raw)


def seal(path, text):
    """Write a manifest with a right checksum, whatever it says."""
    raw = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    write(path / MANIFEST, b'{"crc32": %d, "manifest": %s}' % (crc32(raw), raw))


def replace_head(path, file, new):
    """Give a file another header, and make length and checksum right in the manifest."""
    old, raw, manifest = head(path / file), (path / file).read_bytes(), manifest_of(path)
    write(path / file, new + raw[len(old) :])
    if manifest["schema"] == 1:
        manifest["headers"][file] = crc32(new[8:])
    else:
        size = len(raw) - len(old) + len(new)
        manifest["files"][file] = {"header": len(new), "crc32": crc32(new), "bytes": size}
    seal(path, json.dumps(manifest))
