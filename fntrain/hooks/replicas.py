"""hooks.check_replicas: compare what the ranks hold."""

from toolz import merge

from fntrain.core import gates, tree
from fntrain.core.errors import ReplicaError
from fntrain.core.hook import AnyHook, hook
from fntrain.core.state import TrainState, named_leaves


def compare(state: TrainState) -> None:
    """Raise ReplicaError if a leaf that should be the same on all ranks is not; the callback of the hook."""
    ranks = state.run.ranks
    if ranks.world_size == 1:
        return
    mine = {leaf: tree.fingerprint(value) for leaf, value in named_leaves(state) if tree.local(value) is value}
    if len(set(ranks.gather(tree.fingerprint(mine)))) == 1:
        return
    found = ranks.gather(mine)
    for leaf in merge(found):
        values = [theirs.get(leaf) for theirs in found]
        usual = max(values, key=values.count)
        others = [rank for rank, value in enumerate(values) if value != usual]
        if others:
            nor = f", nor is that of ranks {others[1:]}" if others[1:] else ""
            got = f"state.{leaf} of rank {others[0]} is not that of the other ranks{nor}"
            advice = "all of them should hold the same: look for what only some ranks do"
            raise ReplicaError(f"step {state.step}: {got}; {advice}")


def check_replicas(*, every: int, name: str = "check_replicas") -> AnyHook:
    """Compare digests of all that the ranks hold, every n steps and after the last one; list it before `checkpoint`.

    Each digest reads the whole state once (about 1 GB/s on a CPU). With one rank it does nothing.

    Args:
      every: number of steps between two.
      name: unique in a run.
    Raises:
      ValueError: `every` is not positive.
      ReplicaError: (in the run) a leaf differs; the message names the first, and whose.
    Example:
      >>> check_replicas(every=1000).every
      1000
    """
    return gates.at_end(gates.every(every, hook(after_step=compare, name=name, communicates=True, stops=False)))
