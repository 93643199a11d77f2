"""Paths in any cell, bands of chains in closed form, and densities of states."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip_refine import testing
from mlip_refine.crystals.phonons.bands import Bands, band_errors, band_path, bands
from mlip_refine.crystals.phonons.dos import DensityOfStates, densities_of_states, overlap
from mlip_refine.crystals.phonons.dynamical_matrix import TERAHERTZ
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.errors import InputError

SALT = bulk("NaCl", "rocksalt", a=5.64)
TURN = np.array([[2, 1, 0], [1, 1, 0], [0, 1, 1]])


@pytest.fixture(scope="module")
def of_springs():
    """Phonons of springs along the bonds of a repeated cell."""

    def make(cell: Atoms, springs: dict[float, float], repeats=(3, 3, 3)):
        crystal = HarmonicCrystal.of_cell(cell, np.diag(repeats))
        n = len(crystal.supercell)
        blocks = testing.bond_springs(crystal.supercell, springs).view(n, 3, n, 3).permute(0, 2, 1, 3)
        return crystal, crystal.phonopy(blocks[crystal.translations.primitive_atoms].contiguous())

    return make


@pytest.fixture(scope="module")
def salt(of_springs):
    return of_springs(SALT, {2.9: 2.5, 4.1: 0.8})


def _turned(atoms: Atoms) -> Atoms:
    """The same crystal with other vectors of the same lattice."""
    return Atoms(atoms.symbols, atoms.positions, cell=TURN @ atoms.cell.array, pbc=True)


@pytest.mark.parametrize(
    ("crystal", "lengths"),
    [
        (bulk("Al", "fcc", a=4.0), {"X": 1 / 4, "L": 3**0.5 / 8, "W": 5**0.5 / 8, "K": 18**0.5 / 16}),
        (bulk("Fe", "bcc", a=3.0), {"H": 1 / 3, "N": 2**0.5 / 6, "P": 3**0.5 / 6}),
        (bulk("Ti", "hcp", a=3.0, c=5.0), {"A": 1 / 10, "M": 1 / 27**0.5, "K": 2 / 9}),
    ],
)
def test_labels_are_those_of_points_of_the_given_cell(crystal, lengths):
    """Distances from Γ in closed form tell the points, whatever vectors span the lattice."""
    for cell in (crystal, _turned(crystal)):
        path = band_path(cell)
        reciprocal = np.linalg.inv(cell.cell.array).T
        found = {}
        for (first, last), line in zip(path.ends, path.points, strict=True):
            found |= {
                first: np.linalg.norm(line[0] @ reciprocal),
                last: np.linalg.norm(line[-1] @ reciprocal),
            }
        assert found["G"] == 0
        assert {name: found[name] for name in lengths} == pytest.approx(lengths, rel=1e-12)


def test_a_path_has_even_steps_and_ticks_where_lines_meet_or_not():
    path = band_path(bulk("Al", "fcc", a=4.0), 101)
    assert [label for _, label in path.ticks] == ["G", "X", "W", "K", "G", "L", "U", "W", "L", "K|U", "X"]
    steps = [np.diff(line) for line in path.distances]
    assert max(s.max() for s in steps) / min(s.min() for s in steps) < 1.05
    assert [line[0] for line in path.distances[1:]] == [line[-1] for line in path.distances[:-1]]


def test_a_cell_that_is_less_symmetric_than_its_atoms_is_refused(monkeypatch):
    crystal = bulk("Al", "fcc", a=4.0)
    crystal.set_cell(crystal.cell.array * np.array([1, 1, 1.00001]), scale_atoms=True)
    assert band_path(crystal).ends[0] == ("G", "X")
    monkeypatch.setattr("mlip_refine.crystals.phonons.bands._LATTICE_TOLERANCES", (1e-6,))
    with pytest.raises(InputError, match="space group 225 in a tetragonal lattice"):
        band_path(crystal)


def test_moments_lower_the_symmetry_of_the_path():
    """An fcc lattice of up and down layers is a tetragonal crystal."""
    layers = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.5] * 3], cell=[2.5, 2.5, 2.5 * 2**0.5], pbc=True)
    with pytest.raises(InputError, match="less symmetry"):
        band_path(layers)
    layers.set_initial_magnetic_moments([2, -2])
    assert {label for ends in band_path(layers).ends for label in ends} >= {"A", "M", "R", "X", "Z"}


def test_bands_of_a_chain(of_springs):
    """Springs between nearest neighbours of rock salt are chains along the axes (Born and von Kármán)."""
    crystal, phonon = of_springs(SALT, {2.9: 2.5})
    path = band_path(crystal.primitive)
    line = next(i for i, ends in enumerate(path.ends) if ends == ("G", "X"))
    found = bands(phonon, path).frequencies[line]
    light, heavy = 1 / crystal.primitive.get_masses()
    q = path.points[line] @ np.linalg.inv(crystal.primitive.cell.array).T
    root = np.sqrt((light + heavy) ** 2 - 4 * np.sin(2 * np.pi * q * 2.82) ** 2 * light * heavy)
    squares = 2.5 * np.concatenate([light + heavy - root, light + heavy + root], axis=1)
    expected = TERAHERTZ * np.sqrt(np.sort(squares, axis=1).clip(min=0))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_bands_do_not_depend_on_the_lattice_vectors(salt):
    crystal, phonon = salt
    turned = HarmonicCrystal.of(crystal.supercell, (TURN / 3).T)
    assert turned.primitive.cell.array == pytest.approx(TURN @ crystal.primitive.cell.array)
    assert (turned.translations.primitive_atoms == crystal.translations.primitive_atoms).all()
    other = turned.phonopy(torch.from_numpy(phonon.force_constants))
    mine, theirs = (bands(p, band_path(c.primitive)) for c, p in ((crystal, phonon), (turned, other)))
    assert not np.allclose(mine.path.points[0], theirs.path.points[0])
    for a, b in zip(mine.frequencies, theirs.frequencies, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_errors_of_bands(salt):
    crystal, phonon = salt
    reference = bands(phonon, band_path(crystal.primitive))
    assert max(band_errors(reference, reference).largest) == 0
    shifted = [line.copy() for line in reference.frequencies]
    for line in shifted:
        line[:, 5] += 0.25
    shifted[2][7, 1] -= 3.0
    found = band_errors(Bands(reference.path, tuple(shifted)), reference)
    assert found.mean[5] == pytest.approx(0.25)
    assert found.mean[0] == 0
    assert found.largest[1] == pytest.approx(3.0)
    assert found.lines[1] == reference.path.ends[2]
    assert found.points[1] == pytest.approx(reference.path.points[2][7])
    # One point among evenly spaced ones counts as its share of the path.
    along, length = reference.path.distances[2], reference.path.distances[-1][-1]
    assert found.mean[1] == pytest.approx(3.0 * (along[8] - along[7]) / length)
    assert found.as_json()["largest_THz"] == pytest.approx(3.0)
    assert json.loads(json.dumps(found.as_json()))["bands"][1]["line"] == list(reference.path.ends[2])


def test_bands_of_other_paths_are_not_compared(salt):
    crystal, phonon = salt
    fine, coarse = (bands(phonon, band_path(crystal.primitive, n)) for n in (21, 11))
    with pytest.raises(InputError, match="not of one path"):
        band_errors(fine, coarse)


def _densities(phonons, n: int, **options: float):
    for phonon in phonons:
        phonon.run_mesh([n, n, n], is_gamma_center=True)
    return densities_of_states(phonons, **options)


def test_a_crystal_without_a_real_mode_has_a_density(salt):
    crystal, phonon = salt
    for factor, lowest in ((-1.0, -5), (0.0, -0.03)):
        constants = torch.from_numpy(factor * phonon.force_constants)
        (found,) = _densities([crystal.phonopy(constants)], 3)
        assert found.n_modes == pytest.approx(6, rel=1e-4)
        assert found.frequencies[0] < lowest
        assert len(found.frequencies) < 1000
    with pytest.raises(InputError, match="frequencies on a mesh"):
        densities_of_states([crystal.phonopy()])


def test_bands_and_densities_survive_files(salt):
    crystal, phonon = salt
    found = bands(phonon, band_path(crystal.primitive, 11))
    again = Bands.from_json(json.loads(json.dumps(found.as_json())))
    assert [label for _, label in again.path.ticks] == [label for _, label in found.path.ticks]
    np.testing.assert_allclose(again.frequencies[3], found.frequencies[3], atol=1e-6)
    (density,) = _densities([phonon], 5)
    read = DensityOfStates.from_json(json.loads(json.dumps(density.as_json())))
    np.testing.assert_allclose(read.states, density.states, atol=1e-6)


def test_densities_hold_all_modes_and_overlap_as_far_as_they_are_alike(salt):
    crystal, phonon = salt
    stiffer = crystal.phonopy(torch.from_numpy(1.02**2 * phonon.force_constants))
    other = crystal.phonopy(torch.from_numpy(16.0 * phonon.force_constants))
    mine, near, far = _densities([phonon, stiffer, other], 7)
    assert [one.n_modes for one in (mine, near, far)] == pytest.approx([6, 6, 6], rel=1e-4)
    assert overlap(mine, mine) == 1
    assert overlap(far, mine) < 0.3
    assert 0.6 < overlap(near, mine) < 1
    assert overlap(near, mine) == overlap(mine, near)
    with pytest.raises(InputError, match="same frequencies"):
        overlap(mine, _densities([phonon], 7)[0])


def test_a_density_by_gaussians_is_that_of_tetrahedra_smeared(salt):
    _, phonon = salt
    (found,) = _densities([phonon], 21, width=0.15)
    exact = phonon.run_total_dos(
        freq_min=found.frequencies[0], freq_max=found.frequencies[-1], freq_pitch=0.01
    )
    x, states = np.array(exact.frequency_points), np.array(exact.dos)
    kernel = np.exp(-((found.frequencies[:, None] - x) ** 2) / (2 * 0.15**2)) / (0.15 * np.sqrt(2 * np.pi))
    difference = np.abs(found.states - kernel @ states * 0.01).sum() * np.diff(found.frequencies)[0]
    assert difference < 0.025 * 6
