"""Static structure factor."""

from collections.abc import Mapping
from math import pi

import torch
from ase.data import chemical_symbols
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.observables.chunks import portions


class StructureFactor(Observable):
    """S(q) = ⟨|Σ_j b_j exp(i q·r_j)|²⟩/Σ_j b_j² (Hansen and McDonald 2013, 4.1), mean over shells of q.

    By direct summation over the wave vectors that the box allows, q = 2π h·(reciprocal vectors) with whole
    numbers h, without the forward direction q = 0. In a moving cell they follow the cell of each frame.

    Attributes:
        wave_numbers: Middle of every shell `[bins]`, 1/Å.
    """

    unit = "1"

    def __init__(
        self,
        smallest: float,
        largest: float,
        bins: int,
        scattering_lengths: Mapping[str, float] | None = None,
    ) -> None:
        """Choose the shells.

        Args:
            smallest: Where they begin, 1/Å; no box allows less than 2π over its largest length.
            largest: Where they end, 1/Å.
            bins: Shells of equal width.
            scattering_lengths: By element, any unit; None: all atoms scatter alike.

        Raises:
            InputError: Bounds that are not in order, or no shell.
        """
        if not (0 <= smallest < largest and bins > 0):
            raise InputError(
                "a structure factor needs shells of q",
                found=f"smallest {smallest:g}, largest {largest:g} 1/Å, bins {bins}",
                expected="0 <= smallest < largest, and bins above zero",
            )
        self.smallest, self.largest, self.bins = smallest, largest, bins
        self.lengths = None if scattering_lengths is None else dict(scattering_lengths)
        edges = torch.linspace(smallest, largest, bins + 1, dtype=torch.float64)
        self.wave_numbers = (edges[1:] + edges[:-1]) / 2
        self.labels = tuple(f"S({q:.4g})" for q in self.wave_numbers.tolist())

    @torch.no_grad()
    def columns(self, sample: Sample) -> Tensor:
        """Sum over every shell, and its wave vectors `[n, 2 bins]`.

        Raises:
            InputError: A shell without wave vectors, or an element without a scattering length.
        """
        factors = self._factors(sample)
        largest = self.largest * sample.cells.norm(dim=-1).amax(0) / (2 * pi)
        axes = [torch.arange(-int(n), int(n) + 1, dtype=torch.float64) for n in largest]
        # q and -q scatter alike: half of the third axis will do, counted twice but for its zero.
        axes[2] = axes[2][axes[2] >= 0]
        axes = [axis.to(sample.cells) for axis in axes]
        each = len(axes[0]) * len(axes[1]) * (2 * sample.n_atoms + 6 * len(axes[2]))
        found = [self._sums(sample, frames, axes, factors) for frames in portions(len(sample), each)]
        columns = torch.cat(found)
        self._check_shells(columns[:, self.bins :])
        return columns

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002
        """S(q) of every shell `[bins]`."""
        sums, vectors = means.chunk(2)
        return sums / vectors

    def _sums(self, sample: Sample, frames: slice, axes: list[Tensor], factors: Tensor) -> Tensor:
        """Columns of some frames `[n, 2 bins]`."""
        cells = sample.cells[frames]
        fractional = torch.linalg.solve(cells, sample.positions[frames], left=False)
        intensity = _amplitudes(fractional, axes, factors).abs().square() / factors.square().sum()
        reciprocal = 2 * pi * torch.linalg.inv(cells).mT
        whole = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
        wave_numbers = (whole @ reciprocal).norm(dim=-1)
        place = (wave_numbers - self.smallest) * (self.bins / (self.largest - self.smallest))
        inside = (place >= 0) & (place < self.bins) & (wave_numbers > 0)
        times = inside * (1.0 + (whole[:, 2] > 0).to(cells))
        index = place.long().clamp(0, self.bins - 1)
        empty = times.new_zeros(len(cells), self.bins)
        sums = empty.scatter_add(1, index, times * intensity)
        return torch.cat([sums, empty.scatter_add(1, index, times)], dim=1)

    def _factors(self, sample: Sample) -> Tensor:
        """Scattering length of every atom `[n_atoms]`."""
        if self.lengths is None:
            return torch.ones(sample.n_atoms).to(sample.cells)
        symbols = [chemical_symbols[z] for z in sample.numbers]
        missing = sorted(set(symbols) - set(self.lengths))
        if missing:
            raise InputError(
                "no scattering length of an element",
                found=", ".join(self.lengths),
                expected=", ".join(missing),
            )
        return torch.tensor([self.lengths[s] for s in symbols]).to(sample.cells)

    def _check_shells(self, vectors: Tensor) -> None:
        empty = (vectors.sum(0) == 0).nonzero().flatten().tolist()
        if empty:
            raise InputError(
                f"the box allows no wave vector in {len(empty)} of {self.bins} shells",
                found=f"the first around {float(self.wave_numbers[empty[0]]):.4g} 1/Å",
                fix="Take fewer shells, a larger smallest, or a larger box.",
            )


def _amplitudes(fractional: Tensor, axes: list[Tensor], factors: Tensor) -> Tensor:
    """Σ_j b_j exp(2πi h·s_j) for all whole h on a grid `[n, n_h]`: phases are products over the axes."""
    x, y, z = (torch.exp(2j * pi * fractional[:, None, :, i] * axis[:, None]) for i, axis in enumerate(axes))
    planes = (x[:, :, None] * y[:, None]).flatten(1, 2)
    return (planes @ (z * factors).mT).flatten(1)
