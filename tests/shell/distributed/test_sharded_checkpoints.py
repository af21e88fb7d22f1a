"""Checkpoints of ranks that each hold a part: each writes its own, any number of ranks reads them, damage is found."""

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import fsspec
import jobs
import pytest
import saved
import torch
import torch.distributed.checkpoint as dcp
from pool import Pool

import fntrain as ft
from fntrain import CheckpointError
from fntrain.__main__ import main
from fntrain.core import tree
from fntrain.shell.checkpoints import commit, saver
from fntrain.shell.checkpoints.local import LocalStore
from fntrain.shell.checkpoints.reading import read_model
from fntrain.shell.checkpoints.save_load import checkpoints
from fntrain.shell.checkpoints.store import entries


def parts(strategy, optimizer=None, **options):
    """A job with moments, BatchNorm's buffers and an average; alone without a strategy."""
    optimizer = optimizer or ft.optimizer(torch.optim.AdamW, lr=0.01)
    step_fn, state, data = jobs.parts(optimizer=optimizer, norm=True, **options)
    return (ft.shell.distribute(step_fn, strategy) if strategy else step_fn), state, data


def whole(state):
    """All saved leaves, of split tensors the whole."""
    return {
        leaf: value.full_tensor() if hasattr(value, "full_tensor") else value
        for leaf, value in ft.named_leaves(ft.snapshot(state))
    }


def same(a, b):
    return ft.core.tree.bitwise_equal(dict(a), dict(b))


def train(directory, strategy, until, *, made="before", hooks=(), every=2, **kwargs):
    """Go on from whatever is in the directory, saving at every second step; all leaves of the first and last state."""
    step_fn, state, data = parts(strategy)
    if made == "after":
        model = step_fn.step.model
        state = ft.init_state(model, step_fn.step.optimizer)
    state = ft.resume_or(state, directory)
    first = whole(state)
    own = [ft.hooks.ema(0.5), ft.hooks.evaluate(loss_of, every=1), *hooks]
    saving = ft.hooks.checkpoint(directory, every=every, keep_best=KEPT, **kwargs)
    final = ft.fit(step_fn, [*own, saving], state=state, data=data, max_steps=until)
    return first, whole(final)


KEPT = ft.hooks.keep_best("eval/score", mode="max", n=2)


def loss_of(state):
    """A score that goes up and down."""
    return {"score": float((state.step * 7) % 5)}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def run(ranks, size, fn, *args, **kwargs):
    call = functools.partial(fn, *args, **kwargs)
    return [call()] if size == 1 else ranks(size)(call)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("made", ["before", "after"])
def test_states_go_from_strategy_to_strategy_bit_for_bit(ranks, tmp_path, made, asynchronous):
    """fsdp 4 -> ddp 2 -> one process -> fsdp 3: parameters, moments, buffers, average, hooks' memory."""
    before = None
    for number, (size, strategy) in enumerate([(4, "fsdp"), (2, "ddp"), (1, None), (3, "fsdp")]):
        how = made if strategy == "fsdp" else "before"
        options = {"made": how, "asynchronous": asynchronous}
        found = run(ranks, size, train, tmp_path, strategy, 2 * number + 2, **options)
        final = found[0][1]
        for first, last in found:
            assert before is None or same(first, before)
            assert same(last, final)
        loaded = ft.load(ft.latest(tmp_path, verify="full"))
        assert same(dict(ft.named_leaves(loaded)), final)
        assert "hooks.ema.params.layers.0.weight" in final
        before = final


def test_a_run_goes_on_as_if_it_had_never_stopped(ranks, tmp_path):
    """Stopped at an uneven place and resumed by the same ranks: bit for bit the run that went through."""
    train_in = functools.partial(train, tmp_path / "halves", "fsdp")
    ranks(3)(functools.partial(train_in, 3))
    halves = ranks(3)(functools.partial(train_in, 6))
    through = ranks(3)(functools.partial(train, tmp_path / "through", "fsdp", 6))
    for (_, one), (_, other) in zip(halves, through, strict=True):
        assert same(one, other)


def saved_by_hand(directory, steps=3):
    step_fn, state, data = parts("fsdp")
    final = ft.fit(step_fn, [ft.hooks.ema(0.5)], state=state, data=data, max_steps=steps)
    path = ft.save(final, directory)
    return str(path), whole(final)


def test_each_rank_writes_its_own_part(ranks, tmp_path):
    """Its files hold rows of every split tensor and no more than its share of the bytes."""
    found = ranks(3)(functools.partial(saved_by_hand, tmp_path))
    name, params = found[0]
    path = Path(name)
    assert all(other == name and same(leaves, params) for other, leaves in found)
    kinds = [f"{kind}-rank{rank}.safetensors" for kind in ("model", "train") for rank in range(3)]
    assert sorted(file.name for file in path.iterdir()) == sorted([*kinds, "state.json"])
    manifest = saved.manifest_of(path)
    split = manifest["whole"]
    assert len(split) == 6 * 4  # parameters, two moments and an average of each
    for entry in manifest["tensors"].values():
        if "of" in entry and split[entry["of"]]["shape"][0] > 3:
            assert entry["shape"][0] < split[entry["of"]]["shape"][0]
    sizes = [
        sum(about["bytes"] - about["header"] for file, about in manifest["files"].items() if f"rank{rank}." in file)
        for rank in range(3)
    ]
    assert max(sizes) < 0.5 * sum(sizes)
    loaded = ft.load(path)
    assert same(dict(ft.named_leaves(loaded)), params)


def into_parts(directory):
    """Load over the memory of a state in parts."""
    path = checkpoints(directory)[0]
    expected = ft.load(path)
    step_fn, state, data = parts("fsdp")
    state = ft.fit(step_fn, [ft.hooks.ema(0.5)], state=state, data=data, max_steps=1)
    memory = {name: value.to_local().data_ptr() for name, value in state.params.items()}
    loaded = ft.load(path, into=state)
    with pytest.raises(ft.StateConsumedError) as consumed:
        dict(state.params)
    kept = all(value.to_local().data_ptr() == memory[name] for name, value in loaded.params.items())
    equal = same(whole(loaded), dict(ft.named_leaves(expected)))
    after = [
        whole(ft.fit(step_fn, [ft.hooks.ema(0.5)], state=start, data=data, max_steps=4)) for start in (loaded, expected)
    ]
    return bool(consumed), kept, equal, same(*after), int(after[0]["step"])


def test_a_checkpoint_is_loaded_into_parts(ranks, tmp_path):
    """load(into=...) writes over the parts; training goes on as from the whole."""
    ranks(2)(functools.partial(saved_by_hand, tmp_path))
    assert ranks(3)(functools.partial(into_parts, tmp_path)) == [(True, True, True, True, 4)] * 3


def test_a_checkpoint_of_parts_is_read_exported_and_told_of_as_any_other(ranks, tmp_path):
    """read_weights, load_params, and the commands inspect, diff, verify and export."""
    (name, _), *_ = ranks(3)(functools.partial(saved_by_hand, tmp_path / "runs"))
    loaded = ft.load(name)
    expected = {**loaded.params, **loaded.buffers}
    assert same(read_model(Path(name)), expected)
    model = jobs.Net(True)
    assert len(ft.load_params(name, model).matched) == len(expected)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    out = tmp_path / "one.safetensors"
    assert command("export", name, out) == 0
    assert same(ft.shell.weights.read_weights(out), expected)
    assert command("verify", tmp_path / "runs") == 0
    assert command("inspect", name) == 0
    plain = ft.save(loaded, tmp_path / "plain")
    assert command("diff", name, plain) == 0
    assert command("diff", name, out) == 0
    assert {file.name for file in plain.iterdir()} == set(saved.NAMES)


def command(*arguments):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main([str(argument) for argument in arguments])


def kept(directory, until):
    """keep_last and keep_best, and the best checkpoint beside; what the ranks remember."""
    best = ft.hooks.best_checkpoint(directory / "best", "eval/score", mode="max")
    train(directory / "runs", "fsdp", until, hooks=[best], every=1, keep_last=2)
    return names(directory / "runs"), names(directory / "best")


def test_directories_hold_what_they_should(ranks, tmp_path):
    """The last two and the two best of the scores 2 4 1 3 0 2 4 1; the best; also after a stop, and without the best."""
    ranks(2)(functools.partial(kept, tmp_path, 5))
    for runs, best in ranks(3)(functools.partial(kept, tmp_path, 8)):
        assert runs == [".lock", *(f"step_0000000{step}" for step in (2, 7, 8))]
        assert best == [".lock", "step_00000002"]
    shutil.rmtree(tmp_path / "best" / "step_00000002")
    for _, best in ranks(2)(functools.partial(kept, tmp_path, 9)):
        assert best == [".lock", "step_00000009"]


def lost(directory):
    """The best checkpoint is of the step that the run starts from, and is not there."""
    best = ft.hooks.best_checkpoint(directory / "best", "eval/score", mode="max")
    train(directory / "runs", "fsdp", 2, hooks=[best], every=1)
    ft.shell.ranks().barrier()
    if ft.shell.ranks().rank == 0:
        shutil.rmtree(directory / "best" / "step_00000002")
    ft.shell.ranks().barrier()
    train(directory / "runs", "fsdp", 3, hooks=[best], every=1)
    return names(directory / "best")


def test_a_lost_best_is_saved_again(ranks, tmp_path):
    """By all ranks, each its part, or the first for all."""
    assert ranks(2)(functools.partial(lost, tmp_path)) == [[".lock", "step_00000002"]] * 2
    assert ft.load(tmp_path / "best" / "step_00000002").step == 2


def refused(directory, until=2):
    """What each rank is told."""
    try:
        train(directory, "fsdp", until)
    except CheckpointError as error:
        return str(error)
    return None


def test_a_directory_in_use_is_refused_on_all_ranks(ranks, tmp_path):
    """With the lock's message, at the start; the ranks are none the worse for it."""
    with LocalStore(tmp_path).hold():
        for told in ranks(2)(functools.partial(refused, tmp_path)):
            assert "rank 0" in told
            assert "another process writes its checkpoints there" in told
    assert ranks(2)(functools.partial(refused, tmp_path)) == [None, None]


def test_a_later_checkpoint_is_refused_on_all_ranks(ranks, tmp_path):
    """A fresh start beside a checkpoint of step 2."""
    ranks(2)(functools.partial(refused, tmp_path))
    for told in ranks(2)(functools.partial(from_the_start, tmp_path)):
        assert "is of a later step" in told


def from_the_start(directory):
    step_fn, state, data = parts("fsdp")
    with pytest.raises(CheckpointError) as told:
        ft.fit(step_fn, [ft.hooks.checkpoint(directory, every=1)], state=state, data=data, max_steps=3)
    return str(told.value)


FAILING = {"write_tensors": 1, "publish": 0, "retain": 0}
OWNERS = {"write_tensors": commit, "publish": LocalStore, "retain": saver}


def failing(directory, what, asynchronous):
    """One rank's part of a save fails, from step 4 on."""
    owner = OWNERS[what]
    original = getattr(owner, what)

    def fails(*args, **kwargs):
        if {"write_tensors": lambda: args[0].step, "publish": lambda: args[2], "retain": lambda: args[1]}[what]() < 4:
            return original(*args, **kwargs)
        raise OSError("No space left on device") if what != "retain" else CheckpointError("No space left on device")

    if ft.shell.ranks().rank == FAILING[what]:
        setattr(owner, what, fails)
    step_fn, state, data = parts("fsdp")
    saving = ft.hooks.checkpoint(directory, every=1, keep_last=3, asynchronous=asynchronous)
    try:
        ft.fit(step_fn, [saving], state=state, data=data, max_steps=6)
    except CheckpointError as error:
        return str(error)
    finally:
        setattr(owner, what, original)
    return None


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("what", FAILING)
def test_trouble_of_one_rank_is_an_error_on_all(ranks, tmp_path, what, asynchronous):
    """The disk of one rank is full: all are told whose, former checkpoints are as they were, nothing is left over."""
    for told in ranks(2)(functools.partial(failing, tmp_path, what, asynchronous)):
        assert f"rank {FAILING[what]}: No space left" in told
    assert not list(tmp_path.glob(".partial-*"))
    steps = [1, 2, 3, 4] if what == "retain" else [1, 2, 3]
    found = sorted(entries(LocalStore(tmp_path)))
    assert [ft.load(path).step for path in found] == steps


def changed_at_the_end(directory):
    """A hook changes the part of one rank after the last step, which is on the disk already."""

    def change(state):
        weight = state.params["layers.0.weight"]
        part = weight.to_local().clone() + (state.run.ranks.rank == 1)
        return state.replace(params={**state.params, "layers.0.weight": tree.relocated(weight, part)})

    step_fn, state, data = parts("fsdp")
    hooks = [ft.hook(after_train=change), ft.hooks.checkpoint(directory, every=1)]
    final = ft.fit(step_fn, hooks, state=state, data=data, max_steps=2)
    return whole(final)


def test_what_one_rank_changed_after_the_last_step_is_saved_by_all(ranks, tmp_path):
    """Whether to save again is agreed."""
    found, _ = ranks(2)(changed_at_the_end, tmp_path, timeout=120)
    assert same(whole(ft.load(tmp_path / "step_00000002")), found)


def groups(directory):
    """How many process groups there are after each of some runs."""
    found = []
    for number in range(3):
        step_fn, state, data = parts("fsdp")
        saving = ft.hooks.checkpoint(f"{directory}/{number}", every=1)
        ft.fit(step_fn, [saving], state=state, data=data, max_steps=1)
        found.append(len(torch.distributed.distributed_c10d._world.pg_map))
    return found


def test_a_run_leaves_no_process_group_behind(ranks, tmp_path):
    """Each has sockets and threads."""
    for found in ranks(2)(groups, tmp_path):
        assert len(set(found)) == 1


def forgot(directory):
    step_fn, state, data = parts("fsdp")
    final = ft.fit(step_fn, state=state, data=data, max_steps=1)
    with pytest.raises(CheckpointError) as told:
        ft.save(final.replace(run=ft.Run()), directory)
    named = final.replace(hooks={"a": {"w@0": torch.ones(1), "w": final.params["layers.0.weight"]}})
    with pytest.raises(CheckpointError) as taken:
        ft.save(named, directory)
    return str(told.value), str(taken.value)


def test_a_state_that_forgot_its_ranks_is_refused(ranks, tmp_path):
    """No rank writes its part as if it were the whole; nor a leaf named like a part."""
    for told, taken in ranks(2)(functools.partial(forgot, tmp_path)):
        assert "state.params.layers.0.weight: is split over ranks, and the state does not know which" in told
        assert "state.hooks.a.w@0: is named like a part" in taken
    assert not list(tmp_path.glob("step_*"))


def two_of_parts(ranks, root):
    """A directory with checkpoints of steps 1 and 2, each of three ranks' parts."""
    for steps in (1, 2):
        ranks(3)(functools.partial(saved_by_hand, root, steps))
    return [ft.load(path) for path in checkpoints(root)]


def test_files_that_are_missing_cut_or_of_another_step_are_found(ranks, tmp_path):
    """Each file of each rank; the message names it, and a run goes on from the checkpoint before."""
    newer, older = two_of_parts(ranks, tmp_path)
    path, rng = tmp_path / "step_00000002", random.Random(0)
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        lengths = [None, 0, 7, len(raw) - 1, *(rng.randrange(len(raw)) for _ in range(4))]
        damaged = [None if length is None else raw[:length] for length in lengths]
        damaged += [raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :] for at in rng.sample(range(len(raw)), 4)]
        if file.name != "state.json":
            damaged.append((tmp_path / "step_00000001" / file.name).read_bytes())
        for other in damaged:
            file.unlink()
            if other is not None:
                file.write_bytes(other)
            with pytest.raises(CheckpointError, match=f"step_00000002/{file.name}"):
                ft.load(path)
            _, fresh, _ = parts(None)
            assert ft.resume_or(fresh, tmp_path) == older
            file.write_bytes(raw)
    assert ft.load(path) == newer


LEAF = "params.layers.0.weight"


def in_whole(**changes):
    return lambda manifest: manifest["whole"][LEAF].update(changes)


def in_part(rank=0, **changes):
    return lambda manifest: manifest["tensors"][f"{LEAF}@{rank}"].update(changes)


def twice(manifest):
    manifest["tensors"][f"{LEAF}@9"] = manifest["tensors"][f"{LEAF}@0"]


def swapped(manifest):
    parts = manifest["tensors"]
    parts[f"{LEAF}@0"]["at"], parts[f"{LEAF}@2"]["at"] = parts[f"{LEAF}@2"]["at"], parts[f"{LEAF}@0"]["at"]


def both(manifest):
    manifest["tensors"][LEAF] = {
        key: v for key, v in manifest["tensors"][f"{LEAF}@0"].items() if key not in ("of", "at")
    }
    del manifest["tensors"][f"{LEAF}@0"]


def of_itself(manifest):
    manifest["whole"][f"{LEAF}@0"] = manifest["whole"][LEAF]
    manifest["tensors"][f"{LEAF}@0"]["of"] = f"{LEAF}@0"


HOSTILE = {
    "rows that overlap": in_part(1, at=1),
    "rows that are missing": in_part(1, at=7),
    "rows from before the first": in_part(0, at=-6),
    "rows from no number": in_part(0, at=0.0),
    "rows from true": in_part(1, at=True),
    "parts in another's place": swapped,
    "a part listed twice": twice,
    "a part of nothing": in_part(0, of="params.nothing"),
    "a part of a list": in_part(0, of=[]),
    "a part of another": in_part(0, of="params.layers.2.weight"),
    "a part of itself": of_itself,
    "a tensor whole and in parts": both,
    "a huge whole": in_whole(shape=[2**62, 6]),
    "more rows than there are": in_whole(shape=[17, 6]),
    "fewer rows than there are": in_whole(shape=[15, 6]),
    "other columns": in_whole(shape=[16, 2**40]),
    "negative rows": in_whole(shape=[-16, 6]),
    "rows that are no whole number": in_whole(shape=[16.0, 6]),
    "no dimension": in_whole(shape=[]),
    "no shape": in_whole(shape=None),
    "another dtype": in_whole(dtype="float64"),
    "no dtype": in_whole(dtype="float31"),
    "a file outside": in_whole(file="/etc/passwd"),
    "a stride that is none": in_whole(stride=["a", {}]),
    "an empty list of wholes": lambda manifest: manifest.update(whole={}),
    "no list of wholes": lambda manifest: manifest.pop("whole"),
    "a text for the wholes": lambda manifest: manifest.update(whole="x"),
    "a whole without parts": lambda manifest: manifest["whole"].update(x=manifest["whole"][LEAF]),
    "a file that nothing is in": lambda manifest: manifest["files"].update(
        {"model-rank9.safetensors": {"header": 8, "crc32": 0, "bytes": 8}}
    ),
    "an earlier schema": lambda manifest: manifest.update(schema=2),
}


def test_manifests_that_lie_about_parts_are_refused(ranks, tmp_path):
    """Overlaps, gaps, other shapes and names: a CheckpointError of every reader, before memory is taken."""
    from test_fuzz import bounded  # takes long to import

    two_of_parts(ranks, tmp_path)
    path = tmp_path / "step_00000002"
    honest = json.dumps(saved.manifest_of(path))
    for name, lie in HOSTILE.items():
        manifest = json.loads(honest)
        lie(manifest)
        saved.seal(path, json.dumps(manifest))
        readers = [ft.load, functools.partial(ft.load, verify="structure")]
        for read in readers if "outside" in name or "nothing is in" in name else [*readers, read_model]:
            with bounded(tmp_path), pytest.raises(CheckpointError, match="step_00000002/"):
                read(path)
    saved.seal(path, honest)
    assert ft.load(path).step == 2


def leave_behind(directory):
    """What ranks that died while saving step 3 leave, of an earlier attempt of the same step."""
    for token in ("0", "1"):
        partial = directory / f".partial-step_00000003-{token}"
        shutil.copytree(directory / "step_00000002", partial)
        (partial / "state.json").unlink()


def test_leftovers_of_a_dead_attempt_never_mix_in(ranks, tmp_path):
    """They are removed when the next run begins; its checkpoint of that step is whole, of its own files."""
    two_of_parts(ranks, tmp_path)
    leave_behind(tmp_path)
    (_, final), _ = ranks(2)(functools.partial(train, tmp_path, "fsdp", 3, every=3))
    assert not list(tmp_path.glob(".partial-*"))
    path = tmp_path / "step_00000003"
    assert names(path) == sorted(
        [f"{kind}-rank{rank}.safetensors" for kind in ("model", "train") for rank in range(2)] + ["state.json"]
    )
    assert same(dict(ft.named_leaves(ft.load(path))), final)


def dying(directory, number):
    """Rank 1 is killed before the nth time that it opens a file for writing, while it saves in the background."""
    if ft.shell.ranks().rank == 1:
        left = [number]

        def count(event, arguments):
            if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                left[0] -= str(directory) in str(arguments[0])
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
    train(directory, "fsdp", 9, every=1)


@pytest.mark.parametrize("number", [1, 4])
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(ranks, tmp_path, number):
    """SIGKILL of one rank; the restart finds a whole checkpoint and ends in the bits of the undisturbed run."""
    ranks(2)(functools.partial(train, tmp_path / "runs", "fsdp", 2, every=1))
    killed = Pool(2)
    try:
        with pytest.raises(RuntimeError, match="ended without a word|Connection|rank 0"):
            killed.run(functools.partial(dying, tmp_path / "runs", number), timeout=120)
    finally:
        killed.close()
    newest = ft.latest(tmp_path / "runs", verify="full")
    assert ft.load(newest).step == 2 + (number - 1) // 2  # two files for each step
    (_, final), _ = ranks(2)(functools.partial(train, tmp_path / "runs", "fsdp", 6, every=1))
    (_, whole_run), _ = ranks(2)(functools.partial(train, tmp_path / "alone", "fsdp", 6, every=1))
    assert same(final, whole_run)
    assert not list((tmp_path / "runs").glob(".partial-*"))


def on_a_store(fn, *args, **kwargs):
    """A store made of files: directories come with what is written there."""
    fsspec.config.conf["file"] = {"auto_mkdir": True}
    try:
        return fn(*args, **kwargs)
    finally:
        del fsspec.config.conf["file"]


def test_an_object_store_holds_parts(ranks, tmp_path):
    """A store that all ranks reach; saving a step again replaces the files of the former attempt."""
    url = f"local://{tmp_path}"
    first = ranks(2)(functools.partial(on_a_store, train, url, "fsdp", 4, every=1, keep_last=2))[0][1]
    newest = ft.latest(url, verify="full")
    assert same(dict(ft.named_leaves(ft.load(newest))), first)
    assert {f"step_0000000{step}" for step in (2, 3, 4)} == set(names(tmp_path))
    again = ranks(3)(functools.partial(on_a_store, saved_by_hand, url, 3))[0]
    files = names(tmp_path / "step_00000003")
    assert len(files) == 7
    assert same(dict(ft.named_leaves(ft.load(again[0]))), again[1])


def test_a_store_that_each_rank_has_for_itself_is_refused(ranks):
    """memory:// is of one process: rank 1's part is not where rank 0 could list it."""
    for told in ranks(2)(functools.partial(refused, "memory://runs")):
        assert "could not be written: rank 0" in told


def to_dcp(directory, strategy):
    """Write the state of a run as a directory of torch's, and read it back on every rank."""
    step_fn, state, data = parts(strategy)
    final = ft.fit(step_fn, [ft.hooks.ema(0.5)], state=state, data=data, max_steps=3)
    ft.shell.to_dcp(final, directory)
    with pytest.raises(CheckpointError, match="already"):
        ft.shell.to_dcp(final, directory)
    mine = {"model": {name: torch.zeros_like(value) for name, value in final.params.items()}}
    dcp.load(mine, checkpoint_id=directory)  # as a user of torch does, into parts
    leaves = whole(final)
    read = all(
        ft.core.tree.bitwise_equal(whole_of(value), leaves[f"params.{name}"]) for name, value in mine["model"].items()
    )
    return leaves, read, same(dict(ft.named_leaves(ft.shell.from_dcp(directory))), leaves)


def whole_of(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_states_go_to_and_from_the_format_of_torch(ranks, tmp_path, strategy):
    """Written by three ranks, read by torch's own loader and by one process: bit for bit."""
    found = ranks(3)(functools.partial(to_dcp, tmp_path / "dcp", strategy))
    assert [one[1:] for one in found] == [(True, True)] * 3
    leaves = found[0][0]
    loaded = ft.shell.from_dcp(tmp_path / "dcp")
    assert same(dict(ft.named_leaves(loaded)), leaves)
    assert same(ft.shell.from_dcp(tmp_path / "dcp", "model."), {**loaded.params, **loaded.buffers})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torch_wrote_is_read_by_prefix_and_never_unpickled(tmp_path):
    """Tensors of a directory of torch.distributed's own; its Python objects are left alone."""
    model = jobs.Net(True)
    dcp.save({"net": model.state_dict(), "epoch": 3, "evil": saved.make_state}, checkpoint_id=tmp_path, no_dist=True)
    found = ft.shell.from_dcp(tmp_path, "net.")
    assert same(found, model.state_dict())
    with pytest.raises(CheckpointError, match=r"was not written by to_dcp.*'epoch', 'evil'"):
        ft.shell.from_dcp(tmp_path)
    with pytest.raises(CheckpointError, match="begins with 'model'"):
        ft.shell.from_dcp(tmp_path, "model")
    with pytest.raises(CheckpointError, match="no such file"):
        ft.shell.from_dcp(tmp_path / "nothing")
    metadata = (tmp_path / ".metadata").read_bytes()
    for file, raw in ((".metadata", metadata[:-40]), ("__0_0.distcp", b"")):
        (tmp_path / file).write_bytes(raw)
        with pytest.raises(CheckpointError, match="damaged or can't be read"):
            ft.shell.from_dcp(tmp_path, "net.")
        (tmp_path / ".metadata").write_bytes(metadata)


def test_every_kind_of_leaf_goes_through_the_format_of_torch(tmp_path):
    """Several dtypes, lists, tuples, numbers, nan and nothing."""
    state = saved.make_state(2)
    assert ft.shell.from_dcp(ft.shell.to_dcp(state, tmp_path)) == state


@contextlib.contextmanager
def small_sums(size):
    """One checksum for so many bytes, so that rows of several ranks lie under one."""
    from fntrain.shell.checkpoints import manifest, reading, tensor_file

    before = tensor_file.PART
    manifest.PART = reading.PART = tensor_file.PART = commit.PART = size
    try:
        yield
    finally:
        manifest.PART = reading.PART = tensor_file.PART = commit.PART = before


def resumed_in_parts(directory, size=1 << 24):
    """All leaves of what is resumed into parts, and the bytes of tensors that this rank has read."""
    from fntrain.shell.checkpoints.tensor_file import Reader

    read, right = [], Reader.read_into

    def reading(self, at, view):
        read.append(len(view))
        return right(self, at, view)

    step_fn, _, _ = parts("fsdp")
    state = ft.init_state(step_fn.step.model, step_fn.step.optimizer)
    Reader.read_into = reading
    try:
        with small_sums(size):
            found = ft.resume_or(state, directory)
    finally:
        Reader.read_into = right
    split = [leaf for leaf, value in ft.named_leaves(found) if hasattr(value, "full_tensor")]
    return whole(found), sum(read), split


def saved_alone(directory, size):
    step_fn, state, data = parts(None)
    with small_sums(size):
        final = ft.fit(step_fn, state=state, data=data, max_steps=3)
        path = ft.save(final, directory)
    return whole(final), path


@pytest.mark.parametrize("size", [8, 100, 1 << 24])
@pytest.mark.parametrize("ranks_of", [2, 3])
def test_each_rank_reads_its_rows_alone(ranks, tmp_path, ranks_of, size):
    """Parameters and moments come split, bit for bit, wherever checksums begin; a rank reads little of the others'."""
    final, path = saved_alone(tmp_path, size)
    found = ranks(ranks_of)(resumed_in_parts, tmp_path)
    number = sum(value.numel() for leaf, value in final.items() if leaf.startswith("params."))
    for state, _, split in found:
        assert same(state, final)
        assert {leaf for leaf in final if leaf.startswith("params.")} < set(split)
        assert {leaf for leaf in final if leaf.endswith(("exp_avg", "exp_avg_sq"))} < set(split)
    if size == 8:
        heads = sum(file.stat().st_size for file in path.glob("*.safetensors")) - sum(
            value.nbytes for value in final.values() if isinstance(value, torch.Tensor)
        )
        others = sum(
            value.nbytes for leaf, value in final.items() if isinstance(value, torch.Tensor) and leaf not in found[0][2]
        )
        for _, read, _ in found:
            assert read - heads - others <= 12 * (number / ranks_of + 20 * ranks_of) + 8 * 12


def test_rows_that_one_rank_finds_damaged_all_pass_over(ranks, tmp_path):
    """The rank that reads them names the leaf; all resume from the checkpoint before."""
    step_fn, state, data = parts(None)
    ft.fit(step_fn, ft.hooks.checkpoint(tmp_path, every=2), state=state, data=data, max_steps=4)
    newest, before = checkpoints(tmp_path)
    expected = whole(ft.load(before))
    file = newest / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1  # in the last rows of the last parameter or buffer
    file.write_bytes(raw)
    for state, _, _ in ranks(2)(resumed_in_parts, tmp_path):
        assert same(state, expected)
