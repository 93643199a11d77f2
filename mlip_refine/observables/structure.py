"""Distributions of distances, angles and wave vectors: RDF, ADF and static structure factor.

Pairs are found over all periodic images within reach, so that a crystal has the same distributions in every
box. Positions of a trajectory follow its sampling model: these observables depend on the weights alone.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from math import pi
from typing import Literal

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.observables.base import Observable, Sample, portions

AngleVariable = Literal["angle", "cosine"]

_PER_PAIR = 12
"""Float64 numbers that a pair of atoms needs on its way into a histogram."""


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
            bins: Number of shells of equal width from zero on.
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
        """Return g(r) of every frame `[n, bins]`.

        Raises:
            InputError: No atom of an element.
        """
        centres, others = (_atoms_of(sample, symbol, "rdf") for symbol in self.pair)
        counts = sample.volumes.new_zeros(len(sample), self.bins)
        for frames in portions(len(sample), _PER_PAIR * len(centres) * len(others)):
            positions, cells = sample.positions[frames], sample.cells[frames]
            shifts = image_shifts(cells, self.largest)
            for rows in portions(len(centres), _PER_PAIR * len(others) * len(cells)):
                separation = separations(positions, cells, centres[rows], others)
                for _, distance in image_distances(separation, cells, shifts):
                    shells = (distance * (self.bins / self.largest)).long().clamp(max=self.bins - 1)
                    # An atom is no pair with itself.
                    counted = (distance > 0.0) & (distance < self.largest)
                    counts[frames] += _histogram(shells, counted, self.bins)
        density = len(centres) * len(others) / sample.volumes
        return counts / density[:, None] / self._shells.to(counts)


class AngularDistribution(Observable):
    """Distribution of the angles between two neighbours of an atom, those within a distance of it.

    Every pair of neighbours counts once. The density integrates to one, over degrees from 0 to 180 or over
    cos θ from -1 to 1; in the latter directions without order have the same density ½ everywhere.

    Attributes:
        middles: Middle of every bin `[bins]`, degrees or cos θ.
    """

    def __init__(
        self,
        distance: float,
        bins: int = 90,
        variable: AngleVariable = "angle",
        triple: tuple[str | None, str | None, str | None] = (None, None, None),
    ) -> None:
        """Choose neighbours, bins and species.

        Args:
            distance: Largest distance of a neighbour, Å.
            bins: Number of bins of equal width.
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
        """Return the number of angles of every frame in every bin `[n, bins]`.

        Raises:
            InputError: No atom of an element.
            StatisticsError: No atom has two neighbours within the distance.
        """
        first, middle, last = (_atoms_of(sample, symbol, "adf") for symbol in self.triple)
        counts = sample.volumes.new_zeros(len(sample), self.bins)
        for frames in portions(len(sample), _PER_PAIR * len(middle) * sample.n_atoms):
            positions, cells = sample.positions[frames], sample.cells[frames]
            for rows in portions(len(middle), _PER_PAIR * sample.n_atoms * len(cells)):
                ends = [self._neighbours(positions, cells, middle[rows], first)]
                if self.triple[0] != self.triple[2]:
                    ends.append(self._neighbours(positions, cells, middle[rows], last))
                counts[frames] += self._angles(ends[0], ends[-1], same=len(ends) == 1)
        if not bool(counts.any()):
            raise StatisticsError(
                f"no atom has two neighbours within {self.distance:g} Å", needed="a larger distance"
            )
        return counts

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002
        """Return the density in every bin `[bins]`."""
        return means / means.sum() / self._width

    def _neighbours(self, positions: Tensor, cells: Tensor, centres: Tensor, others: Tensor) -> Tensor:
        """Return unit vectors to the neighbours of every centre `[n, c, most, 3]`, zero beyond the last."""
        separation = separations(positions, cells, centres, others)
        images = list(image_distances(separation, cells, image_shifts(cells, self.distance)))
        vectors = torch.cat([vector for vector, _ in images], dim=2)
        lengths = torch.cat([length for _, length in images], dim=2)
        near = (lengths > 0.0) & (lengths < self.distance)
        most = int(near.sum(2).max())
        lengths, order = torch.where(near, lengths, torch.inf).topk(most, dim=2, largest=False)
        return vectors.gather(2, order[..., None].expand(-1, -1, -1, 3)) / lengths[..., None]

    def _angles(self, first: Tensor, last: Tensor, *, same: bool) -> Tensor:
        """Count the angles between neighbours of two lists; of the same list each pair once `[n, bins]`."""
        cosines = (first @ last.mT).clamp(-1.0, 1.0)
        counted = (first.any(-1)[..., :, None]) & (last.any(-1)[..., None, :])
        if same:
            counted = counted.triu(diagonal=1)
        if self.variable == "angle":
            place = cosines.arccos() * (self.bins / pi)
        else:
            place = (cosines + 1.0) * (self.bins / 2.0)
        return _histogram(place.long().clamp(max=self.bins - 1), counted, self.bins)


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
            smallest: Lower end of the first shell, 1/Å; no box allows less than 2π over its largest length.
            largest: Upper end of the last shell, 1/Å.
            bins: Number of shells of equal width.
            scattering_lengths: Scattering length of every element, any unit; None: all atoms scatter alike.

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
        """Return the sum over every shell, and its number of wave vectors `[n, 2 bins]`.

        Raises:
            InputError: A shell without wave vectors, or an element without a scattering length.
        """
        factors = self._scattering_lengths(sample)
        largest = self.largest * sample.cells.norm(dim=-1).amax(0) / (2 * pi)
        axes = [torch.arange(-int(n), int(n) + 1, dtype=torch.float64) for n in largest]
        # q and -q scatter alike: half of the third axis will do, counted twice but for its zero.
        axes[2] = axes[2][axes[2] >= 0]
        axes = [axis.to(sample.cells) for axis in axes]
        each = len(axes[0]) * len(axes[1]) * (2 * sample.n_atoms + 6 * len(axes[2]))
        found = [self._sums(sample, frames, axes, factors) for frames in portions(len(sample), each)]
        columns = torch.cat(found)
        empty = (columns[:, self.bins :].sum(0) == 0).nonzero().flatten().tolist()
        if empty:
            raise InputError(
                f"the box allows no wave vector in {len(empty)} of {self.bins} shells",
                found=f"the first around {float(self.wave_numbers[empty[0]]):.4g} 1/Å",
                fix="Take fewer shells, a larger smallest, or a larger box.",
            )
        return columns

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002
        """Return S(q) of every shell `[bins]`."""
        sums, vectors = means.chunk(2)
        return sums / vectors

    def _sums(self, sample: Sample, frames: slice, axes: list[Tensor], factors: Tensor) -> Tensor:
        """Return the columns of some frames `[n, 2 bins]`."""
        cells = sample.cells[frames]
        fractional = torch.linalg.solve(cells, sample.positions[frames], left=False)
        # Phases exp(2πi h·s_j) on the grid of whole h are products over the axes.
        x, y, z = (
            torch.exp(2j * pi * fractional[:, None, :, i] * axis[:, None]) for i, axis in enumerate(axes)
        )
        planes = (x[:, :, None] * y[:, None]).flatten(1, 2)
        amplitudes = (planes @ (z * factors).mT).flatten(1)
        intensity = amplitudes.abs().square() / factors.square().sum()
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

    def _scattering_lengths(self, sample: Sample) -> Tensor:
        """Return the scattering length of every atom `[n_atoms]`."""
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


FIRST_PEAKS = (0.8, 1.25)
"""Where simple crystals have their first Bragg peaks, in 2π (N/V)^⅓: bcc 1.12, fcc 1.09, hcp 1.03, sc 1.00,
diamond 0.87."""


def first_peak_vectors(cell: Tensor, n_atoms: int, bounds: tuple[float, float] = FIRST_PEAKS) -> Tensor:
    """Return the wave vectors of a cell among which every crystal in it has Bragg peaks.

    Args:
        cell: Cell vectors as rows `[3, 3]`, Å.
        n_atoms: Atoms in the cell.
        bounds: Smallest and largest wave number, in 2π (N/V)^⅓.

    Returns:
        Whole numbers h `[m, 3]` of q = 2π h·(reciprocal vectors), one of each pair q and -q.
    """
    scale = (n_atoms / torch.linalg.det(cell).abs()) ** (1 / 3)
    largest = (bounds[1] * scale * cell.norm(dim=-1)).tolist()
    axes = [torch.arange(-int(n), int(n) + 1, dtype=cell.dtype, device=cell.device) for n in largest]
    whole = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    wave_numbers = (whole @ torch.linalg.inv(cell).mT).norm(dim=-1) / scale
    # The first component that is not zero is positive in one of q and -q.
    sign = (whole.sign() * whole.new_tensor([9.0, 3.0, 1.0])).sum(-1)
    return whole[(wave_numbers >= bounds[0]) & (wave_numbers <= bounds[1]) & (sign > 0)]


def bragg_amplitudes(positions: Tensor, cells: Tensor, vectors: Tensor) -> Tensor:
    """Return |ρ_q|/√N with ρ_q = Σ_j exp(i q·r_j), the square root of the structure factor of a frame.

    All atoms scatter alike. A Bragg peak of a crystal has √N exp(-W), with W of Debye and Waller. In a gas
    the mean is √π/2, in a liquid √(π S(q)/4): 1.5 at the peak of S(q), which is below 2.9 in a fluid in
    equilibrium (Hansen and Verlet 1969).

    Args:
        positions: Positions `[n, n_atoms, 3]`, Å, wrapped or not.
        cells: Cell vectors as rows `[n, 3, 3]`, Å; wave vectors follow the cell of each frame.
        vectors: Whole numbers of the wave vectors `[m, 3]` (see `first_peak_vectors`).

    Returns:
        Amplitudes `[n, m]`.
    """
    n, n_atoms = positions.shape[:2]
    amplitudes = positions.new_empty(n, len(vectors))
    for frames in portions(n, 4 * n_atoms * len(vectors)):
        fractional = torch.linalg.solve(cells[frames], positions[frames], left=False)
        phases = 2 * pi * (fractional @ vectors.to(fractional).mT)
        amplitudes[frames] = torch.hypot(phases.cos().sum(1), phases.sin().sum(1)) / n_atoms**0.5
    return amplitudes


def _histogram(bins: Tensor, counted: Tensor, n_bins: int) -> Tensor:
    """Count the entries of every frame in every bin `[n, n_bins]`.

    Args:
        bins: Number of the bin `[n, ...]`; changed in place.
        counted: Entries that count `[n, ...]`, bool.
        n_bins: Number of bins.
    """
    n = len(bins)
    bins += n_bins * torch.arange(n, device=bins.device).view(-1, *[1] * (bins.ndim - 1))
    return torch.bincount(bins[counted], minlength=n * n_bins).view(n, n_bins)


def _atoms_of(sample: Sample, symbol: str | None, where: str) -> Tensor:
    """Return the indices of the atoms of an element, of all atoms if it is None.

    Raises:
        InputError: The sample has none.
    """
    if symbol is None:
        return torch.arange(sample.n_atoms, device=sample.positions.device)
    found = torch.from_numpy(sample.numbers == atomic_numbers.get(symbol, -1)).nonzero().flatten()
    if not len(found):
        have = ", ".join(sorted({chemical_symbols[z] for z in sample.numbers}))
        raise InputError(f"{where}: no atom of the element", found=symbol, expected=f"one of {have}")
    return found.to(sample.positions.device)


def separations(positions: Tensor, cells: Tensor, centres: Tensor, others: Tensor) -> Tensor:
    """Return differences of atoms in units of the cell vectors, nearest image along each `[n, c, o, 3]`.

    Args:
        positions: Positions `[n, n_atoms, 3]`, Å.
        cells: Cell vectors as rows `[n, 3, 3]`, Å.
        centres: Indices of atoms `[c]`.
        others: Indices of atoms `[o]`.
    """
    fractional = torch.linalg.solve(cells, positions, left=False)
    difference: Tensor = fractional[:, None, others] - fractional[:, centres, None]
    return difference - difference.round()


def image_shifts(cells: Tensor, distance: float) -> Tensor:
    """Return the cells whose atoms can lie within a distance `[n_images, 3]`.

    A separation of s + m cell vectors, |s| ≤ ½, is at least |s + m| heights of the cell long.

    Args:
        cells: Cell vectors as rows `[n, 3, 3]`, Å.
        distance: Largest distance, Å.
    """
    # The rows of the inverse transpose are the reciprocal vectors, one over a height long.
    largest = (distance * torch.linalg.inv(cells).mT.norm(dim=-1)).amax(0)
    reach = [int(r) for r in (largest + 0.5 - 1e-12).floor()]
    shifts = list(product(*(range(-r, r + 1) for r in reach)))
    return torch.tensor(shifts, dtype=cells.dtype, device=cells.device)


def image_distances(separation: Tensor, cells: Tensor, shifts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the vectors `[n, c, o, 3]` and distances `[n, c, o]` of every image in turn, Å.

    Args:
        separation: Separations from `separations` `[n, c, o, 3]`.
        cells: Cell vectors as rows `[n, 3, 3]`, Å.
        shifts: Images from `image_shifts` `[n_images, 3]`.
    """
    home = torch.einsum("ncoi,nij->ncoj", separation, cells)
    for offset in torch.einsum("mi,nij->mnj", shifts, cells):
        vectors = home + offset[:, None, None]
        yield vectors, vectors.norm(dim=-1)
