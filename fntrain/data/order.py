"""Data order as a function: which samples batch number s has is a function of (seed, s). Pure; nothing is read here.

Each epoch is a keyed permutation of the data set, of which any part can be asked for, so a run can start at any batch
for nothing. The global batch is cut into the ranks' shares after shuffling.
"""

from functools import lru_cache

import attrs
import torch
from torch import Tensor

from fntrain.core.check import whole
from fntrain.core.rng import fold_in

Sample = tuple[int, int]  # (epoch, index in the data set)
Span = tuple[int, int, int]  # (epoch, first place in its order, end)
_USE_ORDER = 0x6F726472  # keeps the draws of the order apart from those of samples and steps
_TRUE_PERMUTATION_UP_TO = 1 << 20  # items; above, a Feistel network is evaluated block by block
_BLOCK = 16384


@attrs.frozen(kw_only=True)
class Order:
    """What decides which samples a batch has; the parameters are those of `ft.data.stream`.

    Example:
      >>> order = Order(size=5, batch_size=2, seed=0)
      >>> sorted(index for position in range(5) for epoch, index in order.samples(position) if epoch == 0)
      [0, 1, 2, 3, 4]
    """

    size: int
    batch_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False
    ragged_last: bool = False

    @property
    def straddles(self) -> bool:
        """Whether a batch may hold the end of one epoch and the beginning of the next."""
        return not (self.drop_last or self.ragged_last)

    @property
    def smallest(self) -> int:
        """Number of samples in the smallest batch."""
        return self.size % self.batch_size or self.batch_size if self.ragged_last else self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Batches that it takes to see every sample of an epoch once (all that are not dropped)."""
        return steps_per_epoch(self.size, self.batch_size, drop_last=self.drop_last)

    def samples(self, position: int) -> list[Sample]:
        """Return the (epoch, index) pairs of a global batch, over all ranks."""
        return self._drawn(self.spans(position))

    def share(self, position: int, rank: int, world_size: int) -> list[Sample]:
        """Return one rank's part of a batch; sizes differ by at most one between ranks."""
        spans = self.spans(position)
        size = sum(end - start for _, start, end in spans)
        first, last = (-(-size * one // world_size) for one in (rank, rank + 1))
        mine, before = [], 0
        for epoch, start, end in spans:  # spans are cut, not samples: many ranks would each draw them all
            mine.append((epoch, max(start, start + first - before), min(end, start + last - before)))
            before += end - start
        return self._drawn(mine)

    def spans(self, position: int) -> list[Span]:
        """Return where a batch lies in the orders of its epochs."""
        whole("position", position, 0)
        if not self.straddles:
            epoch, batch = divmod(position, self.steps_per_epoch)
            start = batch * self.batch_size
            return [(epoch, start, min(start + self.batch_size, self.size))]
        start, end = position * self.batch_size, (position + 1) * self.batch_size
        epochs = range(start // self.size, (end - 1) // self.size + 1)
        return [(e, max(start - e * self.size, 0), min(end - e * self.size, self.size)) for e in epochs]

    def _drawn(self, spans: list[Span]) -> list[Sample]:
        return [(epoch, index) for epoch, start, end in spans if start < end for index in self._of(epoch, start, end)]

    def _of(self, epoch: int, start: int, end: int) -> list[int]:
        if not self.shuffle:
            return list(range(start, end))
        return permutation(self.size, fold_in(self.seed, _USE_ORDER, epoch), start, end)


def steps_per_epoch(num_samples: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Count the batches of an epoch; a last one that is not full counts, unless dropped.

    Example:
      >>> steps_per_epoch(10, 4), steps_per_epoch(10, 4, drop_last=True)
      (3, 2)
    """
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


def permutation(size: int, key: int, start: int, end: int) -> list[int]:
    """Return elements start to end of the permutation of range(size) that `key` names.

    Up to 2**20 items it is a true random permutation, cached; a Feistel network reaches only even permutations and is
    for larger sets, where it costs nothing to start anywhere: it is evaluated in blocks of 16,384.

    Example:
      >>> sorted(permutation(5, 7, 0, 5))
      [0, 1, 2, 3, 4]

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains" (cycle walking).
    """
    if size <= _TRUE_PERMUTATION_UP_TO:
        return _true_permutation(size, key)[start:end].tolist()
    first, last = start // _BLOCK, (max(end, start + 1) - 1) // _BLOCK
    blocks = torch.cat([_feistel_block(size, key, block) for block in range(first, last + 1)])
    return blocks[start - first * _BLOCK : end - first * _BLOCK].tolist()


@lru_cache(maxsize=2)
def _true_permutation(size: int, key: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(key))


@lru_cache(maxsize=4)
def _feistel_block(size: int, key: int, block: int) -> Tensor:
    half_bits = ((size - 1).bit_length() + 1) // 2
    values = torch.arange(block * _BLOCK, min((block + 1) * _BLOCK, size))
    values = _feistel(values, key, half_bits)
    while bool((outside := values >= size).any()):  # cycle walking: at most 4 times the domain, so few rounds
        values = torch.where(outside, _feistel(values, key, half_bits), values)
    return values


def _feistel(values: Tensor, key: int, half_bits: int) -> Tensor:
    mask = (1 << half_bits) - 1
    left, right = values >> half_bits, values & mask
    for turn in range(6):
        mixed = (right ^ _signed(fold_in(key, turn))) * _signed(0x9E3779B97F4A7C15)
        mixed = (mixed ^ ((mixed >> 29) & (2**35 - 1))) * _signed(0xBF58476D1CE4E5B9)
        left, right = right, left ^ ((mixed >> 32) & mask)
    return (left << half_bits) | right


def _signed(value: int) -> int:
    """The same 64 bits as torch's int64 reads them; its products wrap around."""
    return value - (1 << 64) if value >= 1 << 63 else value
