"""fntrain.data: what a position holds is a function of (seed, position)."""

import ast
import gc
import inspect
import multiprocessing
import random
from itertools import islice, permutations

import broken_io
import numpy as np
import pytest
import torch
from broken_io import twin

import fntrain as ft
from fntrain.data import steps_per_epoch, stream
from fntrain.data.order import permutation

forks = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create", "ignore:.*multi-threaded.*fork:DeprecationWarning"
)


class Noisy:
    """Samples that draw from all three default generators."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        drawn = float(torch.rand(())), random.random(), float(np.random.rand())
        return torch.tensor([index, *drawn], dtype=torch.float64)


class Counting:
    """Counts what is read of it."""

    def __init__(self, size):
        self.size, self.reads = size, 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads += 1
        return index


def take(iterator, n):
    """The first n batches as lists; the iterator is closed."""
    try:
        return [batch.tolist() for batch in islice(iterator, n)]
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def generators():
    """The bits of all default generators of this process."""
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (name, keys.tolist(), *rest)


# Laws, each for the real thing and for a broken twin.


def law_order(make):
    whole = take(make(0).at(0), 8)
    for workers in (0, 1, 3):
        for position in (0, 1, 5):
            assert take(make(workers).at(position), 8 - position) == whole[position:], (workers, position)


def law_once(s, epochs=2):
    size, positions = len(s.dataset), -(-len(s.dataset) * epochs // s.batch_size)
    samples = [sample for position in range(positions) for sample in s.samples(position)]
    assert all(len(s.samples(position)) == s.batch_size for position in range(min(positions, 5)))
    for epoch in range(epochs):
        mine = samples[epoch * size : (epoch + 1) * size]
        assert {e for e, _ in mine} == {epoch}
        assert torch.equal(torch.tensor([i for _, i in mine]).sort().values, torch.arange(size))


def law_shares(make):
    for world in (1, 2, 3, 4):
        for position in range(6):
            shares = [make(rank, world).share(position) for rank in range(world)]
            assert [sample for share in shares for sample in share] == make(0, 1).samples(position)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def law_sample_randomness(make):
    drawn: dict = {}
    for batch_size, workers, position in ((3, 0, 0), (3, 2, 0), (5, 0, 1), (5, 2, 0)):
        s = make(batch_size, workers)
        torch.manual_seed(position)  # what the generators held before must not matter
        batches = take(s.at(position), 6)
        for offset, batch in enumerate(batches):
            for key, (index, *values) in zip(s.samples(position + offset), batch, strict=True):
                assert index == key[1]
                assert drawn.setdefault(key, values) == values, (key, batch_size, workers)
    for which in range(3):
        assert len({values[which] for values in drawn.values()}) == len(drawn)


def workers_alive():
    """Child processes, without the ranks that tests/distributed keeps for its next test."""
    return [one for one in multiprocessing.active_children() if not one.name.startswith("ranks-of-tests")]


def law_two_iterators(s):
    want = [[index for _, index in s.samples(position)] for position in range(6)]
    a, b = s.at(0), s.at(3)
    got_a, got_b = zip(*[(next(a).tolist(), next(b).tolist()) for _ in range(3)], strict=True)
    for iterator in (a, b):
        iterator.close()
    assert list(got_a) == want[:3]
    assert list(got_b) == want[3:]


@forks
def test_order_does_not_depend_on_workers_or_start():
    """Worker counts 0, 1, 3 and every starting position give the same batches."""
    law_order(lambda workers: stream(range(11), 4, seed=5, num_workers=workers))
    with pytest.raises(AssertionError):
        law_order(lambda workers: twin(broken_io.GlobalOrder, stream(range(11), 4, seed=5, num_workers=workers)))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 97, 10**6 + 3])
def test_every_sample_comes_exactly_once_per_epoch(size):
    """Full batches by position cover each epoch exactly once, also for awkward sizes."""
    s = stream(range(size), 4096 if size > 1000 else 8, seed=1)
    law_once(s, epochs=1 if size > 1000 else 3)
    assert s.steps_per_epoch == -(-size // s.batch_size)


@pytest.mark.parametrize("broken", [broken_io.EpochTailLost, broken_io.WithReplacement])
def test_law_once_can_fail(broken):
    """Streams that lose the tail of an epoch or draw with replacement are refused."""
    with pytest.raises(AssertionError):
        law_once(twin(broken, stream(range(97), 8, seed=1)))


def test_order_is_pure():
    """Which samples a batch has is computed without a clock, the system, or a loader."""
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(permutation)))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"functools", "attrs", "torch", "fntrain.core.check", "fntrain.core.rng"}


def test_own_share_starts_where_its_data_can():
    """Of what can't start anywhere, it does not say that it can."""
    data = stream(range(9), 3, seed=0)
    assert next(ft.data.own_share(data).at(2)).equal(next(data.at(2)))
    assert not hasattr(ft.data.own_share([1, 2]), "at")
    assert ft.data.own_share(data).shard(rank=0, world_size=2) is data


def test_seeds_and_epochs_give_other_orders():
    """Another seed or epoch is another permutation; the same is the same."""
    orders = [permutation(97, ft.fold_in(seed, epoch), 0, 97) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    read = [tuple(stream(range(97), 97, seed=seed).samples(epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(index for _, index in one) for one in read}) == 6
    assert {epoch for epoch, _ in read[5]} == {2}


def test_large_permutation_is_a_bijection_and_keyed():
    """Above 2**20 items the Feistel permutation hits every element once, differs by key and reads in any slices."""
    size = 2**20 + 7
    whole = {key: torch.tensor(permutation(size, key, 0, size)) for key in (3, 4, 2**64 - 1)}
    for order in whole.values():
        assert torch.equal(order.sort().values, torch.arange(size))
        assert (order == torch.arange(size)).sum() < 20
        neighbours = torch.stack([order[:-1], order[1:]]).double()
        assert abs(float(torch.corrcoef(neighbours)[0, 1])) < 0.01
    assert (whole[3] == whole[4]).sum() < 20
    for start, end in ((0, 1), (16383, 16385), (16000, 60000), (size - 3, size)):
        assert permutation(size, 3, start, end) == whole[3][start:end].tolist()
    epochs = [[i for _, i in stream(range(size), 64, seed=0).samples(p)] for p in (0, size // 64 + 1)]
    assert set(epochs[0]) != set(epochs[1])


def law_parity(permute):
    def parity(order):
        return sum(a > b for k, a in enumerate(order) for b in order[k + 1 :]) % 2

    assert {parity(permute(16, key, 0, 16)) for key in range(64)} == {0, 1}


def test_small_permutations_reach_odd_ones_too():
    """A data set of 4 can come in all 24 orders, and 16 items in odd ones (a Feistel network only in even ones)."""
    assert {tuple(permutation(4, key, 0, 4)) for key in range(300)} == set(permutations(range(4)))
    law_parity(permutation)
    with pytest.raises(AssertionError):
        law_parity(broken_io.feistel_for_all)


def test_choices_for_the_end_of_an_epoch():
    """drop_last leaves the rest out, ragged_last gives a smaller batch, neither straddles; the default does."""
    sizes = {}
    for name, choice in {"straddle": {}, "drop": {"drop_last": True}, "ragged": {"ragged_last": True}}.items():
        s = stream(range(10), 4, seed=0, **choice)
        samples = [s.samples(position) for position in range(6)]
        sizes[name] = [len(batch) for batch in samples], [len({e for e, _ in batch}) for batch in samples]
        assert [batch.tolist() for batch in islice(s.at(0), 6)] == [[i for _, i in b] for b in samples]
        assert s.steps_per_epoch == steps_per_epoch(10, 4, drop_last=name == "drop")
    assert sizes == {
        "straddle": ([4, 4, 4, 4, 4, 4], [1, 1, 2, 1, 1, 1]),
        "drop": ([4] * 6, [1] * 6),
        "ragged": ([4, 4, 2, 4, 4, 2], [1] * 6),
    }
    assert sorted(i for p in range(3) for _, i in stream(range(10), 4, seed=0, ragged_last=True).samples(p)) == [
        *range(10)
    ]
    assert stream(range(3), 8, seed=0).samples(0)[3:] != []  # a batch may hold several epochs


def test_unshuffled_order_is_the_data_sets_own():
    """shuffle=False counts through the data set, epoch after epoch."""
    s = stream(range(5), 3, seed=9, shuffle=False)
    assert [s.samples(p) for p in (0, 1, 2)] == [
        [(0, 0), (0, 1), (0, 2)],
        [(0, 3), (0, 4), (1, 0)],
        [(1, 1), (1, 2), (1, 3)],
    ]


@pytest.mark.parametrize("choice", [{}, {"shuffle": False}, {"ragged_last": True}])
def test_shares_concatenate_to_the_global_batch(choice):
    """The ranks' shares are the global batch in order, and differ by at most one sample."""

    def make(rank, world):
        return stream(range(24), 10, seed=2, rank=rank, world_size=world, **choice)

    law_shares(make)
    with pytest.raises(AssertionError):
        law_shares(lambda rank, world: twin(broken_io.PaddedShares, make(rank, world)))


@forks
def test_randomness_of_a_sample_is_a_function_of_seed_epoch_index():
    """What a sample draws from torch, random and numpy does not depend on workers, batch size or history."""
    law_sample_randomness(lambda size, workers: stream(Noisy(), size, seed=3, num_workers=workers))
    one, other = (take(stream(Noisy(), 7, seed=seed, shuffle=False).at(0), 1) for seed in (3, 4))
    assert one != other
    with pytest.raises(AssertionError):
        law_sample_randomness(
            lambda size, workers: twin(broken_io.Unseeded, stream(Noisy(), size, seed=3, num_workers=workers))
        )


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_leaves_the_main_generators_alone(workers):
    """The bits of torch's, Python's and NumPy's generators are the same before, during and after iterating."""
    before = generators()
    batches = stream(Noisy(), 3, seed=0, num_workers=workers).at(0)
    for _ in range(4):
        next(batches)
        assert generators() == before
    batches.close()
    assert generators() == before
    take(twin(broken_io.Unseeded, stream(Noisy(), 3, seed=0, num_workers=workers)).at(0), 1)
    assert generators() != before


def test_generators_are_put_back_when_a_sample_raises():
    """An error while reading a sample leaves the generators as they were, too."""

    class Failing(Noisy):
        def __getitem__(self, index):
            super().__getitem__(index)
            raise OSError("no such image")

    before = generators()
    with pytest.raises(OSError, match="no such image"):
        next(stream(Failing(), 3, seed=0).at(0))
    assert generators() == before


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_two_live_iterators_are_independent(workers):
    """Two iterators of one stream, read in turns, both give the right batches (trap 4)."""
    law_two_iterators(stream(range(11), 4, seed=0, num_workers=workers))
    with pytest.raises(AssertionError):
        law_two_iterators(twin(broken_io.SharedIterator, stream(range(11), 4, seed=0)))


@forks
@pytest.mark.parametrize("reads", [0, 1, 3])
def test_closing_the_iterator_ends_its_workers(reads):
    """No child process is left after close(), however much was read."""
    iterator = stream(range(11), 4, seed=0, num_workers=2).at(0)
    for _ in range(reads):
        next(iterator)
    assert len(workers_alive()) == 2
    iterator.close()
    gc.collect()
    assert workers_alive() == []


@forks
@pytest.mark.parametrize("fails", [False, True])
def test_fit_ends_the_workers(fails):
    """fit leaves no worker behind, also when a step raises."""

    def step_fn(state, batch):
        if fails and state.step == 2:
            raise RuntimeError("boom")
        return state.advance(metrics={})

    data = stream(range(11), 4, seed=0, num_workers=2)
    state = ft.TrainState(step=0, position=0, seed=0, params={})
    try:
        ft.fit(step_fn, state=state, data=data, max_steps=4)
    except RuntimeError as error:
        assert fails and "boom" in str(error)  # noqa: PT017
    assert workers_alive() == []


def test_seeking_does_not_touch_the_data_set():
    """Position 10**6 costs no read; the first batch there reads its own samples only."""
    dataset = Counting(1000)
    batches = stream(dataset, 8, seed=0).at(10**6)
    assert dataset.reads == 0
    assert next(batches).tolist() == [index for _, index in stream(range(1000), 8, seed=0).samples(10**6)]
    assert dataset.reads == 8


class NoLength:
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("dataset", "arguments", "error", "message"),
    [
        (iter([1]), {}, TypeError, "dataset: got list_iterator, expected a map-style"),
        (NoLength(), {}, TypeError, "dataset: got NoLength, expected a map-style"),
        (range(0), {}, ValueError, "dataset: got an empty one"),
        (range(9), {"batch_size": 0}, ValueError, "batch_size: got 0, expected a whole number >= 1"),
        (range(9), {"batch_size": -4}, ValueError, "batch_size: got -4"),
        (range(9), {"batch_size": 2.5}, ValueError, "batch_size: got 2.5"),
        (range(9), {"batch_size": True}, ValueError, "batch_size: got True"),
        (range(9), {"num_workers": -1}, ValueError, "num_workers: got -1, expected a whole number >= 0"),
        (range(9), {"prefetch_factor": 0}, ValueError, "prefetch_factor: got 0"),
        (range(9), {"world_size": 0}, ValueError, "world_size: got 0"),
        (range(9), {"rank": 2, "world_size": 2}, ValueError, "rank: got 2, expected 0 <= rank < world_size=2"),
        (range(9), {"rank": -1}, ValueError, "rank: got -1"),
        (range(9), {"rank": 0.5}, ValueError, "rank: got 0.5"),
        (range(9), {"seed": "a"}, (TypeError, ValueError), "seed: got 'a'"),
        (range(9), {"seed": 0.5}, (TypeError, ValueError), "seed: got 0.5"),
        (range(9), {"drop_last": True, "ragged_last": True}, ValueError, "drop_last and ragged_last: got both"),
        (range(3), {"drop_last": True}, ValueError, "drop_last: the data set has 3 samples, less than one batch of 4"),
        (range(9), {"world_size": 5}, ValueError, "batch_size: a batch of 4 can't be shared by world_size=5"),
        (range(9), {"ragged_last": True, "world_size": 2}, ValueError, "a batch of 1 can't be shared by world_size=2"),
    ],
)
def test_wrong_arguments_are_named(dataset, arguments, error, message):
    """Every wrong argument of stream is refused when it is built, by name."""
    with pytest.raises(error, match=message):
        stream(dataset, **{"batch_size": 4, "seed": 0, **arguments})


@pytest.mark.parametrize("call", [lambda s: s.samples(-1), lambda s: s.share(-1), lambda s: next(s.at(-1))])
def test_a_negative_position_is_refused(call):
    """There is no batch before number 0."""
    with pytest.raises(ValueError, match="position: got -1"):
        call(stream(range(9), 4, seed=0))


def test_streams_of_tensor_data_compare_and_print():
    """A stream is a value: it compares and prints briefly whatever its data set is."""
    dataset = torch.arange(9)
    assert stream(dataset, 4, seed=0) == stream(dataset, 4, seed=0)
    assert stream(dataset, 4, seed=0) != stream(dataset, 4, seed=1)
    assert "<Tensor of 9>" in repr(stream(dataset, 4, seed=0))


def test_random_collation_is_part_of_the_batch():
    """MixUp and the like draw while collating: batch s is the same from any start, and the generators stay."""

    def mix(samples):
        return torch.tensor(samples) + torch.rand(())

    one = stream([float(i) for i in range(10)], 4, seed=0, collate_fn=mix)
    before = torch.get_rng_state()
    running = one.at(0)
    next(running)
    second = next(running)
    torch.rand(3)
    assert torch.equal(second, next(one.at(1)))
    torch.set_rng_state(before)
    next(one.at(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_and_steps_draw_from_different_streams():
    """With one seed for all, the draws of step 3 are not those of sample 0 in epoch 3."""

    class Draws:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.rand(3)

    read = {
        tuple(row)
        for batch, _ in zip(stream(Draws(), 2, seed=0).at(0), range(6), strict=False)
        for row in batch.tolist()
    }
    for step in range(6):
        for rank in range(2):
            ft.seed_generators(0, step, rank)
            assert tuple(torch.rand(3).tolist()) not in read
