"""Evaluation and BatchNorm statistics of several ranks: each sample once, the results of one process, bit for bit."""

import functools
import random

import jobs
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import fntrain as ft
from fntrain.core.state import Run
from fntrain.evaluation import Evaluation


class Samples:
    """A data set that notes who was read; each sample is drawn for."""

    def __init__(self, size, drawn=False):
        generator = torch.Generator().manual_seed(2)
        self.xs = torch.randn(size, 6, generator=generator)
        self.drawn = drawn
        self.read = []

    def __len__(self):
        return len(self.xs)

    def __getitem__(self, index):
        self.read.append(index)
        noise = torch.randn(6) * random.random() if self.drawn else 0.0
        return {"x": self.xs[index] + noise, "index": torch.tensor(index)}


class Batches:
    """A re-iterable of batches of several sizes, the last of 1."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        for start in range(0, len(self.samples), 3):
            stop = min(start + 3 - start % 2, len(self.samples))
            yield torch.utils.data.default_collate([self.samples[index] for index in range(start, stop)])


def measure(model, batch):
    """Plain, weighted and nested results; one of them draws."""
    logits = model(batch["x"])
    losses = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="none")
    weights = (batch["index"] % 3).float()
    return {
        "loss": losses.mean(),
        "masked": ft.weighted((losses * weights).sum(), weights.sum()),
        "noisy": (losses * torch.rand_like(losses)).mean(),
        "heads": {"a": {"x": logits[:, 0].mean()}, "b": random.random()},
        "never": ft.weighted(losses.sum() * 0, 0.0),
    }


def state_here():
    """A model and its state, of as many ranks as there are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3))
    state = ft.init_state(model, ft.optimizer(torch.optim.SGD, lr=0.1), seed=3)
    return model, state.replace(run=Run(ranks=ft.shell.ranks()), step=4)


def evaluated(cases):
    """Results and indices read, of each case; generators as no two ranks have them."""
    model, state = state_here()
    random.seed(state.run.ranks.rank)
    torch.manual_seed(100 + state.run.ranks.rank)
    results = []
    for kind, size, batch_size, drawn in cases:
        samples = Samples(size, drawn)
        data = {
            "own": samples,
            "loader": DataLoader(samples, batch_size=batch_size),
            "shuffled": DataLoader(samples, batch_size=batch_size, shuffle=True),
            "iterable": Batches(samples),
        }[kind]
        found = ft.evaluation(model, measure, data, batch_size=batch_size)(state)
        results.append(({name: float(value).hex() for name, value in found.items()}, sorted(samples.read)))
    return results


SIZES = [("own", size, batch_size, False) for size in range(1, 21) for batch_size in (1, 3, 256)]
OTHERS = [
    (kind, size, 4, drawn)
    for kind in ("own", "loader", "shuffled", "iterable")
    for size in (1, 20)
    for drawn in (False, True)
]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_results_are_bitwise_those_of_one_process(ranks, size):
    """For 1 to 20 samples in batches of any size, more ranks than batches too; of data sets each sample is read once."""
    found, alone = ranks(size)(evaluated, SIZES), evaluated(SIZES)
    for number, case in enumerate(SIZES):
        for rank in range(size):
            assert found[rank][number][0] == alone[number][0], (case, rank)
        assert sorted(index for one in found for index in one[number][1]) == list(range(case[1])), case


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_so_are_those_of_loaders_and_of_samples_that_are_drawn_for(ranks, case):
    """A loader of the user's own, shuffling too, and other iterables are read by all; draws depend on the batch."""
    found, alone = ranks(3)(evaluated, [case]), evaluated([case])
    assert [one[0][0] for one in found] == [alone[0][0]] * 3
    assert alone == evaluated([case])


def padded():
    """A twin that pads: every rank has as many batches, the first again."""
    right = Evaluation._share

    def share(self, state):
        ranks, batches = state.run.ranks, list(enumerate(self.data))
        wanted = -(-len(batches) // ranks.world_size) * ranks.world_size
        batches += [(len(batches) + i, batch) for i, (_, batch) in enumerate(batches[: wanted - len(batches)])]
        return batches[ranks.rank :: ranks.world_size]

    Evaluation._share = share
    try:
        return evaluated([("own", 9, 3, False)])
    finally:
        Evaluation._share = right


def test_the_law_can_fail(ranks):
    """An evaluation that pads the batches of the last round gives other results."""
    assert ranks(2)(padded)[0][0] != evaluated([("own", 9, 3, False)])[0][0]


def in_a_run(norm=False):
    """An evaluation as a hook, with what it measured at each step."""
    torch.manual_seed(0)
    model = jobs.Net(norm)
    sgd = ft.optimizer(torch.optim.SGD, lr=0.0)
    step_fn = ft.shell.distribute(ft.supervised_step(model, jobs.mean_loss, sgd))
    test = ft.evaluation(model, lambda model, batch: {"x": model(batch["x"]).mean()}, Samples(13), batch_size=4)
    kept = ft.writers.memory()
    hooks = [ft.hooks.evaluate(test, every=2), ft.hooks.write_metrics(kept, every=3), ft.hooks.check_replicas(every=1)]
    final = ft.fit(step_fn, hooks, state=ft.init_state(model, sgd), data=jobs.parts()[2], max_steps=5)
    return final.metrics["eval/x"], [(row.step, row.scalars.get("eval/x")) for row in kept.rows]


def test_a_run_writes_the_evaluations_of_one_process(ranks):
    """Bit for bit, each at its own step, from rank 0; the others know them too."""
    found, alone = ranks(3)(in_a_run), in_a_run()
    assert found[0] == alone and [one[0] for one in found] == [alone[0]] * 3
    assert [step for step, value in alone[1] if value is not None] == [2, 4, 5]


class Telling(jobs.Net):
    """Reports from its forward."""

    def forward(self, x):
        ft.put_scalar("size", x.abs().mean())
        return super().forward(x)


def evaluated_in_parts(strategy):
    """An evaluation of 13 samples in 4 batches by 3 ranks, of a model that reports; two ranks have one batch less."""
    torch.manual_seed(0)
    model = Telling()
    sgd = ft.optimizer(torch.optim.SGD, lr=0.0)
    step_fn = ft.supervised_step(model, jobs.mean_loss, sgd)
    state = ft.init_state(model, sgd)
    test = ft.evaluation(model, lambda model, batch: {"x": model(batch["x"]).mean()}, Samples(13), batch_size=4)
    hooks = [ft.hooks.evaluate(test, every=2)]
    final = ft.fit(ft.shell.distribute(step_fn, strategy), hooks, state=state, data=jobs.parts()[2], max_steps=2)
    return final.metrics["eval/x"]


def test_ranks_that_hold_parts_evaluate_together(ranks):
    """Those without a batch left help the others, and what the model reports then belongs to no step."""
    assert ranks(3)(evaluated_in_parts, "fsdp") == [evaluated_in_parts("ddp")] * 3


class Deep(nn.Module):
    """Two layers of BatchNorm, and dropout before the second."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 3)
        )

    def forward(self, x):
        return self.layers(x)


def population(size, batch_size, num_batches=200, kind="own", strategy="ddp"):
    """The buffers after precise_bn, and a reference of the first layer in float64."""
    torch.manual_seed(0)
    model = Deep()
    sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
    step_fn = ft.shell.distribute(ft.supervised_step(model, jobs.mean_loss, sgd), strategy)
    samples = Samples(size)
    data = [sample["x"] for sample in samples]
    if kind == "shuffled":
        data = DataLoader(data, batch_size=batch_size, shuffle=True)
    hook = ft.hooks.precise_bn(model, data, every=99, batch_size=batch_size, num_batches=num_batches)
    hooks = [hook, ft.hooks.check_replicas(every=1)]
    final = ft.fit(step_fn, hooks, state=ft.init_state(model, sgd), data=jobs.parts()[2], max_steps=2)
    read = samples.xs[: batch_size * num_batches].double()
    return {name: value.clone() for name, value in final.buffers.items()}, read.mean(0), read.var(0)


@pytest.mark.parametrize(
    ("size", "batch_size", "num_batches", "kind"),
    [(20, 4, 200, "own"), (19, 4, 200, "own"), (20, 4, 3, "own"), (5, 5, 9, "own"), (20, 3, 200, "shuffled")],
)
def test_precise_statistics_are_those_of_one_process(ranks, size, batch_size, num_batches, kind):
    """Equal on all ranks, those of all samples, whoever forwards which batch, also behind a dropout."""
    job = functools.partial(population, size, batch_size, num_batches, kind)
    found, (alone, mean, var) = ranks(3)(job), job()
    # Weights have been trained by 3 ranks and by one, on batches normalised in parts: compare what precedes them.
    for buffers, *_ in found:
        for name, value in buffers.items():
            assert torch.equal(value, found[0][0][name])
        for name, reference in (("layers.0.running_mean", mean), ("layers.0.running_var", var)):
            assert torch.allclose(buffers[name].double(), reference, rtol=1e-6, atol=1e-7)
            assert torch.allclose(buffers[name], alone[name], rtol=1e-6, atol=1e-7)


class Synced(nn.SyncBatchNorm):
    """As on a GPU: every forward in train mode waits for all ranks."""

    def forward(self, x):
        if self.training:
            ft.shell.ranks().barrier()
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


def synced(num_batches):
    torch.manual_seed(0)
    model = nn.Sequential(Synced(6), nn.Linear(6, 3))
    data = [sample["x"] for sample in Samples(4 * num_batches)]
    state = ft.init_state(model, ft.optimizer(torch.optim.SGD, lr=0.1))
    state = state.replace(run=Run(ranks=ft.shell.ranks()))
    hook = ft.hooks.precise_bn(model, data, every=1, batch_size=4)
    return hook.after_step(state).buffers["0.running_mean"].clone(), torch.stack(data).mean(0)


@pytest.mark.parametrize("num_batches", [1, 2, 5])
def test_precise_bn_of_synchronised_layers_waits_for_nobody(ranks, num_batches):
    """Ranks without a batch left help the others."""
    for found, mean in ranks(2)(synced, num_batches, timeout=120):
        assert torch.allclose(found, mean, atol=1e-6)


def test_ranks_that_hold_parts_measure_together(ranks):
    """5 batches for 3 ranks: one of them helps the others with a forward that is not measured."""
    for buffers, mean, var in ranks(3)(functools.partial(population, 19, 4, strategy="fsdp")):
        assert torch.allclose(buffers["layers.0.running_mean"].double(), mean, rtol=1e-6, atol=1e-7)
        assert torch.allclose(buffers["layers.0.running_var"].double(), var, rtol=1e-6, atol=1e-7)


def untrained(size):
    """The buffers of all layers, of weights that were not trained."""
    model = Deep()
    torch.manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param)
    state = ft.init_state(model, ft.optimizer(torch.optim.SGD, lr=0.1)).replace(run=Run(ranks=ft.shell.ranks()))
    hook = ft.hooks.precise_bn(model, [sample["x"] for sample in Samples(size)], every=1, batch_size=4)
    new = hook.after_step(state)
    return {name: value.clone() for name, value in new.buffers.items()}


def test_layers_behind_a_dropout_measure_what_they_do_in_one_process(ranks):
    """What a forward draws depends on the number of its batch."""
    alone = untrained(18)
    for buffers in ranks(3)(untrained, 18):
        for name, value in alone.items():
            assert torch.allclose(buffers[name], value, rtol=1e-6, atol=1e-7), name
