"""hooks.progress_bar: a tqdm bar over the steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import attrs

from fntrain.core import gates
from fntrain.core.errors import MissingExtraError
from fntrain.core.hook import AnyHook, Hook, hook, resource
from fntrain.core.state import TrainState


@attrs.frozen
class ProgressBar:
    """The parameters of the hook; called, it gives the live one, which holds the bar."""

    @contextmanager
    def __call__(self) -> Iterator[Hook]:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise MissingExtraError("progress_bar needs tqdm: pip install 'fntrain[cli]'") from error
        with tqdm(unit="step") as bar:

            def before_train(state: TrainState) -> None:
                bar.reset(state.run.max_steps)
                bar.update(state.step)

            def after_step(state: TrainState) -> None:
                bar.update(state.step - bar.n)  # not 1: a roll-back takes the bar back

            yield hook(before_train=before_train, after_step=after_step)


def progress_bar(*, name: str = "progress_bar") -> AnyHook:
    """Show a progress bar over the steps; needs the extra `cli`.

    Raises:
      MissingExtraError: (when the run starts) tqdm is not installed.
    Example:
      >>> progress_bar()
      on_main(ProgressBar())
    """
    return gates.on_main(resource(ProgressBar(), name=name))
