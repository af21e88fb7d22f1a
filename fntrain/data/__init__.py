"""Data as a function of the position: which samples a batch has (`order`), and how it is read (`loader`).

May import: `fntrain.core`. `order` is pure; `loader` starts torch's DataLoader and its workers.
Read first: `order`.
"""

from fntrain.data.loader import OwnShare, Stream, own_share, stream
from fntrain.data.order import steps_per_epoch

__all__ = ["OwnShare", "Stream", "own_share", "steps_per_epoch", "stream"]
