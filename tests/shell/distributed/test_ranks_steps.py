"""The step of several ranks with everything a step can have: buffers, skipped steps, groups, precision, options."""

import functools
import gc
import re
import warnings
import weakref
from itertools import chain

import attrs
import jobs
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fntrain as ft


def close(found, alone, rtol):
    """Whether parameters are those of one process, and alike on all ranks."""
    for name, value in alone["params"].items():
        for one in found:
            assert torch.equal(one["params"][name], found[0]["params"][name]), name
            assert (one["params"][name] - value).abs().max() <= rtol * value.abs().max(), name


def noted(norm=True, strategy=None, poisoned=None, on_nonfinite="skip", steps=6, **options):
    """Digests after every step, which were skipped, and the buffers at the end; some batches may be nan on one rank."""

    def loss_fn(model, batch):
        loss = jobs.mean_loss(model, batch)
        return loss * float("nan") if poisoned is not None and position[0] in poisoned and here == 1 else loss

    def look(state):
        position[0] = state.position

    def note(state):
        digests.append(ft.digest(state))
        skipped.append(float(state.metrics["skipped_steps"]))
        losses.append(float(state.metrics["loss"]))

    step_fn, state, data = jobs.parts(loss_fn=loss_fn, norm=norm, on_nonfinite=on_nonfinite, **options)
    step_fn = ft.shell.distribute(step_fn, **(strategy or {}))
    position, digests, skipped, losses = [0], [], [], []
    here = step_fn.ranks.rank if step_fn.ranks.world_size > 1 else 1
    hooks = [ft.hook(before_train=look, after_step=note), ft.hook(after_step=look)]
    final = ft.fit(step_fn, hooks, state=state, data=data, max_steps=steps)
    return {"digests": digests, "skipped": skipped, "losses": losses, **jobs.summary(final)}


def test_buffers_are_equal_on_all_ranks_after_every_step(ranks):
    """BatchNorm's too: those of rank 0, so what is saved is what every rank evaluates with."""
    found = ranks(3)(noted)
    assert found[0]["digests"] == found[1]["digests"] == found[2]["digests"]
    assert found[0]["buffers"]["layers.1.num_batches_tracked"] == 6


def unshared():
    """A twin that leaves buffers as each rank has them."""
    from fntrain.shell.distributed.distribute import Replicas

    right, Replicas.broadcast_buffers = Replicas.broadcast_buffers, lambda self, slots: None
    try:
        return noted()
    finally:
        Replicas.broadcast_buffers = right


def test_the_law_of_buffers_can_fail(ranks):
    """Without the exchange, ranks have statistics of their own."""
    found = ranks(2)(unshared)
    assert found[0]["digests"] != found[1]["digests"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_on_one_rank_skips_the_step_on_all(ranks, accumulate):
    """Parameters, buffers and optimizer state of all ranks stay; the run goes on as in one process."""
    job = functools.partial(noted, poisoned=(0, 3), accumulate=accumulate)
    found = ranks(2)(job)
    assert [one["skipped"] for one in found] == [[1, 0, 0, 1, 0, 0]] * 2
    assert found[0]["digests"] == found[1]["digests"]
    plain = functools.partial(noted, norm=False, poisoned=(0, 3), accumulate=accumulate, dtype=torch.float64)
    close(ranks(2)(plain), plain(), 1e-12)


def raised():
    """What a step that may not skip says, and what is left of the state."""
    step_fn, state, data = jobs.parts(loss_fn=poisoned_on_one, on_nonfinite="raise", norm=True)
    step_fn = ft.shell.distribute(step_fn)
    batch = next(data.shard(step_fn.ranks.rank, step_fn.ranks.world_size).at(0))
    before = ft.digest(state)
    try:
        step_fn(state, batch)
    except ft.NonFiniteError as error:
        told = str(error)
    step_fn.step.model.poisoned = False
    after = ft.digest(step_fn(state, batch))  # the state is whole, the step can be called again
    return told, before == ft.digest(ft.snapshot(jobs.parts(norm=True)[1])), after


def poisoned_on_one(model, batch):
    loss = jobs.mean_loss(model, batch)
    return loss * float("nan") if getattr(model, "poisoned", True) and torch.distributed.get_rank() == 1 else loss


def test_a_nan_on_one_rank_raises_on_all_if_it_is_to(ranks):
    """The state before is unchanged, and the step can be called again."""
    found = ranks(2)(raised)
    assert found[0][0] == found[1][0] and found[0][0].startswith("step 1: loss is nan")
    assert all(whole for _, whole, _ in found) and found[0][2] == found[1][2]


class Broken(Exception):  # noqa: N818
    pass


def called_again():
    """A step whose loss function fails on all ranks: outright, by its form, and in the backward."""
    kinds = iter(["raise", "form", "backward", "", ""])

    def loss_fn(model, batch):
        kind, loss = next(kinds), jobs.mean_loss(model, batch)
        if kind == "raise":
            raise Broken("outright")
        if kind == "form":
            return loss[None]
        return loss + Fails.apply(loss) if kind == "backward" else loss

    step_fn, state, data = jobs.parts(loss_fn=loss_fn)
    step_fn = ft.shell.distribute(step_fn)
    batches = data.shard(step_fn.ranks.rank, step_fn.ranks.world_size).at(0)
    batch, told = next(batches), []
    for _ in range(3):
        try:
            step_fn(state, batch)
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told, jobs.summary(step_fn(step_fn(state, batch), next(batches)))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise Broken("in the backward")


def test_a_step_can_be_called_again_after_an_error(ranks):
    """Errors of all ranks: it goes on as if they had not been."""
    found, (told, alone) = ranks(2)(called_again), called_again()
    assert [one[0] for one in found] == [told] * 2 and len(told) == 3
    close([one[1] for one in found], alone, 1e-6)


def last_frozen(name, _param):
    return name.startswith("layers.2")


def frozen(accumulate):
    """The last layer does not learn."""
    optimizer = ft.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, groups=[ft.group(last_frozen, frozen=True)])
    return jobs.train(optimizer=optimizer, accumulate=accumulate, dtype=torch.float64)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_frozen_parameters_stay(ranks, accumulate):
    """And nobody waits for their gradients."""
    found, alone, start = ranks(2)(frozen, accumulate), frozen(1), jobs.parts(dtype=torch.float64)[1]
    close(found, alone, 1e-12)
    assert torch.equal(found[0]["params"]["layers.2.weight"], start.params["layers.2.weight"])


class Branches(nn.Module):
    """A net one of whose heads is used at some steps, by some ranks only."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.double()

    def forward(self, x, use):
        features = self.body(x)
        both = self.heads[0](features)
        return both + use[:, None] * self.heads[1](features) if bool(use.any()) else both


def branching(accumulate):
    """Head 1 is used where a sample is masked, and by nobody at step 2."""
    torch.manual_seed(0)
    model = Branches()
    adam = ft.optimizer(torch.optim.AdamW, lr=0.01)

    def loss_fn(model, batch):
        use = batch["mask"].double() * (turn[0] != 1)
        return nn.functional.cross_entropy(model(batch["x"], use), batch["y"])

    turn = [0]
    step_fn = ft.supervised_step(model, loss_fn, adam, accumulate=accumulate)
    state = ft.init_state(model, adam)
    step_fn = ft.shell.distribute(step_fn, find_unused_parameters=True)
    look = ft.hook(after_step=lambda state: turn.__setitem__(0, state.step))
    data = ft.data.stream(jobs.samples(torch.float64), 4, seed=0)
    return jobs.summary(ft.fit(step_fn, [look], state=state, data=data, max_steps=5))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_parameter_may_be_unused_on_a_rank_or_on_all(ranks, accumulate):
    """With find_unused_parameters, the step is that of one process: unused by all, the optimizer leaves it alone."""
    close(ranks(2)(branching, accumulate), branching(1), 1e-10)


def doubled(grads):
    return {name: 2 * grad for name, grad in grads.items() if name != "layers.0.bias"}


@pytest.mark.parametrize(
    ("options", "strategy", "rtol"),
    [
        ({"clip_grad_norm": 0.1}, {}, 1e-12),
        ({"clip_grad_value": 0.01}, {}, 1e-12),
        ({"transform_grads": doubled, "clip_grad_norm": 0.1, "accumulate": 2}, {}, 1e-12),
        ({}, {"bucket_cap_mb": 0.0001}, 1e-12),
        ({}, {"static_graph": True}, 1e-12),
        ({"accumulate": 2}, {"bucket_cap_mb": 0.0001, "find_unused_parameters": True}, 1e-12),
        ({"dtype": torch.float32}, {"compress": "bf16"}, 1e-2),
        ({"dtype": torch.float32}, {"compress": "fp16", "bucket_cap_mb": 0.0001}, 1e-3),
        ({"dtype": torch.float32, "precision": "bf16"}, {}, 1e-2),
        ({"dtype": torch.float32, "precision": "bf16", "accumulate": 2}, {"compress": "bf16"}, 2e-2),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),
)
def test_options_of_step_and_strategy_keep_the_step(ranks, options, strategy, rtol):
    """Of 3 ranks it is that of one process, up to the precision that was asked for."""
    job = functools.partial(jobs.train, "masked", **({"dtype": torch.float64} | options))
    found, alone = ranks(3)(functools.partial(job, strategy=strategy)), job()
    close(found, alone, rtol)
    if rtol > 1e-6:  # it was in effect
        exact = ranks(3)(functools.partial(jobs.train, "masked", accumulate=options.get("accumulate", 1)))
        assert not torch.equal(exact[0]["params"]["layers.0.weight"], found[0]["params"]["layers.0.weight"])


def scaled(overflows, accumulate=1):
    """fp16: a loss scale that overflows at first, on one rank only if asked."""

    def loss_fn(model, batch):
        loss = jobs.mean_loss(model, batch)
        big = overflows and ft_rank() == 1 and turn[0] == 1
        return loss * 1e30 if big else loss

    def ft_rank():
        return step_fn.ranks.rank

    turn = [0]
    step_fn, state, data = jobs.parts(loss_fn=loss_fn, precision="fp16", accumulate=accumulate)
    step_fn = ft.shell.distribute(step_fn)
    look = ft.hook(after_step=lambda state: turn.__setitem__(0, state.step))
    final = ft.fit(step_fn, [look, ft.hooks.check_replicas(every=1)], state=state, data=data, max_steps=4)
    return float(final.extra["loss_scale"]["scale"]), jobs.summary(final)


def test_the_loss_scale_is_agreed(ranks):
    """Gradients that overflow on one rank halve it on all."""
    found, alone = ranks(2)(scaled, False), scaled(False, 2)  # of parts, sums are scaled: they overflow earlier
    assert {one[0] for one in found} == {alone[0]}
    close([one[1] for one in found], alone[1], 5e-3)
    assert {one[0] for one in ranks(2)(scaled, True)} == {alone[0] / 2}


def dropped(times):
    """A net with dropout: what each rank drew at the first step, and where training came to."""
    drawn = []

    def loss_fn(model, batch):
        noise = torch.rand(3)
        drawn.append(noise.tolist())
        return jobs.mean_loss(model, batch) * (1 + noise.sum())

    finals = []
    for _ in range(times):
        step_fn, state, data = jobs.parts(loss_fn=loss_fn)
        torch.rand(torch.distributed.get_rank() + 1)  # what was drawn before does not matter
        final = ft.fit(ft.shell.distribute(step_fn), state=state, data=data, max_steps=2)
        finals.append(jobs.summary(final)["digest"])
        del step_fn, state, final
    return drawn, finals


def test_draws_differ_between_ranks_and_can_be_had_again(ranks):
    """They are a function of seed, step and rank."""
    (first, finals), (second, others) = ranks(2)(dropped, 2)
    assert first[:2] == first[2:] and second[:2] == second[2:]
    assert not {*map(tuple, first)} & {*map(tuple, second)}
    assert len({*finals, *others}) == 1


class Tied(nn.Module):
    """One weight in two places, and one that is computed from another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight
        parametrize.register_parametrization(self.c, "weight", Halved())
        self.double()

    def forward(self, x):
        return self.c(self.b(self.a(x).tanh()))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def tied():
    torch.manual_seed(0)
    model = Tied()
    sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
    step_fn = ft.supervised_step(model, jobs.masked_loss, sgd, accumulate=2)
    state = ft.init_state(model, sgd)
    return jobs.summary(
        ft.fit(ft.shell.distribute(step_fn), state=state, data=jobs.parts(dtype=torch.float64)[2], max_steps=4)
    )


def test_tied_and_computed_weights_are_those_of_one_process(ranks):
    """Gradients of both places add up once."""
    close(ranks(2)(tied), tied(), 1e-12)


class Writes(nn.Module):
    """Assigns a buffer at each forward, one of them new memory; and has one that is not saved."""

    def __init__(self):
        super().__init__()
        self.net = jobs.Net()
        self.register_buffer("seen", torch.zeros(6))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.seen = self.seen + x.mean(0)
        self.flags.logical_xor_(x[0, :3] > 0)
        self.scratch.add_(1)
        return self.net(x)


def writing():
    torch.manual_seed(0)
    model = Writes()
    sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
    step_fn = ft.shell.distribute(ft.supervised_step(model, jobs.masked_loss, sgd, accumulate=2))
    hooks = [ft.hooks.check_replicas(every=1)]
    return jobs.summary(ft.fit(step_fn, hooks, state=ft.init_state(model, sgd), data=jobs.parts()[2], max_steps=3))


def test_buffers_that_a_forward_assigns_are_shared_too(ranks):
    """Of any kind; afterwards all ranks have those of rank 0."""
    found = ranks(2)(writing)
    assert found[0]["digest"] == found[1]["digest"] and found[0]["buffers"]["seen"].abs().sum() > 0


def misused():
    """A second one on the model, one given to distribute again, and options that can't be."""
    step_fn, _, _ = jobs.parts()
    made = ft.shell.distribute(step_fn)
    told = []
    for call in (
        lambda: ft.shell.distribute(step_fn),
        lambda: ft.shell.distribute(made),
        lambda: ft.shell.distribute(print),
        lambda: ft.shell.distribute(step_fn, "zero"),
        lambda: ft.shell.distribute(step_fn, compress="int8"),
        lambda: ft.shell.distribute(step_fn, sync_batchnorm=True),
        lambda: ft.shell.distribute(attrs.evolve(step_fn, accumulate=2), static_graph=True),
    ):
        try:
            call()
        except (TypeError, ValueError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_misuse_is_refused_on_all_ranks(ranks):
    """And says what to do."""
    for found in ranks(2)(misused):
        expected = [
            "ValueError: step_fn: another step runs in place on this Net",
            "TypeError: step_fn: got in_place(SupervisedStep(",
            "TypeError: step_fn: got print, expected what ft.supervised_step returned",
            "ValueError: strategy: got 'zero', expected",
            "ValueError: compress: got 'int8', expected",
            "ValueError: sync_batchnorm: torch has it on GPUs only",
            "ValueError: static_graph: torch has it without micro-batches only, and accumulate=2",
        ]
        assert [told[: len(words)] for told, words in zip(found, expected, strict=True)] == expected


def test_alone_it_is_the_step_in_place(ranks):
    """Bit for bit; without a process group nothing is wrapped."""
    step_fn, state, data = jobs.parts(norm=True, accumulate=2)
    plain = ft.fit(ft.shell.in_place(step_fn), state=state, data=data, max_steps=3)
    assert jobs.train(norm=True, accumulate=2, max_steps=3)["digest"] == ft.digest(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ranks(1)(jobs.train)[0]["digest"] == jobs.train()["digest"]


def weighted_dict(model, batch):
    logits, mask = model(batch["x"]), batch["mask"] * 1.0
    losses = nn.functional.cross_entropy(logits, batch["y"], reduction="none")
    return ft.weighted({"class": (losses * mask).sum(), "size": (logits.square().mean(1) * mask).sum()}, mask.sum())


def with_masks(masks, on_nonfinite="skip", accumulate=1):
    """A step for each row of masks, which say what counts in a batch of 4."""
    step_fn, state, data = jobs.parts(
        loss_fn=weighted_dict, dtype=torch.float64, on_nonfinite=on_nonfinite, accumulate=accumulate
    )
    step_fn = ft.shell.distribute(step_fn)
    data = [
        dict(sample, mask=torch.tensor(mask))
        for sample, mask in zip(jobs.samples(torch.float64), chain(*masks), strict=False)
    ]
    stream = ft.data.stream(data, 4, seed=0, shuffle=False)
    rows = []
    note = ft.hook(after_step=lambda state: rows.append(dict(state.metrics)))
    final = ft.fit(step_fn, [note], state=state, data=stream, max_steps=len(masks))
    skipped = [bool(row.get("skipped_steps", 0)) for row in rows]
    return skipped, [float(row["loss"]) for row in rows], jobs.summary(final)


MASKS = [[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rank_may_have_no_weight_and_all_may_have_none(ranks, accumulate, on_nonfinite):
    """The first is a step of the others, the second no step; a dict of losses may share its weight."""
    found, alone = ranks(2)(with_masks, MASKS, on_nonfinite, accumulate), with_masks(MASKS, on_nonfinite)
    assert alone[0] == [False, False, True, False, False]
    for skipped, losses, _ in found:
        assert skipped == alone[0] and losses == pytest.approx(alone[1], rel=1e-12, nan_ok=True)
    close([one[2] for one in found], alone[2], 1e-12)


def last_state():
    step_fn, state, data = jobs.parts()
    return ft.fit(ft.shell.distribute(step_fn), state=state, data=data, max_steps=2)


def test_a_state_can_be_sent_elsewhere(ranks):
    """It belongs to a run of several ranks; where it comes to, it is of none."""
    first, second = ranks(2)(last_state)
    assert first == second and first.run.ranks.world_size == 1 and first.run.stop.kind == "done"


def outlived():
    """Whether a model is still there after all that used it is gone; and a second step on one model."""
    step_fn, state, data = jobs.parts()
    model = weakref.ref(step_fn.model)
    ft.fit(ft.shell.distribute(step_fn), state=state, data=data, max_steps=1)
    del step_fn, state
    gc.collect()
    left = model() is not None
    step_fn, state, data = jobs.parts()
    for _ in range(2):
        made = ft.shell.distribute(step_fn)
        state = ft.fit(made, state=ft.snapshot(state), data=data, max_steps=state.step + 2)
        state = ft.snapshot(state)
        del made
        gc.collect()
    return left, jobs.summary(state)


def test_nothing_of_a_step_outlives_it(ranks):
    """The model is let go, and another step on the same model goes on where the first one ended."""
    found, (_, alone) = ranks(2)(outlived), outlived()
    assert [left for left, _ in found] == [False, False]
    close([one for _, one in found], alone, 1e-6)
