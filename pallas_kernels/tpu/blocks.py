"""Block sizes of the TPU kernels, in one table by (head dim, ratio, length).

No TPU has timed them; they come from counting (cost.py). Small tiles waste less on masked pairs: of what the forward
pass computes at r = 4, 63% is visible at 4K raws and 86% at 32K; with tiles of 512 keys it would be 49% and 80%. Large
tiles reuse what they read: a product does as many operations per byte of keys as the query tile has columns, and per
byte of queries twice the keys of the key tile, against the 240 that v5e can do for each byte it reads, and 560 on v6e.
"""

from __future__ import annotations

from typing import NamedTuple

VMEM_LIMIT = 32 * 2**20  # what a kernel may take of the vector memory: 64 MiB on v5p, 128 MiB on v5e and v6e


class Blocks(NamedTuple):
    """Sizes of tiles.

    Attributes:
      rows: positions of a query tile.
      columns: the most query columns (positions times heads) of a tile.
      keys: keys of a key tile.
      part: columns that a kernel takes at once. Nothing ties one part to the next, so the compiler fills the softmax of
        one with the products of another (docs/tpu_kernels.md).
    """

    rows: int
    columns: int
    keys: int
    part: int = 512

    def heads(self, group: int) -> int:
        """Query heads of a tile: the largest divisor of the `group` that shares a KV head within `columns`."""
        return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * self.rows <= self.columns))


# (head dim, ratios it holds for or None for all, shortest length in raws) -> blocks; the last row that fits wins
TABLE: tuple[tuple[int, tuple[int, ...] | None, int, Blocks], ...] = (
    (64, None, 0, Blocks(rows=128, columns=1024, keys=256)),
    (64, (2, 4), 8192, Blocks(rows=256, columns=1024, keys=256)),
    (64, None, 65536, Blocks(rows=256, columns=1024, keys=512)),
    (128, None, 0, Blocks(rows=128, columns=1024, keys=256)),
    (128, (2, 4), 8192, Blocks(rows=256, columns=1024, keys=256)),
    (128, None, 65536, Blocks(rows=256, columns=1024, keys=512)),
)


def blocks_for(dim: int, ratio: int, length: int) -> Blocks:
    """Blocks for a head dim, a ratio and a context of `length` raws."""
    return [row[3] for row in TABLE if row[0] == dim and (row[1] is None or ratio in row[1]) and length >= row[2]][-1]
