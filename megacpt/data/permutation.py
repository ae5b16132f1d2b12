"""A pseudo-random permutation of 0 … n-1 with random access and no memory: a Feistel network over the next power of
four, walked until it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains")."""

import hashlib

import numpy as np

_ROUNDS = 4


def permute(indices: np.ndarray, n: int, key: tuple) -> np.ndarray:
    """The images of `indices` under the permutation of 0 … n-1 that `key` names.

    Args:
        indices: integers in [0, n).
        key: anything with a stable repr, for example (seed, "epoch", 3).
    Returns:
        int64, same shape as `indices`.
    """
    half = max(1, ((max(n, 2) - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest(), "<u8")
    out = np.asarray(indices, np.uint64).reshape(-1).copy()
    pending = np.arange(len(out))
    while len(pending):
        x = out[pending]
        left, right = x >> shift, x & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        x = (left << shift) | right
        out[pending] = x
        pending = pending[x >= n]
    return out.astype(np.int64).reshape(np.shape(indices))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
