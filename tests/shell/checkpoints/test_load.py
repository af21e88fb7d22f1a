"""Reading with "full" and "structure": what each finds; reading into the memory of a state; resuming into a module's."""

import logging
import shutil

import attrs
import pytest
import torch
from cases import batches, make, same, square_loss

import fntrain as ft
from fntrain import CheckpointError, TrainState
from fntrain.shell.checkpoints import reading, resume

LOADS = {
    "load": lambda root, verify: ft.load(root / "step_00000002", verify=verify),
    "load into": lambda root, verify: ft.load(root / "step_00000002", into=make_state(0), verify=verify),
    "latest": lambda root, verify: ft.latest(root, verify=verify),
    "resume_or": lambda root, verify: ft.resume_or(make_state(0), root, verify=verify),
}


def make_state(step=0, **fields):
    filled = {
        "params": {"a": torch.full((3, 4), float(step)), "b": torch.full((4, 2), float(step)).t()},
        "buffers": {"mean": torch.full((2,), float(step))},
        "extra": {"ema": {"a": torch.full((3, 4), -float(step))}, "note": "warm"},
    }
    return TrainState(**{"step": step, "position": step, "seed": 7, **filled, **fields})


@pytest.fixture
def root(tmp_path):
    for step in (1, 2):
        ft.save(make_state(step), tmp_path)
    return tmp_path


def flip(file, where):
    raw = bytearray(file.read_bytes())
    raw[where] ^= 1
    file.write_bytes(raw)


DAMAGE = {
    "value of the model": lambda path: flip(path / "model.safetensors", -1),
    "value of another": lambda path: flip(path / "train.safetensors", -1),
    "header": lambda path: flip(path / "model.safetensors", 20),
    "manifest": lambda path: flip(path / "state.json", 50),
    "cut": lambda path: (path / "train.safetensors").write_bytes((path / "train.safetensors").read_bytes()[:-1]),
    "longer": lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes() + b"x"),
    "missing": lambda path: (path / "model.safetensors").unlink(),
    "mixed up": lambda path: shutil.copy(path / "train.safetensors", path / "model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("verify", ["full", "structure"])
@pytest.mark.parametrize("name", LOADS)
def test_what_verify_finds(root, caplog, name, verify, damage):
    """ "full" finds all damage; "structure" all but in the values of tensors. latest and resume_or pass over it."""
    DAMAGE[damage](root / "step_00000002")
    found = verify == "full" or not damage.startswith("value")
    with caplog.at_level(logging.WARNING, logger="fntrain"):
        if found and name.startswith("load"):
            with pytest.raises(CheckpointError, match="step_00000002"):
                LOADS[name](root, verify)
            return
        result = LOADS[name](root, verify)
    step = 1 if found else 2
    assert result.name == f"step_{step:08d}" if name == "latest" else result.step == step
    assert ("step_00000002" in caplog.text) == found


def test_what_is_looked_at_by_default(root):
    """load and resume_or believe nothing; latest, which returns a path, does not read the values."""
    DAMAGE["value of the model"](root / "step_00000002")
    assert ft.latest(root).name == "step_00000002"
    assert ft.resume_or(make_state(0), root).step == 1
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* is damaged"):
        ft.load(root / "step_00000002")


def test_latest_raises_when_all_are_damaged(root):
    """None means that there is nothing; a directory with nothing whole is an error that names all."""
    for step in (1, 2):
        DAMAGE["missing"](root / f"step_0000000{step}")
    with pytest.raises(CheckpointError, match=r"(?s)all 2 checkpoints are damaged.*step_00000002.*step_00000001"):
        ft.latest(root)


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("value", ["none", "Full", None, True])
def test_a_wrong_value_of_verify_is_refused(root, tmp_path, name, value):
    """Also where there is nothing to read, and before the memory of a state is touched."""
    for place in (root, tmp_path / "none"):
        with pytest.raises(ValueError, match="verify: got"):
            LOADS[name](place, value)
    model = make("mlp")
    state = ft.init_state(model, ft.optimizer(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match="verify: got"):
        ft.load(root / "step_00000002", into=state, verify=value)
    assert state == ft.init_state(model, ft.optimizer(torch.optim.SGD, lr=0.1))


# load(into=state).


def addresses(state):
    return {leaf: value.data_ptr() for leaf, value in ft.named_leaves(state) if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("verify", ["full", "structure"])
def test_the_memory_of_a_state_is_used_again(root, verify):
    """Every tensor of the same path, shape and dtype is written over, whatever its layout."""
    into = make_state(0)
    wide = torch.zeros(6, 8)
    into = into.replace(params={"a": wide[::2, ::2], "b": torch.zeros(2, 4)})
    before = addresses(into)
    loaded = ft.load(root / "step_00000002", into=into, verify=verify)
    assert loaded == make_state(2)
    assert addresses(loaded) == before
    assert loaded.params["a"].stride() == (16, 2)
    assert wide.sum() == 24  # and nothing beside it


def test_what_is_of_another_kind_gets_memory_of_its_own(root):
    """A leaf of another shape, dtype or name is read to new memory, and the old one stays as it was."""
    into = make_state(0, params={"a": torch.zeros(4, 3), "b": torch.zeros(2, 4).double()}, extra={})
    loaded = ft.load(root / "step_00000002", into=into)
    assert loaded == make_state(2)
    assert into.params["a"].abs().sum() == into.params["b"].abs().sum() == 0
    kept = {leaf for leaf, place in addresses(loaded).items() if place in addresses(into).values()}
    assert kept == {"buffers.mean"}


def test_memory_that_two_leaves_share_is_used_for_one(root):
    """An average that began as the parameters themselves, an expanded tensor, overlapping views: all bits are right."""
    base = torch.zeros(40)
    shared = base[:12].view(3, 4)
    overlapping = {
        "the same": {"params": {"a": shared, "b": base[12:20].view(4, 2).t()}, "extra": {"ema": {"a": shared}}},
        "partly": {"params": {"a": shared, "b": base[8:16].view(2, 4)}},
        "expanded": {"params": {"a": torch.zeros(1, 4).expand(3, 4), "b": torch.zeros(2, 4)}},
        "interleaved": {"params": {"a": base.view(-1, 10)[:3, :8:2], "b": base.view(-1, 10)[:2, 1:9:2]}},
    }
    for name, fields in overlapping.items():
        assert ft.load(root / "step_00000002", into=make_state(0, **fields)) == make_state(2), name


def adam():
    return ft.optimizer(torch.optim.AdamW, lr=0.05, fused=True)


@pytest.mark.parametrize("name", ["mlp", "dropout", "batchnorm", "channels_last", "tied", "foreign_stride"])
def test_training_in_place_goes_on_from_it(tmp_path, name):
    """A state on a module's memory is consumed; the loaded one lies there, and trains on exactly."""
    data = batches(name, 6)
    pure = ft.supervised_step(make(name), square_loss, adam())
    whole = ft.fit(pure, state=ft.init_state(pure.model, adam()), data=iter(data), max_steps=6)
    model = make(name)
    step = ft.shell.in_place(ft.supervised_step(model, square_loss, adam()))
    half = ft.fit(step, state=ft.init_state(model, adam()), data=iter(data), max_steps=3)
    path = ft.save(half, tmp_path)
    later = ft.fit(step, state=half, data=iter(data[3:]), max_steps=5)
    before = addresses(later)
    loaded = ft.load(path, into=later)
    with pytest.raises(ft.StateConsumedError, match="ft.load"):
        later.params["any"]
    assert loaded == ft.load(path)
    assert addresses(loaded) == before
    assert same(dict(model.named_parameters()), loaded.params)
    assert ft.fit(step, state=loaded, data=iter(data[3:]), max_steps=6) == whole
    with pytest.raises(ft.StateConsumedError):
        loaded.params["any"]


def test_another_models_checkpoint_is_not_taken_for_the_modules_memory(tmp_path):
    """A parameter that did not fit lies elsewhere; the next step in place says so, and trains nothing else."""
    wide = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    path = ft.save(ft.init_state(wide, adam()), tmp_path)
    model = make("mlp")
    step = ft.shell.in_place(ft.supervised_step(model, square_loss, adam()))
    loaded = ft.load(path, into=ft.init_state(model, adam()))
    with pytest.raises(ValueError, match=r"2\.weight"):
        step(loaded, batches("mlp", 1)[0])


def test_a_module_that_moved_is_not_taken_for_its_old_memory(tmp_path):
    """What a leased state lies on is what the module has."""
    model = make("mlp")
    state = ft.init_state(model, adam())
    path = ft.save(state, tmp_path)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    loaded = ft.load(path, into=state)
    assert same(dict(model.named_parameters()), loaded.params)


# resume_or.


@pytest.mark.parametrize("name", ["mlp", "batchnorm", "channels_last", "tied"])
def test_resume_uses_the_modules_memory(tmp_path, name):
    """One copy of the weights, not two: a state on a module's memory is consumed, and the resumed one lies there."""
    data = batches(name, 6)
    pure = ft.supervised_step(make(name), square_loss, adam())
    half = ft.fit(pure, state=ft.init_state(pure.model, adam()), data=iter(data), max_steps=3)
    whole = ft.fit(pure, state=half, data=iter(data[3:]), max_steps=6)
    ft.save(half, tmp_path)
    for make_step in (lambda step: step, ft.shell.in_place):
        model = make(name)
        step = make_step(ft.supervised_step(model, square_loss, adam()))
        start = ft.init_state(model, adam())
        place = {key: value.data_ptr() for key, value in start.params.items()}
        resumed = ft.resume_or(start, tmp_path)
        assert {key: value.data_ptr() for key, value in resumed.params.items()} == place
        assert same(dict(model.named_parameters()), half.params)
        with pytest.raises(ft.StateConsumedError, match="ft.resume_or"):
            start.params["any"]
        assert ft.fit(step, state=resumed, data=iter(data[3:]), max_steps=6) == whole


@pytest.mark.parametrize("read", ["resume_or", "load"])
def test_the_optimizers_state_of_a_checkpoint_is_put_where_the_optimizer_wants_it(tmp_path, monkeypatch, read):
    """It may have been saved on another device, or by another kernel: the step in place asks, as for any state."""
    data, model = batches("mlp", 3), make("mlp")
    pure = ft.supervised_step(make("mlp"), square_loss, adam())
    path = ft.save(pure(ft.init_state(pure.model, adam()), data[0]), tmp_path)
    step = ft.shell.in_place(ft.supervised_step(model, square_loss, adam()))
    start = ft.init_state(model, adam())
    resumed = ft.resume_or(start, tmp_path) if read == "resume_or" else ft.load(path, into=start)
    asked, placed = [], type(step.step.body.bound).placed

    def noted(bound, opt_state, params):
        asked.append(sorted(opt_state))
        return placed(bound, opt_state, params)

    monkeypatch.setattr(type(step.step.body.bound), "placed", noted)
    later = step(resumed, data[1])
    assert asked == [sorted(later.params)]
    step(later, data[2])
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("read", ["resume_or", "load"])
def test_a_checkpoint_of_the_cpu_is_resumed_on_a_gpu(tmp_path, read):
    """Moments and counters that were saved on the host follow the module to its device."""
    data = [batch.cuda() for batch in batches("mlp", 4)]
    pure = ft.supervised_step(make("mlp"), square_loss, adam())
    state = pure(ft.init_state(pure.model, adam()), data[0].cpu())
    path = ft.save(state, tmp_path)
    results = []
    for make_step in (lambda step: step, ft.shell.in_place):
        model = make("mlp").cuda()
        step = make_step(ft.supervised_step(model, square_loss, adam()))
        start = ft.init_state(model, adam())
        resumed = ft.resume_or(start, tmp_path) if read == "resume_or" else ft.load(path, into=start)
        results.append(ft.digest(ft.fit(step, state=resumed, data=iter(data[1:]), max_steps=4)))
    assert results[0] == results[1]


def trained(root, steps=2):
    """Checkpoints of two steps of an MLP, and a fresh state on the memory of another one."""
    pure = ft.supervised_step(make("mlp"), square_loss, adam())
    hook = ft.hooks.checkpoint(root, every=1)
    ft.fit(pure, hook, state=ft.init_state(pure.model, adam()), data=iter(batches("mlp", 2)), max_steps=steps)
    return ft.init_state(make("mlp"), adam())


def test_resume_reads_straight_into_the_modules_memory(tmp_path, monkeypatch):
    """No memory is taken for a second copy of parameters and buffers, only for what the model does not have."""
    state, memory, taken = trained(tmp_path), reading.Wanted.memory, []

    def noted(wanted, stored):
        tensor = memory(wanted, stored)
        if tensor.device.type == "cpu":
            taken.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(reading.Wanted, "memory", noted)
    shapes = sorted(tuple(param.shape) for param in state.params.values())
    resumed = ft.resume_or(state, tmp_path)
    assert resumed.step == 2
    moments = sorted(shape for shape in taken if shape)  # the optimizer's counters have no dimension
    assert moments == sorted(2 * shapes)
    taken.clear()
    ft.resume_or(ft.snapshot(resumed), tmp_path)  # on memory of its own
    assert sorted(shape for shape in taken if shape) == sorted(3 * shapes)


def law_unharmed(root, state):
    """Whatever is damaged, the state given is as it was, and may still be used."""
    before = ft.digest(state)
    file = root / "step_00000002" / "train.safetensors"  # read after the model's
    raw = file.read_bytes()
    for at in (-1, len(raw) // 2):
        flip(file, at)
        with pytest.raises(CheckpointError, match="damaged"):
            ft.resume_or(state, root)
        assert ft.digest(state) == before
        file.write_bytes(raw)
    assert ft.resume_or(state, root).step == 2


def test_a_damaged_checkpoint_leaves_the_state_given_as_it_was(tmp_path):
    """Nothing of the module's memory is written over before all is found intact."""
    state = trained(tmp_path)
    shutil.rmtree(tmp_path / "step_00000001")
    law_unharmed(tmp_path, state)


def test_law_unharmed_can_fail(tmp_path, monkeypatch):
    """Reading over the memory before all has been checked is refused."""
    state = trained(tmp_path)
    shutil.rmtree(tmp_path / "step_00000001")
    monkeypatch.setattr(
        resume, "read_state", lambda path, wanted: reading.read_state(path, attrs.evolve(wanted, accept=None))
    )
    with pytest.raises(AssertionError):
        law_unharmed(tmp_path, state)


def test_a_checkpoint_that_is_damaged_after_its_check_is_passed_over(tmp_path, monkeypatch):
    """Its bytes are checked again when they are read over the weights; the older one is resumed in the same memory."""
    state, accept = trained(tmp_path), resume._Target._accept
    places = {name: param.data_ptr() for name, param in state.params.items()}

    def and_flip(target, path, found):
        if path.name == "step_00000002":
            flip(path / "model.safetensors", -1)
        return accept(target, path, found)

    monkeypatch.setattr(resume._Target, "_accept", and_flip)
    resumed = ft.resume_or(state, tmp_path)
    assert resumed == ft.load(tmp_path / "step_00000001")
    assert {name: param.data_ptr() for name, param in resumed.params.items()} == places
    with pytest.raises(ft.StateConsumedError, match=r"ft\.resume_or"):
        state.params["any"]


def test_resume_from_nothing_or_another_job_consumes_nothing(tmp_path):
    """The given state is whole where nothing was resumed."""
    state = ft.init_state(make("mlp"), adam())
    assert ft.resume_or(state, tmp_path / "none") is state
    ft.save(make_state(1), tmp_path)
    with pytest.raises(CheckpointError, match="seed is 7"):
        ft.resume_or(state, tmp_path)
    assert len(state.params) == 4


def test_a_directory_that_was_renamed_is_no_checkpoint_of_that_step(tmp_path):
    """A name that claims another step is refused: retention and resuming go by it; any other name is fine."""
    path = ft.save(ft.TrainState(step=3, position=3, seed=0, params={"w": torch.zeros(2)}), tmp_path)
    other = path.rename(tmp_path / "step_00000700")
    with pytest.raises(ft.CheckpointError, match="holds step 3; a directory that was renamed"):
        ft.load(other)
    assert ft.load(other.rename(tmp_path / "good_one")).step == 3


def test_a_module_in_place_of_a_state_is_told(tmp_path):
    """A newcomer's mistake, and an AttributeError of the module would not say so."""
    model = torch.nn.Linear(2, 1)
    path = ft.save(ft.TrainState(step=1, position=1, seed=0, params={}), tmp_path)
    for call in (
        lambda: ft.save(model, tmp_path),
        lambda: ft.load(path, into=model),
        lambda: ft.resume_or(model, tmp_path),
        lambda: ft.digest(model),
    ):
        with pytest.raises(TypeError, match="state: got Linear, expected a TrainState"):
            call()
