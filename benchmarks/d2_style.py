"""A loop in the manner of detectron2, written from its documented behaviour (the package does not install from pip).

SimpleTrainer: one step takes the next batch, computes a dict of losses, sums them, backpropagates, reads every loss on
the host and refuses non-finite ones, keeps them in an EventStorage, and steps the optimizer. Hooks run around every
step; the storage holds the whole history of every scalar. Default hooks: IterationTimer, the learning rate with its
scheduler, a checkpointer, and writers every 20 steps that show medians of the last 20.
"""

import json
import math
import time
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import EVERY, LR, OPTIONS, Batch, Case, Competitor, Lent, lent, loss_fn
from torch import Tensor, nn


class EventStorage:
    """Every scalar ever put, with its step, and which of them are shown smoothed."""

    def __init__(self) -> None:
        self.step = 0
        self.history: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.latest: dict[str, tuple[float, int]] = {}
        self.smoothed: dict[str, bool] = {}

    def put_scalar(self, name: str, value: float, *, smooth: bool = True) -> None:
        value = float(value)
        self.history[name].append((value, self.step))
        self.latest[name] = (value, self.step)
        if self.smoothed.setdefault(name, smooth) != smooth:
            raise ValueError(f"{name}: was put with smooth={not smooth} before")

    def shown(self, name: str) -> float:
        values = self.history[name]
        return median(value for value, _ in values[-EVERY:]) if self.smoothed[name] else values[-1][0]


class Hook:
    """Four callbacks that see the trainer."""

    trainer: "SimpleTrainer"

    def before_train(self) -> None:
        pass

    def before_step(self) -> None:
        pass

    def after_step(self) -> None:
        pass

    def after_train(self) -> None:
        pass


class SimpleTrainer:
    def __init__(self, model: nn.Module, batches: Lent, optimizer: torch.optim.Optimizer, hooks: list[Hook]) -> None:
        self.model, self.batches, self.optimizer, self.hooks = model, iter(batches), optimizer, hooks
        self.storage, self.step = EventStorage(), 0
        for hook in hooks:
            hook.trainer = self

    def train(self) -> None:
        self.model.train()
        try:
            for hook in self.hooks:
                hook.before_train()
            while True:
                self.storage.step = self.step
                for hook in self.hooks:
                    hook.before_step()
                self.run_step()
                for hook in self.hooks:
                    hook.after_step()
                self.step += 1
        except StopIteration:
            pass
        finally:
            for hook in self.hooks:
                hook.after_train()

    def run_step(self) -> None:
        assert self.model.training
        start = time.perf_counter()
        batch: Batch = next(self.batches)
        data_time = time.perf_counter() - start
        losses = {"loss_cls": loss_fn(self.model, batch)}
        total: Any = sum(losses.values())
        self.optimizer.zero_grad()
        total.backward()
        self.write_metrics(losses, data_time)
        self.optimizer.step()

    def write_metrics(self, losses: dict[str, Tensor], data_time: float) -> None:
        numbers = {name: loss.detach().cpu().item() for name, loss in losses.items()}
        total = sum(numbers.values())
        if not math.isfinite(total):
            raise FloatingPointError(f"loss is {total} at step {self.step}: {numbers}")
        self.storage.put_scalar("data_time", data_time)
        self.storage.put_scalar("total_loss", total)
        if len(numbers) > 1:
            for name, number in numbers.items():
                self.storage.put_scalar(name, number)


class IterationTimer(Hook):
    def before_step(self) -> None:
        self.start = time.perf_counter()

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("time", time.perf_counter() - self.start)


class LearningRate(Hook):
    def before_train(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.trainer.optimizer, lambda _: 1.0)

    def after_step(self) -> None:
        self.trainer.storage.put_scalar("lr", self.trainer.optimizer.param_groups[0]["lr"], smooth=False)
        self.scheduler.step()


class Checkpointer(Hook):
    """Its turn never comes."""

    def after_step(self) -> None:
        if (self.trainer.step + 1) % 10**9 == 0:
            raise AssertionError("not in this benchmark")


class Writers(Hook):
    """Console, a file of lines and TensorBoard every 20 steps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def before_train(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(self.directory)
        self.file = (self.directory / "metrics.json").open("a")

    def after_step(self) -> None:
        storage, done = self.trainer.storage, self.trainer.step + 1
        if done % EVERY == 0:
            row = {name: storage.shown(name) for name in storage.latest}
            print(f"iter: {done}  " + "  ".join(f"{name}: {value:.4g}" for name, value in row.items()), flush=True)
            self.file.write(json.dumps({"iteration": done, **row}) + "\n")
            self.file.flush()
            for name, value in row.items():
                self.board.add_scalar(name, value, done)

    def after_train(self) -> None:
        self.file.close()
        self.board.close()


def d2_bare(case: Case) -> Competitor:
    return _trainer(case, [])


def d2_logging(case: Case, directory: Path) -> Competitor:
    return _trainer(case, [IterationTimer(), LearningRate(), Checkpointer(), Writers(directory)])


def _trainer(case: Case, hooks: list[Hook]) -> Competitor:
    model = deepcopy(case.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **OPTIONS)
    return lent(
        case, lambda lent: SimpleTrainer(model, lent, optimizer, hooks).train(), lambda _: list(model.parameters())
    )
