"""predictor: a trained recipe as a function of raw inputs."""

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import torch
from toolz import partition_all
from torch import Tensor, nn
from torch.utils.data import default_collate

from fntrain.core.check import whole
from fntrain.core.errors import ConfigError
from fntrain.core.state import TrainState
from fntrain.jobs.config import from_dict
from fntrain.jobs.defaults import device_of
from fntrain.jobs.recipe import Recipe
from fntrain.shell.checkpoints.paths import AnyPath, path_of
from fntrain.shell.checkpoints.save_load import latest
from fntrain.shell.weights.load import load_params
from fntrain.steps.batch import is_array, map_batch, move_batch
from fntrain.steps.containers import leaves, map_leaves
from fntrain.steps.module import load_into


@attrs.frozen(kw_only=True)
class Predictor:
    """A function of raw inputs; made by `predictor`. It owns its model, which training does not change."""

    recipe: Recipe = attrs.field(repr=False)
    model: nn.Module = attrs.field(repr=lambda model: type(model).__name__)
    config: Any

    def __call__(self, raw: Any) -> Any:
        """Return the result for one raw input."""
        return self.batch([raw])[0]

    def batch(self, raws: Iterable[Any], *, batch_size: int = 256) -> list[Any]:
        """Return the results for several raw inputs, in order.

        Args:
          raws: any number of them.
          batch_size: how many the model is given at once.
        Raises:
          ValueError: the model gave another number of outputs than it got samples.
        """
        samples = [self.recipe.preprocess(raw) for raw in raws]
        results: list[Any] = []
        for some in partition_all(whole("batch_size", batch_size, 1), samples):
            outputs = self._outputs(some)
            results += [self.recipe.postprocess(_of_sample(outputs, index)) for index in range(len(some))]
        return results

    def _outputs(self, samples: Sequence[Any]) -> Any:
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            outputs = self.recipe.predict_fn(self.model, move_batch(default_collate(list(samples)), device))
        for leaf in leaves(outputs):
            is_scalar = isinstance(leaf, Tensor) and leaf.ndim == 0
            if is_scalar or (_has_samples(leaf) and len(leaf) != len(samples)):
                got = f"an output of shape {tuple(leaf.shape)} for {len(samples)} samples"
                expected = f"tensors whose first dimension is {len(samples)}, in dicts, lists or tuples"
                raise ValueError(f"predict_fn: gave {got}; expected {expected}")
        return map_batch(Tensor.cpu, outputs)


def predictor(
    recipe: Recipe, checkpoint: TrainState | str | os.PathLike[str], *, config: Any = None, device: str | None = None
) -> Predictor:
    """Make a function of raw inputs from a trained recipe: preprocess, model in eval mode, postprocess.

    Args:
      recipe: its `build_model`, `preprocess`, `predict_fn` and `postprocess` are used.
      checkpoint: directory of a run (its newest intact checkpoint, and its config.json), one checkpoint, a safetensors
        file, or a state, such as `ft.hooks.averaged(state)`.
      config: settings in place of the run's or the recipe's.
      device: in place of the one in the settings, which may have been of another machine.
    Raises:
      CheckpointError: nothing there, damaged, or of another model.
      ConfigError: the run's config.json is not of this recipe; there is no such device here.
    Example:
      >>> recipe = ft.Recipe(build_model=lambda config: nn.Linear(2, 1), build_data=lambda config: [],
      ...                    loss_fn=lambda model, batch: model(batch).mean(), postprocess=lambda output: output.item())
      >>> state = ft.TrainState(step=9, position=9, seed=0,
      ...                       params={"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
      >>> predict = predictor(recipe, state)
      >>> predict(torch.tensor([1.0, 2.0])), predict.batch([torch.ones(2), torch.zeros(2)])
      (3.0, [2.0, 0.0])

    Source: detectron2's DefaultPredictor
    """
    if isinstance(checkpoint, TrainState):
        config = recipe.config if config is None else config
        model = recipe.build_model(config)
        load_into(model, checkpoint)
    else:
        path = path_of(checkpoint)
        config = _config_beside(path, recipe) if config is None else config
        model = recipe.build_model(config)
        load_params(latest(path) or path, model)
    config = config if device is None else attrs.evolve(config, device=device)
    model.to(device_of(config)).eval().requires_grad_(False)
    return Predictor(recipe=recipe, model=model, config=config)


def _of_sample(outputs: Any, index: int) -> Any:
    """Return the outputs for one sample: its row of every tensor and array; all other leaves belong to each sample."""
    return map_leaves(lambda leaf: leaf[index] if _has_samples(leaf) else leaf, outputs)


def _has_samples(leaf: Any) -> bool:
    return is_array(leaf) and leaf.ndim > 0


def _config_beside(path: AnyPath, recipe: Recipe) -> Any:
    """Return the settings in the config.json of a checkpoint's run, which may lie up to two directories above it."""
    path = path.absolute()
    for one in (path, path.parent, path.parent.parent):
        kept = one / "config.json"
        if kept.is_file():
            try:
                return from_dict(recipe.config, json.loads(kept.read_bytes()))
            except (ValueError, AttributeError) as error:  # no JSON, another field, or no object at the top
                raise ConfigError(f"{kept}: is not of this recipe ({error}); give config=...") from error
    return recipe.config
