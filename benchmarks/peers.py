"""Other training libraries as competitors of overhead.py: bare, and with the loggers and callbacks they usually have.

All train a copy of the same model on the same batches with AdamW(fused=True), and must end with bitwise the weights of
the raw loop. Bare rows use what each library documents as its fast settings. Logging rows write loss, learning rate and
times every 20 steps to the console (a progress bar where that is the library's console), to TensorBoard, and to a file
of lines where it has one; Lightning's Trainer, Ignite and the detectron2-style trainer also have a checkpoint callback
that is idle. Those that own the loop run in a thread of their own (see harness.py); Fabric and Accelerate leave the
loop, and most of the logging, to their user.
"""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from d2_style import d2_bare, d2_logging
from harness import EVERY, LR, OPTIONS, Batch, Case, Competitor, Entry, Lent, MissingError, lent, loss_fn
from torch import Tensor, nn

Place = Callable[[str], Path]  # name -> a directory of its own
NEVER = 10**9


def bare_entries() -> dict[str, Entry]:
    return {
        "Lightning Trainer, barebones": Entry(partial(lightning_trainer, directory=None)),
        "Lightning Fabric": Entry(partial(fabric, directory=None)),
        "Accelerate": Entry(partial(accelerate, directory=None)),
        "Ignite, Engine": Entry(partial(ignite, directory=None)),
        "TorchTNT, TrainUnit": Entry(partial(torchtnt, directory=None)),
        "detectron2-style SimpleTrainer": Entry(d2_bare),
    }


def logging_entries(place: Place) -> dict[str, Entry]:
    return {
        "Lightning Trainer, CSV, TensorBoard, progress bar": Entry(
            lambda case: lightning_trainer(case, directory=place("lightning"))
        ),
        "Lightning Fabric, CSV, TensorBoard, print": Entry(lambda case: fabric(case, directory=place("fabric"))),
        "Accelerate, TensorBoard, lines, print": Entry(lambda case: accelerate(case, directory=place("accelerate"))),
        "Ignite, TensorBoard, lines, progress bar": Entry(lambda case: ignite(case, directory=place("ignite"))),
        "TorchTNT AutoUnit, TensorBoard, progress bar": Entry(lambda case: torchtnt(case, directory=place("tnt"))),
        "detectron2-style trainer, default hooks": Entry(lambda case: d2_logging(case, place("detectron2"))),
    }


def need(*modules: str) -> None:
    if any(find_spec(module) is None for module in modules):
        raise MissingError("not installed: pip install -e '.[bench]'")


@contextmanager
def quiet() -> Iterator[None]:
    """No advice on number of workers and the like, once, at the start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------------------------------------------------- lightning


def lightning_trainer(case: Case, *, directory: Path | None) -> Competitor:
    need("lightning")
    with quiet():
        import lightning.pytorch as pl
        from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
        from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logs = directory is not None

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, _: int) -> Tensor:
            loss = loss_fn(self.model, batch)
            if logs:
                self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR, **OPTIONS)

    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1}
    if directory is None:
        options |= {"barebones": True}
    else:
        options |= {
            "logger": [CSVLogger(directory), TensorBoardLogger(directory)],
            "log_every_n_steps": EVERY,
            "callbacks": [
                TQDMProgressBar(refresh_rate=EVERY),
                LearningRateMonitor(logging_interval="step"),
                ModelCheckpoint(directory, every_n_train_steps=NEVER),
            ],
            "enable_model_summary": False,
        }
    model = deepcopy(case.model)

    def train(batches: Lent) -> None:
        with quiet():
            pl.Trainer(**options).fit(Module(model), batches)

    return lent(case, train, lambda _: list(model.parameters()), sized=True)


def fabric(case: Case, *, directory: Path | None) -> Competitor:
    need("lightning")
    with quiet():
        from lightning.fabric import Fabric
        from lightning.fabric.loggers import CSVLogger, TensorBoardLogger

        loggers = [] if directory is None else [CSVLogger(directory), TensorBoardLogger(directory)]
        made = Fabric(accelerator="cpu", devices=1, loggers=loggers)
        model = deepcopy(case.model)
        params = list(model.parameters())
        net, optimizer = made.setup(model, torch.optim.AdamW(params, lr=LR, **OPTIONS))
    done = 0

    def run(steps: int) -> None:
        nonlocal done
        for batch in case.take(steps):
            optimizer.zero_grad()
            loss = loss_fn(net, batch)
            made.backward(loss)
            optimizer.step()
            done += 1
            if directory is not None and done % EVERY == 0:
                value = loss.item()
                made.log_dict({"loss": value, "lr": LR}, step=done)
                made.print(f"step {done}  loss {value:.4g}  lr {LR:.4g}", flush=True)

    return Competitor(run, lambda: params)


# --------------------------------------------------------------------------------------------------------- accelerate


def accelerate(case: Case, *, directory: Path | None) -> Competitor:
    need("accelerate")
    with quiet():
        from accelerate import Accelerator

        trackers = {} if directory is None else {"log_with": "tensorboard", "project_dir": str(directory)}
        made = Accelerator(cpu=True, **trackers)
        if directory is not None:
            made.init_trackers("run")
        model = deepcopy(case.model)
        params = list(model.parameters())
        net, optimizer = made.prepare(model, torch.optim.AdamW(params, lr=LR, **OPTIONS))
    lines = None if directory is None else (directory / "metrics.jsonl").open("a")
    done = 0

    def run(steps: int) -> None:
        nonlocal done
        for batch in case.take(steps):
            optimizer.zero_grad()
            loss = loss_fn(net, batch)
            made.backward(loss)
            optimizer.step()
            done += 1
            if lines is not None and done % EVERY == 0:
                row = {"loss": loss.item(), "lr": LR}
                made.log(row, step=done)
                lines.write(json.dumps({"step": done, **row}) + "\n")
                lines.flush()
                made.print(f"step {done}  loss {row['loss']:.4g}  lr {LR:.4g}", flush=True)

    def finish() -> None:
        if lines is not None:
            lines.close()
            made.end_training()

    return Competitor(run, lambda: params, finish)


# ------------------------------------------------------------------------------------------------------------- ignite


def ignite(case: Case, *, directory: Path | None) -> Competitor:
    need("ignite")
    with quiet():
        from ignite.engine import Engine, Events, create_supervised_trainer
        from ignite.handlers import Checkpoint, DiskSaver, ProgressBar, TensorboardLogger, Timer
        from ignite.handlers.tensorboard_logger import OptimizerParamsHandler, OutputHandler
        from ignite.metrics import RunningAverage

    model = deepcopy(case.model)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=LR, **OPTIONS)

    def update(_: Any, batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    def train_bare(batches: Lent) -> None:
        engine = Engine(update)
        engine.interrupt_resume_enabled = False  # documented: without the generator that makes runs resumable
        engine.run(batches, max_epochs=1)

    def train_logging(batches: Lent) -> None:
        def flat_loss(logits: Tensor, targets: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())

        engine = create_supervised_trainer(model, optimizer, flat_loss)  # its output is loss.item()
        timer = Timer(average=True).attach(
            engine, resume=Events.ITERATION_STARTED, pause=Events.ITERATION_COMPLETED, step=Events.ITERATION_COMPLETED
        )
        RunningAverage(output_transform=lambda loss: loss).attach(engine, "loss")
        ProgressBar().attach(engine, ["loss"], event_name=Events.ITERATION_COMPLETED(every=EVERY))
        saver = Checkpoint({"model": model}, DiskSaver(str(directory), require_empty=False))
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=NEVER), saver)
        each = Events.ITERATION_COMPLETED(every=EVERY)
        with (
            TensorboardLogger(log_dir=str(directory)) as board,
            (Path(str(directory)) / "metrics.jsonl").open("a") as file,
        ):
            board.attach(engine, event_name=each, log_handler=OutputHandler("training", metric_names=["loss"]))
            board.attach(engine, event_name=each, log_handler=OptimizerParamsHandler(optimizer))

            @engine.on(each)  # type: ignore[untyped-decorator]
            def write(engine: Any) -> None:
                row = {"step": engine.state.iteration, "loss": engine.state.metrics["loss"], "time": timer.value()}
                file.write(json.dumps(row) + "\n")
                file.flush()

            engine.run(batches, max_epochs=1)

    return lent(case, train_bare if directory is None else train_logging, lambda _: params)


# ----------------------------------------------------------------------------------------------------------- torchtnt


def import_torchtnt() -> None:
    """TorchTNT 0.2.4 imports pkg_resources, which setuptools no longer has, and uses it only if torch has no version.

    An empty module of that name lets it be imported.
    """
    if find_spec("pkg_resources") is not None or "torchtnt.framework" in sys.modules:
        return
    sys.modules["pkg_resources"] = ModuleType("pkg_resources")
    try:
        import torchtnt.framework  # noqa: F401
    finally:
        del sys.modules["pkg_resources"]


def torchtnt(case: Case, *, directory: Path | None) -> Competitor:
    need("torchtnt")
    with quiet():
        import_torchtnt()
        from torchtnt.framework.auto_unit import AutoUnit
        from torchtnt.framework.callbacks.iteration_time_logger import IterationTimeLogger
        from torchtnt.framework.callbacks.lambda_callback import Lambda
        from torchtnt.framework.callbacks.tqdm_progress_bar import TQDMProgressBar
        from torchtnt.framework.train import train as tnt_train
        from torchtnt.framework.unit import TrainUnit
        from torchtnt.utils.loggers.tensorboard import TensorBoardLogger

    model = deepcopy(case.model)

    class Unit(TrainUnit):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.module = model
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **OPTIONS)

        def train_step(self, state: Any, data: Batch) -> None:  # the library asks for these names
            del state
            self.optimizer.zero_grad()
            loss = loss_fn(self.module, data)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    def train_bare(batches: Lent) -> None:
        tnt_train(Unit(), batches, max_epochs=1)

    def train_logging(batches: Lent) -> None:
        board = TensorBoardLogger(str(directory))

        class Auto(AutoUnit):  # type: ignore[misc]
            def compute_loss(self, state: Any, data: Batch) -> tuple[Tensor, None]:
                del state
                return loss_fn(self.module, data), None

            def configure_optimizers_and_lr_scheduler(self, module: nn.Module) -> tuple[torch.optim.Optimizer, None]:
                return torch.optim.AdamW(module.parameters(), lr=LR, **OPTIONS), None

            def on_train_step_end(self, state: Any, data: Batch, step: int, results: Any) -> None:
                del state, data
                if step % EVERY == 0:
                    board.log("loss", results.loss.item(), step)

        def report_lr(_: Any, unit: Any) -> None:  # LearningRateMonitor writes at every step or epoch, not every 20
            if (step := unit.train_progress.num_steps_completed) % EVERY == 0:
                board.log("lr", unit.optimizer.param_groups[0]["lr"], step)

        callbacks = [
            TQDMProgressBar(refresh_rate=EVERY),
            IterationTimeLogger(board, moving_avg_window=EVERY, log_every_n_steps=EVERY),
            Lambda(on_train_step_end=report_lr),
        ]
        tnt_train(Auto(module=model, device=torch.device("cpu")), batches, max_epochs=1, callbacks=callbacks)
        board.close()

    return lent(case, train_bare if directory is None else train_logging, lambda _: list(model.parameters()))
