"""The order of the data: keyed permutations that are computed, not stored.

The place of a window in an epoch must be a function of (seed, epoch, place) alone, and at 10^9 windows a stored order takes
gigabytes a process. A Feistel network over the next power of four permutes numbers of any range, with cycle walking for
what falls outside (Black and Rogaway 2002): every place costs a few dozen integer operations and nothing is kept.
"""

import numpy as np

_ROUNDS = 6  # four make a Feistel network a pseudo-random permutation (Luby and Rackoff 1988)
_GOLDEN = 0x9E3779B97F4A7C15


def permute(places: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Where a permutation of range(n) sends each place.

    Args:
        places: int64, each in [0, n).
        n: size of the range.
        key: non-negative integers that choose the permutation.

    Returns:
        int64, like `places`; distinct places go to distinct numbers.
    """
    if n < 2:
        return np.zeros_like(places)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    # The words of Philox do not change between versions of numpy.
    keys = np.random.Philox(np.random.SeedSequence(key)).random_raw(_ROUNDS)
    found = places.astype(np.uint64)
    outside = np.ones(found.shape, bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & low)
        found[outside] = (left << half) | right
        outside = found >= n
    return found.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words that spreads every bit over all (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
