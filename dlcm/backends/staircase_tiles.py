"""Which tiles the staircase kernels use on a GPU, chosen once for each kind of problem and kept.

The choice is measured among a few candidates the first time that a kernel meets a head width, dtype, grouping and
order of magnitude of tokens. Sums are added up tile by tile, so two processes that choose differently differ in rounding:
where `torch.use_deterministic_algorithms` is on, the first candidate is taken unmeasured and every process agrees.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["forward", "query_grad", "key_grad"]


class Tiles(NamedTuple):
    """Shape of a tile, warps of a program, and depth of the software pipeline.

    Attributes:
        block_m: queries.
        block_n: keys.
        num_warps: warps.
        num_stages: tiles in flight.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By kernel and padded head width, for two-byte dtypes; the first is what is taken unmeasured. All were compiled for compute
# capability 9.0: they fit its shared memory, and their inner loops spill no registers.
_CANDIDATES: dict[tuple[Kernel, int], tuple[Tiles, ...]] = {
    ("forward", 64): (Tiles(128, 64, 4, 3), Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 3), Tiles(128, 32, 4, 4)),
    ("forward", 128): (Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 3), Tiles(128, 32, 8, 4)),
    ("forward", 256): (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 3)),
    ("query_grad", 64): (Tiles(128, 64, 8, 2), Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(128, 32, 4, 3)),
    ("query_grad", 128): (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 3), Tiles(64, 32, 4, 3)),
    ("query_grad", 256): (Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2)),
    ("key_grad", 64): (Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3), Tiles(32, 128, 4, 3)),
    ("key_grad", 128): (Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 2), Tiles(32, 128, 8, 3), Tiles(32, 64, 4, 3)),
    ("key_grad", 256): (Tiles(32, 64, 8, 2), Tiles(16, 64, 8, 2), Tiles(32, 32, 8, 2)),
}
# Four-byte elements take twice the room, and full precision is not what tensor cores are for: one modest choice.
_FLOAT32 = {64: Tiles(64, 32, 4, 2), 128: Tiles(32, 32, 4, 2), 256: Tiles(16, 32, 4, 1)}

# Programs that fill a large GPU, and the tokens per concept that the number of key blocks is guessed with. It is a guess from
# the number of tokens alone, because a sum must not be split otherwise when some document has one concept more.
_FULL_GPU, _TOKENS_PER_CONCEPT, _MAX_SPLITS = 256, 4, 8

_fixed: dict[Kernel, Tiles] = {}
_fixed_splits: list[int] = []
_chosen: dict[tuple, Tiles] = {}


def fix(tiles: dict[Kernel, Tiles], n_splits: int | None = None) -> None:
    """Use these tiles, and so many partial sums, instead of any choice from now on; choose what is not named."""
    _fixed.clear()
    _fixed.update(tiles)
    _fixed_splits[:] = [] if n_splits is None else [n_splits]


def choose_splits(n_tokens: int, n_kv_heads: int, block_n: int) -> int:
    """Into how many partial sums the gradient of each block of keys is cut; one where these blocks alone fill a GPU."""
    if _fixed_splits:
        return _fixed_splits[0]
    n_blocks = -(-n_tokens // (_TOKENS_PER_CONCEPT * block_n)) * n_kv_heads
    wanted = min(_MAX_SPLITS, max(1, _FULL_GPU // n_blocks))
    return 1 << (wanted.bit_length() - 1)


def padded_width(d_head: int) -> int:
    """Head width of a tile: a power of two that a matrix unit can take."""
    return max(16, 1 << (d_head - 1).bit_length())


def candidates(kernel: Kernel, d_head: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """What is tried for a kernel, the default first."""
    width = max(64, padded_width(d_head))
    if dtype == torch.float32:
        return (_FLOAT32[width],)
    return _CANDIDATES[kernel, width]


def choose(kernel: Kernel, q_THA: Tensor, n_kv_heads: int, launch: Callable[[Tiles], None]) -> Tiles:
    """The tiles to launch a kernel with.

    The key holds log2 of the number of tokens, so that a training whose number of concepts moves from step to step measures
    once.

    Args:
        kernel: which one.
        q_THA: the queries.
        n_kv_heads: G.
        launch: runs the kernel on the present problem; it may be run any number of times.
    """
    if kernel in _fixed:
        return _fixed[kernel]
    found = candidates(kernel, q_THA.shape[2], q_THA.dtype)
    if not q_THA.is_cuda or len(found) == 1 or torch.are_deterministic_algorithms_enabled():
        return found[0]
    n_tokens, n_heads, d_head = q_THA.shape
    key = (kernel, q_THA.device, q_THA.dtype, d_head, n_heads, n_kv_heads, round(math.log2(n_tokens)))
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return found[0]  # nothing can be timed while a graph is recorded
        _chosen[key] = _fastest(found, launch)
    return _chosen[key]


def _fastest(found: tuple[Tiles, ...], launch: Callable[[Tiles], None]) -> Tiles:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: dict[Tiles, Any] = {}
    for tiles in found:
        try:
            times[tiles] = do_bench(lambda tiles=tiles: launch(tiles), warmup=5, rep=20, return_mode="median")
        except OutOfResources:  # a GPU with less shared memory than the candidates were drawn up for
            continue
    if not times:
        raise RuntimeError(f"none of the tiles {found} fits this GPU")
    return min(times, key=lambda tiles: times[tiles])
