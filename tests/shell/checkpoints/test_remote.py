"""Checkpoints on other file systems: in memory, and on an object store that speaks S3 on this machine."""

import gc
import itertools
import logging
import shutil
from contextlib import suppress
from pathlib import Path, PosixPath

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import fntrain as ft
from fntrain import CheckpointError, TrainState
from fntrain.__main__ import main
from fntrain.shell.checkpoints import tensor_file
from fntrain.shell.checkpoints.objects import ObjectStore
from fntrain.shell.checkpoints.paths import RemotePath, path_of
from fntrain.shell.checkpoints.save_load import checkpoints
from fntrain.shell.checkpoints.store import name_of
from fntrain.shell.weights import inspect

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def s3():
    """A server of the S3 protocol with one bucket, known to fsspec."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "nobody", "secret": "none"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", options)
        fsspec.filesystem("s3").mkdir("bucket")
        yield options
    server.stop()
    logging.getLogger("werkzeug").setLevel(logging.NOTSET)


@pytest.fixture(params=["memory", "s3"])
def root(request):
    """A directory of a run that is not there yet."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        yield f"s3://bucket/{next(NUMBERS)}/runs"
    else:
        yield f"memory://{next(NUMBERS)}/runs"
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


def make_state(step=0, **fields):
    filled = {
        "params": {"fc.weight": torch.full((4, 3), float(step)).t(), "fc.bias": torch.full((3,), float(step)).half()},
        "buffers": {"count": torch.tensor(step)},
        "extra": {"empty": torch.zeros(0), "many": torch.arange(9.0) + step, "note": "warm"},
    }
    return TrainState(**{"step": step, "position": step, "seed": 7, **filled, **fields})


def step_fn(state, batch):
    return state.advance(params={name: value + 1 for name, value in state.params.items()}, metrics={})


def names(root):
    return sorted(path.name for path in path_of(root).iterdir())


def files(root, step):
    return sorted(path.name for path in (path_of(root) / name_of(step)).iterdir())


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(bytes(raw))


# Everything works there.


def test_what_is_saved_is_loaded(root):
    """save, load, latest, checkpoints and resume_or take URLs; paths print as URLs and are taken back."""
    assert ft.latest(root) is None
    assert checkpoints(root) == []
    assert ft.resume_or(state := make_state(), root) is state
    for step in (1, 10, 2):
        path = ft.save(make_state(step), root)
        assert path == path_of(root) / f"step_{step:08d}"
        assert ft.load(str(path)) == ft.load(path) == ft.load(path, verify="structure") == make_state(step)
    assert [one.name for one in checkpoints(root)] == ["step_00000010", "step_00000002", "step_00000001"]
    assert ft.latest(root, verify="full") == ft.latest(root) == path_of(root) / "step_00000010"
    assert ft.resume_or(make_state(), root) == make_state(10)
    assert files(root, 1) == ["model.safetensors", "state.json", "train.safetensors"]
    into = make_state()
    assert ft.load(path, into=into).params["fc.bias"].data_ptr() == into.params["fc.bias"].data_ptr()


def test_a_run_saves_and_resumes(root):
    """The hook with retention, the best one, and a run that is stopped at every step, as on a disk."""

    def report(state):
        return state.replace(metrics={"score": [0.5, 0.7, 0.6, 0.1][state.step - 1]})

    start = make_state()
    whole = ft.fit(step_fn, state=start, data=iter(range(9)), max_steps=4).replace(metrics={})
    for asynchronous in (True, False):
        top = f"{root}/{asynchronous}"
        for step in range(1, 5):
            hooks = [
                ft.hook(after_step=report),
                ft.hooks.best_checkpoint(f"{top}/best", "score", mode="max", asynchronous=asynchronous),
                ft.hooks.checkpoint(f"{top}/runs", every=1, keep_last=2, keep_every=3, asynchronous=asynchronous),
            ]
            state = ft.resume_or(start, f"{top}/runs")
            final = ft.fit(step_fn, hooks, state=state, data=iter(range(9)), max_steps=step)
        assert names(f"{top}/runs") == ["step_00000003", "step_00000004"]
        assert names(f"{top}/best") == ["step_00000002"]
        assert ft.load(ft.latest(f"{top}/best")).hooks == {"best_checkpoint": {"2": 0.7}}
        assert ft.load(ft.latest(f"{top}/runs")) == final
        assert final.params["fc.bias"].equal(whole.params["fc.bias"])


def test_the_command_line_takes_urls(root, tmp_path, capsys):
    """inspect, verify, diff and export."""
    for step in (1, 2):
        ft.save(make_state(step), root)
    assert main(["verify", root]) == 0
    assert capsys.readouterr().out == "step_00000002: intact\nstep_00000001: intact\n"
    assert main(["inspect", root]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{path_of(root)}/step_00000002\n")
    assert "params.fc.weight" in out
    assert main(["diff", f"{root}/step_00000001", root]) == 1
    assert main(["diff", f"{root}/step_00000002", root]) == 0
    assert main(["export", root, str(tmp_path / "model.safetensors")]) == 0
    capsys.readouterr()
    assert ft.shell.weights.read_weights(tmp_path / "model.safetensors")["count"] == 2
    assert main(["verify", f"{root}/none"]) == 2
    assert "no such directory" in capsys.readouterr().err


DAMAGE = {
    "model": lambda path: flip(path / "model.safetensors", -1),
    "header": lambda path: flip(path / "train.safetensors", 20),
    "manifest": lambda path: flip(path / "state.json", 60),
    "cut": lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1]),
    "missing": lambda path: (path / "train.safetensors").remove(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(root, caplog, name):
    """It names the file, is passed over with a warning, and told by verify."""
    for step in (1, 2):
        path = ft.save(make_state(step), root)
    DAMAGE[name](path)
    file = {"header": "train", "manifest": "state", "missing": "train"}.get(name, "model")
    with pytest.raises(CheckpointError, match=rf"{root.partition('/')[0]}.*step_00000002/{file}\."):
        ft.load(path)
    with caplog.at_level(logging.WARNING, logger="fntrain"):
        assert ft.resume_or(make_state(), root) == make_state(1)
    assert f"step_00000002/{file}." in caplog.text
    assert [one.problem is None for one in inspect.verify(root)] == [False, True]


def test_what_another_process_wrote_is_seen(s3):
    """Listings are not remembered: a file system of s3fs of its own stands for the other process."""
    root = path_of(f"s3://bucket/{next(NUMBERS)}/runs")
    ft.save(make_state(1), root)
    assert ft.latest(root).name == "step_00000001"
    other = RemotePath(type(root.fs)(**s3, skip_instance_cache=True), root.url)
    ft.save(make_state(2), other)
    assert ft.latest(root).name == "step_00000002"
    ft.save(make_state(2, extra={}), other)
    assert ft.load(ft.latest(root)) == make_state(2, extra={})
    ObjectStore(other).remove(other / "step_00000002")
    assert ft.resume_or(make_state(), root) == make_state(1)


# What is in view is whole.


class Killed(BaseException):
    """Ends the process as far as the code can tell."""


class Seams:
    """Counts what goes to the store, and fails at one of these calls, in the middle of it if it can be."""

    def __init__(self, patch):
        self.calls, self.at, self.error = [], 0, None
        write, write_bytes, remove = tensor_file.Writer.write, RemotePath.write_bytes, RemotePath.remove

        def half(out, *data):
            if self.counted(out.path):
                whole = b"".join(data)
                write(out, whole[: len(whole) // 2])
                raise self.error
            write(out, *data)

        def whole(path, data):
            if self.counted(path):
                raise self.error
            write_bytes(path, data)

        def removed(path):
            if self.counted(path):
                raise self.error
            remove(path)

        patch.setattr(tensor_file.Writer, "write", half)
        patch.setattr(RemotePath, "write_bytes", whole)
        patch.setattr(RemotePath, "remove", removed)

    def counted(self, path):
        self.calls.append(path.name)
        return len(self.calls) == self.at


def small(step, **extra):
    tensors = {"params": {"w": torch.full((3,), float(step))}, "extra": {"x": torch.ones(2), **extra}}
    return TrainState(step=step, position=step, seed=7, **tensors)


def in_view(root):
    return {path.name: ft.load(path) for path in checkpoints(root)}


@pytest.mark.parametrize("step", [2, 3])
def test_an_upload_that_fails_anywhere_is_not_seen(root, monkeypatch, step):
    """The manifest comes last: until it is there the old checkpoint of a step is, then the new one; rests are cleaned."""
    new, name = small(step, new=1), name_of(step)
    with monkeypatch.context() as patch:
        seams = Seams(patch)
        for number in itertools.count(1):
            top, seams.at = f"{root}/{number}", 0
            for old in (1, 2):
                ft.save(small(old), top)
            seams.calls, seams.at = [], number
            seams.error = Killed() if number % 2 else OSError("the network is down")
            raised = None
            try:
                ft.save(new, top)
            except (CheckpointError, Killed) as error:
                raised = error
            committed, seams.at = "state.json" in seams.calls[: number - 1], 0
            expected = {name_of(old): small(old) for old in (1, 2)} | ({name: new} if committed else {})
            assert in_view(top) == expected, number
            assert ft.latest(top).name == max(expected)
            assert [one.problem for one in inspect.verify(top)] == [None] * len(expected)
            start = ft.load(ft.latest(top))
            ft.fit(step_fn, ft.hooks.checkpoint(top, every=1), state=start, data=iter([0]), max_steps=start.step)
            assert names(top) == sorted(expected)
            if raised is None:
                break
            assert isinstance(raised, Killed) or f"{name}: could not be written" in str(raised)
    assert number > 5
    assert ft.load(f"{top}/{name}") == new


def test_the_manifest_is_written_last(root, monkeypatch):
    """Then the files of the former checkpoint of the step go; until then they keep their names."""
    with monkeypatch.context() as patch:
        seams = Seams(patch)
        ft.save(make_state(1), root)
        assert list(dict.fromkeys(seams.calls)) == ["model.safetensors", "train.safetensors", "state.json"]
        former = files(root, 1)
        seams.calls = []
        ft.save(make_state(1, extra={}), root)
        at = seams.calls.index("state.json")
        assert not {*seams.calls[:at]} & {*former}
        assert sorted(seams.calls[at + 1 :]) == ["model.safetensors", "train.safetensors"]
    assert len(files(root, 1)) == 3
    assert ft.load(f"{root}/step_00000001") == make_state(1, extra={})


def test_an_upload_that_fails_leaves_no_part_of_a_file(s3, monkeypatch):
    """On an object store a file whose writing failed does not come to be, not even when it is collected."""
    root = path_of(f"s3://bucket/{next(NUMBERS)}")
    with suppress(ZeroDivisionError), tensor_file.created(root / "file") as out:
        out.write(bytes(6 << 20))  # a part of several
        raise ZeroDivisionError
    del out
    gc.collect()
    assert not (root / "file").exists()
    with tensor_file.created(root / "file") as out:
        out.write(bytes(6 << 20))
        out.write(b"end")
    assert tensor_file.opened(root / "file").bytes == (6 << 20) + 3


def test_a_large_tensor_goes_up_in_parts(s3):
    """One that is larger than s3fs' block and fntrain's part comes back."""
    root = f"s3://bucket/{next(NUMBERS)}"
    state = make_state(1, extra={"large": torch.arange(14_000_001, dtype=torch.int16)})
    assert ft.load(ft.save(state, root)) == state


# Put aside.


def test_what_is_put_aside_stays_out_of_the_way(root, caplog):
    """A damaged later checkpoint is put aside once, is not deleted, and no later start stumbles over it."""
    for step in (1, 5):
        path = ft.save(make_state(step), root)
    flip(path / "model.safetensors", -1)
    raw = (path / "model.safetensors").read_bytes()
    for step in (2, 3):
        with caplog.at_level(logging.WARNING, logger="fntrain"):
            caplog.clear()
            start = ft.resume_or(make_state(), root)
            hook = ft.hooks.checkpoint(root, every=1, keep_last=1)
            ft.fit(step_fn, hook, state=start, data=iter(range(9)), max_steps=step)
        assert ("put a damaged checkpoint aside" in caplog.text) == (step == 2)
        assert [one.name for one in checkpoints(root)] == [name_of(step)]
        assert (path / "model.safetensors").read_bytes() == raw
    assert files(root, 5) == ["damaged-state.json", "model.safetensors", "train.safetensors"]
    hook = ft.hooks.checkpoint(root, every=1)
    ft.fit(step_fn, hook, state=ft.resume_or(make_state(), root), data=iter(range(9)), max_steps=6)
    assert [one.name for one in checkpoints(root)] == [name_of(step) for step in (6, 5, 4, 3)]


def test_a_run_beside_a_later_one_is_refused(root):
    """As on a disk."""
    ft.save(make_state(5), root)
    hook = ft.hooks.checkpoint(root, every=1)
    with pytest.raises(CheckpointError, match=r"step_00000005: is of a later step"):
        ft.fit(step_fn, hook, state=make_state(), data=iter(range(9)), max_steps=6)
    assert ft.load(ft.latest(root)) == make_state(5)


def test_a_single_checkpoint_is_no_directory_of_them(root):
    """resume_or says so."""
    path = ft.save(make_state(1), root)
    for wrong in (path, path / "state.json"):
        with pytest.raises(CheckpointError, match="is no directory of checkpoints"):
            ft.resume_or(make_state(), wrong)


# Paths.


def test_paths_of_either_kind(tmp_path):
    """A path is local, and so is a file:// URL, with its lock and its renaming; other URLs are fsspec's."""
    assert path_of("runs") == Path("runs")
    assert path_of(tmp_path) is tmp_path or path_of(tmp_path) == tmp_path
    assert path_of(f"file://{tmp_path}/runs") == tmp_path / "runs"
    assert isinstance(path_of("memory://runs"), RemotePath)
    assert path_of(path_of("memory://runs")) == path_of("memory://runs") == path_of("memory://runs/")
    path = ft.save(make_state(1), f"file://{tmp_path}/runs")
    assert type(path) is PosixPath
    assert (tmp_path / "runs" / ".lock").exists()


def test_a_protocol_that_is_not_there_is_named():
    """What to install, or that nobody knows it."""
    with pytest.raises(ImportError, match="gcsfs"):
        ft.save(make_state(1), "gs://bucket/runs")
    with pytest.raises(ValueError, match="nosuch"):
        ft.latest("nosuch://bucket/runs")


def test_local_paths_do_not_import_fsspec_of_their_own(tmp_path, monkeypatch):
    """A run on a disk makes no file system of fsspec."""
    monkeypatch.setattr(RemotePath, "of", lambda url: pytest.fail(url))
    ft.save(make_state(1), tmp_path)
    assert ft.resume_or(make_state(), tmp_path) == make_state(1)
    shutil.rmtree(tmp_path)


def test_an_error_of_the_network_says_where(monkeypatch):
    """What listing raises is the library's own, and names no path."""

    def refuse(self, path, **options):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(MemoryFileSystem, "isdir", refuse)
    hook = ft.hooks.checkpoint("memory://runs/unreachable", every=1)
    state = TrainState(step=0, position=0, seed=0, params={})
    with pytest.raises(CheckpointError, match=r"memory:///runs/unreachable: can't be listed: no credentials"):
        ft.fit(lambda state, batch: state.advance(), [hook], state=state, data=[1], max_steps=1)
