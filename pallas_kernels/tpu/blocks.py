"""Block sizes of the TPU kernels, in one table by (head dim, ratio, length).

No TPU has timed them. They are the largest powers of two at which a kernel's tiles stay within half of the smallest
vector memory among v5e, v5p and v6e, with fewer rows where a tile of gists would see many raws of other gists' units.
"""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """Positions of a query tile, the most query columns (positions times heads) of a tile, and keys of a key tile."""

    rows: int
    columns: int
    keys: int

    def heads(self, group: int) -> int:
        """Query heads of a tile: the largest divisor of the `group` that shares a KV head within `columns`."""
        return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * self.rows <= self.columns))


# (head dim, ratios it holds for or None for all, shortest length in raws) -> blocks; the last row that fits wins
TABLE: tuple[tuple[int, tuple[int, ...] | None, int, Blocks], ...] = (
    (64, None, 0, Blocks(rows=128, columns=1024, keys=512)),
    (64, (2, 4), 8192, Blocks(rows=256, columns=1024, keys=512)),
    (128, None, 0, Blocks(rows=128, columns=1024, keys=512)),
    (128, (2, 4), 8192, Blocks(rows=256, columns=1024, keys=512)),
)


def blocks_for(dim: int, ratio: int, length: int) -> Blocks:
    """Blocks for a head dim, a ratio and a context of `length` raws."""
    return [row[3] for row in TABLE if row[0] == dim and (row[1] is None or ratio in row[1]) and length >= row[2]][-1]
