"""Volumes and shapes that barostats draw, against closed formulas and quadrature."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine import testing
from mlip_refine.quantities import GPA, KB
from mlip_refine.sampling import Length, MolecularDynamics, StatePoint, sample
from mlip_refine.sampling.md.barostat import free_strains, strain_projection

FREEDOMS = ("isotropic", "hexagonal", "anisotropic", "triclinic")
STIFFNESS, TEMPERATURE, PRESSURE, ATOMS = 4.0, 900.0, 2.0, 5


def _gas(n: int, length: float) -> Atoms:
    """Heavy atoms, which stay near each other: no distribution of volumes depends on masses."""
    places = np.random.default_rng(n).random((n, 3))
    return Atoms(f"Ti{n}", scaled_positions=places, cell=np.eye(3) * length, pbc=True, masses=[5e3] * n)


@pytest.mark.statistical
def test_an_ideal_gas_has_the_volumes_of_the_gamma_distribution(
    open_guards: Callable[..., Any],
    observe: Callable[..., Any],
    require_means: Callable[..., None],
) -> None:
    """V has density V^N exp(-PV/kT) dV: mean (N + 1) kT/P, variance (N + 1) (kT/P)²; one batch has all."""
    cases = [(2, 600.0, 2.0), (5, 1800.0, 4.0), (8, 900.0, 2.0)]
    points, replicas = [], 64
    for n, temperature, pressure in cases:
        unit = KB * temperature / (pressure * GPA)
        atoms = _gas(n, ((n + 1) * unit) ** (1 / 3))
        name = f"N = {n}, T = {temperature:g} K, P = {pressure:g} GPa"
        points.append(
            StatePoint(name, atoms, temperature, pressure, "npt", replicas=replicas, identity="none")
        )
    settings = open_guards(timestep=10.0, friction=8.0, barostat_time=150.0)
    dynamics = MolecularDynamics.prepare(testing.IdealGas([22], 0.1), points, settings, seed=12)
    volumes = observe(dynamics, frames=40, every=8, equilibration=80)["volume"].split(replicas)
    comparisons = {}
    for (n, temperature, pressure), point, volume in zip(cases, points, volumes, strict=True):
        unit = KB * temperature / (pressure * GPA)
        comparisons[f"<V>, {point.name}"] = volume, (n + 1) * unit
        comparisons[f"var V, {point.name}"] = (volume - (n + 1) * unit).square(), (n + 1) * unit**2
    require_means(comparisons)
    smallest = volumes[0].mean(1)
    bound = testing.sigma_bound(len(comparisons), replicas - 1)
    assert 1.2 * bound * smallest.std() / len(smallest) ** 0.5 < KB * 600.0 / (2.0 * GPA), (
        "N and N + 1 cannot be told apart"
    )


def _exact(freedom: str, rest: float) -> dict[str, float]:
    """Means over densities V^(N+1) exp(-β(PV + U)) per logarithmic strain, by quadrature on a grid.

    Principal strains e of free axes are Cartesian coordinates. Of symmetric matrices they are eigenvalues:
    the invariant measure of deformations has the factor Π |sinh(e_i - e_j)|.
    """
    grid = np.linspace(-1.2, 1.2, 121)
    axes = {"isotropic": 1, "hexagonal": 2}.get(freedom, 3)
    mesh = np.meshgrid(*[grid] * axes, indexing="ij")
    strain = np.stack([mesh[i] for i in {1: (0, 0, 0), 2: (0, 0, 1), 3: (0, 1, 2)}[axes]])
    volume, square = rest * np.exp(strain.sum(0)), (strain**2).sum(0)
    energy = PRESSURE * GPA * volume + 0.5 * STIFFNESS * square
    weight = volume ** (ATOMS + 1) * np.exp(-energy / (KB * TEMPERATURE))
    if freedom == "triclinic":
        for i, j in itertools.combinations(range(3), 2):
            weight = weight * np.abs(np.sinh(strain[i] - strain[j]))
    weight /= weight.sum()
    mean = float((weight * volume).sum())
    return {
        "V": mean,
        "var V": float((weight * (volume - mean) ** 2).sum()),
        "tr e": float((weight * strain.sum(0)).sum()),
        "(tr e)²": float((weight * strain.sum(0) ** 2).sum()),
        "tr e²": float((weight * square).sum()),
        "|e_zz|²": float((weight * (strain[2] ** 2 if freedom != "triclinic" else square / 3)).sum()),
    }


@pytest.fixture(scope="module")
def elastic(open_guards: Callable[..., Any]) -> dict[str, Tensor]:
    """Cells `[replicas, frames, 3, 3]` and strains of an elastic gas under all freedoms in one batch."""
    unit = KB * TEMPERATURE / (PRESSURE * GPA)
    atoms = _gas(ATOMS, ((ATOMS + 1) * unit) ** (1 / 3))
    potential = testing.ElasticGas([22], STIFFNESS, atoms.cell.array)
    points = [
        StatePoint(f, atoms, TEMPERATURE, PRESSURE, "npt", f, replicas=64, identity="none") for f in FREEDOMS
    ]
    settings = open_guards(timestep=8.0, friction=8.0, interval=64.0, barostat_time=150.0)
    runs = sample(potential, points, settings, Length(1000.0, 80), seed=21, stage="elastic")
    return {f: torch.stack([runs[f].cells, potential.strain(runs[f].cells)]) for f in FREEDOMS}


@pytest.mark.slow
@pytest.mark.statistical
@pytest.mark.parametrize("freedom", FREEDOMS)
def test_an_elastic_gas_has_the_strains_of_quadrature(
    elastic: dict[str, Tensor], require_means: Callable[..., None], freedom: str
) -> None:
    cells, strain = elastic[freedom]
    unit = KB * TEMPERATURE / (PRESSURE * GPA)
    exact = _exact(freedom, (ATOMS + 1) * unit)
    volume, trace = torch.linalg.det(cells), torch.einsum("rtii->rt", strain)
    # The mean square of all elements in a triclinic cell has the off-diagonal ones in it.
    zz = strain[..., 2, :].square().sum(-1) if freedom == "triclinic" else strain[..., 2, 2].square()
    found = {
        "V": volume,
        "var V": (volume - exact["V"]).square(),
        "tr e": trace,
        "(tr e)²": trace.square(),
        "tr e²": strain.square().sum((-1, -2)),
        "|e_zz|²": zz,
    }
    require_means({f"{name}, {freedom}": (found[name], value) for name, value in exact.items()})


@pytest.mark.slow
@pytest.mark.parametrize("freedom", FREEDOMS)
def test_frozen_strains_stay_zero(elastic: dict[str, Tensor], freedom: str) -> None:
    cells = elastic[freedom][0]
    off = cells[..., ~torch.eye(3, dtype=torch.bool)]
    x, y, z = torch.diagonal(cells, dim1=-2, dim2=-1).unbind(-1)
    if freedom == "triclinic":
        assert (off.abs() > 1e-3).double().mean() > 0.9
    else:
        assert not off.any()
        assert torch.equal(x, y) == (freedom != "anisotropic")
        assert torch.equal(x, z) == (freedom == "isotropic")


@pytest.mark.parametrize(("freedom", "free"), zip((*FREEDOMS, "fixed"), (1, 2, 3, 6, 0), strict=True))
def test_projections_are_orthogonal_and_onto_symmetric_matrices(freedom: Any, free: int) -> None:
    projection = strain_projection(freedom)
    strains = free_strains(freedom).flatten(1)
    assert len(strains) == free
    torch.testing.assert_close(strains @ projection, strains)
    torch.testing.assert_close(projection @ projection, projection)
    assert torch.equal(projection, projection.T)
    assert torch.linalg.matrix_rank(projection) == free
    turn = torch.tensor([[0.0, 1.0, -2.0], [-1.0, 0.0, 3.0], [2.0, -3.0, 0.0]], dtype=torch.float64)
    assert not (projection @ turn.flatten()).any()


def _rotation(seed: int) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


@pytest.mark.slow
@pytest.mark.statistical
def test_a_triclinic_cell_does_not_care_how_the_crystal_lies(
    open_guards: Callable[..., Any], require_means: Callable[..., None]
) -> None:
    """Volume and lengths of the edges of a tetragonal supercell, as it is and rotated anyhow."""
    upright = bulk("Al", "fcc", a=4.0, cubic=True) * (2, 2, 3)
    tilted = upright.copy()
    tilted.set_cell(upright.cell.array @ _rotation(5), scale_atoms=True)
    points = [
        StatePoint(name, atoms, 400.0, 1.0, "npt", "triclinic", replicas=32)
        for name, atoms in (("upright", upright), ("tilted", tilted))
    ]
    settings = open_guards(timestep=6.0, friction=5.0, interval=60.0, barostat_time=400.0)
    potential = testing.LennardJones([13], 0.25, 2.56, 4.4)
    runs = sample(potential, points, settings, Length(1000.0, 20), seed=31, stage="tilt")
    one, two = (runs[name].cells for name in ("upright", "tilted"))
    assert two[..., 0, 1].abs().min() > 0.5
    differences = {"V": (torch.linalg.det(one) - torch.linalg.det(two), 0.0)}
    for axis, edge in enumerate("abc"):
        differences[f"|{edge}|"] = (one[..., axis, :].norm(dim=-1) - two[..., axis, :].norm(dim=-1), 0.0)
    lengths = [(c.norm(dim=-1) / c.norm(dim=-1).mean((0, 1)) - 1).square().sum(-1) for c in (one, two)]
    differences["spread of the edges"] = lengths[0] - lengths[1], 0.0
    require_means(differences)


@pytest.mark.statistical
@pytest.mark.parametrize("freedom", [pytest.param("isotropic", marks=pytest.mark.slow), "anisotropic"])
def test_barostats_keep_the_pressure_of_a_crystal(
    open_guards: Callable[..., Any],
    require_means: Callable[..., None],
    freedom: str,
) -> None:
    """⟨(N + 1) kT - V σ⟩ = P⟨V⟩ holds exactly for that measure; axis by axis when the axes are free."""
    atoms = bulk("Al", "fcc", a=4.0, cubic=True) * (2, 2, 2)
    potential = testing.LennardJones([13], 0.25, 2.56, 4.4)
    points = [StatePoint(f"P{p:g}", atoms, 300.0, p, "npt", freedom, replicas=32) for p in (0.0, 4.0)]
    settings = open_guards(timestep=4.0, friction=5.0, interval=40.0, barostat_time=300.0)
    runs = sample(potential, points, settings, Length(800.0, 12), seed=13, stage="crystal")
    comparisons = {}
    for name, run in runs.items():
        volume = torch.linalg.det(run.cells)[..., None]
        pull = (run.n_atoms + 1) * KB * 300.0 - volume * torch.diagonal(run.stress, dim1=-2, dim2=-1)
        excess = pull - run.point.pressure * GPA * volume
        axes = [excess.mean(-1)] if freedom == "isotropic" else list(excess.unbind(-1))
        comparisons |= {f"{name}, axis {i}": (axis, 0.0) for i, axis in enumerate(axes)}
    require_means(comparisons)
    assert torch.linalg.det(runs["P4"].cells).mean() < torch.linalg.det(runs["P0"].cells).mean()
