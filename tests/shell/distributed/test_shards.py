"""strategy="fsdp": ranks that each hold a part of the state."""

import functools
import gc

import jobs
import pytest
import torch
import torch.nn.functional as F
from test_distribute import TOLERANCE, close
from torch import nn
from torch.distributed.fsdp import FSDPModule

import fntrain as ft
from fntrain.core.source import shared
from fntrain.shell.distributed.shards import Shards


def whole(state):
    """The parameters of all ranks together, and what one rank holds."""
    params = {name: value.full_tensor() for name, value in state.params.items()}
    return {
        "params": params,
        "buffers": {name: value.detach().clone() for name, value in state.buffers.items()},
        "metrics": {name: float(value) for name, value in state.metrics.items()},
        "held": sum(value.to_local().numel() for value in state.params.values()),
        "moments": sum(
            value.to_local().numel()
            for entry in state.opt_state.values()
            for value in entry.values()
            if hasattr(value, "to_local")
        ),
    }


def layers(name, module):
    return isinstance(module, torch.nn.Linear)


def train(loss="mean", *, wrap=None, strategy=None, late=False, max_steps=jobs.STEPS, **options):
    step_fn, state, data = jobs.parts(loss, **options)
    step_fn = ft.shell.distribute(step_fn, "fsdp", wrap=wrap, **(strategy or {}))
    if late:
        state = ft.init_state(step_fn.step.model, step_fn.step.optimizer)
    return whole(ft.fit(step_fn, state=state, data=data, max_steps=max_steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("loss", jobs.LOSSES)
@pytest.mark.parametrize(("size", "wrap"), [(2, None), (3, layers)])
def test_parts_are_trained_as_the_whole(ranks, size, wrap, loss, accumulate, dtype):
    """Weights, losses and norms of one process, with blocks gathered each by itself or all together."""
    job = functools.partial(train, loss, wrap=wrap, accumulate=accumulate, dtype=dtype, clip_grad_norm=0.5)
    found, alone = ranks(size)(job), jobs.train(loss, dtype=dtype, clip_grad_norm=0.5)
    close(found, alone, dtype)
    for name in ("loss", "grad_norm"):
        for one in found:
            assert one["metrics"][name] == pytest.approx(alone["metrics"][name], rel=10 * TOLERANCE[dtype])
    number = sum(value.numel() for value in alone["params"].values())
    assert sum(one["held"] for one in found) == number
    assert sum(one["moments"] for one in found) == number
    assert max(one["held"] for one in found) < 0.7 * number


def full(state):
    """Parameters and what the optimizer keeps of them, whole."""
    return {
        leaf: value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        for leaf, value in ft.named_leaves(state)
        if isinstance(value, torch.Tensor)
    }


def law_same(found, alone, tolerance=1e-6):
    """All leaves of all ranks are those of one process, relative to the largest of their tensor."""
    for one in found:
        assert one.keys() == alone.keys()
        for leaf, value in alone.items():
            scale = max(float(value.abs().max()), 1e-12) if value.numel() else 1.0
            difference = (one[leaf].double() - value.double()).abs().max() if value.numel() else 0.0
            assert difference <= tolerance * scale, leaf


class Odd(nn.Module):
    """Fewer rows than ranks, a single number, tied, frozen and unused parameters; with BatchNorm on request."""

    def __init__(self, norm=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh())
        self.one = nn.Linear(8, 1)
        self.up = nn.Linear(1, 8, bias=False)
        self.head = nn.Linear(6, 8)
        self.head.weight = self.body[0].weight
        self.out = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.body(x) + self.up(self.one(self.head(x)).tanh()) * self.scale)


ADAMW = (torch.optim.AdamW, {"lr": 0.01})
OPTIMIZERS = {
    "AdamW": ADAMW,
    "fused AdamW": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
}


def odd_parts(optimizer=ADAMW, *, norm=False, loss=jobs.mean_loss, **options):
    """A step that is not run yet, and data."""
    torch.manual_seed(0)
    cls, kwargs = optimizer
    groups = [ft.group("out.bias", frozen=True), ft.group("*bias", lr_scale=2.0)]
    step_fn = ft.supervised_step(Odd(norm), loss, ft.optimizer(cls, groups=groups, **kwargs), **options)
    return step_fn, ft.data.stream(jobs.samples(torch.float32), jobs.BATCH, seed=0)


def odd(optimizer=ADAMW, *, parallel=None, made="before", directory=None, max_steps=3, hooks=(), **options):
    """Train the odd model, alone or in parts, from a state made or resumed before or after it was distributed."""
    step_fn, data = odd_parts(optimizer, **options)

    def begun():
        state = ft.init_state(step_fn.model, step_fn.optimizer)
        return ft.resume_or(state, directory) if made.startswith("resumed") else state

    state = begun() if made.endswith("before") else None
    running = step_fn if parallel is None else ft.shell.distribute(step_fn, "fsdp", **parallel)
    state = begun() if state is None else state
    final = ft.fit(running, list(hooks), state=state, data=data, max_steps=max_steps)
    if parallel is not None and made == "after":
        with pytest.raises(ft.StateConsumedError):
            dict(state.params)
    return full(final)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_odd_parameters_and_elementwise_optimizers_are_as_in_one_process(ranks, optimizer):
    """Three ranks: single rows and single numbers, ties, groups, frozen and unused parameters; every leaf."""
    law_same(ranks(3)(functools.partial(odd, optimizer, parallel={})), odd(optimizer), 1e-5)


def linears(name, module):
    return isinstance(module, nn.Linear) and not name.startswith(("head", "body"))


def twice_loss(model, batch):
    return jobs.mean_loss(model, batch) + 0.1 * model(2 * batch["x"]).square().mean()


def inner_loss(model, batch):
    """Calls sub-modules alone, and returns a view."""
    hidden = model.body(batch["x"]) + model.up(model.one(model.head(batch["x"]))) * model.scale
    return F.cross_entropy(model.out(hidden), batch["y"], reduction="none").mean(0, keepdim=True)[0]


WAYS = {
    "a state made afterwards": ({}, {"made": "after"}),
    "a block for each layer": ({"wrap": linears}, {}),
    "blocks, and the model as one": ({"wrap": lambda name, module: not name or linears(name, module)}, {}),
    "nothing dropped after the forward": ({"wrap": linears, "reshard_after_forward": False}, {}),
    "the model called twice": ({"wrap": linears}, {"loss": twice_loss}),
    "sub-modules called alone": ({}, {"loss": inner_loss}),
    "sub-modules that are blocks called alone": ({"wrap": linears}, {"loss": inner_loss}),
    "some ranks with fewer micro-batches": ({"wrap": linears}, {"accumulate": 4, "loss": jobs.masked_loss}),
    "a large norm clipped": ({}, {"clip_grad_norm": 0.01}),
    "elements clipped": ({}, {"clip_grad_value": 0.001}),
}


def odd_way(name):
    parallel, options = WAYS[name]
    return odd(OPTIMIZERS["SGD"], parallel=parallel, **options)


@pytest.mark.parametrize("name", WAYS)
def test_all_ways_to_split_and_to_call_the_model_are_as_in_one_process(ranks, name):
    """11 samples over 3 ranks."""
    options = {key: value for key, value in WAYS[name][1].items() if key != "made"}
    law_same(ranks(3)(functools.partial(odd_way, name)), odd(OPTIMIZERS["SGD"], **options), 1e-5)


def test_batchnorm_buffers_are_equal_on_all_ranks(ranks):
    """Those of rank 0's share, bit for bit."""
    found = ranks(3)(functools.partial(odd, parallel={}, norm=True))
    names = [leaf for leaf in found[0] if leaf.startswith("buffers")]
    assert len(names) == 3
    assert all(torch.equal(one[name], found[0][name]) for one in found for name in names)
    assert found[0]["buffers.body.1.running_mean"].abs().max() > 0


def parted(*, loss=jobs.mean_loss, wrap=linears, **options):
    """A step in parts, its first state, and data."""
    step_fn, data = odd_parts(loss=loss, **options)
    return ft.shell.distribute(step_fn, "fsdp", wrap=wrap), ft.init_state(step_fn.model, step_fn.optimizer), data


def batches(data, number):
    """This rank's share of the first batches."""
    iterator = shared(data, ft.shell.ranks()).at(0)
    return [next(iterator) for _ in range(number)]


def with_nan(on_nonfinite):
    """Whether a step that meets a nan on rank 1 leaves the state as it was, and what comes of the next one."""
    step_fn, state, data = parted(norm=True, on_nonfinite=on_nonfinite)
    rank = ft.shell.ranks().rank
    one, two, three = batches(data, 3)
    state = step_fn(state, one)
    before = full(state)
    poisoned = {**two, "x": two["x"] * float("nan")} if rank == 1 else two
    told = None
    try:
        state = step_fn(state, poisoned)
    except ft.NonFiniteError as error:
        told = str(error)
    unchanged = all(torch.equal(value, before[leaf]) for leaf, value in full(state).items())
    skipped = state.metrics["skipped_steps"]
    return unchanged, told, skipped, state.step, full(step_fn(state, three))


def test_a_nan_on_one_rank_is_skipped_by_all(ranks):
    """The state stays bit for bit, buffers included; the next step is that of a run without the bad batch."""
    for unchanged, told, skipped, step, after in ranks(2)(functools.partial(with_nan, "skip")):
        assert (unchanged, told, skipped, step) == (True, None, 1.0, 2)
        assert all(value.isfinite().all() for value in after.values())


def test_a_nan_on_one_rank_is_raised_by_all(ranks):
    """on_nonfinite="raise": every rank has the error, and the state of before."""
    for unchanged, told, skipped, step, _ in ranks(2)(functools.partial(with_nan, "raise")):
        assert (unchanged, skipped, step) == (True, 0.0, 1)
        assert "not finite" in told


def failing_loss(model, batch):
    if failing_loss.calls == failing_loss.fails and failing_loss.where == "before":
        raise RuntimeError("in the loss")
    model(batch["x"][:1]) if failing_loss.calls == failing_loss.fails else None
    failing_loss.calls += 1
    output = jobs.mean_loss(model, batch)
    if failing_loss.calls == failing_loss.fails + 1:
        if failing_loss.where == "after":
            raise RuntimeError("in the loss")
        if failing_loss.where == "its backward":
            output.register_hook(fail)
        if failing_loss.where == "the end of its backward":
            model.body[0].weight.register_hook(fail)
    return output


def fail(grad):
    if failing_loss.fails > 0:
        raise RuntimeError("in the backward")


def after_an_error(where, how=None):
    """Whether two steps, the second from other weights, come to the same after a step or evaluation that failed."""
    found = []
    kept, torchs = Shards.reset, getattr(FSDPModule, "reset_iter_state", None)
    if how == "broken":
        Shards.reset = Shards.clear
    elif how == "as before torch 2.13" and torchs is not None:
        del FSDPModule.reset_iter_state
    try:
        for fails in (-9, 4):
            failing_loss.calls, failing_loss.fails, failing_loss.where = 0, fails, where
            step_fn, state, data = parted(loss=failing_loss, accumulate=3)
            first = ft.snapshot(state)
            one, two, three = batches(data, 3)
            state = step_fn(state, one)
            if fails == 4:
                fails_now = failing_evaluation(step_fn.step.model) if where == "in an evaluation" else step_fn
                with pytest.raises(RuntimeError, match="in the"):
                    fails_now(state, *[three] * (where != "in an evaluation"))
                failing_loss.fails = -9
            found.append([full(step_fn(state, two))])
            found[-1].append(full(step_fn(first, three)))
    finally:
        Shards.reset = kept
        if torchs is not None:
            FSDPModule.reset_iter_state = torchs
    return all(torch.equal(a[leaf], b[leaf]) for a, b in zip(*found, strict=True) for leaf in a)


def failing_evaluation(model):
    """Fails inside of a block."""

    def fn(model, batch):
        handle = model.out.register_forward_pre_hook(lambda module, args: fail(args))
        try:
            return measure(model, batch)
        finally:
            handle.remove()

    return ft.evaluation(model, fn, Samples(8))


PLACES = ["before", "after", "its backward", "the end of its backward", "in an evaluation"]


@pytest.mark.parametrize("how", [None, "as before torch 2.13"])
@pytest.mark.parametrize("where", PLACES)
def test_what_failed_on_all_ranks_leaves_nothing(ranks, where, how):
    """An error in the second of three micro-batches; the steps after it are bit for bit those without it."""
    assert all(ranks(2)(functools.partial(after_an_error, where, how)))


def test_the_law_of_failed_steps_can_fail(ranks):
    """Without forgetting what torch has begun, gradients of the failed step's first micro-batch stay."""
    assert not any(ranks(2)(functools.partial(after_an_error, "after", "broken")))


def fast(steps):
    """Whether the optimizer's fast path is taken, and the memory of its state stays."""
    step_fn, state, data = jobs.parts(optimizer=ft.optimizer(torch.optim.AdamW, lr=0.01, fused=True))
    step_fn, kept = ft.shell.distribute(step_fn, "fsdp", wrap=layers), []
    for batch in batches(data, steps):
        state = step_fn(state, batch)
        kept.append((step_fn.memory.fused, id(step_fn.memory.opt_state)))
    return kept[-1][0] is not None, len(set(kept[1:]))


def test_steps_in_parts_keep_their_memory(ranks):
    """Nothing is set up anew at a step, and the fused update is called without the optimizer around it."""
    assert ranks(2)(functools.partial(fast, 5)) == [(True, 1)] * 2


def loaded(directory):
    """Load another state's values into the sharded model, and read them through the model."""
    step_fn, state, data = parted()
    state = step_fn(state, batches(data, 1)[0])
    kept = ft.snapshot(state)
    state = step_fn(state, batches(data, 1)[0])
    ft.load_into(step_fn.step.model, kept)
    with pytest.raises(ft.StateConsumedError):
        dict(state.params)
    again = ft.init_state(step_fn.step.model, step_fn.step.optimizer)
    same = all(torch.equal(again.params[name].full_tensor(), kept.params[name].full_tensor()) for name in kept.params)
    report = ft.load_params(directory / "w.safetensors", step_fn.step.model)
    now = ft.init_state(step_fn.step.model, step_fn.step.optimizer)
    return same, len(report.matched), full(now)


def test_weights_are_loaded_into_a_model_in_parts(ranks, tmp_path):
    """load_into takes a state in parts, load_params a file: each rank keeps its rows."""
    torch.manual_seed(5)
    other = Odd()
    ft.export(other, tmp_path / "w.safetensors")
    for same, matched, now in ranks(3)(functools.partial(loaded, tmp_path)):
        assert same
        assert matched == len(now) == len(list(other.parameters()))
        assert all(torch.equal(now[f"params.{name}"], value) for name, value in other.named_parameters())


def heads(name, module):
    return name == "head"


def said_by(kind, fn, *args, **kwargs):
    with pytest.raises(kind) as error:
        fn(*args, **kwargs)
    return str(error.value)


def refusals():
    """What each of these says."""
    step_fn, _ = odd_parts()
    scalar = nn.Module()
    scalar.w = nn.Parameter(torch.zeros(()))
    strided = nn.Linear(3, 3)
    strided.weight = nn.Parameter(torch.zeros(3, 3).t())
    sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
    running, left = parted()[0], parted()[0].step.model
    former = odd_parts()[0]
    ft.shell.distribute(former, "fsdp")
    gc.collect()  # of that step only the model is left
    cases = {
        "Adafactor": lambda: odd_parts((torch.optim.Adafactor, {"lr": 0.1}))[0],
        "transform_grads": lambda: odd_parts(transform_grads=dict)[0],
        "no dimension": lambda: ft.supervised_step(scalar, jobs.mean_loss, sgd),
        "not contiguous": lambda: ft.supervised_step(strided, jobs.mean_loss, sgd),
        "another step runs in place": lambda: ft.supervised_step(running.step.model, jobs.mean_loss, sgd),
        "split over ranks already": lambda: ft.supervised_step(left, jobs.mean_loss, sgd),
        "build the model anew": lambda: former,  # a step from before its model was split
    }
    if hasattr(torch.optim, "Muon"):
        sole = nn.Linear(3, 3, bias=False)
        cases["Muon"] = lambda: ft.supervised_step(sole, jobs.mean_loss, ft.optimizer(torch.optim.Muon, lr=0.1))
    said = {name: said_by(ValueError, ft.shell.distribute, make(), "fsdp") for name, make in cases.items()}
    for name in (
        {"compress": "bf16"},
        {"static_graph": True},
        {"bucket_cap_mb": 1.0},
        {"find_unused_parameters": True},
    ):
        said[next(iter(name))] = said_by(ValueError, ft.shell.distribute, step_fn, "fsdp", **name)
    said["tied"] = said_by(ValueError, ft.shell.distribute, step_fn, "fsdp", wrap=heads)
    for name in ({"wrap": linears}, {"mixed_precision": "bf16"}, {"reshard_after_forward": False}):
        said[next(iter(name))] = said_by(ValueError, ft.shell.distribute, step_fn, "ddp", **name)
    said["in place already"] = said_by(TypeError, ft.shell.in_place, running)
    said["split over ranks"] = said_by(ft.CheckpointError, ft.export, running.step.model, "x")
    return said, all(type(one) is nn.Parameter for one in step_fn.model.parameters())


def test_what_needs_the_whole_is_refused(ranks):
    """Optimizers, gradients, tensors, options and forms that would silently do something else; nothing was changed."""
    for said, untouched in ranks(2)(refusals):
        assert len(said) >= 15
        assert [(name, text) for name, text in said.items() if name not in text] == []
        assert untouched


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 3))

    def forward(self, x):
        return self.layers(x)


def dropping(seed):
    torch.manual_seed(0)
    model, sgd = Dropping(), ft.optimizer(torch.optim.SGD, lr=0.1)
    step_fn = ft.shell.distribute(ft.supervised_step(model, jobs.mean_loss, sgd), "fsdp")
    data = ft.data.stream(jobs.samples(torch.float32), jobs.BATCH, seed=0)
    return full(ft.fit(step_fn, state=ft.init_state(model, sgd, seed=seed), data=data, max_steps=3))


def test_dropout_is_a_function_of_the_seed(ranks):
    """Two runs of one seed are equal bit for bit, of another seed they are not."""
    one, same, other = (ranks(2)(functools.partial(dropping, seed))[0] for seed in (0, 0, 1))
    assert all(torch.equal(one[leaf], same[leaf]) for leaf in one)
    assert not torch.equal(one["params.layers.0.weight"], other["params.layers.0.weight"])


def precise_loss(model, batch):
    """Sees what the loss is given: targets in full precision, and predictions but under autocast."""
    predicted = model(batch["x"])[:, 0]
    assert batch["target"].dtype == torch.float32
    assert predicted.dtype == torch.float32 or torch.is_autocast_enabled("cpu")
    return (predicted - batch["target"]).square().mean()


def mixed(parallel, precision="fp32"):
    """Losses of a few steps, the scale, and an evaluation."""
    torch.manual_seed(0)
    model, sgd = Plain(), ft.optimizer(torch.optim.SGD, lr=0.05)
    xs = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    samples = [{"x": x, "target": x.sum() + 1000.5} for x in xs]
    step_fn = ft.supervised_step(model, precise_loss, sgd, precision=precision, clip_grad_norm=1.0)
    step_fn = step_fn if parallel is None else ft.shell.distribute(step_fn, "fsdp", **parallel)
    losses = []
    hook = ft.hook(after_step=lambda state: losses.append(float(state.metrics["loss"])))
    data = ft.data.stream(samples, 8, seed=0)
    final = ft.fit(step_fn, [hook], state=ft.init_state(model, sgd), data=data, max_steps=6)
    test = ft.evaluation(model, lambda model, batch: {"loss": precise_loss(model, batch)}, samples, batch_size=8)
    assert all(value.dtype == torch.float32 for value in final.params.values())
    return losses, test(final)["loss"], final.metrics.get("loss_scale")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("wrap", [None, layers])
def test_mixed_precision_computes_the_model_in_bfloat16_and_the_loss_in_float32(ranks, wrap):
    """Within bfloat16's precision of one process, in training and in evaluation."""
    alone, test, _ = mixed(None)
    for losses, tested, _ in ranks(2)(functools.partial(mixed, {"mixed_precision": "bf16", "wrap": wrap})):
        assert losses == pytest.approx(alone, rel=1e-3)
        assert losses != alone
        assert tested == pytest.approx(test, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_and_the_loss_scale_are_as_in_one_process(ranks, precision):
    """The same steps are skipped while the scale is found, on all ranks."""
    alone, test, scale = mixed(None, precision)
    for losses, tested, scaled in ranks(2)(functools.partial(mixed, {}, precision)):
        assert losses == pytest.approx(alone, rel=1e-3)
        assert tested == pytest.approx(test, rel=1e-3)
        assert scaled == scale


class Samples(torch.utils.data.Dataset):
    """Samples for evaluation; the model reports while it is evaluated."""

    def __init__(self, number):
        self.samples = jobs.samples(torch.float32)[:number]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def measure(model, batch):
    """Reports on its own, too, as a model may."""
    masked = jobs.masked_loss(model, batch)
    return {"loss": jobs.mean_loss(model, batch), "masked": masked}


def evaluating(parallel, number, *, weights=None, wrap=linears, evaluates=True):
    """Train with evaluations at every step, also before the first; what they gave, and what training came to."""
    step_fn, data = odd_parts(ADAMW)
    state, found = ft.init_state(step_fn.model, step_fn.optimizer), []
    test = ft.evaluation(step_fn.model, measure, Samples(number), batch_size=4)
    step_fn = ft.shell.distribute(step_fn, "fsdp", wrap=wrap) if parallel else step_fn

    def by_hand(state):
        """On all ranks the same samples."""
        batch = torch.utils.data.default_collate(Samples(number).samples)
        with ft.bound(test.model, state) as model, torch.no_grad():
            return {"by_hand": F.cross_entropy(model(batch["x"]), batch["y"])}

    def look(state):
        before = full(state)
        found.append(test(state))
        assert all(torch.equal(value, before[leaf]) for leaf, value in full(state).items())

    hooks = [ft.hooks.ema(0.5), ft.hook(before_train=look, name="look", communicates=True)]
    if evaluates:
        hooks += [ft.hooks.evaluate(test, every=1, weights=weights)]
        hooks += [ft.hooks.evaluate(by_hand, every=1, weights=weights, name="hand")]
        hooks += [ft.hook(after_step=lambda state: found.append(metrics_of(state)))]
    final = ft.fit(step_fn, hooks, state=state, data=data, max_steps=3)
    return found, full(final)


def metrics_of(state):
    return {name: float(value) for name, value in state.metrics.items() if name.startswith("eval/")}


@pytest.mark.parametrize("weights", [None, "ema"])
@pytest.mark.parametrize("number", [3, 4, 13, 24])
def test_evaluations_are_those_of_one_process_and_leave_no_trace(ranks, number, weights):
    """1 to 6 batches over 3 ranks: bit for bit the same on all; training goes on bit for bit as without."""
    alone, _ = evaluating(False, number, weights=weights)
    results = ranks(3)(functools.partial(evaluating, True, number, weights=weights))
    _, without = ranks(3)(functools.partial(evaluating, True, number, evaluates=False))[0]
    for found, final in results:
        assert found == results[0][0]
        assert len(found) == 4
        for one, expected in zip(found, alone, strict=True):
            assert one == pytest.approx(expected, rel=1e-5)
        assert all(torch.equal(final[leaf], value) for leaf, value in without.items())


def precise(parallel):
    """Buffers that precise_bn measured, at weights that stand still."""
    cls = torch.optim.SGD, {"lr": 0.0}
    step_fn, data = odd_parts(cls, norm=True)
    state = ft.init_state(step_fn.model, step_fn.optimizer)
    hook = ft.hooks.precise_bn(step_fn.model, Samples(18), every=1, batch_size=4, forward=jobs.mean_loss)
    step_fn = ft.shell.distribute(step_fn, "fsdp", wrap=linears) if parallel else step_fn
    return full(ft.fit(step_fn, [hook], state=state, data=data, max_steps=1))


def test_precise_bn_measures_every_batch_once(ranks):
    """Five batches over three ranks: what one process measures."""
    law_same(ranks(3)(functools.partial(precise, True)), precise(False), 1e-6)


def spiking(parallel):
    """A run that goes back from a spike."""
    step_fn, _ = odd_parts(ADAMW, loss=lambda model, batch: batch["factor"] * jobs.mean_loss(model, batch))
    state = ft.init_state(step_fn.model, step_fn.optimizer)
    step_fn = ft.shell.distribute(step_fn, "fsdp", wrap=linears) if parallel else step_fn
    batch = torch.utils.data.default_collate(jobs.samples(torch.float32)[:12])
    here = ft.shell.ranks()
    batch = {key: value[here.rank :: here.world_size] for key, value in batch.items()}
    batches = [{**batch, "factor": torch.tensor(100.0 if at == 6 else 1.0)} for at in range(12)]
    spike = ft.hooks.rollback_on_spike(window=2, snapshot_every=2, look_every=1, factor=1.5)
    final = ft.fit(step_fn, [ft.hooks.ema(0.5), spike], state=state, data=ft.data.own_share(batches), max_steps=9)
    kept = {leaf: value for leaf, value in full(final).items() if "rollback" not in leaf}
    return kept, final.position, dict(final.hooks["rollback_on_spike"])["rollbacks"]


def test_a_run_in_parts_goes_back_from_a_spike(ranks):
    """What one process comes to that goes back from the same."""
    alone, position, rollbacks = spiking(False)
    assert rollbacks == [7]
    for kept, at, back in ranks(3)(functools.partial(spiking, True)):
        law_same([kept], alone, 1e-5)
        assert (at, back) == (position, rollbacks)


def values():
    """What states in parts say of themselves."""
    step_fn, state, data = parted()
    state = step_fn(state, batches(data, 1)[0])
    copy = ft.snapshot(state)
    same = (copy == state, ft.digest(copy) == ft.digest(state))
    other = copy.replace(params={**copy.params, "scale": copy.params["scale"] * 2})
    text, ours, theirs = repr(state), ft.digest(state), ft.digest(other)
    state = step_fn(state, batches(data, 1)[0])
    again = step_fn(copy, batches(data, 1)[0])
    return same, text, (ours == theirs, copy == other), again == ft.snapshot(again)


def test_states_in_parts_are_values(ranks):
    """Copies are equal and outlive the next step; numbers and bytes are those of the whole."""
    number = sum(param.numel() for param in Odd().parameters())
    found = ranks(3)(values)
    for same, text, _, again in found:
        assert (same, again) == ((True, True), True)
        assert f"{number} numbers, {4 * number} bytes" in text.splitlines()[1]
    assert not all(all(changed) for _, _, changed, _ in found)


def differing(field):
    """Check replicas after rank 1 changed something."""
    step_fn, state, data = parted(norm=True)

    def change(state):
        if ft.shell.ranks().rank != 1 or state.step != 2 or field is None:
            return None
        if field == "extra":
            return state.replace(extra={"own": 1})
        name = "body.1.running_mean"
        return state.replace(buffers={**state.buffers, name: state.buffers[name] + 1})

    try:
        ft.fit(
            step_fn, [ft.hook(after_step=change), ft.hooks.check_replicas(every=1)], state=state, data=data, max_steps=3
        )
    except ft.ReplicaError as error:
        return str(error)
    return None


def test_check_replicas_compares_what_is_not_split(ranks):
    """Parts differ and are none of its business; a buffer that differs is named, on all ranks."""
    assert ranks(2)(functools.partial(differing, None)) == [None, None]
    for field, leaf in (("extra", "state.extra.own"), ("buffers", "state.buffers.body.1.running_mean")):
        for told in ranks(2)(functools.partial(differing, field)):
            assert f"step 2: {leaf} of rank" in told
