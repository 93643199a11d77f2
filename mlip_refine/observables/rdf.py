"""Radial distribution function."""

from math import pi

import torch
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.observables.chunks import portions
from mlip_refine.observables.pairs import atoms_of, image_distances, image_shifts, separations

# Float64 numbers that a pair needs on its way into the histogram.
_PER_PAIR = 12


class RadialDistribution(Observable):
    """g_ab(r) = ⟨n_ab(r) V⟩/(N_a N_b 4/3 π Δr³), n_ab the pairs in the shell (Allen and Tildesley 2017, 8.2).

    The volume is that of each frame. All images count, so a crystal has the same g(r) in every box and r may
    exceed half the box. The pair density is measured in N_a N_b/V²: a fluid in a box without images in reach
    tends to 1 - S(0)/N at large r (Lebowitz and Percus 1961), the ideal gas to 1 - 1/N.

    Attributes:
        radii: Middle of every shell `[bins]`, Å.
    """

    unit = "1"

    def __init__(
        self, largest: float = 8.0, bins: int = 160, pair: tuple[str | None, str | None] = (None, None)
    ) -> None:
        """Choose the shells and the species.

        Args:
            largest: Largest distance, Å.
            bins: Shells of equal width from zero on.
            pair: Elements of the two atoms; None is any.

        Raises:
            InputError: No distance or no shell.
        """
        if not (largest > 0 and bins > 0):
            raise InputError(
                "a radial distribution needs shells",
                found=f"largest {largest:g} Å, bins {bins}",
                expected="both above zero",
            )
        self.largest, self.bins, self.pair = largest, bins, pair
        edges = torch.linspace(0.0, largest, bins + 1, dtype=torch.float64)
        self.radii = (edges[1:] + edges[:-1]) / 2
        self._shells = 4 / 3 * pi * edges.pow(3).diff()
        self.labels = tuple(f"g({r:.4g})" for r in self.radii.tolist())

    @torch.no_grad()
    def columns(self, sample: Sample) -> Tensor:
        """g(r) of every frame `[n, bins]`.

        Raises:
            InputError: No atom of an element.
        """
        centres, others = (atoms_of(sample, symbol, "rdf") for symbol in self.pair)
        counts = sample.volumes.new_zeros(len(sample), self.bins)
        for frames in portions(len(sample), _PER_PAIR * len(centres) * len(others)):
            positions, cells = sample.positions[frames], sample.cells[frames]
            shifts = image_shifts(cells, self.largest)
            for rows in portions(len(centres), _PER_PAIR * len(others) * len(cells)):
                separation = separations(positions, cells, centres[rows], others)
                for _, distance in image_distances(separation, cells, shifts):
                    counts[frames] += self._histogram(distance)
        density = len(centres) * len(others) / sample.volumes
        return counts / density[:, None] / self._shells.to(counts)

    def _histogram(self, distance: Tensor) -> Tensor:
        """Pairs of every frame in every shell `[n, bins]`; an atom is no pair with itself."""
        n = len(distance)
        bins = (distance * (self.bins / self.largest)).long()
        bins += self.bins * torch.arange(n, device=distance.device)[:, None, None]
        inside = (distance > 0.0) & (distance < self.largest)
        return torch.bincount(bins[inside], minlength=n * self.bins)[: n * self.bins].view(n, self.bins)
