"""Atomic energies take the drift of absolute energies away and leave everything else as it is."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.potential import Potential, Structure
from mlip_refine.potential.energy_shift import Compositions, atomic_energies, shift_energies

Build = Callable[..., torch.nn.Module]

SILICON, TITANIUM = 14, 22
CONTENTS = [(4, 0), (3, 1), (2, 2), (1, 3), (2, 2), (0, 4), (1, 3)]


def _structures(potential: Potential, contents: Sequence[tuple[int, int]]) -> list[Structure]:
    """Rattled crystals with so many atoms of silicon and titanium."""
    rng = np.random.default_rng(2)
    made = []
    for silicon, titanium in contents:
        atoms = bulk("Ti", "fcc", a=4.1, cubic=True) * (1 + (silicon == titanium), 1, 1)
        numbers = [SILICON] * silicon + [TITANIUM] * titanium
        atoms.numbers = numbers * (len(atoms) // len(numbers))
        atoms.positions += rng.normal(size=atoms.positions.shape, scale=0.1)
        made.append(potential.graphs.from_atoms(atoms))
    return made


def _drifted(potential: Potential, amount: float = 0.02) -> Potential:
    """The potential after a training that nobody watched, and the initial one beside it."""
    generator = torch.Generator().manual_seed(1)
    moved = Potential.from_module(potential.module, head=potential.head)
    with torch.no_grad():
        for parameter in moved.module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(amount * noise)
    return moved


def _per_atom(potential: Potential, structures: Sequence[Structure]) -> Tensor:
    return potential.energies(structures) / torch.tensor([len(s.species) for s in structures])


@pytest.mark.parametrize(("kind", "head"), [("residual", None), ("density", "r2scan"), ("nonlinear", "b")])
def test_the_mean_signed_error_is_what_it_was(build: Build, kind: str, head: str | None) -> None:
    initial = Potential.from_module(build(kind), head=head)
    refined, structures = _drifted(initial), _structures(initial, CONTENTS)
    labels = torch.randn(len(structures), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = [_per_atom(p, structures) - labels for p in (initial, refined)]
    assert abs(errors[1].mean() - errors[0].mean()) > 1e-3
    shift_energies(refined, initial, structures)
    assert abs((_per_atom(refined, structures) - labels).mean() - errors[0].mean()) < 1e-13


def test_the_shift_is_the_best_of_all(build: Build) -> None:
    """What is left of the drift is orthogonal to the content of every element."""
    initial = Potential.from_module(build("residual"))
    refined, structures = _drifted(initial), _structures(initial, CONTENTS)
    shift_energies(refined, initial, structures)
    left = _per_atom(refined, structures) - _per_atom(initial, structures)
    assert left.abs().max() > 1e-4
    assert (Compositions.of(initial, structures).fractions.T @ left).abs().max() < 1e-13


def test_a_drift_of_the_elements_is_found_exactly(build: Build) -> None:
    initial = Potential.from_module(build("density"), head="r2scan")
    refined = Potential.from_module(initial.module, head="r2scan")
    with torch.no_grad():
        refined.module.atomic_energies_fn.atomic_energies[1] += torch.tensor(
            [0.385, -0.2], dtype=torch.float64
        )
    structures = _structures(initial, CONTENTS)
    shift = shift_energies(refined, initial, structures)
    assert shift == {"Si": pytest.approx(-0.385, abs=1e-13), "Ti": pytest.approx(0.2, abs=1e-13)}
    assert (refined.energies(structures) - initial.energies(structures)).abs().max() < 1e-12


def test_forces_stresses_and_differences_stay(build: Build) -> None:
    """The first two bit for bit; energies of one composition move together."""
    initial = Potential.from_module(build("residual"))
    refined, structures = _drifted(initial), _structures(initial, CONTENTS)
    graphs = refined.graphs.collate(structures)
    before = refined.evaluate(graphs, ("energy", "forces", "stress"))
    shift_energies(refined, initial, structures)
    after = refined.evaluate(graphs, ("energy", "forces", "stress"))
    assert torch.equal(after["forces"], before["forces"])
    assert torch.equal(after["stress"], before["stress"])
    moved = (after["energy"] - before["energy"]).detach()
    assert moved.abs().min() > 1e-3
    assert CONTENTS[2] == CONTENTS[4]
    assert CONTENTS[3] == CONTENTS[6]
    assert abs(moved[2] - moved[4]) < 1e-12
    assert abs(moved[3] - moved[6]) < 1e-12


def test_other_heads_and_elements_that_do_not_occur_stay(build: Build) -> None:
    initial = Potential.from_module(build("density"), head="r2scan")
    refined = _drifted(initial)
    before = refined.module.atomic_energies_fn.atomic_energies.clone()
    shift = shift_energies(refined, initial, _structures(initial, [(0, 4), (0, 4)]))
    change = refined.module.atomic_energies_fn.atomic_energies - before
    assert change.tolist() == [[0.0, 0.0], [0.0, pytest.approx(shift["Ti"], rel=1e-12)]]
    assert torch.equal(atomic_energies(refined), refined.module.atomic_energies_fn.atomic_energies[1])


def test_a_shifted_potential_is_saved_as_it_is(tmp_path) -> None:
    """Also one whose atomic energies have no row for every head."""
    initial = Potential.load("titanium-compact")
    refined = _drifted(initial, 1e-3)
    structures = [refined.graphs.from_atoms(bulk("Ti", "bcc", a=a, cubic=True)) for a in (3.1, 3.25, 3.4)]
    shift = shift_energies(refined, initial, structures)
    assert list(shift) == ["Ti"]
    for path in refined.save(tmp_path, "shifted"):
        again = Potential.load(str(path))
        assert again.hash == refined.hash
        assert torch.equal(again.energies(structures), refined.energies(structures))


def test_single_precision_to_its_resolution(build: Build) -> None:
    initial = Potential.from_module(build("residual", torch.float32), default_dtype="float32")
    structures = _structures(initial, CONTENTS)
    refined = Potential.from_module(initial.module, default_dtype="float32")
    with torch.no_grad():
        refined.module.atomic_energies_fn.atomic_energies += 0.385
    shift_energies(refined, initial, structures)
    drift = _per_atom(refined, structures) - _per_atom(initial, structures)
    assert abs(drift.mean()) < 1e-6


@pytest.mark.parametrize(
    ("contents", "found"), [([(2, 2), (2, 2)], "1 independent"), ([(1, 3)] * 3, "1 independent")]
)
def test_frames_of_one_composition_do_not_tell_elements_apart(build: Build, contents, found: str) -> None:
    potential = Potential.from_module(build("residual"))
    before = potential.hash
    with pytest.raises(InputError, match="do not tell atomic energies of Si, Ti apart") as caught:
        shift_energies(potential, potential, _structures(potential, contents))
    assert found in str(caught.value)
    assert potential.hash == before


def test_frames_without_an_element_do_not_tell_its_energy(build: Build) -> None:
    potential = Potential.from_module(build("residual"))
    compositions = Compositions.of(potential, _structures(potential, [(0, 4)]))
    compositions.require([TITANIUM])
    with pytest.raises(InputError, match="do not tell atomic energies of Si; found frames of Ti only"):
        compositions.require([TITANIUM, SILICON])


def test_an_isolated_atom_counts_like_any_other(build: Build) -> None:
    potential = Potential.from_module(build("residual"))
    alone = [Atoms("Si", cell=[9.0] * 3, pbc=True), Atoms("Ti", cell=[9.0] * 3, pbc=True)]
    refined = Potential.from_module(potential.module)
    with torch.no_grad():
        refined.module.atomic_energies_fn.atomic_energies += 1.0
    shift = shift_energies(refined, potential, [potential.graphs.from_atoms(a) for a in alone])
    assert shift == {"Si": pytest.approx(-1.0), "Ti": pytest.approx(-1.0)}
