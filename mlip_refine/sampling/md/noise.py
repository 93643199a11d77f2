"""Random numbers of a batch: a stream of its own for every system, addressed by step.

Counter-based generators (Philox, Salmon et al. 2011) need no state: the noise of a system at a step is a
function of the system's key and the step alone. So it depends neither on what else is in the batch nor on how
often a run was interrupted, and a system that is restarted with a new key leaves the others' noise as it is.
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

# Steps that are drawn at once: the cost of setting up a generator is shared by them.
BLOCK = 32

# Independent components of the symmetric noise on a cell.
CELL = 6

_INITIAL = 2**64 - 1


def stream_key(seed: int, name: str, replica: int, restarts: int = 0) -> int:
    """Return the key of a system's stream: 64 bits of a hash of what tells it apart from all others."""
    text = f"{seed}/{name}/{replica}/{restarts}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class NoiseStreams:
    """Standard normal numbers for the atoms and the cells of a batch."""

    def __init__(
        self, keys: Sequence[int], sizes: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Set up the streams; numbers are drawn when they are first needed.

        Args:
            keys: Key of every system (see `stream_key`).
            sizes: Number of atoms of every system, in the order of the batch.
            dtype: Floating type of the numbers.
            device: Device on which they are used.
        """
        self.keys, self.sizes = list(keys), list(sizes)
        self._dtype, self._device = dtype, device
        self._starts = list(accumulate(sizes, initial=0))
        self._block = -1
        self._atoms = torch.empty(BLOCK, self._starts[-1], 3, dtype=dtype)
        self._cells = torch.empty(BLOCK, len(keys), CELL, dtype=dtype)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the noise of a step: `[n_atoms, 3]` for atoms and symmetric `[n_systems, 3, 3]` for cells.

        The symmetric matrix is white in the inner product tr(AB): diagonal elements have variance 1, the
        others 1/2.
        """
        block, row = divmod(step, BLOCK)
        if block != self._block:
            self._block = block
            for system in range(len(self.keys)):
                self._draw(system)
            self._upload()
        return self._atoms_here[row], self._cells_here[row]

    def initial(self, system: int) -> Tensor:
        """Return the numbers for the first momenta of a system `[n, 3]`."""
        return torch.from_numpy(self._numbers(system, _INITIAL, (self.sizes[system], 3))).to(self._device)

    def restart(self, system: int, key: int) -> None:
        """Give a system a new stream."""
        self.keys[system] = key
        if self._block >= 0:
            self._draw(system)
            self._upload()

    def _draw(self, system: int) -> None:
        n = 3 * self.sizes[system]
        numbers = torch.from_numpy(self._numbers(system, self._block, (BLOCK, n + CELL)))
        atoms = slice(self._starts[system], self._starts[system + 1])
        self._atoms[:, atoms] = numbers[:, :n].view(BLOCK, -1, 3)
        self._cells[:, system] = numbers[:, n:]

    def _numbers(self, system: int, block: int, shape: tuple[int, ...]) -> np.ndarray:
        # Plain lists of numbers above 2^63 become floats, and keys lose their last bits.
        key = np.array([self.keys[system], block], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        kind = np.float32 if self._dtype == torch.float32 else np.float64
        return generator.standard_normal(shape, dtype=kind)

    def _upload(self) -> None:
        self._atoms_here = self._atoms.to(self._device)
        # xx, yy, zz, yz, xz, xy
        cells = self._cells.to(self._device)
        scaled = torch.cat([cells[..., :3], cells[..., 3:] / 2**0.5], dim=-1)
        self._cells_here = scaled[..., [0, 5, 4, 5, 1, 3, 4, 3, 2]].view(*cells.shape[:-1], 3, 3)
