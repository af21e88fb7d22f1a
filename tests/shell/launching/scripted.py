"""A recipe of functions that can't be pickled, as a script: python scripted.py, python -m scripted."""

import torch

import fntrain as ft

RECIPE = ft.Recipe(
    config=ft.Config(max_steps=4, batch_size=6, checkpoint_every=2),
    build_model=lambda config: torch.nn.Linear(2, 1),
    build_data=lambda config: torch.arange(40.0).reshape(20, 2) / 40,
    loss_fn=lambda model, batch: model(batch).square().mean(),
)

if __name__ == "__main__":
    ft.main(RECIPE)
