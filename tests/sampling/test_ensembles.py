"""The ensembles that dynamics draws, against exact answers: all bounds are 3 sigma, all seeds fixed."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling import Hamiltonian, Length, StatePoint, Trajectory, sample
from mlip_refine.statistics import statistical_inefficiency


def _mean_se(series: Tensor) -> tuple[float, float]:
    """Mean and standard error of series `[replicas, n]`."""
    n = series.numel() / statistical_inefficiency(series)
    return series.mean().item(), series.std().item() / math.sqrt(n)


def _z(series: Tensor, exact: float) -> float:
    mean, se = _mean_se(series)
    return (mean - exact) / se


@pytest.fixture(scope="module")
def biased(analytic: SimpleNamespace, open_guards: Callable[..., Any]) -> dict[str, tuple[Trajectory, Any]]:
    """Crystals of two sizes at two temperatures in one batch, held by their harmonic bias alone."""
    points, references = [], {}
    for kind in ("NaCl", "hcp"):
        atoms, reference = analytic.crystal(kind)
        for temperature in (200.0, 1100.0):
            name = f"{kind}-{temperature:g}"
            references[name] = reference
            points.append(
                StatePoint(name, atoms, temperature, replicas=8, hamiltonian=Hamiltonian(0.0, 1.0, reference))
            )
    gas = analytic.IdealGas([11, 17, 22], 0.1)
    settings = open_guards(timestep=4.0, friction=8.0, interval=80.0)
    runs = sample(gas, points, settings, Length(1200.0, 90), seed=11, stage="nvt")
    return {name: (run, references[name]) for name, run in runs.items()}


@pytest.mark.parametrize("name", ["NaCl-200", "NaCl-1100", "hcp-200", "hcp-1100"])
def test_langevin_gives_every_mode_half_kt(biased: dict[str, Any], name: str) -> None:
    run, _ = biased[name]
    exact = 1.5 * (run.n_atoms - 1) * KB * run.point.temperature
    assert run.kept.all()
    assert abs(_z(run.bias_energy, exact)) < 3
    assert not run.model_energy.any()


@pytest.mark.parametrize("name", ["NaCl-200", "NaCl-1100", "hcp-200", "hcp-1100"])
def test_displacements_have_the_covariance_kt_over_k(biased: dict[str, Any], name: str) -> None:
    """Every normal mode's variance in units of kT/k: chi squared over all modes within 3 sigma."""
    run, reference = biased[name]
    root = reference.masses.repeat_interleave(3).sqrt()
    values, vectors = torch.linalg.eigh(reference.projected / root[:, None] / root)
    u = (run.positions - reference.sites).flatten(2) * root
    q = (u @ vectors[:, 3:]) * (values[3:] / (KB * run.point.temperature)).sqrt()
    z = torch.tensor([_z(q[..., m].square(), 1.0) for m in range(q.shape[-1])])
    assert abs((z.square().sum() - len(z)) / math.sqrt(2 * len(z))) < 3
    cross = q.flatten(0, 1).T @ q.flatten(0, 1) / q[..., 0].numel()
    off = cross - torch.diag(torch.diagonal(cross))
    assert off.abs().max() < 6 * math.sqrt(2 / q[..., 0].numel())


PRESSURE = 2.0
TEMPERATURE = 900.0


STIFFNESS = 4.0


@pytest.fixture(scope="module")
def shaped_gas(analytic: SimpleNamespace) -> Any:
    """An ideal gas whose box, without an energy of its volume, prefers the shape of a cube.

    U = ½κ Σ (e_i - ē)², e_i the logarithms of the lengths: without it free axes would diffuse apart for ever.
    """

    class ShapedGas(analytic.IdealGas):  # type: ignore[name-defined, misc]
        def parts(self, graphs: Any) -> tuple[Tensor, Tensor, Tensor]:
            _, forces, _ = super().parts(graphs)
            lengths = torch.diagonal(graphs.cell, dim1=-2, dim2=-1).log()
            shape = lengths - lengths.mean(-1, keepdim=True)
            stress = torch.diag_embed(STIFFNESS * shape) / graphs.volume[:, None, None]
            return 0.5 * STIFFNESS * shape.square().sum(-1), forces, stress

    return ShapedGas([22], 0.1)


@pytest.mark.parametrize("freedom", ["isotropic", "anisotropic"])
def test_barostats_give_the_ideal_gas_its_volume(
    shaped_gas: Any, open_guards: Callable[..., Any], freedom: str
) -> None:
    """V has density V^(N-1) exp(-PV/kT): the Gamma distribution of N.

    The barostats move log-strains under V(P_inst - P), so their density V^N exp(-PV/kT) is per d(ln V), the
    scale-invariant measure (Koper and Reiss 1996); per dV it has one power less. So the mean is N kT/P, not
    (N + 1) kT/P, and the variance N (kT/P)². Both, and the spread of the shape, (2/3) kT/κ per axis, within
    3 sigma; N = 12, so that the mean tells N from N + 1 by 8 %, more than 5 sigma.
    """
    n, unit = 12, KB * TEMPERATURE / (PRESSURE * GPA)
    box = np.eye(3) * (n * unit) ** (1 / 3)
    atoms = Atoms(f"Ti{n}", scaled_positions=np.random.default_rng(1).random((n, 3)), cell=box, pbc=True)
    point = StatePoint("gas", atoms, TEMPERATURE, PRESSURE, "npt", freedom, replicas=32)
    settings = open_guards(timestep=10.0, friction=8.0, interval=150.0, barostat_time=150.0)
    run = sample(shaped_gas, [point], settings, Length(1500.0, 90), seed=12, stage="gas")["gas"]
    volume = torch.linalg.det(run.cells)
    assert abs(_z(volume, n * unit)) < 3
    assert _mean_se(volume)[1] < unit / 5
    assert abs(_z((volume - n * unit).square(), n * unit**2)) < 3
    lengths = torch.diagonal(run.cells, dim1=-2, dim2=-1).log()
    spread = (lengths - lengths.mean(-1, keepdim=True)).square().sum(-1)
    if freedom == "anisotropic":
        assert abs(_z(spread, 2 * KB * TEMPERATURE / STIFFNESS)) < 3
    else:
        assert spread.max() < 1e-20


@pytest.mark.parametrize("freedom", [pytest.param("isotropic", marks=pytest.mark.slow), "anisotropic"])
def test_barostats_keep_the_pressure_of_a_crystal(
    analytic: SimpleNamespace, open_guards: Callable[..., Any], freedom: str
) -> None:
    """⟨V P_inst⟩ = P⟨V⟩ holds exactly for that measure; axis by axis when the axes are free."""
    atoms = bulk("Al", "fcc", a=4.0, cubic=True) * (2, 2, 2)
    potential = analytic.LennardJones([13], 0.25, 2.56, 4.4)
    points = [StatePoint(f"P{p:g}", atoms, 300.0, p, "npt", freedom, replicas=3) for p in (0.0, 4.0)]
    settings = open_guards(timestep=2.0, friction=5.0, interval=40.0, barostat_time=400.0)
    runs = sample(potential, points, settings, Length(1000.0, 50), seed=13, stage="crystal")
    for run in runs.values():
        volume = torch.linalg.det(run.cells)
        kinetic = run.n_atoms * KB * 300.0
        pull = kinetic - volume[..., None] * torch.diagonal(run.stress, dim1=-2, dim2=-1)
        excess = pull - run.point.pressure * GPA * volume[..., None]
        parts = [excess.mean(-1)] if freedom == "isotropic" else list(excess.unbind(-1))
        for part in parts:
            assert abs(_z(part, 0.0)) < 3
    assert torch.linalg.det(runs["P4"].cells).mean() < torch.linalg.det(runs["P0"].cells).mean()
