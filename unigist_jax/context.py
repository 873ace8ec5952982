"""Gist context parallelism: the units of a row spread over the mesh's context axis (exact, unlike a chunked method).

Axis legend
  B  batch      n  devices along the context axis, C = 2 n pieces of a row      T  raws of a row, U units
  P  positions of a row, (r + 1) * U      Uc, Tc, Pc  the same of a piece

A row is cut into 2 n pieces, and device i holds pieces i and 2 n - 1 - i. A later piece sees more gists, so each device
gets an early and a late one, and the work is even:

    n = 3      device 0   0 5      device 1   1 4      device 2   2 3

*Placed* order is device by device; each piece is a gist-shifted segment of its own, [ Tc raws | Uc gists ]. What a
piece sees outside itself: the gists before it, all-gathered, and the last k units' raws of the piece before it, which
come from a neighbour (or from the same device, between pieces n - 1 and n):

    raws of piece    0 -> 1 -> 2 -. first pieces move right
                     5 <- 4 <- 3 <' second pieces move left

So a layer moves the gists' keys and values, 1 / r of what ring attention moves, and k units for each piece.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unigist_jax.layout import GistLayout

AXIS = "context"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the pieces of a row lie; one device leaves the row as it is."""

    devices: int = 1

    @property
    def pieces(self) -> int:
        """`C`, the pieces of a row."""
        return 1 if self.devices == 1 else 2 * self.devices

    @property
    def order(self) -> np.ndarray:
        """The piece at each place, int [C]."""
        if self.devices == 1:
            return np.zeros(1, int)
        return np.stack([np.arange(self.devices), 2 * self.devices - 1 - np.arange(self.devices)], axis=1).reshape(-1)

    def place(self, x: Array, axis: int = 1) -> Array:
        """A row's entries along `axis` (raws, units) from their own order into placed order."""
        return self._permuted(x, self.order, axis)

    def restore(self, x: Array, axis: int = 1) -> Array:
        """The inverse of `place`."""
        return self._permuted(x, np.argsort(self.order), axis)

    def _permuted(self, x: Array, order: np.ndarray, axis: int) -> Array:
        if self.devices == 1:
            return x
        pieces = x.reshape(*x.shape[:axis], self.pieces, -1, *x.shape[axis + 1 :])
        return jnp.take(pieces, order, axis=axis).reshape(x.shape)

    def piece_units(self, layout: GistLayout, num_raws: int) -> int:
        """Units of a piece. Raises ValueError if a row does not cut into pieces that hold the window."""
        units = layout.num_units(num_raws)
        if units % self.pieces:
            raise ValueError(
                f"a row of {num_raws} raws has {units} units, which do not cut into {self.pieces} pieces for "
                f"context={self.devices}; use a multiple of {self.pieces * layout.ratio} raws"
            )
        if self.devices > 1 and units // self.pieces < layout.window_units:
            raise ValueError(
                f"a row of {num_raws} raws on context={self.devices} has pieces of {units // self.pieces} units, fewer "
                f"than the window's {layout.window_units}; use longer rows or fewer devices"
            )
        return units // self.pieces


ONE_DEVICE = Placement()


def mesh_placement() -> Placement:
    """That of the mesh in context."""
    return Placement(jax.sharding.get_abstract_mesh().shape.get(AXIS, 1))


def raws_before(tails: tuple[Float[Array, "B w *H"], ...], devices: int) -> tuple[Float[Array, "B w *H"], ...]:
    """The last raws of the pieces before this device's two (under shard_map); meaningless before piece 0.

    Args:
      tails: the last raws of its first and of its second piece.
    """
    first, second = tails
    from_left = jax.lax.ppermute(first, AXIS, [(i, i + 1) for i in range(devices - 1)])
    from_right = jax.lax.ppermute(second, AXIS, [(i + 1, i) for i in range(devices - 1)])
    is_last = jax.lax.axis_index(AXIS) == devices - 1
    return from_left, jnp.where(is_last, first, from_right)


def all_gists(x: Float[Array, "B u *H"], placement: Placement) -> Float[Array, "B U *H"]:
    """Every piece's gists in the row's order (under shard_map), from this device's."""
    return placement.restore(jax.lax.all_gather(x, AXIS, axis=1, tiled=True))
