"""Data of several ranks: the same global batches, resumed by any number of ranks; recipes that run unchanged."""

import functools
import json
from itertools import chain

import attrs
import jobs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fntrain as ft


class Numbered:
    """Samples that say their index, and draw."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(3)
        self.xs, self.ys = torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)

    def __len__(self):
        return len(self.xs)

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(6, dtype=torch.float64)
        return {"x": self.xs[index].double() + noise, "y": self.ys[index], "index": torch.tensor(index)}


choices = st.sampled_from([{}, {"drop_last": True}, {"shuffle": False}])


@given(st.integers(4, 60), st.integers(4, 17), st.integers(0, 40), choices, st.integers(0, 2**40))
def test_the_global_batch_is_the_same_for_any_number_of_ranks(size, batch_size, position, choice, seed):
    """Shares follow each other in it, and differ by one sample at most."""
    if choice.get("drop_last") and size < batch_size:
        return
    stream = ft.data.stream(range(size), batch_size, seed=seed, **choice)
    whole = stream.samples(position)
    for world_size in (1, 2, 3, 4):
        shares = [stream.shard(rank, world_size).share(position) for rank in range(world_size)]
        assert [*chain(*shares)] == whole
        assert max(map(len, shares)) - min(map(len, shares)) <= 1 and min(map(len, shares)) > 0


@pytest.mark.parametrize("choice", [{}, {"drop_last": True}, {"ragged_last": True}], ids=str)
def test_what_ranks_read_are_parts_of_one_batch(choice):
    """Also what is drawn for each sample, at any position."""
    stream = ft.data.stream(Numbered(23), 6, seed=5, **choice)
    for world_size in (2, 3, 4):
        readers = [stream.shard(rank, world_size).at(2) for rank in range(world_size)]
        for _, expected in zip(range(4), stream.at(2), strict=False):
            parts = [next(reader) for reader in readers]
            for name, value in expected.items():
                assert torch.equal(torch.cat([part[name] for part in parts]), value)


@pytest.mark.parametrize(
    ("arguments", "smallest"), [({"batch_size": 2}, 2), ({"batch_size": 4, "ragged_last": True}, 1)]
)
def test_a_batch_smaller_than_the_world_is_refused(arguments, smallest):
    """Before anything is trained, the last one of an epoch too."""
    with pytest.raises(ValueError, match=rf"batch_size: a batch of {smallest} can't be shared by world_size=3"):
        ft.data.stream(list(range(9)), seed=0, **arguments).shard(0, 3)


def test_a_stream_of_another_rank_is_refused():
    """One that was made for this rank is taken as it is."""
    stream = ft.data.stream(list(range(9)), 4, seed=0, rank=1, world_size=2)
    assert stream.shard(rank=1, world_size=2) == stream
    with pytest.raises(ValueError, match="stream: is of rank 1 of 2, expected 0 of 2; leave both out"):
        stream.shard(rank=0, world_size=2)


class OfAnotherLibrary(list):
    """Data whose shard() takes the number of shards first."""

    def shard(self, num_shards, index):
        raise AssertionError("read as something else")


def foreign():
    step_fn, state, _ = jobs.parts()
    try:
        ft.fit(ft.shell.distribute(step_fn), state=state, data=OfAnotherLibrary([1]), max_steps=1)
    except TypeError as error:
        return str(error)


def test_shards_of_other_libraries_are_not_mistaken(ranks):
    """Arguments go by name."""
    assert all("unexpected keyword argument 'rank'" in told for told in ranks(2)(foreign))


def trained(directory, max_steps, batch_size=7):
    """Go on in a directory; the samples of each step of this run, and the last state."""
    model = torch.manual_seed(0) and jobs.Net(dtype=torch.float64)
    sgd = ft.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)

    def loss_fn(model, batch):
        mine.append(batch["index"].tolist())
        return F.cross_entropy(model(batch["x"]), batch["y"])

    mine = []
    step_fn = ft.supervised_step(model, loss_fn, sgd)
    state = ft.init_state(model, sgd)
    step_fn = ft.shell.distribute(step_fn)
    state = ft.resume_or(state, directory)
    start = state.step
    final = ft.fit(
        step_fn,
        [ft.hooks.check_replicas(every=1), ft.hooks.checkpoint(directory, every=2, keep_last=1)],
        state=state,
        data=ft.data.stream(Numbered(20), batch_size, seed=1),
        max_steps=max_steps,
    )
    seen = [[*chain(*parts)] for parts in zip(*step_fn.ranks.gather(mine), strict=True)]
    return {"start": start, "seen": seen, **jobs.summary(final)}


@pytest.mark.parametrize("worlds", [(2, 1, 3), (1, 3, 2), (3, 2, 1)], ids=str)
def test_any_number_of_ranks_goes_on_with_exactly_the_remaining_samples(ranks, tmp_path, worlds):
    """Three runs in one directory, each of another number of ranks, come where one process comes."""
    alone = trained(tmp_path / "alone", 8)
    seen = []
    for world, max_steps in zip(worlds, (3, 6, 8), strict=True):
        found = (
            [trained(tmp_path / "run", max_steps)] if world == 1 else ranks(world)(trained, tmp_path / "run", max_steps)
        )
        assert {one["start"] for one in found} == {len(seen)}
        assert len({one["digest"] for one in found}) == 1
        seen += found[0]["seen"]
    assert seen == alone["seen"]
    for name, value in alone["params"].items():
        assert torch.allclose(found[0]["params"][name], value, rtol=1e-12, atol=1e-14), name
    assert [at.name for at in (tmp_path / "run").glob("step_*")] == ["step_00000008"]


def build_model(_config):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def build_data(_config):
    return Numbered(40)


def recipe_loss(model, batch):
    logits = model(batch["x"])
    ft.put_scalar("accuracy", (logits.argmax(-1) == batch["y"]).double().mean())
    return F.cross_entropy(logits, batch["y"])


def build_evaluation(_config, model):
    return ft.evaluation(
        model, lambda model, batch: {"loss": recipe_loss_quiet(model, batch)}, Numbered(13), batch_size=4
    )


def recipe_loss_quiet(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


RECIPE = ft.Recipe(
    config=ft.Config(max_steps=6, batch_size=10, lr=1e-2, log_every=2, eval_every=3, checkpoint_every=2, accumulate=2),
    build_model=build_model,
    build_data=build_data,
    loss_fn=recipe_loss,
    build_evaluation=build_evaluation,
)


def recipe_run(directory, max_steps=6, eval_only=False):
    config = attrs.evolve(RECIPE.config, output_dir=str(directory), max_steps=max_steps, warmup_steps=1, device="cpu")
    result = ft.run(RECIPE, config, eval_only=eval_only)
    return dict(result.results), jobs.summary(result.state)


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("worlds", [(2,), (3, 2), (2, 1)], ids=str)
def test_a_recipe_runs_unchanged(ranks, tmp_path, worlds):
    """Started, resumed and evaluated by any number of ranks: files, numbers and results of one process."""
    expected, alone = recipe_run(tmp_path / "alone")
    for world in worlds:
        job = functools.partial(partial_run, tmp_path / "run", 6 if world == worlds[-1] else 4)
        found = [job()] if world == 1 else ranks(world)(job)
    for results, final in found:
        assert results == pytest.approx(expected, rel=1e-9)
        for name, value in alone["params"].items():
            assert torch.allclose(final["params"][name], value, rtol=1e-9, atol=1e-12), name
    assert {path.name for path in (tmp_path / "run").iterdir() if "tfevents" not in path.name} == {
        path.name for path in (tmp_path / "alone").iterdir() if "tfevents" not in path.name
    }
    rows, others = lines(tmp_path / "run"), lines(tmp_path / "alone")
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        windows = {"loss", "accuracy", "grad_norm"} if len(worlds) == 1 else set()  # begun anew by each start
        for name in row.keys() & {"lr", "eval/loss", *windows}:
            assert row[name] == pytest.approx(other[name], rel=1e-9), name
    again = ranks(2)(recipe_run, tmp_path / "run", 6, True)
    assert again[0][0] == again[1][0] == pytest.approx(expected, rel=1e-9)


def partial_run(directory, stop):
    """The recipe, stopped after a step as a signal would stop it; the schedule stays that of the whole run."""

    def build_hooks(job):
        return [
            *ft.default_hooks(job),
            ft.hook(after_step=lambda state: ft.stop(state, "cut", at_once=True) if state.step == stop < 6 else None),
        ]

    recipe = attrs.evolve(RECIPE, build_hooks=build_hooks)
    config = attrs.evolve(RECIPE.config, output_dir=str(directory), warmup_steps=1, device="cpu")
    result = ft.run(recipe, config)
    return dict(result.results), jobs.summary(result.state)
