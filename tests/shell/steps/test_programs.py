"""compile_step: one program equal to the eager step within rounding, no second compilation, eager where it must be.

Most laws run the traced graph as it is, uncompiled; a few compile it, which takes 10 seconds each.
"""

import re
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, batches, classification, cross_entropy, make, square_loss, token_loss
from torch import nn

import fntrain as ft
from fntrain.core import tree
from fntrain.shell.steps import compiler, programs
from fntrain.shell.steps.flat import RateVector
from fntrain.shell.steps.programs import compile_step
from fntrain.steps.body import Body
from fntrain.testing import assert_resume_exact

SCHEDULE = ft.schedules.linear(0.02, 0.001, total_steps=1000)
ADAMW = ft.optimizer(torch.optim.AdamW, lr=SCHEDULE, fused=True)
SGD = ft.optimizer(torch.optim.SGD, lr=SCHEDULE, momentum=0.9, fused=True)
FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}
FLOAT64 = {"rtol": 1e-6, "atol": 1e-9}  # step counters of torch's optimizers are float32
BFLOAT16 = {"rtol": 0.05, "atol": 0.01}


@pytest.fixture
def traced(monkeypatch):
    """Programs are the traced graphs themselves; returns how often one was built."""
    built = Counter()

    def compiled(graph, inputs, directory):
        built["programs"] += 1
        return lambda tensors: list(graph(*tensors)), False

    monkeypatch.setattr(programs, "compiled", compiled)
    return built


def run(step_fn, optimizer, model, data):
    state = ft.init_state(model, optimizer)
    states = [ft.snapshot(state)]
    for batch in data:
        state = step_fn(state, batch)
        states.append(ft.snapshot(state))
    return states


def both(make_model, loss_fn, optimizer, data, **options):
    """All states of the eager and of the compiled step."""
    runs = []
    for wrap in (lambda step_fn: step_fn, compile_step):
        model = make_model()
        runs.append(run(wrap(ft.supervised_step(model, loss_fn, optimizer, **options)), optimizer, model, data))
    return runs


def assert_alike(eager, compiled, rtol, atol):
    """The same names, kinds, layouts and integers; floats and metrics within the tolerance."""
    pairs = zip(sorted(ft.named_leaves(eager)), sorted(ft.named_leaves(compiled)), strict=True)
    for (name, one), (other_name, other) in pairs:
        assert name == other_name
        if not isinstance(one, torch.Tensor):
            assert one == other, name
            continue
        assert (one.dtype, one.stride(), one.device) == (other.dtype, other.stride(), other.device), name
        exact = {} if one.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(
            other, one, **({"rtol": rtol, "atol": atol} | exact), msg=lambda m, n=name: f"{n}: {m}"
        )
    kinds = [[(name, type(name), getattr(name, "smooth", "")) for name in state.metrics] for state in (eager, compiled)]
    assert kinds[0] == kinds[1]
    for name, one in eager.metrics.items():
        if isinstance(one, torch.Tensor | float):
            assert float(compiled.metrics[name]) == pytest.approx(float(one), rel=rtol, abs=atol, nan_ok=True), name


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.05}, {"accumulate": 3, "clip_grad_value": 0.01}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_traced_step_is_the_eager_one(traced, name, options):
    """Every model of the table, after five updates: all leaves, their layouts, and the metrics."""
    for eager, compiled in zip(*both(lambda: make(name), square_loss, SGD, batches(name, 5), **options), strict=True):
        assert_alike(eager, compiled, **FLOAT32)
    assert traced["programs"] == 1


OPTIMIZERS = {
    "SGD": {},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"foreach": True},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adagrad": {"lr_decay": 0.1},
    "Adadelta": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "ASGD": {},
}


@pytest.mark.parametrize("lr", [0.01, SCHEDULE], ids=["constant", "scheduled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_optimizers_can_be_traced(traced, name, lr):
    """With float64 the traced update is the eager one to 1e-6: only step counters are float32."""
    optimizer = ft.optimizer(getattr(torch.optim, name), lr=lr, **OPTIMIZERS[name])
    data = [batch.double() for batch in batches("mlp", 7)]
    eager, compiled = both(lambda: make("mlp").double(), square_loss, optimizer, data)
    assert_alike(eager[-1], compiled[-1], **FLOAT64)
    assert traced["programs"] == 1


def test_groups_and_other_scheduled_options(traced):
    """Frozen groups, scales, an lr of 0 and a scheduled weight decay that reaches 0."""
    decay = ft.schedules.linear(0.5, 0.0, total_steps=3)
    groups = [ft.group("0.*", frozen=True), ft.group("*.bias", lr_scale=0.0), ft.group("2.*", lr=0.01)]
    optimizer = ft.optimizer(torch.optim.AdamW, lr=SCHEDULE, weight_decay=decay, groups=groups)
    eager, compiled = both(lambda: make("mlp"), square_loss, optimizer, batches("mlp", 6))
    assert_alike(eager[-1], compiled[-1], **FLOAT32)


def test_a_rate_of_zero_keeps_untouched_rows_finite(traced):
    """Rows of an embedding that no batch holds have moments of 0; 0 / 0 would make them nan."""
    optimizer = ft.optimizer(torch.optim.Adam, lr=ft.schedules.linear(0.1, 0.0, total_steps=2))
    data = [torch.tensor([1, 2])] * 5
    eager, compiled = both(
        lambda: nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False),
        lambda m, b: m(b).square().sum(),
        optimizer,
        data,
    )
    assert_alike(eager[-1], compiled[-1], **FLOAT32)


def reporting_loss(model, batch):
    out = model(batch)
    with ft.name_scope("head"):
        ft.put_scalar("largest", out.max(), reduce="max", smooth=False)
        ft.put_scalar("constant", 3)
    ft.put_histogram("out", out)
    ft.put_image("image", out.reshape(1, *out.shape).sigmoid())
    ft.put_text("note", "same each step")
    return out.square().mean()


def two_terms(model, batch):
    out = model(batch).square().mean(1)
    return {"a": (out * (batch[:, 0] > 0)).sum(), "b": out.sqrt().sum()}


def denominators(batch):
    return {"a": (batch[:, 0] > 0).sum(), "b": len(batch)}


def noisy_loss(model, batch):
    places = torch.arange(batch.shape[1]) / torch.tensor([1.0, 2.0, 4.0]).sum()
    return (model(batch + torch.randn_like(batch)) * torch.rand(3)).square().mean() + places.mean()


@pytest.mark.parametrize(
    ("loss_fn", "options"),
    [
        (reporting_loss, {"accumulate": 2}),
        (token_loss, {"accumulate": 3}),
        (token_loss, {"on_nonfinite": "allow"}),
        (two_terms, {"accumulate": 2, "weights": denominators}),
        (square_loss, {"transform_grads": lambda grads: {n: g.sign() for n, g in grads.items() if "bias" not in n}}),
        (square_loss, {"on_nonfinite": "raise"}),
        (noisy_loss, {}),
    ],
)
def test_losses_and_options(traced, loss_fn, options):
    """Reported values, weights, transformed gradients and random draws are those of the eager step."""
    eager, compiled = both(lambda: make("mlp"), loss_fn, ADAMW, batches("mlp", 5, 7), **options)
    assert_alike(eager[-1], compiled[-1], **FLOAT32)
    for name, one in eager[-1].metrics.items():
        if isinstance(one, ft.events.Image | ft.events.Histogram):
            torch.testing.assert_close(compiled[-1].metrics[name].tensor, one.tensor, **FLOAT32)
        if isinstance(one, ft.events.Text):
            assert compiled[-1].metrics[name] == one
    assert traced["programs"] == 1


def test_autocast_stays_within_bfloat16(traced):
    """bf16 autocast is part of the graph."""
    eager, compiled = both(lambda: make("batchnorm"), square_loss, SGD, batches("batchnorm", 5), precision="bf16")
    assert_alike(eager[-1], compiled[-1], **BFLOAT16)


def test_what_is_not_finite_is_skipped(traced):
    """Also before the optimizer has state; every leaf of the state is then the old one."""
    data = batches("batchnorm", 6)
    data[0], data[3] = data[0] / 0, data[3] * float("nan")
    eager, compiled = both(lambda: make("batchnorm"), square_loss, SGD, data)
    assert [float(state.metrics["skipped_steps"]) for state in compiled[1:]] == [1, 0, 0, 1, 0, 0]
    assert tree.bitwise_equal(dict(compiled[4].params), dict(compiled[3].params))
    assert tree.bitwise_equal(dict(compiled[4].buffers), dict(compiled[3].buffers))
    assert_alike(eager[-1], compiled[-1], **FLOAT32)


def test_raise_names_what_is_not_finite(traced):
    """As the eager step does."""
    model = make("mlp")
    step_fn = compile_step(ft.supervised_step(model, square_loss, SGD, on_nonfinite="raise"))
    state = run(step_fn, SGD, model, batches("mlp", 3))[-1]
    with pytest.raises(ft.NonFiniteError, match=r"step 4.*0\.weight"):
        step_fn(state, batches("mlp", 1)[0] * float("nan"))


@pytest.mark.parametrize("name", ["batchnorm", "dropout", "lstm", "unused_and_frozen"])
def test_a_compiled_step_keeps_the_modules_objects_and_a_failing_one_its_state(traced, name):
    """Parameters, buffers and their memory are those of before; what raises leaves the state whole."""
    model = make(name)
    objects = [(id(tensor), tensor.data_ptr()) for tensor in [*model.parameters(), *model.buffers()]]
    trainable = [param.requires_grad for param in model.parameters()]
    step_fn = compile_step(ft.supervised_step(model, square_loss, SGD))
    state = ft.init_state(model, SGD)
    for batch in batches(name, 4):
        state = step_fn(state, batch)
    assert traced["programs"] == 1
    if name != "reassigned_buffer":
        assert [(id(tensor), tensor.data_ptr()) for tensor in [*model.parameters(), *model.buffers()]] == objects
    assert [param.requires_grad for param in model.parameters()] == trainable
    assert all(param.grad is None for param in model.parameters())
    before, state = state, step_fn(state, batches(name, 1)[0])
    with pytest.raises(ft.StateConsumedError, match="step 4 was consumed by step 5"):
        len(before.params)

    def failing(model, batch):
        model(batch)
        raise KeyError("from the loss")

    kept = ft.snapshot(state)
    del step_fn
    with pytest.raises(KeyError, match="from the loss"):
        compile_step(ft.supervised_step(model, failing, SGD))(state, batches(name, 1)[0])
    assert state == kept


def thousand_steps(step_fn, model):
    return run(step_fn, ADAMW, model, batches("mlp", 10) * 100)[-1]


def frozen_rate(monkeypatch):
    """The broken twin: rates are those of the trace, for ever."""
    write, first = RateVector.write, []
    monkeypatch.setattr(RateVector, "write", lambda self, rates: write(self, (first.append(rates), first[0])[1]))


@pytest.mark.parametrize("twin", [None, frozen_rate])
def test_a_thousand_scheduled_steps_build_one_program(traced, twin, monkeypatch):
    """The rate is an input: no value of it is compiled in, and none sticks."""
    eager_model, model = make("mlp"), make("mlp")
    eager = thousand_steps(ft.supervised_step(eager_model, square_loss, ADAMW), eager_model)
    if twin:
        twin(monkeypatch)
    compiled = thousand_steps(compile_step(ft.supervised_step(model, square_loss, ADAMW)), model)
    assert traced["programs"] == 1
    if twin:
        with pytest.raises(AssertionError):
            assert_alike(eager, compiled, rtol=0.01, atol=1e-4)
    else:
        assert_alike(eager, compiled, rtol=0.01, atol=1e-4)  # rounding grows over a thousand steps


def test_a_resumed_run_is_exact(traced):
    """The decision what runs eagerly depends on the state alone, so a resumed run makes the same steps."""

    def job():
        model = make("dropout")
        data = ft.data.stream(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), 4, seed=0)
        step_fn = compile_step(ft.supervised_step(model, square_loss, ADAMW))
        return {"step_fn": step_fn, "state": ft.init_state(model, ADAMW), "data": data}

    assert_resume_exact(job, num_steps=4)


@pytest.mark.parametrize("name", ["batchnorm", "lstm", "reassigned_buffer", "tied"])
def test_eager_and_compiled_steps_take_turns(traced, name):
    """Each goes on from the other's state, also with values that a hook put in."""
    model, twin = make(name), make(name)
    eager = ft.supervised_step(model, square_loss, SGD)
    compiled = compile_step(eager)
    state, other = ft.init_state(model, SGD), ft.init_state(twin, SGD)
    reference = ft.supervised_step(twin, square_loss, SGD)
    for index, batch in enumerate(batches(name, 6)):
        state, other = (compiled if index % 2 else eager)(state, batch), reference(other, batch)
        if index == 3:
            state, other = [one.replace(params={n: p * 0.9 for n, p in one.params.items()}) for one in (state, other)]
    assert_alike(other, state, **FLOAT32)
    assert traced["programs"] == 1


def test_flags_and_shapes_are_part_of_the_key(traced):
    """Eval mode, a frozen parameter and another batch size each have a program, and go back to the first."""
    model, twin = make("dropout"), make("dropout")
    eager = ft.supervised_step(twin, square_loss, SGD)
    compiled = compile_step(ft.supervised_step(model, square_loss, SGD))
    state, other = ft.init_state(model, SGD), ft.init_state(twin, SGD)

    def step(batch):
        nonlocal state, other
        state, other = compiled(state, batch), eager(other, batch)

    big, small = *batches("dropout", 1), *batches("dropout", 1, 5)
    step(big)
    step(big)
    for one in (model, twin):
        one.eval()
    step(big)
    for one in (model, twin):
        one.train()
    step(small)
    for one in (model, twin):
        one[0].weight.requires_grad_(False)
    step(big)
    for one in (model, twin):
        one[0].weight.requires_grad_(True)
    step(big)
    assert_alike(other, state, **FLOAT32)
    assert traced["programs"] == 4


def test_a_tensor_of_the_closure_is_read_anew(traced):
    """Class weights changed in place count from the next step on."""
    weights = torch.ones(3)
    model = make("mlp")
    step_fn = compile_step(ft.supervised_step(model, lambda m, b: (m(b) * weights).square().mean(), SGD))
    state = run(step_fn, SGD, model, batches("mlp", 2))[-1]
    weights.zero_()
    assert float(step_fn(state, batches("mlp", 1)[0]).metrics["loss"]) == 0.0


def test_a_rate_that_is_a_tensor_is_read_anew(traced):
    """A hook may write to it, as with the eager step."""
    rate, model = torch.tensor(0.1), make("mlp")
    optimizer = ft.optimizer(torch.optim.SGD, lr=rate)
    eager = ft.supervised_step(model, square_loss, optimizer)
    state = run(compile_step(eager), optimizer, model, batches("mlp", 2))[-1]
    compiled, (batch,) = compile_step(eager), batches("mlp", 1)
    compiled(state, batch)
    rate.fill_(0.5)
    assert_alike(eager(state, batch), compiled(state, batch), **FLOAT32)


def test_the_law_of_draws_fails_without_seeds(traced, monkeypatch):
    """A program that draws from whatever the generator holds is noticed."""
    eager, compiled = both(lambda: make("mlp"), noisy_loss, ADAMW, batches("mlp", 5))
    assert_alike(eager[-1], compiled[-1], **FLOAT32)
    monkeypatch.setattr(Body, "seed", lambda self, state: None)
    _, compiled = both(lambda: make("mlp"), noisy_loss, ADAMW, batches("mlp", 5))
    with pytest.raises(AssertionError):
        assert_alike(eager[-1], compiled[-1], **FLOAT32)


def by_value(model, batch):
    out = model(batch).mean()
    return out if out > 0 else -out


def by_chance(model, batch):
    import random

    return model(batch).mean() * random.random()


def around_the_slots():
    model = make("mlp")
    weight, forward = model[0].weight, model.forward
    model.forward = lambda x: forward(x) + weight.sum()
    return model


UNTRACEABLE = {
    "control flow": (lambda: make("mlp"), by_value, SGD, "decides by the value of a tensor.*return out if out > 0"),
    "python's generator": (lambda: make("mlp"), by_chance, SGD, "draws from Python's"),
    "closure": (around_the_slots, square_loss, SGD, "not by the module's own attribute"),
    "optimizer": (lambda: make("mlp"), square_loss, ft.optimizer(torch.optim.Adafactor, lr=SCHEDULE), "min.lr"),
    "betas": (
        lambda: make("mlp"),
        square_loss,
        ft.optimizer(torch.optim.Adam, lr=0.1, betas=lambda step: (0.9, 0.99 + step / 1000)),
        "scheduled option is .0.9",
    ),
}


@pytest.mark.parametrize("case", UNTRACEABLE)
def test_what_cannot_be_traced_runs_eagerly_and_says_so_once(traced, case):
    """One warning that names the cause; results are bitwise the eager step's."""
    make_model, loss_fn, optimizer, cause = UNTRACEABLE[case]
    with pytest.warns(
        UserWarning, match=rf"compile_step: Sequential can't be one program: .*{cause}.*leave out"
    ) as told:
        eager, compiled = both(make_model, loss_fn, optimizer, batches("mlp", 5), seeds="all")
    assert len(told) == 1
    assert compiled[-1] == eager[-1]
    assert traced["programs"] == 0


def test_a_program_that_cannot_run_is_not_used(monkeypatch):
    """Operators that AOTInductor compiles but can't call are found before the first step is given away."""

    def run(tensors):
        raise RuntimeError("isIntList() INTERNAL ASSERT FAILED\nmore")

    monkeypatch.setattr(programs, "compiled", lambda graph, inputs, directory: (run, False))
    with pytest.warns(UserWarning, match=r"AOTInductor can't run it \(isIntList\(\) INTERNAL ASSERT FAILED\)"):
        eager, compiled = both(lambda: make("lstm"), square_loss, SGD, batches("lstm", 3))
    assert compiled[-1] == eager[-1]


def test_a_batch_of_unknown_things_runs_eagerly(traced):
    """An object in the batch is named by its kind."""

    class Box:
        tensor = torch.ones(2, 6)

    with pytest.warns(UserWarning, match="a Box in batch"):
        both(lambda: make("mlp"), lambda m, b: m(b["box"].tensor).mean(), SGD, [{"box": Box()}] * 3)


def test_further_programs_run_eagerly_after_max_programs(traced):
    """With one warning; the programs that are there go on."""
    model = make("mlp")
    step_fn = compile_step(ft.supervised_step(model, square_loss, SGD), max_programs=2)
    data = [batches("mlp", 1, size)[0] for size in (8, 8, 7, 6, 5, 8, 6)]
    with pytest.warns(UserWarning, match=r"has 2 programs.*\(6, 6\).*max_programs") as told:
        state = run(step_fn, SGD, model, data)[-1]
    assert (len(told), traced["programs"], state.step) == (1, 2, 7)


def test_fp16_runs_eagerly(traced):
    """A program without the loss scale would be another step."""
    with pytest.warns(UserWarning, match="precision='fp16' is of eager steps"):
        eager, compiled = both(lambda: make("mlp"), square_loss, SGD, batches("mlp", 4), precision="fp16")
    assert compiled[-1] == eager[-1]
    assert "loss_scale" in compiled[-1].extra


def test_master_weights_compile_too(traced):
    """Parameters in bfloat16 follow their float32 copies, which agree with the eager ones."""
    adamw = ft.optimizer(torch.optim.AdamW, lr=SCHEDULE, master_weights=True)
    data = [
        batch.bfloat16() if isinstance(batch, torch.Tensor) else {k: v.bfloat16() for k, v in batch.items()}
        for batch in batches("mlp", 5)
    ]
    eager, compiled = both(lambda: make("mlp").bfloat16(), square_loss, adamw, data)
    assert_alike(eager[-1], compiled[-1], **BFLOAT16)
    assert traced["programs"] == 1
    for name, entry in compiled[-1].opt_state.items():
        assert torch.equal(entry["master_weight"].bfloat16(), compiled[-1].params[name])


def test_wrong_arguments_are_refused():
    """The message says what to pass."""
    with pytest.raises(TypeError, match=r"step_fn: got <lambda>, expected what ft.supervised_step"):
        compile_step(lambda state, batch: state)
    with pytest.raises(ValueError, match="max_programs: got 0"):
        compile_step(ft.supervised_step(make("mlp"), square_loss, SGD), max_programs=0)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no program"])
def test_a_damaged_program_is_compiled_anew(monkeypatch, tmp_path, damage, caplog):
    """The log names the file, and a good one takes its place; torch's own loader would run it."""
    graph, content = torch.fx.symbolic_trace(nn.Identity()), b"PK\x03\x04 what a program is made of"

    def compile_anew(graph, inputs, directory, name):
        file = directory / "temporary"
        file.write_bytes(content)
        return file.replace(directory / f"{name}-{compiler._checksum(file)}.pt2")

    load = compiler._load
    monkeypatch.setattr(compiler, "_compile", compile_anew)
    monkeypatch.setattr(compiler, "_load", lambda file: "program")
    assert compiler.compiled(graph, [], tmp_path) == ("program", False)
    assert compiler.compiled(graph, [], tmp_path) == ("program", True)
    (file,) = tmp_path.iterdir()
    if damage == "cut":
        file.write_bytes(content[:-3])
    if damage == "flipped":
        file.write_bytes(content.replace(b"program", b"progrbm"))
    if damage == "no program":
        calls = iter([load, lambda file: "program"])
        monkeypatch.setattr(compiler, "_load", lambda file: next(calls)(file))
    assert compiler.compiled(graph, [], tmp_path) == ("program", False)
    assert re.search(rf"{file.name} is damaged \(.*\); it is compiled anew", caplog.text)
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [content]


class Everything(nn.Module):
    """Dropout, batch norm, tied weights, a constant made in the forward, a buffer that is scratch memory."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        self.again = nn.Linear(6, 8)
        self.again.weight = self.enter.weight
        self.head = nn.Linear(8, 3)
        self.register_buffer("scratch", torch.arange(8.0), persistent=False)

    def forward(self, x):
        hidden = F.dropout(self.norm(self.enter(x)) + self.again(x) * torch.arange(8), 0.3, self.training)
        return self.head(hidden + self.scratch)


def everything():
    torch.manual_seed(0)
    return Everything()


def compiled_job(directory):
    """Six steps of a compiled job: its step function and the states."""
    model = everything()
    options = {"accumulate": 2, "clip_grad_norm": 0.1, "split": None}
    step_fn = compile_step(ft.supervised_step(model, cross_entropy, ADAMW, **options), directory=directory)
    data = [classification() for _ in range(6)]
    data[3] = {**data[3], "x": data[3]["x"] * float("inf")}
    eager_model = everything()
    eager = ft.supervised_step(eager_model, cross_entropy, ADAMW, **options)
    return step_fn, run(step_fn, ADAMW, model, data), run(eager, ADAMW, eager_model, data)


def test_a_restart_loads_its_program(tmp_path, capfd):
    """The compiled step is the eager one; another process finds the program, and ends with the same bits."""
    step_fn, compiled, eager = compiled_job(tmp_path / "programs")
    for one, other in zip(eager, compiled, strict=True):
        assert_alike(one, other, **FLOAT32)
    assert (step_fn.num_compiled, step_fn.num_loaded) == (1, 0)
    assert "compile_step: Everything, batch float32 (8, 6), int64 (8,): compiled in" in capfd.readouterr().err
    (file,) = (tmp_path / "programs").iterdir()
    written = file.stat().st_mtime_ns
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import test_programs, fntrain as ft\n"
        f"step_fn, states, _ = test_programs.compiled_job({str(tmp_path / 'programs')!r})\n"
        "print(step_fn.num_compiled, step_fn.num_loaded, ft.digest(states[-1]))"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.split() == ["0", "1", ft.digest(compiled[-1])]
    assert (file.stat().st_mtime_ns, [*(tmp_path / "programs").iterdir()]) == (written, [file])


def test_channels_last_and_bfloat16_compile():
    """Layouts of the state survive a program, and a second one in the same process."""
    data = batches("channels_last", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, compiled = both(lambda: make("channels_last"), square_loss, SGD, data, precision="bf16")
    for one, other in zip(eager, compiled, strict=True):
        assert_alike(one, other, **BFLOAT16)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        return self.last(checkpoint(lambda x: F.dropout(self.first(x), 0.5).tanh(), x, use_reentrant=False))


def test_checkpointing_with_dropout_is_not_compiled(traced):
    """A recomputation would draw another mask in a program: the gradients would be wrong without a word."""

    def make_model():
        torch.manual_seed(0)
        return Checkpointed()

    with pytest.warns(UserWarning, match="saves a generator's state to draw again"):
        eager, compiled = both(make_model, cross_entropy, SGD, [classification() for _ in range(3)])
    assert compiled[-1] == eager[-1]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.calls = nn.Linear(6, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.last(x) / self.calls


def test_a_forward_with_memory_of_its_own_is_not_compiled(traced):
    """A program would repeat the number of its trace."""

    def make_model():
        torch.manual_seed(0)
        return Counting()

    with pytest.warns(UserWarning, match="the forward sets Counting.calls"):
        eager, compiled = both(make_model, cross_entropy, SGD, [classification() for _ in range(4)])
    assert compiled[-1] == eager[-1]


def test_a_tensor_of_the_closure_is_not_written_twice(traced):
    """Tracing and trying out would count too: such a loss runs eagerly."""
    counter = torch.zeros(())

    def loss_fn(model, batch):
        counter.add_(1)
        return square_loss(model, batch)

    model = make("mlp")
    step_fn = compile_step(ft.supervised_step(model, loss_fn, SGD))
    data = batches("mlp", 4)
    state = step_fn(ft.init_state(model, SGD), data[0])
    with pytest.warns(UserWarning, match=r"writes \(add_\) to a tensor of shape \(\) that is not the module's own"):
        state = step_fn(state, data[1])
    for batch in data[2:]:
        state = step_fn(state, batch)
    assert counter.item() == 4


def test_a_reported_view_of_a_parameter_keeps_its_value(tmp_path):
    """Metrics are those of their step, whatever the program writes over the tensor they look at."""

    def loss_fn(model, batch):
        ft.put_scalar("bias", model.last.bias[0])
        return cross_entropy(model, batch)

    kept = []
    for wrap in (lambda step_fn: step_fn, compile_step):
        torch.manual_seed(0)
        model = Checkpointed()
        model.forward = lambda x, model=model: model.last(model.first(x))
        step_fn = wrap(ft.supervised_step(model, loss_fn, SGD))
        state, seen = ft.init_state(model, SGD), []
        for _ in range(4):
            state = step_fn(state, classification())
            seen.append(state.metrics["bias"])
        kept.append([float(value) for value in seen])
    assert kept[1] == pytest.approx(kept[0], rel=1e-4)
    assert len(set(kept[1])) == 4


def test_the_program_follows_a_tensor_put_into_the_module(traced):
    """What somebody assigns to a parameter's data is what is trained on, as in place."""
    ends = []
    for wrap in (ft.shell.in_place, compile_step):
        model = make("mlp")
        step_fn = wrap(ft.supervised_step(model, square_loss, SGD))
        state = ft.init_state(model, SGD)
        for index, batch in enumerate(batches("mlp", 5)):
            if index == 3:
                first = next(model.parameters())
                first.data = torch.ones_like(first)
            state = step_fn(state, batch)
        assert torch.equal(next(model.parameters()), next(iter(state.params.values())))
        ends.append(ft.snapshot(state))
    assert_alike(*ends, **FLOAT32)
