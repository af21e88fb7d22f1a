"""Errors of fntrain that a caller may want to catch by kind; wrong values and kinds raise ValueError and TypeError.

What is no error is said to the user by one channel, chosen by what it is:

- `warnings.warn`: the caller's code should change, and this is seen when a run starts or in its first steps. Python
  shows it once for each place, and `-W error` stops the run before it has cost anything. Core and steps know no other.
- the logger "fntrain": what happens in a run, and what a hook finds at its end, where an error would cost the result.
  The log of the run (`ft.shell.setup`) keeps it with time and rank. Info is as expected, a warning is to be read.
- `print`: what was asked for (command lines, the console writer), and that something long is under way (a compilation).
"""


class FntrainError(Exception):
    """Base of the errors below."""


class ConfigError(FntrainError, ValueError):
    """A setting that can't be, or does not go with another one or with this machine; the message names it."""


class DataExhaustedError(FntrainError):
    """The data ended before `max_steps`; the message says how many batches it gave."""


class CheckpointError(FntrainError):
    """A checkpoint is missing, damaged, of another model, or cannot be written; the message names file and leaf."""


class NonFiniteError(FntrainError, FloatingPointError):
    """Loss or gradients were inf or nan under `on_nonfinite="raise"`; the message names them and the step."""


class GraphError(FntrainError, RuntimeError):
    """A step can't be captured as a CUDA graph; the message says why and what to do."""


class StateConsumedError(FntrainError, RuntimeError):
    """A state was used after a step run in place wrote to its memory; the message names both steps."""


class MissingExtraError(FntrainError, ImportError):
    """A feature needs a package of an optional extra; the message names the extra."""


class LaunchError(FntrainError, RuntimeError):
    """A process of a launched job failed; the message has its rank, its traceback, and what the others said."""


class ReplicaError(FntrainError, RuntimeError):
    """Ranks that should hold the same state do not; the message names the leaf and the rank."""


for _error in [FntrainError, *FntrainError.__subclasses__()]:
    _error.__module__ = "fntrain"  # tracebacks show the name under which a caller imports and catches it
