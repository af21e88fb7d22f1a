"""A run saved at any step and resumed is the run that was never stopped, bit for bit."""

import attrs
import pytest
import torch
from cases import make, square_loss

import fntrain as ft
from fntrain import TrainState
from fntrain.shell.checkpoints import contents, reading
from fntrain.testing import assert_resume_exact

SAMPLES = torch.randn(22, 6, generator=torch.Generator().manual_seed(5))


class Jittered(torch.utils.data.Dataset):
    """Samples with a random part, drawn when they are read."""

    def __len__(self):
        return len(SAMPLES)

    def __getitem__(self, index):
        return SAMPLES[index] + 0.1 * torch.randn(6)


def average(state):
    old = state.hooks["ema"]
    return ft.remember(state, "ema", {n: 0.9 * old[n] + 0.1 * p for n, p in state.params.items()})


def ema():
    return ft.stateful("ema", lambda state: dict(state.params), after_step=average)


def job(name="mlp", *, optimizer=None, workers=0, hooks=(), **step):
    """A function that builds the whole job anew."""
    schedule = ft.schedules.warmup_cosine(0.05, warmup_steps=2, total_steps=6)
    chosen = optimizer or ft.optimizer(torch.optim.AdamW, lr=schedule, fused=True)

    def build():
        model = make(name)
        return {
            "step_fn": ft.supervised_step(model, square_loss, chosen, **step),
            "hooks": [make_hook() for make_hook in hooks],
            "state": ft.init_state(model, chosen, seed=3),
            "data": ft.data.stream(Jittered(), 4, seed=3, num_workers=workers),
        }

    return build


JOBS = {
    "mlp": job(),
    "dropout": job("dropout"),
    "batchnorm": job("batchnorm"),
    "channels_last": job("channels_last"),
    "tied": job("tied"),
    "reassigned_buffer": job("reassigned_buffer"),
    "accumulate": job("batchnorm", accumulate=2, clip_grad_norm=0.1),
    "bf16": job("dropout", precision="bf16"),
    "stateful_hook": job("mlp", hooks=[ema]),
    "sgd": job(optimizer=ft.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)),
    "adafactor": job(optimizer=ft.optimizer(torch.optim.Adafactor, lr=0.1)),
    "nadam": job(optimizer=ft.optimizer(torch.optim.NAdam, lr=0.1)),
}


@pytest.mark.parametrize("name", JOBS)
def test_resume_is_exact_at_every_step(name):
    """Parameters, buffers, optimizer state, hook memory: all bits agree, whatever the step it was stopped at."""
    assert assert_resume_exact(JOBS[name], num_steps=6).step == 6


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_resume_is_exact_with_workers():
    """Two loader processes, prefetching beyond the stop, change nothing; the run equals the one without workers."""
    with_workers = assert_resume_exact(job("dropout", workers=2), num_steps=6, at=[1, 4])
    assert with_workers == assert_resume_exact(job("dropout"), num_steps=6, at=[])


def test_the_resume_law_fails_for_memory_outside_the_state():
    """A hook that keeps its memory in itself is found out."""

    def leaky():
        seen = []

        def after_step(state):
            seen.append(1)
            return state.replace(extra={"seen": len(seen)})

        return ft.hook(after_step=after_step)

    with pytest.raises(AssertionError, match=r"resumed at step 1.*\n.*extra.seen: got 3, expected 4"):
        assert_resume_exact(job("mlp", hooks=[leaky]), num_steps=4)


def test_the_resume_law_fails_for_data_that_starts_again():
    """Data whose order depends on how often it was opened is found out."""

    class Restarts:
        def at(self, position):
            return iter(SAMPLES.split(4))

    def build():
        return {**job()(), "data": Restarts()}

    with pytest.raises(AssertionError, match="resumed at step 1, the run ends differently"):
        assert_resume_exact(build, num_steps=3)


def test_a_longer_horizon_goes_on_exactly():
    """A finished run given a larger max_steps continues as if that had been said at first (schedules permitting)."""
    constant = ft.optimizer(torch.optim.Adam, lr=0.01)
    first, second, whole = (job("dropout", optimizer=constant)() for _ in range(3))
    half = ft.fit(**first, max_steps=3)
    assert ft.fit(**second | {"state": half}, max_steps=6) == ft.fit(**whole, max_steps=6)


def test_on_a_device_there_is_no_second_copy_of_the_weights(tmp_path, monkeypatch):
    """Parameters and buffers wait on the host to be copied to the model's; what the model does not have goes there."""
    stored = contents._stored
    monkeypatch.setattr(contents, "_stored", lambda *leaf: attrs.evolve(stored(*leaf), device="cuda"))
    state = TrainState(step=1, position=1, seed=0, params={"w": torch.ones(2)}, buffers={"b": torch.ones(1)})
    path = ft.save(state.replace(opt_state={"w": {"exp_avg": torch.ones(2)}}), tmp_path)
    read = reading.read_state(path, reading.Wanted(device=torch.device("meta")))
    assert not read.params["w"].is_meta and not read.buffers["b"].is_meta and read.opt_state["w"]["exp_avg"].is_meta
