"""Angular distribution function."""

from math import pi
from typing import Literal

import torch
from torch import Tensor

from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.observables.base import Observable, Sample
from mlip_refine.observables.chunks import portions
from mlip_refine.observables.pairs import atoms_of, image_distances, image_shifts, separations

Variable = Literal["angle", "cosine"]

# Float64 numbers that a pair needs in the search for neighbours.
_PER_PAIR = 12


class AngularDistribution(Observable):
    """Distribution of the angles between two neighbours of an atom, those within a distance of it.

    Every pair of neighbours counts once. The density integrates to one, over degrees from 0 to 180 or over
    cos θ from -1 to 1; in the latter directions without order have the same density ½ everywhere.

    Attributes:
        middles: Of the bins `[bins]`, degrees or cos θ.
    """

    def __init__(
        self,
        distance: float,
        bins: int = 90,
        variable: Variable = "angle",
        triple: tuple[str | None, str | None, str | None] = (None, None, None),
    ) -> None:
        """Choose neighbours, bins and species.

        Args:
            distance: Largest distance of a neighbour, Å.
            bins: Of equal width.
            variable: `angle` (density per degree) or `cosine`.
            triple: Elements of one neighbour, the atom in the middle, and the other neighbour; None is any.

        Raises:
            InputError: No distance, no bin, another variable, or one neighbour named and the other not.
        """
        if not (distance > 0 and bins > 0) or variable not in ("angle", "cosine"):
            raise InputError(
                "an angular distribution needs a distance above zero, bins, and angle or cosine",
                found=f"distance {distance:g} Å, bins {bins}, variable {variable}",
            )
        if (triple[0] is None) != (triple[2] is None):
            raise InputError(
                "the neighbours of an angle are both named or both any", found=", ".join(map(str, triple))
            )
        self.distance, self.bins, self.variable, self.triple = distance, bins, variable, triple
        low, high = (0.0, 180.0) if variable == "angle" else (-1.0, 1.0)
        edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
        self.middles, self._width = (edges[1:] + edges[:-1]) / 2, (high - low) / bins
        self.labels = tuple(f"p({x:.4g})" for x in self.middles.tolist())
        self.unit = "1/°" if variable == "angle" else "1"

    @torch.no_grad()
    def columns(self, sample: Sample) -> Tensor:
        """Angles of every frame in every bin `[n, bins]`.

        Raises:
            InputError: No atom of an element.
            StatisticsError: No atom has two neighbours within the distance.
        """
        first, middle, last = (atoms_of(sample, symbol, "adf") for symbol in self.triple)
        counts = sample.volumes.new_zeros(len(sample), self.bins)
        for frames in portions(len(sample), _PER_PAIR * len(middle) * sample.n_atoms):
            positions, cells = sample.positions[frames], sample.cells[frames]
            for rows in portions(len(middle), _PER_PAIR * sample.n_atoms * len(cells)):
                ends = [self._neighbours(positions, cells, middle[rows], first)]
                if self.triple[0] != self.triple[2]:
                    ends.append(self._neighbours(positions, cells, middle[rows], last))
                counts[frames] += self._histogram(ends)
        if not bool(counts.any()):
            raise StatisticsError(
                f"no atom has two neighbours within {self.distance:g} Å", needed="a larger distance"
            )
        return counts

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002
        """Density in every bin `[bins]`."""
        return means / means.sum() / self._width

    def _neighbours(self, positions: Tensor, cells: Tensor, centres: Tensor, others: Tensor) -> Tensor:
        """Unit vectors to the neighbours of every centre `[n, c, most, 3]`, zero where there are fewer."""
        separation = separations(positions, cells, centres, others)
        images = list(image_distances(separation, cells, image_shifts(cells, self.distance)))
        vectors = torch.cat([vector for vector, _ in images], dim=2)
        lengths = torch.cat([length for _, length in images], dim=2)
        near = (lengths > 0.0) & (lengths < self.distance)
        most = int(near.sum(2).max())
        lengths, order = torch.where(near, lengths, torch.inf).topk(most, dim=2, largest=False)
        return vectors.gather(2, order[..., None].expand(-1, -1, -1, 3)) / lengths[..., None]

    def _histogram(self, ends: list[Tensor]) -> Tensor:
        """Angles between neighbours of one list, each pair once, or between those of two `[n, bins]`."""
        first, last = ends[0], ends[-1]
        n = len(first)
        cosines = (first @ last.mT).clamp(-1.0, 1.0)
        real = (first.any(-1)[..., :, None]) & (last.any(-1)[..., None, :])
        if len(ends) == 1:
            real = real.triu(diagonal=1)
        if self.variable == "angle":
            place = cosines.arccos() * (self.bins / pi)
        else:
            place = (cosines + 1.0) * (self.bins / 2.0)
        bins = place.long().clamp(max=self.bins - 1)
        bins += self.bins * torch.arange(n, device=first.device)[:, None, None, None]
        return torch.bincount(bins[real], minlength=n * self.bins).view(n, self.bins)
