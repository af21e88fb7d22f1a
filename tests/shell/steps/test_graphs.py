"""The step on a GPU. Graphs are also tested on the CPU, by an engine that records operations instead of a device."""

import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fntrain as ft
from fntrain import testing
from fntrain.core import tree
from fntrain.core.tree import named_leaves
from fntrain.shell.steps.captured import Inputs
from fntrain.shell.steps.graphs import WARMUP, Graphs
from fntrain.shell.steps.in_place import Donated
from fntrain.shell.steps.memory import Memory
from fntrain.steps import grads
from fntrain.steps.rates import Rates

CPU = torch.device("cpu")


class Recorder(TorchDispatchMode):
    """Runs operations and notes them down with the very tensors they read and write."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.failed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.failed |= func is torch.ops.aten._local_scalar_dense.default
        if self.failed:  # as CUDA does, for this operation and all that follow in the capture
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class RecordingEngine:
    """What a CUDA graph does, on the CPU: fixed memory, no Python at replay, nothing run at capture."""

    device = CPU

    def __init__(self, memory):
        self.memory = memory
        self.captures = 0

    def side_stream(self):
        return nullcontext()

    def fetch(self, batch, *, channels_last):
        return batch

    def capture(self, fn):
        self.captures += 1
        slots = self.memory.body.slots
        live = [
            *slots.params.values(),
            *self.memory.body.settings.model.buffers(),
            *(leaf for _, leaf in named_leaves(self.memory.opt_state) if isinstance(leaf, torch.Tensor)),
        ]
        before = [tensor.detach().clone() for tensor in live]
        recorder = Recorder()
        try:
            with recorder:
                result = fn()
        finally:
            with torch.no_grad():
                for tensor, value in zip(live, before, strict=True):
                    tensor.copy_(value)

        @torch.no_grad()
        def replay():
            for func, args, kwargs, out in recorder.calls:
                rewrite(out, func(*args, **kwargs))

        return replay, result


def rewrite(old, new):
    """Put a replayed result where the recorded one lay, unless it is a view or was written in place."""
    if isinstance(old, torch.Tensor):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)
    elif isinstance(old, tuple | list):
        for one, other in zip(old, new, strict=True):
            rewrite(one, other)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Reading a tensor is declared to wait, as on a GPU."""
    monkeypatch.setattr(grads, "stalls", lambda tensor: True)
    monkeypatch.setattr("fntrain.shell.steps.kernels.stalls", lambda tensor: True)


class Net(nn.Module):
    """Linear, BatchNorm, dropout, a scratch buffer and a buffer that is assigned."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(6, 8, bias=False),  # a bias before BatchNorm has gradient 0: noise for Adam
            nn.BatchNorm1d(8),
            nn.Dropout(0.3),
            nn.Linear(8, 3),
        )
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        y = self.last(self.drop(F.relu(self.norm(self.first(x)))))
        self.scratch += 1
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y + self.scratch


def loss_fn(model, batch):
    logits = model(batch["x"])
    ft.put_scalar("accuracy", (logits.argmax(-1) == batch["y"]).float().mean())
    ft.put_histogram("logits", logits)
    return F.cross_entropy(logits, batch["y"])


def batches(n, size=8, *, bad=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        {"x": torch.randn(size, 6, generator=generator), "y": torch.randint(0, 3, (size,), generator=generator)}
        for _ in range(n)
    ]
    for index in bad:
        made[index]["x"][0, 0] = float("nan")
    return made


def job(cls=torch.optim.AdamW, loss=loss_fn, lr=None, options=None, **kwargs):
    torch.manual_seed(0)
    model = Net()
    lr = ft.schedules.warmup_cosine(0.01, warmup_steps=4, total_steps=40) if lr is None else lr
    optimizer = ft.optimizer(cls, lr=lr, **({"fused": True} if options is None else options))
    step_fn = ft.supervised_step(model, loss, optimizer, **kwargs)
    return step_fn, ft.init_state(model, optimizer, seed=3)


def recorded(step_fn, **kwargs):
    memory = Memory(step_fn.body)
    engine = RecordingEngine(memory)
    return Donated(memory, Graphs(engine, kwargs.pop("graph", "auto"), **kwargs), step_fn), engine


def run(step_fn, state, data):
    seen = []
    for batch in data:
        state = step_fn(state, batch)
        seen.append(ft.snapshot(state))
    return seen


def close(a, b):
    """Equal but for the rounding of the learning rate to float32."""
    for (name, x), (other, y) in zip(ft.named_leaves(a), ft.named_leaves(b), strict=True):
        assert name == other
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=name)
        else:
            assert tree.bitwise_equal(x, y), name


WHOLE = [
    {},
    {"clip_grad_norm": 0.1},
    {"accumulate": 3},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"on_nonfinite": "allow"},
]


@pytest.mark.parametrize("kwargs", WHOLE, ids=str)
def test_a_replayed_step_is_the_eager_one(kwargs, as_on_a_device):
    """Dropout, buffers, schedules, accumulation, metrics: as in place, with the rate rounded to float32."""
    data = batches(10, bad=() if kwargs.get("on_nonfinite") else (5, 7))
    step_fn, state = job(**kwargs)
    expected = run(ft.shell.in_place(step_fn), state, data)
    step_fn, state = job(**kwargs)
    graphed, engine = recorded(step_fn)
    for got, want in zip(run(graphed, state, data), expected, strict=True):
        close(got, want)
        assert got.metrics.keys() == want.metrics.keys()
        assert got.metrics["lr"] == want.metrics["lr"]
        for name in ("loss", "accuracy"):
            torch.testing.assert_close(got.metrics[name], want.metrics[name], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert engine.captures == 1
    assert next(iter(graphed.execution.graphs.values())).fused is not None


@pytest.mark.parametrize(
    ("cls", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {}), (torch.optim.RMSprop, {}), (torch.optim.AdamW, {})],
)
def test_other_optimizers_run_after_the_graph_bitwise(cls, options, as_on_a_device):
    """Forward and backward are captured; the class's own step does the rest with the rate in double precision."""
    data = batches(8, bad=(5,))
    step_fn, state = job(cls, options=options)
    expected = run(ft.shell.in_place(step_fn), state, data)
    step_fn, state = job(cls, options=options)
    graphed, engine = recorded(step_fn)
    for got, want in zip(run(graphed, state, data), expected, strict=True):
        testing.assert_states_equal(got, want)
    assert engine.captures == 1
    assert next(iter(graphed.execution.graphs.values())).fused is None


def test_the_replay_law_fails_where_the_rate_is_frozen(as_on_a_device, monkeypatch):
    """A graph that keeps the rate of its capture trains otherwise."""
    data = batches(12)
    step_fn, state = job()
    expected = run(ft.shell.in_place(step_fn), state, data)
    step_fn, state = job()
    graphed, _ = recorded(step_fn)
    fill = Inputs.fill
    frozen = Rates(1e-3, ({"lr": 1e-3},))
    monkeypatch.setattr(Inputs, "fill", lambda self, state, batch, rates: fill(self, state, batch, frozen))
    with pytest.raises(AssertionError):
        close(run(graphed, state, data)[-1], expected[-1])


def test_the_replay_law_fails_without_seeding(as_on_a_device, monkeypatch):
    """A graph whose draws go on where the last ones ended has other dropout."""
    data = batches(6)
    step_fn, state = job()
    expected = run(ft.shell.in_place(step_fn), state, data)
    step_fn, state = job()
    graphed, _ = recorded(step_fn)
    states = run(graphed, state, data[:WARMUP])
    monkeypatch.setattr(type(step_fn.body), "seed", lambda self, state: None)
    with pytest.raises(AssertionError):
        close(run(graphed, states[-1], data[WARMUP:])[-1], expected[-1])


def test_warm_up_and_capture_leave_no_trace(as_on_a_device):
    """The warm-up steps are real ones, and capturing changes no leaf."""
    data = batches(WARMUP + 1)
    step_fn, state = job()
    graphed, engine = recorded(step_fn)
    states = run(graphed, state, data[:WARMUP])
    before = ft.digest(states[-1])
    live, graphs = graphed.memory, graphed.execution
    graphs.graphs["probe"] = graphs._capture(live, states[-1], data[0], graphs.warm[next(iter(graphs.warm))])
    assert engine.captures == 1
    slots = live.body.slots
    now = states[-1].replace(
        params={n: p.detach() for n, p in slots.params.items()}, buffers=slots.buffers, opt_state=live.opt_state
    )
    assert ft.digest(now) == before
    assert all(param.grad is None for param in slots.params.values())


def test_every_shape_has_its_graph_up_to_the_bound(as_on_a_device):
    """Further shapes run eagerly, which is said once; the result is that of the eager step."""
    data = [batches(1, size)[0] for _ in range(WARMUP + 2) for size in (4, 5, 6)]
    step_fn, state = job()
    expected = run(ft.shell.in_place(step_fn), state, data)
    step_fn, state = job()
    graphed, engine = recorded(step_fn, max_graphs=2)
    with pytest.warns(UserWarning, match="max_graphs=2") as warned:
        close(run(graphed, state, data)[-1], expected[-1])
    assert engine.captures == 2
    assert [str(one.message) for one in warned] == [
        f"cuda_step: goes on eagerly at step {WARMUP * 3 + 3}: batches come in more than max_graphs=2 shapes; pad them "
        "to a few, or raise max_graphs"
    ]


def test_shapes_without_end_are_not_remembered(as_on_a_device):
    """Thousands of shapes keep neither graphs nor notes."""
    step_fn, state = job()
    graphed, _ = recorded(step_fn, max_graphs=1)
    with pytest.warns(UserWarning, match="more than max_graphs=1 shapes"):
        run(graphed, state, [batches(1, size)[0] for size in range(2, 40)])
    assert len(graphed.execution.warm) <= 8


def syncing(model, batch):
    return loss_fn(model, batch) * (1.0 if model.last.weight.sum().item() > 1e9 else 0.5)


def counting(model, batch, calls=[]):  # noqa: B006
    calls.append(None)
    ft.put_scalar("calls", float(len(calls)))
    return loss_fn(model, batch)


class Moving(Net):
    def forward(self, x):
        self.last.weight.data = self.last.weight.data * 1.0
        return super().forward(x)


def drawing(model, batch):
    return loss_fn(model, batch) * (0.5 + random.random())


REFUSED = {
    "draws": ({"loss": drawing, "seeds": "all"}, "draws from a generator of the host"),
    "sync": ({"loss": syncing}, r"can't be captured .*not permitted.*look for \.item"),
    "python": ({"loss": counting}, r"\['calls'\] are computed by Python and change"),
    "raise": ({"on_nonfinite": "raise"}, r"on_nonfinite='raise' looks at every step's result on the host"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_runs_eagerly_or_says_why(name, as_on_a_device):
    """auto goes on with one warning and the eager step's bits; always raises GraphError and leaves the state whole."""
    kwargs, message = REFUSED[name]
    data = batches(8)
    step_fn, state = job(**kwargs)
    expected = run(ft.shell.in_place(step_fn), state, data)
    step_fn, state = job(**kwargs)
    graphed, _ = recorded(step_fn)
    with pytest.warns(UserWarning, match="goes on eagerly") as warned:
        testing.assert_states_equal(run(graphed, state, data)[-1], expected[-1])
    assert [one.filename for one in warned] == [__file__]  # where the step is called
    step_fn, state = job(**kwargs)
    graphed, _ = recorded(step_fn, graph="always")
    states = run(graphed, state, data[:WARMUP])
    now = graphed.memory.advanced(states[-1], {}).replace(step=WARMUP, position=WARMUP)
    with pytest.raises(ft.GraphError, match=message):
        graphed(now, data[WARMUP])
    testing.assert_states_equal(ft.snapshot(now), states[-1])


def test_a_forward_that_moves_parameters_is_not_captured(as_on_a_device):
    """Its parameters stay where they were."""
    torch.manual_seed(0)
    model = Moving()
    optimizer = ft.optimizer(torch.optim.AdamW, lr=1e-3, fused=True)
    graphed, _ = recorded(ft.supervised_step(model, loss_fn, optimizer))
    with pytest.warns(UserWarning, match="puts other tensors in the place of parameters"):
        run(graphed, ft.init_state(model, optimizer), batches(WARMUP + 3))
    assert list(graphed.execution.refused.values()) == [
        "the forward puts other tensors in the place of parameters or buffers"
    ]
    assert torch.isfinite(model.last.weight).all()


def test_a_state_from_elsewhere_is_copied_into_the_graphs_memory(as_on_a_device):
    """A roll-back to a snapshot replays the same graph; the steps after it are the same."""
    data = batches(10)
    step_fn, state = job()
    graphed, engine = recorded(step_fn)
    states = run(graphed, state, data)
    again = run(graphed, states[5], data[6:])
    testing.assert_states_equal(again[-1], states[-1])
    assert engine.captures == 1


def test_a_state_of_other_structure_is_captured_anew(as_on_a_device):
    """Without optimizer state the memory moves: warm-up and capture begin again, not on dead memory."""
    data = batches(14)
    step_fn, state = job()
    fresh = ft.snapshot(state)
    expected = run(step_fn, fresh, data[:8])
    graphed, engine = recorded(step_fn)
    run(graphed, state, data[:6])
    got = run(graphed, fresh, data[:8])
    close(got[-1], expected[-1])
    assert engine.captures == 2


def test_train_and_eval_mode_have_graphs_of_their_own(as_on_a_device):
    """A replay never runs with the flags of another capture."""
    data = batches(2 * WARMUP + 4)
    step_fn, state = job()
    graphed, engine = recorded(step_fn)
    states = run(graphed, state, data[: WARMUP + 2])
    step_fn.model.drop.eval()
    run(graphed, states[-1], data[WARMUP + 2 :])
    assert engine.captures == 2


def test_the_old_state_is_consumed_and_metrics_are_not_overwritten(as_on_a_device):
    """What a state reports stays, whatever the graph writes next; its leaves say that they are gone."""
    data = batches(8)
    step_fn, state = job()
    graphed, _ = recorded(step_fn)
    states = [state]
    for batch in data:
        states.append(graphed(states[-1], batch))
    losses = [state.metrics["loss"].item() for state in states[1:]]
    assert len(set(losses)) == len(losses)
    assert states[-2].metrics["logits"].tensor.ne(states[-1].metrics["logits"].tensor).any()
    for field in ("params", "buffers", "opt_state"):
        with pytest.raises(ft.StateConsumedError, match=f"step {len(data) - 1} was consumed by step {len(data)}"):
            len(getattr(states[-2], field))


def test_a_model_that_another_step_runs_on_is_refused_before_it_is_moved(monkeypatch):
    """Also if that is the very same step in place: the model stays where it is."""
    step_fn, _ = job()
    monkeypatch.setattr("fntrain.shell.steps.graphs.checked_device", torch.device)
    monkeypatch.setattr("fntrain.shell.steps.graphs.CudaEngine", lambda device: RecordingEngine(None))
    moved = []
    monkeypatch.setattr(step_fn.model, "to", lambda *to, **how: moved.append(to))
    first = ft.shell.in_place(step_fn)
    with pytest.raises(ValueError, match="another step runs in place"):
        ft.shell.cuda_step(step_fn)
    assert moved == []
    del first
    assert isinstance(ft.shell.cuda_step(step_fn).execution, Graphs)
    assert len(moved) == 1


def test_the_same_call_gives_the_same_step(monkeypatch):
    """A line run again in a notebook gives the step that runs on the model already; with other options it is refused."""
    step_fn, _ = job()
    monkeypatch.setattr("fntrain.shell.steps.graphs.checked_device", torch.device)
    monkeypatch.setattr("fntrain.shell.steps.graphs.CudaEngine", lambda device: RecordingEngine(None))
    monkeypatch.setattr(step_fn.model, "to", lambda *to, **how: None)
    first = ft.shell.cuda_step(step_fn)
    assert ft.shell.cuda_step(step_fn) is first
    with pytest.raises(ValueError, match="another step runs in place"):
        ft.shell.cuda_step(step_fn, max_graphs=2)


def test_autocast_around_the_call_is_a_graph_of_its_own(as_on_a_device):
    """A replay never runs with the casts of another capture."""
    data = batches(2 * WARMUP + 4)
    step_fn, state = job()
    graphed, engine = recorded(step_fn)
    states = run(graphed, state, data[: WARMUP + 2])
    with torch.autocast("cpu", torch.bfloat16):
        run(graphed, states[-1], data[WARMUP + 2 :])
    assert engine.captures == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_message_says_what_to_do():
    """Neither a silent CPU run nor torch's own assertion."""
    step_fn, _ = job()
    with pytest.raises(RuntimeError, match=r"sees 0 CUDA devices; use ft\.shell\.in_place"):
        ft.shell.cuda_step(step_fn)
    with pytest.raises(ValueError, match="expected a CUDA device"):
        ft.shell.cuda_step(step_fn, device="cpu")
    with pytest.raises(ValueError, match="graph: got 'on'"):
        ft.shell.cuda_step(step_fn, graph="on")
    with pytest.raises(TypeError, match=r"expected what ft\.supervised_step returned"):
        ft.shell.cuda_step(lambda state, batch: state)


def test_freezing_a_layer_is_a_graph_of_its_own(as_on_a_device):
    """A replay never trains what was frozen after its capture."""
    data = batches(2 * WARMUP + 4)
    step_fn, state = job()
    graphed, engine = recorded(step_fn)
    states = run(graphed, state, data[: WARMUP + 2])
    step_fn.model.last.weight.requires_grad_(False)
    after = run(graphed, states[-1], data[WARMUP + 2 :])
    assert torch.equal(after[-1].params["last.weight"], states[-1].params["last.weight"])
    assert engine.captures == 2


# On a GPU. Warnings there are torch's about itself.


def on_gpu(graph, **kwargs):
    step_fn, state = job(**kwargs)
    return ft.shell.cuda_step(step_fn, graph=graph), state


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kwargs", WHOLE, ids=str)
def test_gpu_a_replayed_step_is_the_eager_one(kwargs):
    """Real captures: dropout, buffers, schedules, accumulation and precisions as in the eager step."""
    data = batches(12, bad=() if kwargs.get("on_nonfinite") else (6, 8))
    eager, state = on_gpu("never", **kwargs)
    expected = run(eager, state, data)
    graphed, state = on_gpu("always", **kwargs)
    for got, want in zip(run(graphed, state, data), expected, strict=True):
        close(got, want)
    assert len(graphed.execution.graphs) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("cls", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"capturable": True})]
)
def test_gpu_other_optimizers_run_after_the_graph_bitwise(cls, options):
    """Forward and backward replayed, the class's own step after it."""
    data = batches(8, bad=(5,))
    eager, state = on_gpu("never", cls=cls, options=options)
    expected = run(eager, state, data)
    graphed, state = on_gpu("always", cls=cls, options=options)
    testing.assert_states_equal(run(graphed, state, data)[-1], expected[-1])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kwargs", [{}, {"clip_grad_norm": 0.1}, {"accumulate": 2}, {"precision": "fp16"}], ids=str)
def test_gpu_in_place_is_bitwise_the_pure_step(kwargs):
    """The law of in_place holds on the device too, skipped steps included."""
    data = batches(8, bad=(3, 5))
    step_fn, _ = job(**kwargs)
    step_fn.model.cuda()
    pure = ft.supervised_step(step_fn.model, step_fn.loss_fn, step_fn.optimizer, **kwargs)
    state = ft.snapshot(ft.init_state(pure.model, pure.optimizer, seed=3))
    data = [{name: tensor.cuda() for name, tensor in batch.items()} for batch in data]
    expected = run(pure, state, data)
    for got, want in zip(run(ft.shell.in_place(pure), state, data), expected, strict=True):
        testing.assert_states_equal(got, want)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graph", ["never", "auto"])
def test_gpu_steps_never_wait_for_the_device(graph):
    """Between two looks at the metrics nothing synchronises, from the second step on."""
    data = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches(20, bad=(9,))]
    step_fn, state = on_gpu(graph, clip_grad_norm=1.0)
    for batch in data[: WARMUP + 2]:
        state = step_fn(state, batch)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in data[WARMUP + 2 :]:
            state = step_fn(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(state.metrics["loss"])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_gpu_a_failed_capture_leaves_the_state_whole(name):
    """The device goes on after a capture that an operation made impossible."""
    kwargs, message = REFUSED[name]
    data = batches(8)
    eager, state = on_gpu("never", **kwargs)
    expected = run(eager, state, data)
    graphed, state = on_gpu("auto", **kwargs)
    testing.assert_states_equal(run(graphed, state, data)[-1], expected[-1])
    graphed, state = on_gpu("always", **kwargs)
    with pytest.raises(ft.GraphError, match=message):
        run(graphed, state, data)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_gpu_graphs_of_several_shapes_share_memory():
    """Replays of different shapes in turn do not disturb each other."""
    data = [batches(1, size, seed=index)[0] for index in range(2 * WARMUP) for size in (4, 64, 7)]
    eager, state = on_gpu("never")
    expected = run(eager, state, data)
    graphed, state = on_gpu("always")
    close(run(graphed, state, data)[-1], expected[-1])
    assert len(graphed.execution.graphs) == 3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_channels_last_and_compile(compiled):
    """A convolution in channels_last, through torch.compile too, trains and keeps the state's layout."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    optimizer = ft.optimizer(torch.optim.AdamW, lr=1e-2, fused=True)
    step_fn = ft.supervised_step(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), optimizer, precision="bf16")
    step_fn = ft.shell.cuda_step(step_fn, channels_last=True, compile=compiled)
    state = ft.init_state(model, optimizer)
    batch = (torch.randn(16, 3, 12, 12), torch.randint(0, 2, (16,)))
    losses = []
    for _ in range(20):
        state = step_fn(state, batch)
        losses.append(state.metrics["loss"])
    assert losses[-1] < losses[0]
    assert state.params["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert len(step_fn.execution.graphs) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_gpu_tf32_is_on_inside_the_step_only():
    """The switch is put back, and changes the products."""
    torch.manual_seed(0)
    before = torch.get_float32_matmul_precision()
    model = nn.Linear(512, 512).cuda()
    batch = torch.randn(64, 512, device="cuda")
    optimizer = ft.optimizer(torch.optim.SGD, lr=0.1)
    losses = {}
    for precision in ("fp32", "tf32"):
        step_fn = ft.supervised_step(model, lambda m, b: m(b).square().mean(), optimizer, precision=precision)
        losses[precision] = step_fn(ft.init_state(model, optimizer), batch).metrics["loss"].item()
    assert losses["fp32"] != losses["tf32"]
    assert losses["fp32"] == pytest.approx(losses["tf32"], rel=1e-2)
    assert torch.get_float32_matmul_precision() == before
