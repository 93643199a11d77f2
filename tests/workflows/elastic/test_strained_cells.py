"""Strained cells of which the stress is made up: constants and moduli come back, with the right errors."""

import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip_refine.crystals.symmetry import find_symmetry
from mlip_refine.crystals.tensors import stress_from_voigt
from mlip_refine.observables.elasticity import Deformation
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.testing import sigma_bound
from mlip_refine.workflows.elastic.thermal import of_strained_cells, of_stresses

TITANIUM = bulk("Ti", "hcp", a=2.95, c=4.68)
ARGON = bulk("Ar", "fcc", a=5.3, cubic=True)


def _frames(stress: torch.Tensor, atoms: Atoms) -> Trajectory:
    """Frames of one cell with configurational stresses `[n, 6]`, GPa."""
    n = len(stress)
    zero = torch.zeros(1, n).double()
    return Trajectory(
        point=StatePoint("x", atoms, 300.0),
        positions=torch.from_numpy(atoms.positions.copy()).expand(1, n, -1, 3),
        cells=torch.from_numpy(atoms.cell.array.copy()).expand(1, n, 3, 3),
        model_energy=zero,
        bias_energy=zero,
        stress=stress_from_voigt(stress)[None] * GPA,
        kinetic_energy=zero,
        kept=torch.ones(1, n, dtype=torch.bool),
    )


def _kinetic(atoms: Atoms) -> float:
    return float(len(atoms) * KB * 300.0 / atoms.cell.volume / GPA)


def _noise(cells: int, frames: int, seed: int) -> torch.Tensor:
    return torch.randn(cells, frames, 6, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.statistical
def test_what_the_stress_has_no_trace_of_adds_no_error_to_the_pressure():
    """Two cells of 20,000 frames: 1 GPa of shear along the axes, 0.1 GPa of pressure.

    The statistical inefficiency of white noise is found as 1.02(2), so that the error is right within 15 %.
    """
    runs = []
    for noise in _noise(2, 20_000, 3):
        shear, pressure = noise[:, :1], noise[:, 1:2]
        axes, trace = torch.tensor([[1.0, -1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]).double()
        runs.append(_frames(shear * axes - 0.1 * pressure * trace, TITANIUM))
    ((value, error),) = of_stresses(lambda stress: -stress[:, :3].mean().reshape(1), runs)
    assert error == pytest.approx(0.1 / 40_000**0.5, rel=0.15)
    assert value == pytest.approx(_kinetic(TITANIUM), abs=sigma_bound() * error)


def _cubic(constants: tuple[float, float, float]) -> torch.Tensor:
    c11, c12, c44 = constants
    tensor = torch.diag(torch.tensor([c11 - c12] * 3 + [c44] * 3)).double()
    tensor[:3, :3] += c12
    return tensor


def _runs(
    deformation: Deformation, constants: tuple[float, float, float], noise: torch.Tensor
) -> list[Trajectory]:
    shears = torch.tensor([1.0, 1, 1, 2, 2, 2]).double()
    strains = torch.tensor(deformation.strains).double()
    strains = torch.cat([torch.zeros(1, 6).double(), strains])
    mean = (shears * strains) @ _cubic(constants)
    # The total stress, kinetic part included, is that of the constants.
    mean[:, :3] += _kinetic(ARGON)
    return [_frames(m + n, ARGON) for m, n in zip(mean, noise, strict=True)]


def _deformation() -> Deformation:
    return Deformation.of(find_symmetry(ARGON.cell.array, ARGON.positions, ARGON.numbers), 0.01)


def test_moduli_are_those_of_the_tensor():
    """An isotropic one: K = C12 + 2/3 C44, G = C44, E = 9KG/(3K + G), ν = C12/(2 (C12 + C44))."""
    deformation = _deformation()
    noise = 1e-9 * _noise(1 + len(deformation.strains), 20, 1)
    found = of_strained_cells(deformation, _runs(deformation, (180.0, 90.0, 45.0), noise))
    values = {name: m.value for name, m in found["moduli"].items()}
    assert values == pytest.approx({"K": 120.0, "G": 45.0, "E": 120.0, "nu": 1 / 3}, rel=1e-6)
    assert {name: m.unit for name, m in found["moduli"].items()}["nu"] == ""
    assert found["constants"]["C44"].value == pytest.approx(45.0, rel=1e-6)


@pytest.mark.statistical
def test_errors_are_the_spread_over_repetitions():
    """Of 120 repetitions of 30 frames; stresses along the axes rise and fall together in every cell."""
    deformation = _deformation()
    count = 1 + len(deformation.strains)
    values, errors = [], []
    for seed in range(120):
        noise = 0.05 * _noise(count, 30, seed)
        noise[:, :, :3] += 2 * noise[:, :, :1]
        found = of_strained_cells(deformation, _runs(deformation, (150.0, 90.0, 45.0), noise))
        shown = [*found["constants"].values(), *found["moduli"].values(), found["pressure"]]
        values.append([m.value for m in shown])
        errors.append([m.se for m in shown])
    spread = torch.tensor(values).std(0)
    claimed = torch.tensor(errors).square().mean(0).sqrt()
    # The spread of 120 is known to 6.5 %: five sigma.
    torch.testing.assert_close(claimed, spread, rtol=0.35, atol=0)
