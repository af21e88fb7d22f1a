"""The digits recipe as a raw PyTorch loop, for when the fold does not fit: your loop, a few pieces of the library.

    python recipes/plain_train.py [--steps 1500]

It borrows only values: the stream (order is a function of the position), the schedule, and the per-step seeding. Its
losses equal those of recipes/digits.py to the last bit (a test compares them). There is no resume here.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fntrain as ft


class Digits(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, *, train: bool) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(digits.target)
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


def train(steps: int, seed: int = 0, report_every: int = 50) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(seed)
    model = build_model()
    lr = ft.schedules.warmup_cosine(3e-3, warmup_steps=steps // 15, total_steps=steps)
    weights = [param for param in model.parameters() if param.ndim > 1]
    vectors = [param for param in model.parameters() if param.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05, fused=True)
    batches = ft.data.stream(Digits(train=True), 64, seed=seed).at(0)
    losses = []
    for step in range(steps):
        batch = next(batches)
        ft.seed_generators(seed, step, 0)  # as the fold does: (seed, step, rank)
        loss = F.cross_entropy(model(batch["image"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % report_every == 0:
            print(f"step {step + 1}/{steps}  loss {losses[-1]:.4f}  lr {lr(step):.2e}", flush=True)
    return model, losses


def accuracy(model: nn.Module) -> float:
    test = Digits(train=False)
    model.eval()
    with torch.no_grad():
        return float((model(test.images).argmax(-1) == test.labels).float().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    trained, _ = train(parser.parse_args().steps)
    print(f"test accuracy {accuracy(trained):.4f}")
