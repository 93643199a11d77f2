"""The Uhlenbeck-Ford fluid against another neighbour search, derivatives, and an ideal gas."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from scipy.special import zeta
from torch import Tensor

from mlip_refine.errors import SamplingError
from mlip_refine.sampling import MDSettings, MolecularDynamics, StatePoint, UhlenbeckFord
from mlip_refine.sampling.md.forcefield import ForceField
from mlip_refine.sampling.md.state import BatchState
from mlip_refine.sampling.no_potential import NoPotential
from mlip_refine.sampling.pair_reference import CUTOFF, SKIN, ZETA, image_pairs
from mlip_refine.sampling.state_points import Hamiltonian
from mlip_refine.testing import LennardJones, harmonic_reference, sigma_bound

KT = 0.1
CPU = torch.device("cpu")


def _two_species(n_atoms: int, strength: float = 7.0) -> UhlenbeckFord:
    lengths = torch.tensor([[1.3, 1.1], [1.1, 0.8]], dtype=torch.float64)
    return UhlenbeckFord(torch.arange(n_atoms) % 2, lengths, KT, strength)


def _cells(n: int, length: float, rng: np.random.Generator) -> Tensor:
    """Different triclinic cells."""
    return torch.from_numpy(length * (np.eye(3) + rng.normal(scale=0.12, size=(n, 3, 3))))


def _gas(n: int, n_atoms: int, length: float, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    cells = _cells(n, length, rng)
    # Unwrapped: atoms drift through many cells.
    fractional = torch.from_numpy(rng.uniform(size=(n, n_atoms, 3)) + rng.integers(-3, 4, (n, n_atoms, 3)))
    return fractional @ cells, cells


def _exact(fluid: UhlenbeckFord, positions: Tensor, cell: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces and virial of one system from ASE's neighbours, every pair from both its ends."""
    reach = fluid.cutoff * float(fluid.sigma.max())
    atoms = Atoms(["H"] * len(positions), positions.numpy(), cell=cell.numpy(), pbc=True)
    i, j, d, vectors = neighbor_list("ijdD", atoms, reach)
    sigma = fluid.pair_lengths.numpy()[i, j]
    inside = d < fluid.cutoff * sigma
    i, d, vectors, sigma = i[inside], d[inside], vectors[inside], sigma[inside]
    e = np.exp(-((d / sigma) ** 2))
    unit = fluid.strength * fluid.kt
    energy = -0.5 * unit * (np.log1p(-e) - np.log1p(-np.exp(-(fluid.cutoff**2)))).sum()
    push = (2 * unit * e / (1 - e) / sigma**2)[:, None] * vectors
    forces = np.zeros((len(positions), 3))
    np.add.at(forces, i, -push)
    return energy, forces, -0.5 * push.T @ vectors


@pytest.mark.parametrize("cutoff", [CUTOFF, 2.5])
@pytest.mark.parametrize("length", [3.1, 5.0, 9.0, 16.0])
def test_energies_forces_and_virials_are_those_of_all_images(length: float, cutoff: float) -> None:
    """The range, 6.5 Å, is beyond twice the smallest cell, and far within half the largest."""
    fluid = replace(_two_species(12), cutoff=cutoff)
    positions, cells = _gas(3, 12, length, seed=int(10 * length))
    found = fluid.on(CPU, torch.float64).energy_forces(positions, cells, virial=True)
    assert found.virial is not None
    for k in range(3):
        energy, forces, virial = _exact(fluid, positions[k], cells[k])
        assert found.energy[k].item() == pytest.approx(energy, rel=1e-12)
        np.testing.assert_allclose(found.forces[k].numpy(), forces, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(found.virial[k].numpy(), virial, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fluid.energy(positions, cells), found.energy, rtol=1e-12, atol=0)


def test_forces_and_virial_are_derivatives_of_the_energy() -> None:
    fluid = _two_species(10)
    positions, cells = _gas(1, 10, 6.0, seed=2)
    _, forces, virial = fluid.on(CPU, torch.float64).energy_forces(positions, cells, virial=True)
    assert virial is not None
    step, eye = 1e-6, torch.eye(3, dtype=torch.float64)
    for atom, axis in product((0, 3, 7), range(3)):
        ends = []
        for sign in (1, -1):
            moved = positions.clone()
            moved[0, atom, axis] += sign * step
            ends.append(fluid.energy(moved, cells).item())
        slope = (ends[0] - ends[1]) / (2 * step)
        assert forces[0, atom, axis].item() == pytest.approx(-slope, rel=1e-6, abs=1e-7)
    for a, b in product(range(3), range(3)):
        strain = torch.zeros(3, 3, dtype=torch.float64)
        strain[a, b] = step
        plus, minus = (
            fluid.energy(positions @ (eye + sign * strain), cells @ (eye + sign * strain)).item()
            for sign in (1, -1)
        )
        assert virial[0, a, b].item() == pytest.approx((plus - minus) / (2 * step), rel=1e-6, abs=1e-7)


def test_pairs_are_found_once_and_in_any_number_of_systems() -> None:
    positions, cells = _gas(4, 9, 4.0, seed=3)
    reach = 7.3
    system, first, second, shifts = image_pairs(positions, cells, reach)
    for k in range(4):
        mine = system == k
        atoms = Atoms(["H"] * 9, positions[k].numpy(), cell=cells[k].numpy(), pbc=True)
        i, j, moves = neighbor_list("ijS", atoms, reach)
        # ASE's shifts go with its own wrapping of positions, which it undoes.
        both = {(a, b, *s) for a, b, s in zip(i.tolist(), j.tolist(), moves.tolist(), strict=True)}
        one, two = (first[mine] - 9 * k).tolist(), (second[mine] - 9 * k).tolist()
        found = [(a, b, *map(int, s)) for a, b, s in zip(one, two, shifts[:, mine].T.tolist(), strict=True)]
        mirrored = [(b, a, *(-x for x in s)) for a, b, *s in found]
        assert len(set(found)) == len(found)
        assert {*found, *mirrored} == both
        assert 2 * len(found) == len(both)
        alone = image_pairs(positions[k : k + 1], cells[k : k + 1], reach)
        assert torch.equal(alone[1], first[mine] - 9 * k)
        assert torch.equal(alone[3], shifts[:, mine])


def test_a_list_holds_as_long_as_no_pair_can_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fluid = _two_species(40)
    positions, cells = _gas(2, 40, 12.0, seed=4)
    batch = fluid.on(CPU, torch.float64)
    searches = []
    monkeypatch.setattr(
        "mlip_refine.sampling.pair_reference.image_pairs",
        lambda *arguments: searches.append(1) or image_pairs(*arguments),
    )
    batch.find(positions, cells)
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(30):
        positions = positions + torch.from_numpy(rng.normal(scale=0.08, size=positions.shape))
        strain = torch.eye(3, dtype=torch.float64) * (1 + 0.004 * rng.normal())
        positions, cells = positions @ strain, cells @ strain
        if batch.holds(positions, cells):
            held += 1
        else:
            batch.find(positions, cells)
        found = batch.energy_forces(positions, cells)
        fresh = fluid.on(CPU, torch.float64).energy_forces(positions, cells)
        torch.testing.assert_close(found.energy, fresh.energy, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.forces, fresh.forces, rtol=1e-9, atol=1e-11)
    assert 10 < held < 30
    assert not batch.holds(positions * torch.nan, cells)


def test_two_atoms_on_their_way_into_range_are_not_missed() -> None:
    fluid = UhlenbeckFord.of_one_length(2, 1.0, KT)
    cells = 30 * torch.eye(3, dtype=torch.float64)[None]
    far = CUTOFF + SKIN + 1e-6
    positions = torch.tensor([[[0.0, 0, 0], [far, 0, 0]]], dtype=torch.float64)
    batch = fluid.on(CPU, torch.float64)
    batch.find(positions, cells)
    assert batch.energy_forces(positions, cells).energy.item() == 0.0
    positions[0, 0, 0], positions[0, 1, 0] = SKIN / 2 - 1e-3, far - SKIN / 2 + 1e-3
    assert batch.holds(positions, cells)
    positions[0, 0, 0], positions[0, 1, 0] = SKIN / 2 + 1e-3, far - SKIN / 2 - 1e-3
    assert not batch.holds(positions, cells)


@pytest.mark.statistical
def test_the_mean_of_s_in_an_ideal_gas_is_exact() -> None:
    n, n_atoms = 3000, 20
    fluid = _two_species(n_atoms)
    rng = np.random.default_rng(6)
    cell = _cells(1, 9.0, rng)
    positions = torch.from_numpy(rng.uniform(size=(n, n_atoms, 3))) @ cell
    sums = fluid.sums(positions, cell.expand(n, 3, 3))
    exact = fluid.ideal_sum(float(torch.linalg.det(cell)))
    error = float(sums.std()) / math.sqrt(n)
    assert abs(float(sums.mean()) - exact) < sigma_bound() * error
    assert error < 0.02 * exact


def test_the_mean_of_s_of_one_species_is_the_formula_of_the_density() -> None:
    """⟨S⟩ = (N - 1) x ζ(5/2) at p = 0, and B₂ of p = 1 is x/ρ."""
    fluid = UhlenbeckFord.of_one_length(50, 1.7, KT)
    volume = 700.0
    x = 0.5 * (math.pi * 1.7**2) ** 1.5 * 50 / volume
    assert pytest.approx(zeta(2.5), rel=1e-14) == ZETA
    assert fluid.packing(volume) == pytest.approx(x, rel=1e-12)
    assert fluid.ideal_sum(volume) == pytest.approx(49 * x * zeta(2.5), rel=1e-12)


def test_energies_are_linear_in_the_strength_and_keys_tell_fluids_apart() -> None:
    positions, cells = _gas(2, 12, 8.0, seed=7)
    weak, strong = _two_species(12, 1.0), _two_species(12, 40.0)
    torch.testing.assert_close(strong.energy(positions, cells), 40 * KT * weak.sums(positions, cells))
    keys = {
        _two_species(12).key(),
        _two_species(12, 7.5).key(),
        UhlenbeckFord.of_one_length(12, 1.2, KT, 7.0).key(),
        UhlenbeckFord.of_one_length(12, 1.21, KT, 7.0).key(),
        UhlenbeckFord.of_one_length(12, 1.2, 1.1 * KT, 7.0).key(),
        replace(_two_species(12), cutoff=4.0).key(),
    }
    assert len(keys) == 6
    assert _two_species(12).key() == _two_species(12).key()


def test_the_shortest_distance_is_found_in_every_frame() -> None:
    positions, cells = _gas(3, 12, 6.0, seed=8)
    fluid = _two_species(12)
    for k, found in enumerate(fluid.closest(positions, cells).tolist()):
        atoms = Atoms(["H"] * 12, positions[k].numpy(), cell=cells[k].numpy(), pbc=True)
        assert found == pytest.approx(neighbor_list("d", atoms, 6.0).min(), rel=1e-12)
    apart = torch.tensor([[[0.0, 0, 0], [9.0, 0, 0]]], dtype=torch.float64)
    alone = UhlenbeckFord.of_one_length(2, 1.0, KT)
    assert alone.closest(apart, 20 * torch.eye(3, dtype=torch.float64)[None]).tolist() == [math.inf]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": torch.tensor([[1.0, 2.0], [1.5, 1.0]]).double()}, "above 0 and symmetric"),
        ({"sigma": torch.tensor([[0.0]]).double()}, "above 0 and symmetric"),
        ({"strength": 0.0}, "kT, strength and cutoff"),
        ({"kt": math.nan}, "kT, strength and cutoff"),
        ({"species": torch.tensor([0, 1])}, "1 species that have lengths"),
    ],
)
def test_what_makes_no_fluid_is_refused(options: dict[str, Any], message: str) -> None:
    given = {
        "species": torch.zeros(2, dtype=torch.long),
        "sigma": torch.tensor([[1.0]], dtype=torch.float64),
        "kt": KT,
    }
    with pytest.raises(SamplingError, match=message):
        UhlenbeckFord(**(given | options))


def _fluid_point(ensemble: Any, fluid: UhlenbeckFord, atoms: Atoms, scale: float = 0.0) -> StatePoint:
    return StatePoint(
        "fluid",
        atoms,
        KT / 8.617333262e-5,
        ensemble=ensemble,
        hamiltonian=Hamiltonian(scale, 1.0, fluid),
        identity="none",
    )


def test_dynamics_without_thermostat_conserves_the_energy(open_guards: Any) -> None:
    atoms = bulk("Ar", "fcc", a=3.4, cubic=True) * 2
    atoms.positions += np.random.default_rng(9).normal(scale=0.1, size=atoms.positions.shape)
    fluid = UhlenbeckFord.of_one_length(32, 1.3, KT, 50.0)
    drifts = []
    for timestep in (8.0, 4.0):
        settings = open_guards(timestep=timestep, friction=1.0, interval=100.0, barostat_time=100.0)
        point = _fluid_point("nve", fluid, atoms)
        dynamics = MolecularDynamics.prepare(NoPotential([18]), [point], settings, 1)
        before, worst = dynamics.integrator.conserved().item(), 0.0
        for _ in range(50):
            dynamics.advance(round(80 / timestep))
            worst = max(worst, abs(dynamics.integrator.conserved().item() - before))
        drifts.append(worst)
    # Velocity Verlet errs by the square of the time step, and does not drift.
    assert drifts[0] < 0.3 * KT
    assert drifts[1] < 0.4 * drifts[0]


def test_a_cell_moves_with_the_fluid(open_guards: Any) -> None:
    """Without noise, energy and P V are conserved together: so the virial goes with the energy."""
    atoms = bulk("Ar", "fcc", a=3.4, cubic=True) * 2
    atoms.positions += np.random.default_rng(10).normal(scale=0.1, size=atoms.positions.shape)
    fluid = UhlenbeckFord.of_one_length(32, 1.3, KT, 50.0)
    point, drifts = replace(_fluid_point("nph", fluid, atoms), pressure=20.0), []
    for timestep in (4.0, 2.0):
        settings = open_guards(timestep=timestep, friction=1.0, interval=100.0, barostat_time=300.0)
        dynamics = MolecularDynamics.prepare(NoPotential([18]), [point], settings, 2)
        before, worst, stretch = dynamics.integrator.conserved().item(), 0.0, 0.0
        for _ in range(20):
            dynamics.advance(round(40 / timestep))
            worst = max(worst, abs(dynamics.integrator.conserved().item() - before))
            stretch = max(stretch, float(torch.linalg.det(dynamics.state.cell)) / atoms.cell.volume)
        drifts.append(worst)
        assert stretch > 1.3
    # Of about 30 eV; the errors are those of the second order in the time step.
    assert drifts[0] < 1.0
    assert drifts[1] < 0.4 * drifts[0]


def test_without_a_potential_none_may_be_followed() -> None:
    fluid = UhlenbeckFord.of_one_length(4, 1.3, KT)
    with pytest.raises(SamplingError, match="without a potential, every Hamiltonian must have a scale of 0"):
        ForceField(NoPotential([18]), [Hamiltonian(0.5, 0.5, fluid)], [4])


def test_a_lost_fluid_does_not_reach_the_others() -> None:
    atoms = bulk("Ar", "fcc", a=4.4, cubic=True)
    fluid = UhlenbeckFord.of_one_length(4, 1.3, KT)
    forcefield = ForceField(NoPotential([18]), [Hamiltonian(0.0, 5.0, fluid)] * 2, [4, 4], rigid=True)
    state = BatchState.from_atoms([atoms, atoms], CPU, torch.float64)
    exact = forcefield(state)["forces"].clone()
    state.positions[1] = torch.nan
    found = forcefield(state)["forces"]
    assert forcefield.failed.tolist() == [True, False]
    assert not found[:4].any()
    torch.testing.assert_close(found[4:], exact[4:], rtol=0, atol=1e-12)


def test_the_model_is_evaluated_for_frames_only_where_it_is_not_followed(open_guards: Any) -> None:
    """A system that follows its bias alone costs an evaluation per frame; frames know U of the model."""
    atoms = bulk("Ar", "fcc", a=5.3, cubic=True)
    fluid = UhlenbeckFord.of_one_length(4, 1.3, KT, 20.0)
    settings = MDSettings(timestep=5.0, friction=5.0, interval=50.0)

    def run(scales: tuple[float, ...]) -> tuple[LennardJones, Any]:
        potential = LennardJones([18], 0.0103, 3.4, 6.0)
        points = [
            StatePoint(
                f"w{i}", atoms, 900.0, hamiltonian=Hamiltonian(s, 1 - s, fluid), identity="none", timestep=5.0
            )
            for i, s in enumerate(scales)
        ]
        dynamics = MolecularDynamics.prepare(potential, points, settings, 3)
        dynamics.advance(7)
        return potential, dynamics.record(4)

    potential, runs = run((0.0,))
    assert potential.calls == 4
    mixed, both = run((0.0, 0.5))
    assert mixed.calls == 1 + 7 + 40
    for name in ("positions", "model_energy", "bias_energy", "stress"):
        torch.testing.assert_close(getattr(runs["w0"], name), getattr(both["w0"], name), rtol=0, atol=1e-11)
    frames = runs["w0"]
    structures = mixed.graphs.frames(frames.positions[0], frames.cells[0], atoms.numbers)
    torch.testing.assert_close(frames.model_energy[0], mixed.energies(structures), rtol=1e-10, atol=1e-10)
    assert float(frames.model_energy.abs().min()) > 0


def test_a_run_that_was_interrupted_has_the_bits_of_one_that_was_not() -> None:
    """Also in the middle of a segment, with lists that were found some steps before."""
    atoms = bulk("Ar", "fcc", a=4.4, cubic=True) * 2
    fluid, harmonic = UhlenbeckFord.of_one_length(32, 1.4, KT), harmonic_reference(atoms, {3.5: 1.0})
    points = [
        replace(_fluid_point("nvt", fluid, atoms), name=f"p{p}", hamiltonian=Hamiltonian(0.0, p, fluid))
        for p in (1.0, 30.0)
    ]
    points.append(replace(points[0], name="crystal", hamiltonian=Hamiltonian(0.0, 1.0, harmonic)))
    settings = MDSettings(timestep=8.0, friction=3.0, interval=80.0)

    def dynamics() -> MolecularDynamics:
        return MolecularDynamics.prepare(NoPotential([18]), points, settings, 4)

    whole = dynamics()
    whole.advance(30)
    exact = whole.record(4)
    first = dynamics()
    first.advance(30)
    saved: dict[str, Tensor] = {}

    def stop(step: int) -> None:
        if step == 30 + 23:
            saved.update(first.snapshot(under_way=True))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.record(4, stop)
    assert {"neighbours.0.positions", "neighbours.0.cells"} <= set(saved)
    second = dynamics()
    second.restore(saved)
    found = second.record(4)
    for name, run in exact.items():
        for series in ("positions", "bias_energy", "kinetic_energy"):
            assert torch.equal(getattr(found[name], series), getattr(run, series)), (name, series)


def test_a_system_does_not_depend_on_the_others_of_its_batch() -> None:
    """The list is made when an atom of any system has moved far: sums have one order all the same."""
    atoms = bulk("Ar", "fcc", a=4.4, cubic=True) * 2
    fluid = UhlenbeckFord.of_one_length(32, 1.4, KT)
    assert atoms.cell.lengths().max() < 2 * CUTOFF * 1.4
    points = [
        replace(_fluid_point("nvt", fluid, atoms), name=f"p{p}", hamiltonian=Hamiltonian(0.0, p, fluid))
        for p in (1.0, 10.0, 30.0)
    ]
    settings = MDSettings(timestep=8.0, friction=3.0, interval=80.0)
    runs = []
    for batch in (points, points[1:2]):
        dynamics = MolecularDynamics.prepare(NoPotential([18]), batch, settings, 4)
        dynamics.advance(30)
        runs.append(dynamics.record(6)["p10.0"])
    assert torch.equal(runs[0].positions, runs[1].positions)
    assert torch.equal(runs[0].bias_energy, runs[1].bias_energy)


def test_only_a_bias_with_a_virial_goes_into_a_cell_that_moves(open_guards: Any) -> None:
    atoms = bulk("Ar", "fcc", a=4.4, cubic=True)
    settings = open_guards(timestep=5.0, friction=1.0, interval=100.0, barostat_time=300.0)
    fluid = _fluid_point("npt", UhlenbeckFord.of_one_length(4, 1.3, KT), atoms)
    harmonic = replace(fluid, hamiltonian=Hamiltonian(0.0, 1.0, harmonic_reference(atoms, {3.5: 1.0})))
    MolecularDynamics.prepare(NoPotential([18]), [fluid], settings, 1)
    with pytest.raises(SamplingError, match="a harmonic bias belongs to a fixed cell, not to npt"):
        MolecularDynamics.prepare(NoPotential([18]), [harmonic], settings, 1)
