"""Handwritten digits: a small CNN with augmentation, evaluation, checkpoints and exact resume.

    python recipes/digits.py                      # train; run it again and it resumes where it stopped
    python recipes/digits.py --out runs/other --steps 500
    tensorboard --logdir runs

Data: scikit-learn's bundled digits (1,797 images of 8x8), no download; extra `digits`.
Measured: 99.7% of the 360 test images after 1,500 steps, in 13 s on 2 CPU cores.
Copy this file and adapt it: everything is in it, nothing imports it. plain_train.py beside it is the same training
as a raw loop, which is why the two share their data and model.
"""

import argparse
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fntrain as ft


@attrs.frozen
class Config:
    steps: int = 1500
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.05
    clip_grad_norm: float = 1.0
    seed: int = 0
    workers: int = 0
    out: str = "runs/digits"
    checkpoint_every: int = 250


class Digits(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples {"image": (1, 8, 8) in [0, 1], "label": ()}; training images are shifted by up to one pixel.

    The stream seeds torch's generator for each sample, so the shift is a function of (seed, epoch, index).
    """

    def __init__(self, *, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ft.MissingExtraError("recipes/digits.py needs scikit-learn: pip install 'fntrain[digits]'") from error
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(digits.target)
        # Every fifth sample is for testing; the split never depends on the run's seed.
        test = torch.arange(len(labels)) % 5 == 0
        chosen = ~test if train else test
        self.images, self.labels, self.train = images[chosen], labels[chosen], train

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index]
        if self.train:
            down, right = torch.randint(0, 3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return {"image": image, "label": self.labels[index]}


def build_model() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 2 * 2, 10),
    )


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["image"])
    ft.put_scalar("accuracy", (logits.argmax(-1) == batch["label"]).float().mean())
    return F.cross_entropy(logits, batch["label"])


def metrics_fn(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = model(batch["image"])
    return {
        "accuracy": (logits.argmax(-1) == batch["label"]).float().mean(),
        "loss": F.cross_entropy(logits, batch["label"]),
    }


def build_optimizer(config: Config) -> ft.Optimizer:
    return ft.optimizer(
        torch.optim.AdamW,
        lr=ft.schedules.warmup_cosine(config.lr, warmup_steps=config.steps // 15, total_steps=config.steps),
        groups=[ft.group(lambda _, param: param.ndim <= 1, weight_decay=0.0)],  # not on norms and biases
        weight_decay=config.weight_decay,
        fused=True,
    )


def keep_best(state: ft.TrainState) -> ft.TrainState | None:
    """A hook of one's own: remember the best test accuracy, in every checkpoint, and report it."""
    accuracy = state.metrics.get("eval/accuracy")
    if accuracy is None:
        return None
    best = max(state.hooks["best"], float(accuracy))
    return ft.remember(state, "best", best).replace(metrics={**state.metrics, "best_accuracy": best})


def train(config: Config) -> ft.TrainState:
    torch.manual_seed(config.seed)  # for the initial weights; every later draw derives from (seed, step)
    model = build_model()
    optimizer = build_optimizer(config)
    pure = ft.supervised_step(model, loss_fn, optimizer, clip_grad_norm=config.clip_grad_norm)
    step_fn = ft.shell.cuda_step(pure) if torch.cuda.is_available() else ft.shell.in_place(pure)
    state = ft.resume_or(ft.init_state(model, optimizer, seed=config.seed), config.out)
    data = ft.data.stream(Digits(train=True), config.batch_size, seed=config.seed, num_workers=config.workers)
    evaluation = ft.evaluation(model, metrics_fn, Digits(train=False))
    hooks = [
        ft.hooks.iteration_timer(),
        ft.hooks.evaluate(evaluation, every=250),
        ft.stateful("best", 0.0, after_step=keep_best, after_train=keep_best),
        ft.hooks.write_metrics(ft.writers.default(config.out, hparams=attrs.asdict(config)), every=50),
        ft.hooks.checkpoint(config.out, every=config.checkpoint_every, keep_last=3),
    ]
    return ft.fit(step_fn, hooks, state=state, data=data, max_steps=config.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in attrs.fields(Config):
        kind: Any = field.type
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    config = Config(**vars(parser.parse_args()))
    final = train(config)
    print(f"step {final.step}: best test accuracy {final.hooks['best']:.4f}, digest {ft.digest(final)}")


if __name__ == "__main__":
    main()
