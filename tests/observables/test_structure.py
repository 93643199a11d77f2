"""Pair, angle and wave-vector distributions of lattices, of ideal gases, and against plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list

from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.observables import average, measure
from mlip_refine.observables.base import portions
from mlip_refine.observables.structure import (
    AngularDistribution,
    RadialDistribution,
    StructureFactor,
    bragg_amplitudes,
    first_peak_vectors,
)
from mlip_refine.testing import sigma_bound

A = 4.0
SKEW = np.array([[7.0, 0.0, 0.0], [3.0, 6.0, 0.0], [-2.0, 2.5, 5.0]])


@pytest.fixture
def of_atoms(make_sample):
    """A sample whose frames are structures of the same atoms."""

    def build(*frames: Atoms):
        return make_sample(
            positions=torch.from_numpy(np.stack([f.positions for f in frames])),
            cells=torch.from_numpy(np.stack([f.cell.array for f in frames])),
            numbers=frames[0].numbers,
        )

    return build


@pytest.fixture
def gas(make_sample, gaussian):
    """Ideal gas: uniform positions in a box of any shape."""

    def draw(n: int, atoms: int, cell: np.ndarray, numbers: np.ndarray | None = None):
        cells = torch.from_numpy(cell).expand(n, 3, 3)
        # Far outside the box too: positions are not wrapped.
        positions = 3 * torch.special.ndtr(gaussian(n, atoms, 3)) @ cells
        numbers = np.full(atoms, 22) if numbers is None else numbers
        return make_sample(positions=positions, cells=cells, numbers=numbers)

    return draw


def coordination(rdf: RadialDistribution, g: torch.Tensor, density: float) -> list[tuple[float, float]]:
    """Distance and neighbours of every shell of a lattice."""
    edges = torch.linspace(0, rdf.largest, rdf.bins + 1, dtype=torch.float64)
    numbers = g * density * 4 / 3 * math.pi * edges.pow(3).diff()
    return [(float(r), float(n)) for r, n in zip(rdf.radii, numbers, strict=True) if n > 0]


@pytest.mark.parametrize("box", ["primitive", "cubic", "supercell", "skewed"])
def test_shells_of_fcc_in_every_box(of_atoms, box: str) -> None:
    """12, 6, 24, 12, 24 neighbours at √½, 1, √1.5, √2, √2.5 lattice constants, also beyond half the box."""
    atoms = bulk("Al", "fcc", a=A) if box == "primitive" else bulk("Al", "fcc", a=A, cubic=True)
    if box == "supercell":
        atoms = atoms * (3, 3, 3)
    if box == "skewed":
        cell = atoms.cell.array
        atoms.set_cell(np.array([cell[0], cell[1] + 2 * cell[0], cell[2] - cell[1]]))
    rdf = RadialDistribution(6.6, 131)
    found = coordination(rdf, average(rdf, of_atoms(atoms, atoms)), 4 / A**3)
    expected = zip((12, 6, 24, 12, 24), (0.5, 1, 1.5, 2, 2.5), strict=True)
    assert len(found) == 5
    for (r, n), (exact, square) in zip(found, expected, strict=True):
        assert n == pytest.approx(exact)
        assert abs(r - A * math.sqrt(square)) < 6.6 / 131


def test_pairs_of_elements(of_atoms) -> None:
    """Rock salt: the six nearest neighbours are of the other kind, the twelve next of the same."""
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    density = 4 / 5.64**3
    unlike, like = (RadialDistribution(4.5, 90, pair=("Na", other)) for other in ("Cl", "Na"))
    sample = of_atoms(atoms)
    assert coordination(unlike, average(unlike, sample), density) == [
        (pytest.approx(2.82, abs=0.05), pytest.approx(6))
    ]
    assert coordination(like, average(like, sample), density) == [
        (pytest.approx(3.99, abs=0.05), pytest.approx(12))
    ]


@pytest.mark.statistical
def test_ideal_gas_has_no_pair_structure(gas) -> None:
    """g = 1 - 1/N in every shell without images in reach."""
    rdf = RadialDistribution(4.9, 7)
    found = measure(rdf, gas(400, 30, 10 * np.eye(3)), lambda _: 1.0)
    for value in found[2:]:
        assert value.se < 0.04
        assert abs(value.value - (1 - 1 / 30)) < sigma_bound(5) * value.se


def test_pair_counts_are_those_of_a_neighbour_list(gas, of_atoms) -> None:
    sample = gas(2, 9, SKEW)
    frames = [Atoms("Ti9", p.numpy(), cell=SKEW, pbc=True) for p in sample.positions]
    rdf = RadialDistribution(8.0, 40)
    expected = np.mean([np.histogram(neighbor_list("d", f, 8.0), 40, (0, 8.0))[0] for f in frames], axis=0)
    counts = average(rdf, sample).numpy() * 81 / abs(np.linalg.det(SKEW))
    counts *= 4 / 3 * math.pi * np.diff(np.linspace(0, 8, 41) ** 3)
    np.testing.assert_allclose(counts, expected, atol=1e-9)


def test_portions_change_nothing(gas, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = gas(5, 7, SKEW)
    observables = [RadialDistribution(6.0, 12), AngularDistribution(4.0, 9), StructureFactor(1.0, 4.0, 3)]
    whole = [average(o, sample) for o in observables]
    for numbers in (1, 900):
        monkeypatch.setattr("mlip_refine.observables.base._NUMBERS", numbers)
        for observable, expected in zip(observables, whole, strict=True):
            torch.testing.assert_close(average(observable, sample), expected)
    assert [s.stop - s.start for s in portions(7, 300)] == [3, 3, 1]


def peaks(adf: AngularDistribution, density: torch.Tensor) -> dict[int, float]:
    """Share of the angles, percent of all, by the bin of five degrees that holds them."""
    return {round(float(x)): 5 * 100 * float(p) for x, p in zip(adf.middles, density, strict=True) if p > 0}


def test_angles_of_fcc(of_atoms) -> None:
    """66 angles between 12 neighbours: 24 of 60°, 12 of 90°, 24 of 120°, 6 of 180°."""
    adf = AngularDistribution(3.3, bins=36)
    found = peaks(adf, average(adf, of_atoms(bulk("Al", "fcc", a=A) * (2, 2, 2))))
    shares: dict[int, float] = {}
    for middle, share in found.items():
        # Rounding may put an angle on either side of the edge between two bins.
        nearest = min((60, 90, 120, 180), key=lambda angle: abs(angle - middle))
        assert abs(nearest - middle) < 3
        shares[nearest] = shares.get(nearest, 0.0) + share
    assert shares == pytest.approx({60: 2400 / 66, 90: 1200 / 66, 120: 2400 / 66, 180: 600 / 66})


def test_angles_between_named_neighbours(of_atoms) -> None:
    """Cl-Na-Cl in rock salt: 12 right and 3 straight angles; Na-Na-Cl mixes shells of two kinds."""
    sample = of_atoms(bulk("NaCl", "rocksalt", a=5.64, cubic=True))
    same = AngularDistribution(3.0, bins=37, triple=("Cl", "Na", "Cl"))
    density = average(same, sample) * 180 / 37
    assert float(density[18]) == pytest.approx(0.8)
    assert float(density[36]) == pytest.approx(0.2)
    # 12 Na at (110)/2 and 6 Cl at (100)/2: of the 72 angles 24 have 45°, 24 have 90°, 24 have 135°.
    mixed = AngularDistribution(4.1, bins=11, triple=("Na", "Na", "Cl"))
    density = average(mixed, sample) * 180 / 11
    assert {i: round(float(p), 9) for i, p in enumerate(density) if p > 0} == pytest.approx(
        {2: 1 / 3, 5: 1 / 3, 8: 1 / 3}, abs=1e-8
    )


def test_angles_are_those_of_a_plain_loop(gas) -> None:
    sample = gas(1, 8, SKEW)
    atoms = Atoms("Ti8", sample.positions[0].numpy(), cell=SKEW, pbc=True)
    centre, vectors = neighbor_list("iD", atoms, 4.5)
    unit = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    cosines = [u @ v for i in range(8) for u, v in itertools.combinations(unit[centre == i], 2)]
    expected, _ = np.histogram(cosines, 20, (-1, 1), density=True)
    adf = AngularDistribution(4.5, bins=20, variable="cosine")
    np.testing.assert_allclose(average(adf, sample).numpy(), expected, atol=1e-9)


@pytest.mark.statistical
def test_ideal_gas_has_angles_in_all_directions(gas) -> None:
    adf = AngularDistribution(4.0, bins=8, variable="cosine")
    for value in measure(adf, gas(300, 20, 10 * np.eye(3)), lambda _: 1.0):
        assert value.se < 0.02
        assert abs(value.value - 0.5) < sigma_bound(8) * value.se


def test_bragg_peaks_of_fcc(of_atoms) -> None:
    """The cubic cell allows whole hkl: N for 111 and 200, nothing for the mixed 100, 110, 210 and 211."""
    atoms = bulk("Al", "fcc", a=A, cubic=True)
    unit = 2 * math.pi / A
    for square, exact in ((1, 0.0), (2, 0.0), (3, 4.0), (4, 4.0), (5, 0.0), (6, 0.0), (8, 4.0)):
        q = unit * math.sqrt(square)
        found = average(StructureFactor(q - 1e-3, q + 1e-3, 1), of_atoms(atoms))
        assert float(found) == pytest.approx(exact, abs=1e-9)


def test_scattering_lengths(of_atoms) -> None:
    """111 of rock salt is 16 (b_Cl - b_Na)² over 4 (b_Cl² + b_Na²), 200 has the sum."""
    sample, unit = of_atoms(bulk("NaCl", "rocksalt", a=5.64, cubic=True)), 2 * math.pi / 5.64
    lengths = {"Na": 3.63, "Cl": 9.577}
    for square, amplitude in ((3, 9.577 - 3.63), (4, 9.577 + 3.63)):
        q = unit * math.sqrt(square)
        found = average(StructureFactor(q - 1e-3, q + 1e-3, 1, lengths), sample)
        assert float(found) == pytest.approx(4 * amplitude**2 / (9.577**2 + 3.63**2))


@pytest.mark.statistical
def test_ideal_gas_scatters_like_single_atoms(gas) -> None:
    for value in measure(StructureFactor(1.0, 3.0, 4), gas(300, 20, SKEW), lambda _: 1.0):
        assert value.se < 0.1
        assert abs(value.value - 1.0) < sigma_bound(4) * value.se


def test_structure_factor_is_that_of_a_plain_sum(gas) -> None:
    sample = gas(1, 6, SKEW)
    reciprocal = 2 * math.pi * np.linalg.inv(SKEW).T
    whole = np.array([h for h in itertools.product(range(-9, 10), repeat=3) if any(h)])
    q = whole @ reciprocal
    amplitude = np.exp(1j * q @ sample.positions[0].numpy().T).sum(1)
    length = np.linalg.norm(q, axis=1)
    expected = [
        (np.abs(amplitude[(length >= low) & (length < low + 0.5)]) ** 2).mean() / 6
        for low in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5)
    ]
    np.testing.assert_allclose(average(StructureFactor(1.0, 4.0, 6), sample).numpy(), expected, rtol=1e-9)


def test_what_cannot_be_answered_is_refused(of_atoms) -> None:
    sample = of_atoms(bulk("Al", "fcc", a=A))
    with pytest.raises(InputError, match="found Ti, expected one of Al"):
        average(RadialDistribution(pair=("Al", "Ti")), sample)
    with pytest.raises(InputError, match="allows no wave vector in"):
        average(StructureFactor(0.1, 8.0, 50), sample)
    with pytest.raises(InputError, match="no scattering length"):
        average(StructureFactor(1.0, 8.0, 2, {"Ti": 1.0}), sample)
    with pytest.raises(StatisticsError, match=r"two neighbours within 1.5 Å"):
        average(AngularDistribution(1.5), sample)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RadialDistribution(0.0),
        lambda: RadialDistribution(5.0, 0),
        lambda: AngularDistribution(-1.0),
        lambda: AngularDistribution(3.0, variable="sine"),
        lambda: AngularDistribution(3.0, triple=("O", "Ti", None)),
        lambda: StructureFactor(2.0, 1.0, 3),
        lambda: StructureFactor(0.0, 1.0, 0),
    ],
)
def test_shells_that_are_none_are_refused(make) -> None:
    with pytest.raises(InputError):
        make()


@pytest.mark.parametrize("kind", ["fcc", "bcc", "hcp", "sc", "diamond"])
def test_every_simple_crystal_has_a_bragg_peak_in_any_box(of_atoms, kind: str) -> None:
    """√N at a peak, of diamond √(N/2), whatever the origin; other wave vectors of the cell have nothing."""
    atoms = bulk("Ti", kind, a=3.0, cubic=kind != "hcp") * (3, 2, 4)
    skewed = atoms.copy()
    cell = atoms.cell.array
    skewed.set_cell(np.array([cell[0], cell[1] + cell[0], cell[2] - cell[1]]))
    for box in (atoms, skewed):
        box.positions += 0.7
        sample = of_atoms(box)
        vectors = first_peak_vectors(sample.cells[0], len(box))
        amplitudes = bragg_amplitudes(sample.positions, sample.cells, vectors)[0]
        exact = math.sqrt(len(box) / (2 if kind == "diamond" else 1))
        assert float(amplitudes.max()) == pytest.approx(exact)
        assert float(amplitudes.median()) == pytest.approx(0.0, abs=1e-9)


def test_one_of_every_pair_of_wave_vectors() -> None:
    """Their number is that of whole vectors between two spheres, by half."""
    cell = torch.from_numpy(SKEW)
    found = {tuple(h) for h in first_peak_vectors(cell, 40, (0.5, 1.5)).long().tolist()}
    reciprocal, scale = np.linalg.inv(SKEW).T, (40 / abs(np.linalg.det(SKEW))) ** (1 / 3)
    expected = [
        h
        for h in itertools.product(range(-20, 21), repeat=3)
        if 0.5 <= np.linalg.norm(h @ reciprocal) / scale <= 1.5
    ]
    assert 2 * len(found) == len(expected)
    assert found | {(-i, -j, -k) for i, j, k in found} == set(expected)


@pytest.mark.statistical
def test_bragg_amplitudes_of_a_gas(gas, gaussian) -> None:
    """√π/2 in the mean, and 1 the mean square, also where the cell of every frame is another."""
    sample = gas(300, 40, SKEW)
    stretch = 1 + 0.02 * gaussian(300, 1, 1)
    vectors = first_peak_vectors(sample.cells[0], 40)
    amplitudes = bragg_amplitudes(sample.positions * stretch, sample.cells * stretch, vectors).mean(1)
    squares = bragg_amplitudes(sample.positions, sample.cells, vectors).square().mean(1)
    for series, exact in ((amplitudes, math.sqrt(math.pi) / 2), (squares, 1.0)):
        error = float(series.std()) / math.sqrt(len(series))
        # The amplitude of a sum of N unit vectors is not quite Gaussian: -1/(8 N) of it.
        bias = 1 / (8 * 40) if exact != 1.0 else 0.0
        assert abs(float(series.mean()) - exact) < sigma_bound(2) * error + bias
