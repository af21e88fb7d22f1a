"""Disks that are full, read-only, failing or gone, clocks that run backwards, other writers.

After each of them what was in view still loads, the error is a CheckpointError, and the run hears of it at its next step.
"""

import errno
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import saved

import fntrain as ft
from fntrain import CheckpointError
from fntrain.shell.checkpoints import saver, tensor_file
from fntrain.shell.checkpoints.save_load import checkpoints
from fntrain.shell.checkpoints.store import step_of


@pytest.fixture
def root(tmp_path):
    """A directory with checkpoints of steps 1 and 2."""
    return filled(tmp_path / "runs")


def filled(root):
    for step in (1, 2):
        ft.save(saved.make_state(step), root)
    return root


def run(root, max_steps, *hooks, **options):
    """Go on from what is there, saving every step."""
    start = ft.resume_or(saved.fresh(), root)
    kept = ft.stateful("best", lambda state: {})
    hooks = [kept, *hooks, ft.hooks.checkpoint(root, every=1, **options)]
    step_fn = lambda state, batch: state.advance(extra={"step": state.step + 1})  # noqa: E731
    return ft.fit(step_fn, hooks, state=start, data=iter(range(99)), max_steps=max_steps)


def law_kept(root, fault, act, wrong=""):
    """Under a fault it works, or it is a CheckpointError; the old ones are whole; without it, all goes on."""
    before = {step_of(path): ft.digest(ft.load(path)) for path in checkpoints(root)}
    failed, said = False, ""
    with fault:
        try:
            act(root)
        except CheckpointError as error:
            failed, said = True, str(error)
    assert not failed or (str(root) in said and wrong in said), said
    found = {step_of(path): ft.digest(ft.load(path)) for path in checkpoints(root)}
    assert found.items() >= before.items()
    assert max(found) in (2, 3, 4) if failed else max(found) >= 3
    run(root, 5)
    assert max(map(step_of, checkpoints(root))) == 5
    assert [path for path in root.iterdir() if path.name.startswith(".partial")] == []
    return failed


ACTS = {
    "save": lambda root: ft.save(saved.make_state(3), root),
    "run": lambda root: run(root, 4),
    "synchronous run": lambda root: run(root, 4, asynchronous=False),
}


@contextmanager
def file_limit(size):
    """No file may be longer: the system call fails as on a full disk, after it has written a part."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Failing:
    """As a context: the nth call of a function and all later ones raise an OSError, after `before` was done."""

    def __init__(self, patch, owner, name, number, code, *, before=lambda *_: None):
        self.patch, self.owner, self.name, self.left, self.code, self.before = patch, owner, name, number, code, before

    def __enter__(self):
        self.real = getattr(self.owner, self.name)
        self.patch.setattr(self.owner, self.name, lambda *args, **options: self.call(*args, **options))

    def __exit__(self, *_):
        self.patch.setattr(self.owner, self.name, self.real)

    def call(self, *arguments, **options):
        self.left -= 1
        if self.left > 0:
            return self.real(*arguments, **options)
        self.before(*arguments)
        raise OSError(self.code, os.strerror(self.code))


# A full disk.


@pytest.mark.parametrize("act", ["save", "run"])
def test_a_limit_of_file_size(tmp_path, act):
    """Wherever a file ends for want of space."""
    for size in (0, 30, 300, 700, 2000):
        assert law_kept(filled(tmp_path / str(size)), file_limit(size), ACTS[act])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("act", ACTS)
def test_every_limit_of_file_size(tmp_path, act):
    """The same at every 13th length up to one at which all goes well."""
    for size in count(0, 13):
        failed = law_kept(filled(tmp_path / "runs"), file_limit(size), ACTS[act])
        shutil.rmtree(tmp_path / "runs")
        if not failed:
            break
    assert size > 2000


@pytest.mark.parametrize("act", ["save", pytest.param("run", marks=pytest.mark.slow)])
def test_no_space_at_any_write(tmp_path, monkeypatch, act):
    """ENOSPC at every write in turn, half of what was to be written being there."""

    def half(writer, *data):
        whole = b"".join(data)
        writer.file.write(whole[: len(whole) // 2])

    for number in count(1):
        fault = Failing(monkeypatch, tensor_file.Writer, "write", number, errno.ENOSPC, before=half)
        if not law_kept(filled(tmp_path / str(number)), fault, ACTS[act], "No space left on device"):
            break
    assert number > 5  # header and tensors of two files, and the manifest


def test_short_writes_and_reads_go_on(tmp_path, monkeypatch):
    """System calls that do less than they were asked for are repeated."""
    preadv = os.preadv
    monkeypatch.setattr(tensor_file, "_WRITE", 7)
    path = ft.save(saved.make_state(3), tmp_path)
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, at: preadv(descriptor, [views[0][:5]], at))
    assert ft.load(path) == saved.make_state(3)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 128 KB."""
    if not shutil.which("mount") or os.geteuid():
        pytest.skip("needs root, to mount a tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@contextmanager
def full(disk, left):
    """Fill a disk up but for some bytes."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - left)
    yield
    filler.unlink()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("left", [0, 4096, 8192, 12288])
def test_a_full_disk(small_disk, act, left):
    """A real one: with room for nothing, or for some of the files."""
    failed = law_kept(filled(small_disk / "runs"), full(small_disk, left), ACTS[act], "No space left on device")
    assert failed or left == 12288


@pytest.mark.parametrize("act", ACTS)
def test_a_read_only_disk(small_disk, act):
    """Mounted anew without leave to write; what is there can still be read."""

    @contextmanager
    def read_only():
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        try:
            assert ft.resume_or(saved.fresh(), small_disk / "runs") == saved.make_state(2)
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)

    assert law_kept(filled(small_disk / "runs"), read_only(), ACTS[act], "can't be written to")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("mode", [0o755, 0o000])
def test_a_directory_of_somebody_else(root, act, mode):
    """Neither leave to write, nor perhaps to look."""

    @contextmanager
    def nobody():
        parents = [parent for parent in root.parents if not parent.stat().st_mode & 0o001]
        modes = [parent.stat().st_mode for parent in parents]
        for parent in parents:
            parent.chmod(0o755)
        root.chmod(mode)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
            root.chmod(0o755)
            for parent, before in zip(parents, modes, strict=True):
                parent.chmod(before)

    assert law_kept(root, nobody(), ACTS[act], "Permission denied")


# A failing disk.

CALLS = {"fsync": os, "open": os, "mkdir": os, "truncate": os, "pwrite": os, "rename": os, "listdir": os, "scandir": os}


def law_failing_call(tmp_path, monkeypatch, name, act, code):
    for number in count(1):
        root = filled(tmp_path / f"{name} {act} {number}")
        fault = Failing(monkeypatch, CALLS[name], name, number, code)
        law_kept(root, fault, ACTS[act])
        if fault.left > 0:
            break
    return number


@pytest.mark.parametrize("name", CALLS)
def test_a_failing_system_call(tmp_path, monkeypatch, name):
    """Any call that writes or looks at directories fails, at any time and from then on."""
    called = law_failing_call(tmp_path, monkeypatch, name, "run", errno.EIO) > 1
    assert called or (name == "listdir" and sys.version_info >= (3, 13))  # pathlib calls scandir there


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT], ids=errno.errorcode.get)
def test_any_system_call_fails_anyhow(tmp_path, monkeypatch, act, code):
    """The same for other ways to save, and other errors."""
    assert sum(law_failing_call(tmp_path, monkeypatch, name, act, code) for name in CALLS) > 20


@pytest.mark.parametrize("number", [1, 2, 5, 9])
def test_a_failing_read_is_passed_over(root, monkeypatch, number):
    """EIO in the newest checkpoint: load says so, resuming goes on from the older."""
    preadv, calls = os.preadv, count(1)

    def failing_read(descriptor, views, at):
        if "step_00000002" in str(Path(f"/proc/self/fd/{descriptor}").readlink()) and next(calls) >= number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, views, at)

    monkeypatch.setattr(os, "preadv", failing_read)
    with pytest.raises(CheckpointError, match="step_00000002.*Input/output error"):
        ft.load(root / "step_00000002")
    calls = count(1)
    assert ft.resume_or(saved.fresh(), root) == saved.make_state(1)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_directory_that_goes_away(root, replaced):
    """Removed, or replaced by another, while the run writes there: it hears of it, and the other one stays as it is."""
    aside = root.with_name("aside")

    def take_away(state):
        if state.step == 3:
            for live in saver._open:
                live.wait()
            root.rename(aside)
            if replaced:
                root.mkdir()

    with pytest.raises(CheckpointError, match="was removed or replaced while this run was writing"):
        run(root, 9, ft.hook(after_step=take_away))
    assert not root.exists() or list(root.iterdir()) == []
    assert [step_of(path) for path in checkpoints(aside)] == [2, 1]
    assert ft.load(ft.latest(aside)) == saved.make_state(2)


@pytest.mark.parametrize("what", ["write", "delete"])
def test_the_run_hears_of_it_at_the_next_step(root, monkeypatch, what):
    """A save that failed in the background stops the run before another step, though its next save is far away."""
    owner, name = (tensor_file.Writer, "write") if what == "write" else (os, "rename")
    reached = []

    def step_fn(state, batch):
        for live in saver._open:
            if live.pending is not None:
                live.pending.exception()  # it is over
        reached.append(state.step + 1)
        return state.advance()

    start = ft.resume_or(saved.fresh(), root)
    hooks = [ft.stateful("best", lambda state: {}), ft.hooks.checkpoint(root, every=4, keep_last=1)]
    number = 1 if what == "write" else 2  # the first rename brings the new one into view
    with (
        Failing(monkeypatch, owner, name, number, errno.EIO),
        pytest.raises(CheckpointError, match="Input/output error"),
    ):
        ft.fit(step_fn, hooks, state=start, data=iter(range(99)), max_steps=90)
    assert reached in ([3, 4], [3, 4, 5])
    assert step_of(ft.latest(root)) == (2 if what == "write" else 4)


def test_clocks_do_not_matter(root, monkeypatch):
    """Clocks that run backwards, and files that look newer than later ones: steps alone decide."""
    clock = count(2_000_000_000, -1000)
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: float(next(clock)))
    for path in checkpoints(root):
        for file in (path, *path.iterdir()):
            os.utime(file, (4_000_000_000 - step_of(path),) * 2)
    final = run(root, 6, keep_last=2)
    assert [step_of(path) for path in checkpoints(root)] == [6, 5]
    os.utime(root / "step_00000006", (0, 0))
    assert ft.load(ft.latest(root)) == ft.resume_or(saved.fresh(), root) == final


# Other processes.


def test_other_processes_at_the_directory(tmp_path):
    """Two writers, of which one is refused; children forked while a save is under way."""
    script = Path(__file__).with_name("held.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
