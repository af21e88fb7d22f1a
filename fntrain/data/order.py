"""Keyed permutations: the order of an epoch as a function of (size, key), of which any part can be asked for."""

from functools import lru_cache

import torch
from torch import Tensor

from fntrain.core.rng import fold_in

_TRUE_PERMUTATION_UP_TO = 1 << 20  # items; above, a Feistel network is evaluated block by block
_BLOCK = 16384


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
