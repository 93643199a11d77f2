"""From a run of the engine to observables."""

import pytest
import torch
from ase import Atoms

from mlip_refine import testing
from mlip_refine.observables import BulkModulus, Pressure, ThermalExpansion, average, measure, sample_of
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling import Length, StatePoint, sample


@pytest.fixture(scope="module")
def gas(open_guards):
    """Ideal gas of two atoms in NPT, 64 replicas, from the ideal volume on."""
    temperature, pressure, n = 900.0, 2.0, 2
    box = [((n + 1) * KB * temperature / (pressure * GPA)) ** (1 / 3)] * 3
    atoms = Atoms(f"Ti{n}", scaled_positions=[[0.1, 0.2, 0.3], [0.6, 0.5, 0.9]], cell=box, pbc=True)
    options = {"replicas": 64, "identity": "none", "timestep": 8.0, "friction": 10.0, "barostat_time": 200.0}
    point = StatePoint("gas", atoms, temperature, pressure, "npt", **options)
    settings = open_guards(timestep=8.0, interval=80.0)
    runs = sample(testing.IdealGas([22], 0.1), [point], settings, Length(400.0, 20), seed=4, stage="gas")
    return runs["gas"]


@pytest.mark.statistical
def test_an_ideal_gas_expands_and_yields_as_it_should(gas) -> None:
    """α = 1/T, K_T = P and ⟨N kT/V⟩ = P, from dynamics."""
    found = sample_of(gas)
    assert found.free_cell
    for observable, exact in ((ThermalExpansion(), 1 / 900.0), (BulkModulus(), 2.0), (Pressure(), 2.0)):
        (value,) = measure(observable, found, gas.inefficiency)
        assert value.se < 0.15 * exact, (observable, value)
        assert abs(value.value - exact) < testing.sigma_bound(3) * value.se, (observable, value)


def test_given_probes_replace_those_of_the_simulation(gas) -> None:
    other = sample_of(gas, {"stress": gas.stress[gas.kept] - 3 * GPA * torch.eye(3)})
    mine, others = (float(average(Pressure(), s)) for s in (sample_of(gas), other))
    assert others - mine == pytest.approx(3.0)
