"""The force field against the potential itself: reused neighbour lists, biases, scales."""

from typing import Any

import numpy as np
import pytest
import torch
import torch_sim as ts
from ase import Atoms
from ase.build import bulk

from mlip_refine import testing
from mlip_refine.potential import Potential
from mlip_refine.sampling import Hamiltonian
from mlip_refine.sampling.md import skin_list as neighbours
from mlip_refine.sampling.md.forcefield import ForceField
from mlip_refine.sampling.md.skin_list import SKIN

PROBES = ("energy", "forces", "stress")


@pytest.fixture(scope="module")
def titanium() -> Potential:
    return Potential.load("titanium-compact").frozen_copy("float64")


def _systems() -> list[Atoms]:
    """A cubic, a hexagonal and a triclinic crystal, rattled."""
    triclinic = bulk("Ti", "hcp", a=2.93, c=4.65) * (2, 2, 2)
    shear = np.eye(3) + np.array([[0.02, 0.11, -0.07], [0.0, -0.03, 0.09], [0.05, 0.0, 0.01]])
    triclinic.set_cell(np.array(triclinic.cell) @ shear, scale_atoms=True)
    systems = [bulk("Ti", "bcc", a=3.25, cubic=True) * 2, bulk("Ti", "hcp", a=2.93, c=4.65) * 2, triclinic]
    rng = np.random.default_rng(3)
    for atoms in systems:
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    return systems


def _forcefield(potential: Any, systems: list[Atoms], hamiltonian: Hamiltonian | None = None) -> ForceField:
    forcefield = ForceField(
        potential, [hamiltonian or Hamiltonian()] * len(systems), [len(a) for a in systems]
    )
    forcefield.compute_stress = True
    return forcefield


def _state(systems: list[Atoms]) -> ts.SimState:
    return ts.io.atoms_to_state(systems, torch.device("cpu"), torch.float64)


def _fresh(potential: Potential, state: ts.SimState) -> dict[str, torch.Tensor]:
    """The same from new neighbour lists of another program (matscipy)."""
    cells, numbers = state.row_vector_cell, state.atomic_numbers
    structures = [
        potential.graphs.structure(
            state.positions[mine], cells[i], potential.graphs.species(numbers[mine].numpy())
        )
        for i in range(len(cells))
        for mine in [state.system_idx == i]
    ]
    found = potential.evaluate(potential.graphs.collate(structures), PROBES)
    return {name: value.detach() for name, value in found.items()}


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of pairs that searches found."""
    found: list[int] = []
    for name in ("torchsim_nl", "torch_nl_linked_cell"):
        search = getattr(neighbours, name)

        def counted(*arguments: Any, search: Any = search) -> Any:
            result = search(*arguments)
            found.append(result[0].shape[1])
            return result

        monkeypatch.setattr(neighbours, name, counted)
    return found


def _require_equal(forcefield: ForceField, state: ts.SimState, potential: Potential) -> None:
    found, exact = forcefield(state), _fresh(potential, state)
    for name in PROBES:
        torch.testing.assert_close(found[name], exact[name], rtol=1e-9, atol=1e-9)


def test_first_list_equals_a_fresh_one(titanium: Potential) -> None:
    systems = _systems()
    _require_equal(_forcefield(titanium, systems), _state(systems), titanium)


def test_a_list_is_reused_while_atoms_move_drift_and_cells_strain(
    titanium: Potential, searches: list[int]
) -> None:
    systems = _systems()
    forcefield, state = _forcefield(titanium, systems), _state(systems)
    forcefield(state)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        noise = torch.randn(state.positions.shape, generator=generator, dtype=torch.float64)
        state.positions = state.positions + 0.03 * noise.clamp(-2, 2)
        strain = torch.eye(3, dtype=torch.float64) + 0.002 * torch.tensor(
            [[1.0, 0.5, 0.0], [0.5, -1.0, 0.3], [0.0, 0.3, 1.0]], dtype=torch.float64
        )
        state.cell = strain @ state.cell
        state.positions = state.positions @ strain.T
        _require_equal(forcefield, state, titanium)
    assert len(searches) == 1


def test_a_list_is_remade_when_atoms_come_near_or_leave_the_cell(
    titanium: Potential, searches: list[int]
) -> None:
    systems = _systems()
    forcefield, state = _forcefield(titanium, systems), _state(systems)
    forcefield(state)
    generator = torch.Generator().manual_seed(5)
    for shift in ([0.0, 0.0, 0.0], [21.0, -34.5, 7.0], [-60.0, 3.0, 0.4]):
        before = len(searches)
        noise = torch.randn(state.positions.shape, generator=generator, dtype=torch.float64)
        moved = torch.tensor(shift, dtype=torch.float64)
        state.positions = state.positions + moved + 0.12 * noise.clamp(-2, 2)
        state.positions[3] += 0.5 * SKIN
        _require_equal(forcefield, state, titanium)
        assert len(searches) > before


def test_a_list_is_remade_when_the_cell_strains_too_far(titanium: Potential, searches: list[int]) -> None:
    systems = _systems()
    forcefield, state = _forcefield(titanium, systems), _state(systems)
    forcefield(state)
    squeeze = torch.diag(torch.tensor([0.86, 1.05, 0.95], dtype=torch.float64))
    state.cell, state.positions = squeeze @ state.cell, state.positions @ squeeze
    _require_equal(forcefield, state, titanium)
    assert len(searches) == 2


def test_no_pair_is_missed_at_the_edge_of_validity() -> None:
    """Two atoms that approach each other by just less than the list allows: the energy is the exact one."""
    cutoff = 3.0
    atoms = Atoms("Ti2", positions=[[0, 0, 0], [cutoff + SKIN + 1e-6, 0, 0]], cell=np.eye(3) * 12, pbc=True)
    potential = testing.LennardJones([22], 0.3, 2.4, cutoff)
    forcefield, state = _forcefield(potential, [atoms]), _state([atoms])
    assert forcefield(state)["energy"].item() == 0.0
    for approach in (SKIN / 2 - 1e-3, SKIN / 2 + 1e-3, SKIN / 2 + 0.05, SKIN / 2 + 0.2):
        state.positions[0, 0], state.positions[1, 0] = approach, cutoff + SKIN - approach
        distance = torch.tensor([cutoff + SKIN - 2 * approach], dtype=torch.float64)
        exact = potential.pair(distance)[0] if distance < cutoff else torch.zeros(1)
        assert forcefield(state)["energy"].item() == pytest.approx(exact.item(), abs=1e-12)


def test_scale_and_bias_mix_energies_and_forces(titanium: Potential) -> None:
    atoms = _systems()[1]
    reference = testing.harmonic_reference(atoms, {3.3: 2.0})
    systems = [atoms.copy() for _ in range(3)]
    rng = np.random.default_rng(6)
    for system in systems:
        system.positions += rng.normal(scale=0.1, size=system.positions.shape)
    windows = [Hamiltonian(1 - x, x, reference) for x in (0.0, 0.3, 1.0)]
    forcefield = ForceField(titanium, windows, [len(a) for a in systems])
    state = _state(systems)
    found, bare = forcefield(state), _fresh(titanium, state)
    x = state.positions.view(3, -1, 3)
    u, f = reference.energy_forces(x, reference.projected)
    mix = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found["energy"], (1 - mix) * bare["energy"] + mix * u, rtol=1e-10, atol=1e-10)
    wanted = (1 - mix)[:, None, None] * bare["forces"].view(3, -1, 3) + mix[:, None, None] * f
    torch.testing.assert_close(found["forces"], wanted.view(-1, 3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forcefield.model_energy, bare["energy"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(forcefield.bias_energy, u, rtol=1e-10, atol=1e-12)


def test_a_bias_lies_where_the_batch_is(titanium: Potential) -> None:
    """Nothing of it is converted or copied in a step."""
    frozen, atoms = titanium.frozen_copy("float32"), _systems()[1]
    reference = testing.harmonic_reference(atoms, {3.3: 2.0})
    forcefield = ForceField(frozen, [Hamiltonian(0.5, 0.5, reference)] * 2, [len(atoms)] * 2)
    (biased,) = forcefield.biases
    for tensor in (biased.bias.reference.sites, biased.bias.force_constants, biased.scale):
        assert (tensor.dtype, tensor.device) == (frozen.dtype, frozen.device)
    assert reference.sites.dtype == torch.float64


def test_a_lost_system_does_not_reach_its_neighbours(titanium: Potential) -> None:
    systems = _systems()
    exact = _forcefield(titanium, systems)(_state(systems))
    atoms = [len(a) for a in systems]
    others = torch.tensor([True] * atoms[0] + [False] * atoms[1] + [True] * atoms[2])

    def positions_lost(state: ts.SimState) -> None:
        state.positions[~others] = torch.nan

    def cell_lost(state: ts.SimState) -> None:
        state.cell[1] = torch.inf

    def cell_collapsed(state: ts.SimState) -> None:
        state.cell[1] *= 1e-3

    for lose in (positions_lost, cell_lost, cell_collapsed):
        forcefield, state = _forcefield(titanium, systems), _state(systems)
        forcefield(state)
        lose(state)
        found = forcefield(state)
        assert forcefield.failed.tolist() == [False, True, False]
        torch.testing.assert_close(found["forces"][others], exact["forces"][others], rtol=0, atol=1e-10)
        torch.testing.assert_close(found["stress"][::2], exact["stress"][::2], rtol=0, atol=1e-10)
        assert not found["forces"][~others].any()
        assert torch.isfinite(found["stress"]).all()
        assert torch.isfinite(forcefield.cell).all()


def test_a_dense_crystal_keeps_all_its_neighbours() -> None:
    """More atoms within reach than the fast neighbour search allows for."""
    systems = [bulk("C", "diamond", a=a, cubic=True) * 2 for a in (3.1, 3.567)]
    potential = testing.LennardJones([6], 0.1, 1.4, 5.2)
    _require_equal(_forcefield(potential, systems), _state(systems), potential)
