"""Converts manifests of past versions to the form of this one; the tests keep a checkpoint of each version.

Schema 1 had one crc32 for a whole tensor, listed the tensors in the order of the state, and kept of each file only the
crc32 of its header. Schema 2 had no tensors that are split over ranks. A checkpoint without split tensors is still
written as schema 2, so that older versions can read it.
"""

import json
from typing import Any

from fntrain.core.errors import CheckpointError
from fntrain.shell.checkpoints.paths import AnyPath
from fntrain.shell.checkpoints.tensor_file import crc32, opened

SCHEMA = 3
Manifest = dict[str, Any]


class SchemaError(CheckpointError):
    """The checkpoint is of a later version: it is not damaged, so an older one must not be resumed in its place."""


def upgraded(manifest: Manifest, path: AnyPath) -> Manifest:
    """Return the manifest of a checkpoint in the form of this version.

    Raises:
      SchemaError: it is of a later version.
      LookupError, TypeError, ValueError, AttributeError, RecursionError: it is damaged.
    """
    schema = manifest["schema"]
    if type(schema) is not int or schema < 1:
        raise ValueError(f"schema is {schema!r}")
    if schema > SCHEMA:
        raise SchemaError(
            f"{path}: written by a later version of fntrain (schema {schema}; this one reads up to {SCHEMA}); upgrade, "
            "or move it away to go on from an earlier one"
        )
    if schema == 1:
        manifest = _from_1(manifest, path)
    return manifest | {"whole": {}} if schema < SCHEMA else manifest


def _from_1(manifest: Manifest, path: AnyPath) -> Manifest:
    files = {}
    offsets: dict[tuple[str, str], int] = {}
    for file, expected in manifest["headers"].items():
        if file not in ("model.safetensors", "train.safetensors"):
            raise ValueError(f"file {file!r}")
        with opened(path / file) as reader:
            length = bytearray(8)
            reader.read_into(0, memoryview(length))
            head = bytearray(8 + min(int.from_bytes(length, "little"), reader.bytes))
            reader.read_into(0, memoryview(head))
            if crc32(head[8:]) != expected:
                raise CheckpointError(f"{path / file}: header is damaged (checksum differs)")
        ends = [0]
        for name, entry in json.loads(head[8:]).items():
            if name != "__metadata__":
                offsets[file, name], end = entry["data_offsets"]
                ends.append(end)
        files[file] = {"header": len(head), "crc32": crc32(head), "bytes": len(head) + max(ends)}
    entries = [(leaf, entry | {"crc32": [entry["crc32"]]}) for leaf, entry in manifest["tensors"].items()]
    entries.sort(key=lambda item: (item[1]["file"], offsets[item[1]["file"], item[1]["name"]]))
    # One checksum was for a whole tensor, however long.
    return manifest | {"schema": 2, "part": 1 << 62, "files": files, "tensors": dict(entries)}
