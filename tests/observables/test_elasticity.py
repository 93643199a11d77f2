"""Elastic constants at temperature against the free energy of a Lennard-Jones crystal.

At low temperature F(η) = U + ½ kT Σ ln λ_i(η) - kT ln V, with λ_i the curvatures of the strained crystal,
holds to first order in T: its second derivatives are the exact constants. Frames are exact too: drawn from
the harmonic crystal and weighted to the true one.
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine import testing
from mlip_refine.crystals.symmetry import Symmetry, find_symmetry
from mlip_refine.crystals.tensors import project
from mlip_refine.errors import InputError
from mlip_refine.observables.base import Probe, Sample, average, measure
from mlip_refine.observables.cell import Stress
from mlip_refine.observables.elasticity import (
    Deformation,
    FluctuationElasticity,
    FluctuationModuli,
    RestStrain,
    deformation_constants,
    errors_of_stresses,
)
from mlip_refine.quantities import GPA, KB, VOIGT

T = 60.0
KT = KB * T
SHAPES = ("cubic", "turned")


@dataclass
class Crystal:
    """A Lennard-Jones crystal with everything that its free energy needs."""

    potential: Any
    atoms: Atoms

    def strained(self, deformation: np.ndarray) -> "Crystal":
        """The crystal after x' = F x."""
        atoms = self.atoms.copy()
        atoms.set_cell(self.atoms.cell.array @ deformation.T, scale_atoms=True)
        return Crystal(self.potential, atoms)

    def evaluate(self, positions: Tensor, probes: tuple[str, ...]) -> dict[str, Tensor]:
        """Probes of configurations `[n, N, 3]` in this cell."""
        cell = torch.from_numpy(self.atoms.cell.array.copy())
        builder, parts = self.potential.graphs, []
        for part in positions.split(50):
            structures = builder.frames(part, cell.expand(len(part), 3, 3), self.atoms.numbers)
            parts.append(self.potential.evaluate(builder.collate(structures), probes))
        return {name: torch.cat([p[name] for p in parts]) for name in probes}

    def hessian(self) -> Tensor:
        """Force constants `[3N, 3N]`, by central differences."""
        x, h = torch.from_numpy(self.atoms.positions), 1e-4
        steps = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape) * h
        forces = self.evaluate(torch.cat([x + steps, x - steps]), ("forces",))["forces"]
        plus, minus = forces.view(2, x.numel(), x.numel())
        found = (minus - plus) / (2 * h)
        return (found + found.T) / 2

    def free_energy(self) -> float:
        x = torch.from_numpy(self.atoms.positions)[None]
        energy = float(self.evaluate(x, ("energy",))["energy"])
        curvatures = torch.linalg.eigvalsh(self.hessian())[3:]
        return energy + KT * (0.5 * float(curvatures.log().sum()) - np.log(self.atoms.cell.volume))

    def sample(self, n: int, seed: int, probes: tuple[str, ...]) -> tuple[Sample, Tensor]:
        """Frames and their log-weights."""
        values, modes = torch.linalg.eigh(self.hessian())
        noise = torch.randn(n, len(values) - 3, generator=torch.Generator().manual_seed(seed)).double()
        u = (noise * (KT / values[3:]).sqrt()) @ modes[:, 3:].T
        positions = torch.from_numpy(self.atoms.positions) + u.view(n, -1, 3)
        found = self.evaluate(positions, ("energy", *probes))
        log_w = -found["energy"] / KT + 0.5 * noise.square().sum(1)
        cells = torch.from_numpy(self.atoms.cell.array.copy()).expand(n, 3, 3)
        masses = torch.from_numpy(self.atoms.get_masses())
        return Sample(found, positions, cells, self.atoms.numbers, masses, T, 0.0, free_cell=False), log_w

    @cached_property
    def frames(self) -> tuple[Sample, Tensor]:
        """A thousand frames with everything, drawn once."""
        return self.sample(1000, 1, ("stress", "born"))

    @property
    def symmetry(self) -> Symmetry:
        atoms = self.atoms
        return find_symmetry(atoms.cell.array, atoms.positions, atoms.numbers)


@pytest.fixture(scope="module")
def crystals():
    """A crystal under tension, as it is and turned around."""
    atoms = bulk("Al", "fcc", a=4.10, cubic=True).repeat(2)
    angle, axis = 0.7, np.array([1.0, 2.0, 2.0]) / 3
    cross = np.cross(np.eye(3), axis)
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn.T, scale_atoms=True)
    potential = testing.LennardJones([13], 0.25, 2.56, 4.55)
    return {"cubic": Crystal(potential, atoms), "turned": Crystal(potential, turned)}


@pytest.fixture(scope="module")
def exact(crystals) -> dict[str, float]:
    """C11, C12, C44 in GPa, from second differences of F in the Lagrangian strain."""
    crystal, h = crystals["cubic"], 4e-3
    volume = crystal.atoms.cell.volume

    def free_energy(strain: np.ndarray) -> float:
        values, vectors = np.linalg.eigh(np.eye(3) + 2 * strain)
        return crystal.strained(vectors @ np.diag(np.sqrt(values)) @ vectors.T).free_energy()

    middle = crystal.free_energy()

    def second(direction: np.ndarray) -> float:
        ends = free_energy(h * direction) + free_energy(-h * direction)
        return (ends - 2 * middle) / h**2 / volume / GPA

    c11, both = second(np.diag([1.0, 0, 0])), second(np.diag([1.0, 1.0, 0]))
    shear = np.zeros((3, 3))
    shear[1, 2] = shear[2, 1] = 1.0
    return {"C11": c11, "C12": both / 2 - c11, "C44": second(shear) / 4}


@pytest.mark.statistical
@pytest.mark.parametrize("shape", ["cubic", pytest.param("turned", marks=pytest.mark.slow)])
def test_fluctuations_give_the_derivatives_of_the_free_energy(crystals, exact, shape):
    """To an error of at most 0.3 GPa, under tension and in any frame."""
    sample, log_w = crystals[shape].frames
    observable = FluctuationElasticity(crystals[shape].symmetry)
    found = dict(zip(observable.labels, measure(observable, sample, lambda _: 1.0, log_w), strict=True))
    assert set(found) == set(exact)
    for name, value in exact.items():
        assert found[name].se < 0.3
        assert abs(found[name].value - value) < testing.sigma_bound(3) * found[name].se, (
            name,
            found[name],
            value,
        )


def test_the_kinetic_term_is_that_of_the_lagrangian_strain(crystals):
    """Of atoms that feel nothing C = NkT/V (δδ + δδ), twice that of the linear strain."""
    crystal = crystals["cubic"]
    term = len(crystal.atoms) * KT / crystal.atoms.cell.volume / GPA
    sample, _ = crystal.frames
    nothing = {name: torch.zeros_like(values) for name, values in sample.probes.items()}
    free = replace(sample, probes=nothing)
    found = average(FluctuationElasticity(crystal.symmetry), free)
    assert found.tolist() == pytest.approx([2 * term, 0.0, term], abs=1e-9)


def _errors(sample, log_w, observable) -> list[float]:
    return [m.se for m in measure(observable, sample, lambda _: 1.0, log_w)]


@pytest.mark.statistical
def test_strained_cells_give_the_same(crystals, exact):
    """Two strains are enough for a cubic crystal; B is turned into C under tension."""
    crystal = crystals["cubic"]
    deformation = Deformation.of(crystal.symmetry, 0.005)
    assert deformation.directions == (0, 3)
    rows, cells = [], []
    for seed, strain in enumerate(((0.0,) * 6, *deformation.strains)):
        matrix = np.eye(3)
        for (i, j), e in zip(VOIGT, strain, strict=True):
            matrix[i, j] = matrix[j, i] = e + (i == j)
        sample, log_w = crystal.strained(matrix).sample(1000, seed, ("stress",))
        rows.append(average(Stress(), sample, log_w))
        cells.append(partial(_errors, sample, log_w))
    stress = torch.stack(rows)
    constants = partial(deformation_constants, deformation)
    values, errors = constants(stress), errors_of_stresses(constants, stress, cells)
    for value, error, name in zip(values.tolist(), errors, ("C11", "C12", "C44"), strict=True):
        assert 0 < error < 0.5
        assert abs(value - exact[name]) < testing.sigma_bound(3) * error + 0.05, (
            name,
            value,
            error,
            exact[name],
        )
    coefficients = constants(stress, stress_strain=True)
    tension = stress[0, :3].mean()
    torch.testing.assert_close(coefficients, values + tension * torch.tensor([1.0, -1.0, 1.0]).double())


@pytest.mark.statistical
def test_adiabatic_constants_are_larger_by_the_thermal_pressure(crystals):
    """C^S - C^T = T V β²/C_v in C11 and C12, nothing in C44; β = ∂P/∂T from the free energy."""
    crystal = crystals["cubic"]
    sample, log_w = crystal.sample(6000, 2, ("stress",))
    # The Born term is in both.
    still = dict(sample.probes) | {"born": torch.zeros(len(log_w), 6, 6).double()}

    def raised(chosen: Tensor) -> Tensor:
        probes = {name: values[chosen] for name, values in still.items()}
        part = replace(sample, probes=probes, positions=sample.positions[chosen], cells=sample.cells[chosen])
        hot, cold = (
            average(FluctuationElasticity(crystal.symmetry, adiabatic=adiabatic), part, log_w[chosen])
            for adiabatic in (True, False)
        )
        return hot - cold

    block = torch.arange(len(log_w)) * 30 // len(log_w)
    found, left_out = raised(block >= 0), torch.stack([raised(block != i) for i in range(30)])
    error = (29 * left_out.var(0, correction=0)).sqrt()
    h, n, volume = 1e-3, len(crystal.atoms), crystal.atoms.cell.volume
    logs = [
        torch.linalg.eigvalsh(crystal.strained(np.eye(3) * (1 + s * h)).hessian())[3:].log().sum()
        for s in (1, -1)
    ]
    # P = -∂F/∂V at fixed T; d ln V = 3 h.
    slope = -KB * (0.5 * float(logs[0] - logs[1]) / (6 * h) - 1.0) / volume
    expected = T * volume * slope**2 / (3 * n * KB) / GPA
    # A twentieth for what is beyond first order in T.
    tolerance = testing.sigma_bound(2, dof=29) * error + 0.05 * expected
    assert ((found - expected).abs() < tolerance)[:2].all(), (found, error, expected)
    assert (error[:2] < 0.08 * expected).all()
    assert abs(float(found[2])) < 0.01


@pytest.mark.statistical
def test_the_born_term_may_be_known_for_some_frames_only(crystals):
    crystal = crystals["cubic"]
    sample, log_w = crystal.frames
    known = (torch.arange(1000) % 10 == 0).double()
    some = replace(
        sample,
        probes=dict(sample.probes) | {"born": Probe(sample.probes["born"] * known[:, None, None], known)},
    )
    observable = FluctuationElasticity(crystal.symmetry)
    whole, part = (measure(observable, s, lambda _: 1.0, log_w) for s in (sample, some))
    for one, other in zip(whole, part, strict=True):
        assert one.value != other.value
        assert abs(one.value - other.value) < testing.sigma_bound(3) * other.se
        assert one.se < 1.2 * other.se


def test_the_error_of_a_born_term_is_that_of_the_frames_which_have_one(crystals):
    """No other error left: that of a mean over seven values, and none of a single one."""
    crystal = crystals["cubic"]
    sample, _ = crystal.frames
    still = dict(sample.probes) | {"stress": torch.zeros_like(sample.probes["stress"])}
    observable = FluctuationElasticity(crystal.symmetry)

    def errors(number: int) -> list[float]:
        known = torch.zeros(len(sample)).double()
        known[torch.arange(number) * 100] = 1.0
        born = sample.probes["born"] * known[:, None, None]
        some = replace(sample, probes=still | {"born": Probe(born, known)})
        return [m.se for m in measure(observable, some, lambda _: 1.0)]

    born = project_all(sample.probes["born"][:700:100], crystal.symmetry) / GPA
    expected = born.std(dim=0) / 7**0.5
    assert errors(7) == pytest.approx(expected.tolist(), rel=1e-6)
    assert errors(1) == [float("inf")] * 3


def project_all(tensors: Tensor, symmetry: Symmetry) -> Tensor:
    """Independent constants of several tensors `[n, m]`."""
    projected = [project(t, symmetry.rotations) for t in tensors]
    return torch.stack([torch.stack(list(symmetry.independent(t).values())) for t in projected])


def test_stress_strain_coefficients_have_the_total_stress(crystals):
    """Under a tension s alike in all directions B11 = C11 + s, B12 = C12 - s, B44 = C44 + s."""
    crystal = crystals["cubic"]
    sample, log_w = crystal.frames
    constants = average(FluctuationElasticity(crystal.symmetry), sample, log_w)
    coefficients = average(FluctuationElasticity(crystal.symmetry, stress_strain=True), sample, log_w)
    tension = average(Stress(), sample, log_w)[:3].mean()
    assert float(tension) > 1.0
    signs = torch.tensor([1.0, -1.0, 1.0]).double()
    torch.testing.assert_close(coefficients, constants + signs * tension)


def test_moduli_are_those_of_the_stress_strain_coefficients(crystals):
    crystal = crystals["cubic"]
    sample, log_w = crystal.frames
    observable = FluctuationElasticity(crystal.symmetry, stress_strain=True)
    c11, c12, c44 = average(observable, sample, log_w).tolist()
    bulk_modulus, shear, young, nu = average(FluctuationModuli(crystal.symmetry), sample, log_w).tolist()
    assert bulk_modulus == pytest.approx((c11 + 2 * c12) / 3)
    assert shear == pytest.approx((c11 - c12 + 3 * c44) / 5)
    assert young == pytest.approx(9 * bulk_modulus * shear / (3 * bulk_modulus + shear))
    assert nu == pytest.approx((3 * bulk_modulus - 2 * shear) / (2 * shear + 6 * bulk_modulus))


@pytest.mark.statistical
@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_the_strain_to_rest_takes_the_stress_away(crystals, shape):
    """Near rest: where the cell is strained by what is told, 95 % of the mean stress is gone."""
    crystal = crystals[shape].strained(np.eye(3) * 0.995)
    sample, log_w = crystal.sample(300, 6, ("stress", "born"))
    before = average(Stress(), sample, log_w)[:3].mean()
    strain = average(RestStrain(crystal.symmetry), sample, log_w)
    assert float(strain.std()) < 0.02 * float(strain.mean().abs())
    rested, weights = crystal.strained(np.eye(3) * (1 + float(strain.mean()))).sample(300, 7, ("stress",))
    after = average(Stress(), rested, weights)[:3].mean()
    assert abs(float(after)) < 0.05 * abs(float(before))


def test_a_moving_cell_is_refused(crystals):
    sample, _ = crystals["cubic"].sample(10, 8, ("stress", "born"))
    free = replace(sample, free_cell=True)
    with pytest.raises(InputError, match="fixed cell"):
        average(FluctuationElasticity(crystals["cubic"].symmetry), free)


@pytest.mark.parametrize(("kind", "directions"), [("hcp", (0, 2, 3)), ("fcc", (0, 3))])
def test_strains_show_every_constant(kind, directions):
    """A tensor of the symmetry comes back from the stresses that it answers with, at no stress."""
    atoms = bulk("Ti", "hcp", a=2.95, c=4.68) if kind == "hcp" else bulk("Al", "fcc", a=4.05, cubic=True)
    symmetry = find_symmetry(atoms.cell.array, atoms.positions, atoms.numbers)
    deformation = Deformation.of(symmetry, 0.01)
    assert deformation.directions == directions
    constants = torch.linspace(50, 200, len(deformation.basis)).double()
    tensor = torch.einsum("m,mij->ij", constants, deformation.basis)
    shears = torch.tensor([1.0, 1, 1, 2, 2, 2]).double()
    stress = torch.tensor(deformation.strains).double() * shears @ tensor.T
    values = deformation_constants(deformation, torch.cat([torch.zeros(1, 6).double(), stress]))
    assert values.tolist() == pytest.approx(constants.tolist())
