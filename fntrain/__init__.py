"""fntrain: a functional minimal-core training library for PyTorch.

Training is a pure fold, state_n = reduce(step_fn, batches, state_0), over a step function
`(TrainState, batch) -> TrainState` on immutable records; everything else is built around that line.
"""

from typing import TYPE_CHECKING

from fntrain import data, events, hooks, schedules, shell, writers

# Not in the order of the formatter, which would put each error on a line of its own.
# isort: off
from fntrain.core.errors import CheckpointError, ConfigError, DataExhaustedError, FntrainError, GraphError
from fntrain.core.errors import LaunchError, MissingExtraError, NonFiniteError, ReplicaError, StateConsumedError

# isort: on
from fntrain.core.fold import fit, states
from fntrain.core.gates import at_end, between, every, first, on_main, when
from fntrain.core.hook import Hook, Needs, compose, hook, identity, resource, stateful
from fntrain.core.rng import fold_in, preserved_generators, seed_generators
from fntrain.core.state import Run, StepFn, Stop, TrainState, digest, named_leaves, remember, snapshot, stop
from fntrain.core.wrapping import wrap
from fntrain.evaluation import Evaluation, evaluation
from fntrain.events import name_scope, put_histogram, put_image, put_scalar, put_scalars, put_text
from fntrain.lazy import imported_on_first_use
from fntrain.shell.checkpoints.resume import resume_or
from fntrain.shell.checkpoints.save_load import latest, load, save
from fntrain.steps.batch import num_samples, split_batch
from fntrain.steps.loss import weighted
from fntrain.steps.module import bound, init_state, load_into
from fntrain.steps.optim import Optimizer, group, optimizer
from fntrain.steps.supervised import SupervisedStep, supervised_step
from fntrain.writers.history import History

if TYPE_CHECKING:  # so that type checkers know the exports that are imported on first use
    from fntrain.jobs.cli import main
    from fntrain.jobs.config import Config, scale_config, to_dict
    from fntrain.jobs.defaults import default_hooks
    from fntrain.jobs.job import Job, Result
    from fntrain.jobs.predictor import Predictor, predictor
    from fntrain.jobs.recipe import Recipe, build, run
    from fntrain.shell.weights.export import export
    from fntrain.shell.weights.load import load_params

__all__ = [  # noqa: RUF022 (by theme)
    # packages and modules
    "data", "events", "hooks", "schedules", "shell", "writers",
    # the fold and its state
    "Run", "StepFn", "Stop", "TrainState", "digest", "fit", "named_leaves", "snapshot", "states", "stop", "wrap",
    # hooks and gates
    "Hook", "Needs", "at_end", "between", "compose", "every", "first", "hook", "identity", "on_main", "remember",
    "resource", "stateful", "when",
    # steps
    "Optimizer", "SupervisedStep", "bound", "group", "init_state", "load_into", "optimizer", "supervised_step",
    "weighted",
    # batches and random numbers
    "fold_in", "num_samples", "preserved_generators", "seed_generators", "split_batch",
    # metrics and evaluation
    "Evaluation", "History", "evaluation", "name_scope", "put_histogram", "put_image", "put_scalar", "put_scalars",
    "put_text",
    # checkpoints and weights
    "export", "latest", "load", "load_params", "resume_or", "save",
    # jobs
    "Config", "Job", "Predictor", "Recipe", "Result", "build", "default_hooks", "main", "predictor", "run",
    "scale_config", "to_dict",
    # errors
    "CheckpointError", "ConfigError", "DataExhaustedError", "FntrainError", "GraphError", "LaunchError",
    "MissingExtraError", "NonFiniteError", "ReplicaError", "StateConsumedError",
]  # fmt: skip

_ON_FIRST_USE = {
    "jobs.cli": "main",
    "jobs.config": "Config scale_config to_dict",
    "jobs.defaults": "default_hooks",
    "jobs.job": "Job Result",
    "jobs.predictor": "Predictor predictor",
    "jobs.recipe": "Recipe build run",
    "shell.weights.export": "export",
    "shell.weights.load": "load_params",
}
__getattr__, __dir__ = imported_on_first_use(globals(), _ON_FIRST_USE)
