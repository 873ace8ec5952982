"""Block sizes of the Triton kernels, in one table by head dim and shared memory.

`python -m launch.tune_attention --backend=triton` measures candidates and prints the rows to put here.
"""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """Tile sizes and launch options of one kernel: folded query rows and keys of a tile, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


class KernelBlocks(NamedTuple):
    """Blocks of each kernel of the forward and backward pass."""

    forward: Blocks
    query_gradient: Blocks
    key_gradient: Blocks  # sinks and gists, which many query tiles see
    raw_gradient: Blocks  # raws, which few query tiles see


class DecodeBlocks(NamedTuple):
    """Keys of a tile, warps and pipeline stages of the decoding kernel."""

    keys: int = 64
    warps: int = 4
    stages: int = 3


# (compute capability from which it holds, head dim) -> blocks
TABLE: dict[tuple[int, int], KernelBlocks] = {
    (80, 64): KernelBlocks(Blocks(128, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    (80, 128): KernelBlocks(Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    # compute capabilities 8.6 and 8.9 have 99 KiB of shared memory a block instead of 163
    (86, 64): KernelBlocks(Blocks(128, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (86, 128): KernelBlocks(Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2), Blocks(32, 64, 4, 2)),
    (90, 64): KernelBlocks(Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 3), Blocks(64, 64, 4, 3)),
    (90, 128): KernelBlocks(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2), Blocks(64, 64, 4, 2)),
}
DECODE = DecodeBlocks()


def kernel_blocks(capability: int, dim: int) -> KernelBlocks:
    """Blocks for a GPU of compute capability `capability` (90 for 9.0) and a head dim."""
    return TABLE[max(row for row, row_dim in TABLE if row_dim == dim and row <= capability), dim]
