"""Both outcomes of an update side by side: on a GPU the device chooses one, so that the host never waits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def can_choose(new: Any, old: Any, device: torch.device) -> bool:
    """Whether a device can choose between two trees: of the same structure, all tensors, and all on that device.

    Example:
      >>> cpu = torch.device("cpu")
      >>> can_choose({"w": torch.ones(2)}, {"w": torch.zeros(2)}, cpu), can_choose({"n": 1}, {"n": 1}, cpu)
      (True, False)
    """
    if isinstance(new, Tensor):
        return isinstance(old, Tensor) and new.device == device and (new.shape, new.dtype) == (old.shape, old.dtype)
    if isinstance(new, Mapping):
        both = isinstance(old, Mapping) and new.keys() == old.keys()
        return both and all(can_choose(value, old[key], device) for key, value in new.items())
    return False


def choose(healthy: Tensor, new: Any, old: Any) -> Any:
    """Return the new tree where `healthy` (a 0-d tensor of bool) is true, and the old one where it is not.

    Where the device can't choose, the host waits for it, and one of the two trees is returned as it is: an update may
    have created state, or the optimizer keeps counters on the host.

    Example:
      >>> choose(torch.tensor(False), {"w": torch.ones(2)}, {"w": torch.zeros(2)})
      {'w': tensor([0., 0.])}
    """
    if can_choose(new, old, healthy.device):
        return _chosen(healthy, new, old)
    return new if bool(healthy) else old


def _chosen(healthy: Tensor, new: Any, old: Any) -> Any:
    if isinstance(new, Tensor):
        return torch.where(healthy, new, old)
    return {key: _chosen(healthy, value, old[key]) for key, value in new.items()}
