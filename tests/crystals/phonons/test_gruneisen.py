"""Grüneisen parameters of pairs that repel as a power of the distance, and of crystals that are unstable."""

import json
import math

import numpy as np
import pytest
import torch
from ase.build import bulk

from mlip_refine.crystals.phonons.gruneisen import gruneisen, outer_volumes
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.phonons.quasi_harmonic import pressures_of_volumes
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.potential import Potential

N = 9
HCP = bulk("Ti", "hcp", a=2.9, c=4.7)


class Powers(torch.nn.Module):
    """Pairs with energies ε (σ/r)ⁿ, as MACE is called."""

    def __init__(self, number: int, power: int, sigma: float, reach: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.power, self.sigma = power, sigma
        self.register_buffer("atomic_numbers", torch.tensor([number]))
        self.register_buffer("r_max", torch.tensor(reach, dtype=torch.float64))

    def forward(self, inputs, **_):
        pairs = 0.5 * self.scale * (self.sigma / inputs["shifts"].norm(dim=1)) ** self.power
        system = inputs["batch"][inputs["edge_index"][0]]
        return {"energy": pairs.new_zeros(len(inputs["ptr"]) - 1).index_add(0, system, pairs)}


@pytest.fixture(scope="module")
def repelling():
    """Hexagonal close packing under pressure, where nearest neighbours repel each other."""
    potential = Potential.from_module(Powers(22, N, 2.9, 3.5))
    crystal = HarmonicCrystal.of_cell(HCP, np.diag([3, 3, 2]))
    pressure = 40.0
    return potential, crystal.at_rest(potential, Rest("cell", pressure)), pressure


def _phonon(potential, crystal, factor=1.0):
    return crystal.phonopy(factor * crystal.force_constants(potential))


def test_powers_of_the_distance_have_one_parameter(repelling):
    """ω² ~ r^-(n+2): γ = (n+2)/6 of every mode, in a cell whose shape is free."""
    potential, crystal, pressure = repelling
    errors = []
    for change in (0.02, 0.01):
        smaller, larger = outer_volumes(potential, crystal, pressure, change)
        phonons = [_phonon(potential, one) for one in (crystal, smaller, larger)]
        found = gruneisen(*phonons, (4, 4, 3))
        assert np.diff(found.volumes) == pytest.approx(change / 2 * found.volumes[1], rel=0.1)
        assert found.counted.sum() == found.counted.size - 3
        errors.append(np.nanmax(np.abs(found.parameters - (N + 2) / 6)))
    # Differences of second order.
    assert errors[1] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert found.mean(300.0) == pytest.approx((N + 2) / 6, abs=1e-3)
    assert math.isnan(found.mean(0.0))
    assert found.imaginary_share == 0


def test_pressures_bring_the_volumes_that_are_asked_for(repelling):
    potential, crystal, pressure = repelling
    for ratio, allowed in ((0.99, 1e-4), (1.01, 1e-4), (0.95, 3e-3)):
        (one,) = pressures_of_volumes(potential, crystal, (ratio,), pressure)
        found = crystal.at_rest(potential, Rest("cell", one)).primitive.get_volume()
        assert found / crystal.primitive.get_volume() == pytest.approx(ratio, abs=allowed)


def test_the_mean_weighs_modes_by_their_heat_capacities(repelling):
    potential, crystal, _ = repelling
    base = _phonon(potential, crystal)
    constants = torch.from_numpy(base.force_constants)
    # Stiffness of motion along c changes more than that of motion across.
    smaller, larger = (
        crystal.moved(_scaled(crystal, s)).phonopy(k * constants) for s, k in ((0.995, 1.03), (1.005, 0.97))
    )
    found = gruneisen(base, smaller, larger, (4, 4, 3))
    x = found.frequencies[found.counted] * 47.992430730 / 150.0
    capacity = x**2 * np.exp(x) / np.expm1(x) ** 2
    weights = np.broadcast_to(found.weights[:, None], found.counted.shape)[found.counted]
    expected = np.average(found.parameters[found.counted], weights=weights * capacity)
    assert found.mean(150.0) == pytest.approx(expected, rel=1e-4)
    assert found.lowest.parameter <= expected <= found.highest.parameter


def _scaled(crystal, factor):
    cell = crystal.primitive
    cell.set_cell(factor * cell.cell.array, scale_atoms=True)
    return cell


def test_a_mean_over_imaginary_modes_is_refused(repelling):
    potential, crystal, pressure = repelling
    smaller, larger = outer_volumes(potential, crystal, pressure)
    constants = [one.force_constants(potential) for one in (crystal, smaller, larger)]
    # Forces along c push where they pulled.
    for one in constants:
        one[..., 2, 2] *= -1
    found = gruneisen(
        *(c.phonopy(k) for c, k in zip((crystal, smaller, larger), constants, strict=True)), (4, 4, 3)
    )
    assert 0.2 < found.imaginary_share < 0.5
    assert found.frequencies.min() < -1
    assert np.isnan(found.parameters[found.imaginary]).all()
    with pytest.raises(StatisticsError, match=r"% of the modes are imaginary, the lowest at -[\d.]+ THz"):
        found.mean(300.0)
    data = json.loads(json.dumps(found.as_json([0.0, 300.0])))
    assert data["mean"] == [None, None]
    assert "imaginary" in data["refused"]
    assert data["imaginary_share"] == found.imaginary_share
    assert "modes" not in data
    modes = json.loads(json.dumps(found.modes_as_json()))
    assert [len(modes[key]) for key in ("points", "weights", "parameters")] == [len(found.points)] * 3
    none = [[value is None for value in row] for row in modes["parameters"]]
    np.testing.assert_array_equal(none, ~found.counted)
    np.testing.assert_allclose(modes["frequencies_THz"], found.frequencies, atol=1e-6)
    assert data["lowest_frequency_THz"] == pytest.approx(found.frequencies.min(), abs=1e-6)


def test_volumes_ascend_and_a_mode_is_real(repelling):
    potential, crystal, _ = repelling
    constants = crystal.force_constants(potential)
    three = [crystal.moved(_scaled(crystal, s)) for s in (0.995, 1.0, 1.005)]
    small, middle, large = (one.phonopy(-constants) for one in three)
    with pytest.raises(StatisticsError, match="no mode of the crystal is real"):
        gruneisen(middle, small, large, (3, 3, 3))
    for smaller, larger in ((large, small), (middle, large), (small, middle)):
        with pytest.raises(InputError, match="do not ascend"):
            gruneisen(middle, smaller, larger, (3, 3, 3))
