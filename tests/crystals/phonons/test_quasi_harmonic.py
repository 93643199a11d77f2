"""Thermal expansion of Lennard-Jones nearest neighbours, against the same sums done otherwise."""

import json

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from scipy.optimize import brentq

from mlip_refine.crystals.phonons.dynamical_matrix import TERAHERTZ
from mlip_refine.crystals.phonons.gruneisen import gruneisen, outer_volumes
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.quasi_harmonic import (
    CompressedCrystal,
    QuasiHarmonicResult,
    compressed_crystals,
    lattice_constants,
    quasi_harmonic,
)
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA, HBAR, KB

EPSILON, SIGMA = 0.4, 2.5
REST = 2 ** (1 / 6) * SIGMA
MESH = (5, 5, 5)
PRESSURES = np.array([5.0, 2.0, 0.0, -2.0, -3.5, -5.0, -6.0])


class Neighbours(torch.nn.Module):
    """Nearest neighbours with the Lennard-Jones energy, as MACE is called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.register_buffer("atomic_numbers", torch.tensor([13]))
        self.register_buffer("r_max", torch.tensor(1.25 * REST, dtype=torch.float64))

    def forward(self, inputs, **_):
        six = (SIGMA / inputs["shifts"].norm(dim=1)) ** 6
        system = inputs["batch"][inputs["edge_index"][0]]
        pairs = 2 * EPSILON * self.scale * (six.square() - six)
        return {"energy": pairs.new_zeros(len(inputs["ptr"]) - 1).index_add(0, system, pairs)}


@pytest.fixture(scope="module")
def crystals():
    crystal = HarmonicCrystal.of_cell(bulk("Al", "fcc", a=REST * 2**0.5), np.diag([3, 3, 3]))
    return compressed_crystals(Potential.from_module(Neighbours()), crystal, PRESSURES.tolist())


class Exact:
    """The same crystal: 12 neighbours, a sum over the same waves, derivatives written out."""

    def __init__(self) -> None:
        cell = bulk("Al", "fcc", a=1.0).cell.array
        grid = np.indices(MESH).reshape(3, -1).T[1:] / MESH[0]
        self.along = (np.indices((3, 3, 3)).reshape(3, -1).T - 1) @ cell
        self.along = self.along[np.isclose(np.linalg.norm(self.along, axis=1), 0.5**0.5)] * 2**0.5
        phases = 2 * np.pi * grid @ np.linalg.inv(cell).T @ self.along.T / 2**0.5
        self.waves = 1 - np.cos(phases)
        self.n = len(grid) + 1
        self.mass = Atoms("Al").get_masses()[0]

    @staticmethod
    def pair(r):
        """Energy and its first two derivatives."""
        six = (SIGMA / r) ** 6
        return (
            4 * EPSILON * (six**2 - six),
            -24 * EPSILON * (2 * six**2 - six) / r,
            24 * EPSILON * (26 * six**2 - 7 * six) / r**2,
        )

    def free_energy(self, v, t):
        """U + F of one atom, eV."""
        r = (v * 2**0.5) ** (1 / 3)
        u, du, ddu = self.pair(r)
        outer = self.along[:, :, None] * self.along[:, None, :]
        blocks = (ddu - du / r) * outer + du / r * np.eye(3)
        squares = np.linalg.eigvalsh(np.einsum("qb,bij->qij", self.waves, blocks) / self.mass)
        quanta = 2 * np.pi * HBAR * 1e-3 * TERAHERTZ * np.sqrt(squares)
        vibrations = quanta / 2 + (KB * t * np.log1p(-np.exp(-quanta / (KB * t))) if t else 0.0)
        return 6 * u + vibrations.sum() / self.n

    def slope(self, v, t, h=1e-3):
        """∂F/∂V, eV/Å³, to fourth order in h."""
        f = [self.free_energy(v + k * h, t) for k in (-2, -1, 1, 2)]
        return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)

    def volume(self, t, pressure=0.0):
        return brentq(
            lambda v: self.slope(v, t) + pressure * GPA, 0.9 * REST**3 / 2**0.5, 1.12 * REST**3 / 2**0.5
        )


def test_expansion_is_that_of_the_same_crystal_done_otherwise(crystals):
    exact = Exact()
    temperatures = [0.0, 100.0, 300.0, 500.0]
    found = quasi_harmonic(crystals, temperatures, MESH)
    volumes = np.array([exact.volume(t) for t in temperatures])
    np.testing.assert_allclose(found.volume_A3_per_atom, volumes, rtol=1e-5)
    h = 2.0
    for i, t in enumerate(temperatures[1:], start=1):
        expansion = (exact.volume(t + h) - exact.volume(t - h)) / (2 * h * volumes[i])
        assert found.expansion_per_K[i] == pytest.approx(expansion, rel=1e-3)
        above, below = (exact.slope(volumes[i] + dv, t) for dv in (0.02, -0.02))
        curvature = (above - below) / 0.04
        assert found.bulk_modulus_GPa[i] == pytest.approx(volumes[i] * curvature / GPA, rel=2e-3)
        assert found.gibbs_eV_per_atom[i] == pytest.approx(exact.free_energy(volumes[i], t), abs=1e-5)
        gibbs = [exact.free_energy(exact.volume(one), one) for one in (t - h, t, t + h)]
        capacity = -t * (gibbs[0] - 2 * gibbs[1] + gibbs[2]) / h**2 / KB
        assert found.heat_capacity_kB_per_atom[i] == pytest.approx(capacity, rel=1e-3)
        assert found.entropy_kB_per_atom[i] == pytest.approx((gibbs[0] - gibbs[2]) / (2 * h) / KB, rel=1e-3)
    assert found.expansion_per_K[0] == found.heat_capacity_kB_per_atom[0] == 0
    assert np.isnan(found.gruneisen[0])


def test_lattice_constants_expand_with_the_volume(crystals):
    found = quasi_harmonic(crystals, [300.0, 200.0], MESH)
    assert found.temperatures_K.tolist() == [200.0, 300.0]
    assert list(found.lattice) == ["a"]
    np.testing.assert_allclose(found.lattice["a"] ** 3, 4 * found.volume_A3_per_atom, rtol=1e-9)
    np.testing.assert_allclose(3 * found.linear_expansion_per_K["a"], found.expansion_per_K, rtol=1e-6)


def test_pressure_moves_the_minimum(crystals):
    (volume,) = quasi_harmonic(crystals, [300.0], MESH, pressure=2.0).volume_A3_per_atom
    assert volume == pytest.approx(Exact().volume(300.0, 2.0), rel=1e-5)


def test_expansion_is_the_mean_of_modes_at_their_volume(crystals):
    """α V B_T = Σγ C_V, where the pressure brings the crystal to the volume of the modes."""
    rest, potential = crystals[2], Potential.from_module(Neighbours())
    volume = rest.phonon.primitive.volume
    outer = outer_volumes(potential, rest.crystal)
    modes = gruneisen(rest.phonon, *(one.phonopy(one.force_constants(potential)) for one in outer), MESH)
    pressure = -Exact().slope(volume, 300.0) / GPA
    found = quasi_harmonic(crystals, [300.0], MESH, pressure)
    assert found.volume_A3_per_atom[0] == pytest.approx(volume, rel=1e-5)
    assert found.gruneisen[0] == pytest.approx(modes.mean(300.0), rel=2e-3)


def test_results_survive_a_file(crystals):
    found = quasi_harmonic(crystals, [0.0, 300.0], MESH)
    again = QuasiHarmonicResult.from_json(json.loads(json.dumps(found.as_json())))
    assert again.lattice["a"] == pytest.approx(found.lattice["a"])
    assert again.expansion_per_K == pytest.approx(found.expansion_per_K)
    assert np.isnan(again.gruneisen[0])
    assert again.pressure_GPa == 0.0


def test_a_minimum_outside_the_volumes_is_refused(crystals):
    with pytest.raises(
        StatisticsError, match=r"at \d+ K; needed: pressures below -2 GPa, or lower temperatures"
    ):
        quasi_harmonic(crystals[:4] + crystals[:1], [900.0], MESH)
    with pytest.raises(StatisticsError, match="needed: pressures above 0 GPa"):
        quasi_harmonic(crystals[2:], [10.0], MESH, pressure=4.0)


def test_an_unstable_volume_is_refused_by_its_pressure(crystals):
    bad = crystals[3]
    turned = bad.crystal.phonopy(torch.from_numpy(-bad.phonon.force_constants))
    others = [*crystals[:3], CompressedCrystal(bad.crystal, bad.pressure, bad.energy, turned), *crystals[4:]]
    with pytest.raises(StatisticsError, match=r"under -2 GPa \(.* Å³ per atom\) is unstable: .*i THz at"):
        quasi_harmonic(others, [300.0], MESH)


def test_too_little_is_refused(crystals):
    with pytest.raises(InputError, match="found 4, expected at least 5"):
        quasi_harmonic(crystals[:4], [300.0], MESH)
    with pytest.raises(InputError, match="temperatures must be given"):
        quasi_harmonic(crystals, [-1.0, 300.0], MESH)


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (bulk("Ti", "hcp", a=2.95, c=4.68), ["a", "c"]),
        (Atoms("Sn", cell=[[3, 0, 0], [0, 4, 0], [0, 0, 5]], pbc=True), ["a", "b", "c"]),
        (Atoms("Sn", cell=[[3, 0, 0], [0, 4, 0], [1.1, 0, 5]], pbc=True), ["a", "b", "c", "beta"]),
    ],
)
def test_constants_are_of_one_setting(cell, names):
    first = HarmonicCrystal.of_cell(cell, np.diag([2, 2, 2]))
    strain = np.diag([1.01, 1.01, 1.03])
    if len(names) > 2:
        strain[1, 1], strain[2, 0] = 1.02, 0.02
    if len(names) == 3:
        strain[2, 0] = 0
    stretched = first.primitive
    stretched.set_cell(stretched.cell.array @ strain, scale_atoms=True)
    found = lattice_constants([first, first.moved(stretched)])
    assert list(found) == names
    volumes = [first.primitive.get_volume(), stretched.get_volume()]
    product = found["a"] * found.get("b", found["a"]) * found["c"]
    product = product * np.sin(np.radians(found.get("beta", 90.0)))
    assert product[1] / product[0] == pytest.approx(volumes[1] / volumes[0])
