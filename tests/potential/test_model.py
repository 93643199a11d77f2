"""The potential against MACE's own calculator, finite differences and its own promises."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, hcp0001
from mace.calculators import MACECalculator

from mlip_refine.errors import InputError
from mlip_refine.potential import Potential, ase_calculator, batching, resolve_device
from mlip_refine.potential.graphs import Graphs
from mlip_refine.potential.model_files import resolve_model

PROBES = ("energy", "forces", "stress")
Build = Callable[..., torch.nn.Module]


def _frames() -> list[Atoms]:
    """Rattled bcc, strained hcp and a triclinic cell with atoms far outside of it."""
    rng = np.random.default_rng(2)
    frames = [bulk("Ti", "bcc", a=3.25, cubic=True) * 2, bulk("Ti", "hcp", a=2.93, c=4.65) * (2, 1, 1)]
    frames.append(bulk("Ti", "hcp", a=2.9, c=4.7))
    shear = np.eye(3) + np.array([[0.02, 0.11, -0.07], [0.0, -0.03, 0.09], [0.05, 0.0, 0.01]])
    frames[1].set_cell(np.array(frames[1].cell) @ shear, scale_atoms=True)
    for atoms in frames:
        atoms.positions += rng.normal(scale=0.1, size=atoms.positions.shape)
    frames[2].positions[1] += [14.0, -22.0, 9.0]
    return frames


@pytest.fixture(scope="module")
def shared() -> Potential:
    """Titanium in float64; tests must leave it as it is."""
    return Potential.load("titanium-compact", default_dtype="float64")


@pytest.fixture
def titanium(shared: Potential) -> Iterator[Potential]:
    before = shared.hash
    yield shared
    assert shared.hash == before


def _graphs(potential: Potential, frames: list[Atoms] | None = None) -> Graphs:
    return potential.graphs.collate([potential.graphs.from_atoms(a) for a in frames or _frames()])


def test_energies_forces_and_stresses_equal_those_of_mace(titanium: Potential) -> None:
    path = resolve_model("titanium-compact", Path.cwd())
    calculator = MACECalculator(model_paths=[str(path)], device="cpu", default_dtype="float64")
    graphs = _graphs(titanium)
    found = titanium.evaluate(graphs, PROBES)
    for i, atoms in enumerate(_frames()):
        atoms.calc = calculator
        mine = graphs.batch == i
        assert found["energy"][i].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(found["forces"][mine].numpy(), atoms.get_forces(), rtol=0, atol=1e-10)
        stress = found["stress"][i].detach().numpy()
        np.testing.assert_allclose(stress, atoms.get_stress(voigt=False), rtol=0, atol=1e-10)


def test_a_saved_model_gives_the_same_through_ase(titanium: Potential, tmp_path: Path) -> None:
    path, _ = titanium.save(tmp_path, "saved")
    (atoms, *_), found = _frames(), titanium.evaluate(_graphs(titanium, _frames()[:1]), PROBES)
    atoms.calc = ase_calculator(path)
    assert found["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    np.testing.assert_allclose(found["forces"].numpy(), atoms.get_forces(), rtol=0, atol=1e-10)
    again = Potential.load(str(path))
    assert again.hash == titanium.hash


def test_a_calculator_opens_names_paths_and_potentials(
    titanium: Potential, monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms = _frames()[0]
    wanted = titanium.evaluate_atoms(atoms).energy[0]
    atoms.calc = ase_calculator(titanium, default_dtype="float32")
    assert 1e-9 < abs(atoms.get_potential_energy() - wanted) < 1e-2
    loaded = []
    monkeypatch.setattr(Potential, "load", lambda model, **_: loaded.append(model) or titanium)
    given = ["titanium-compact", "medium-mpa-0", "~/saved.model", Path("saved.safetensors")]
    for model in given:
        calculator = ase_calculator(model)
        assert calculator.head == "Default"
        assert next(calculator.models[0].parameters()).dtype == torch.float64
    assert loaded == given
    with pytest.raises(InputError, match="no head 'pbe'"):
        ase_calculator(titanium, head="pbe")


def test_a_model_with_heads_keeps_its_precision_whatever_that_of_the_process(build, frames) -> None:
    potential = Potential.from_module(build("all-residual"), head="other", default_dtype="float32")
    found = []
    for default in (torch.float32, torch.float64):  # MACE's calculator sets it
        torch.set_default_dtype(default)
        found.append(potential.evaluate_atoms(frames))
        assert torch.get_default_dtype() == default
    np.testing.assert_array_equal(found[0].energy, found[1].energy)
    np.testing.assert_array_equal(found[0].stress, found[1].stress)


def test_atoms_of_any_periodicity_are_evaluated_in_one_call(titanium: Potential) -> None:
    slab, wire = hcp0001("Ti", (2, 2, 3)), Atoms("Ti4", cell=[5, 5, 9], pbc=(False, False, True))
    skewed = bulk("Ti", "hcp", a=2.93, c=4.65) * (1, 3, 1)
    skewed.pbc = (True, False, True)
    cluster, single = Atoms("Ti3", [[0, 0, 0], [2.5, 0, 0], [0, 2.8, 1]]), Atoms("Ti")
    wire.positions = np.random.default_rng(4).normal(scale=2.5, size=(4, 3))
    given = [*_frames(), slab, wire, skewed, cluster, single]
    before = [atoms.copy() for atoms in given]
    found = titanium.evaluate_atoms(given)
    assert given == before
    calculator = ase_calculator(titanium)
    for number, atoms in enumerate(before):
        atoms.calc = calculator
        assert found.energy[number] == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(found.forces[number], atoms.get_forces(), rtol=0, atol=1e-10)
        if atoms.pbc.all():
            stress = atoms.get_stress(voigt=False)
            np.testing.assert_allclose(found.stress[number], stress, rtol=0, atol=1e-10)
        else:
            assert np.isnan(found.stress[number]).all()
    wire.cell[:2] = 0.0  # MACE's calculator does not take a cell without a volume
    assert titanium.evaluate_atoms(wire).energy[0] == pytest.approx(
        found.energy[given.index(wire)], abs=1e-10
    )
    labelled = found.attached(given)
    assert labelled[0].get_stress(voigt=False) == pytest.approx(found.stress[0])
    assert labelled[-1].get_potential_energy() == found.energy[-1]


def test_no_atoms_have_no_energies_and_strange_ones_are_named(titanium: Potential) -> None:
    none = titanium.evaluate_atoms([])
    assert (none.energy.shape, none.forces, none.stress.shape) == ((0,), (), (0, 3, 3))
    with pytest.raises(InputError, match=r"configuration 1 \(HTi\): the model does not know every element"):
        titanium.evaluate_atoms([Atoms("Ti"), Atoms("HTi")])
    with pytest.raises(InputError, match=r"configuration 0.*not finite"):
        titanium.evaluate_atoms(Atoms("Ti", positions=[[0, np.nan, 0]]))


def test_forces_are_the_derivative_of_the_energy(titanium: Potential) -> None:
    atoms, h = _frames()[1], 1e-4
    forces = titanium.evaluate(_graphs(titanium, [atoms]), ("forces",))["forces"]
    for i, axis in [(0, 0), (1, 1), (3, 2)]:
        moved = [atoms.copy(), atoms.copy()]
        for sign, frame in zip((1, -1), moved, strict=True):
            frame.positions[i, axis] += sign * h
        plus, minus = titanium.evaluate(_graphs(titanium, moved))["energy"].tolist()
        assert forces[i, axis].item() == pytest.approx(-(plus - minus) / (2 * h), abs=1e-6)


def test_stress_is_the_derivative_of_the_energy_tensile_positive(titanium: Potential) -> None:
    atoms, h = _frames()[1], 1e-5
    stress = titanium.evaluate(_graphs(titanium, [atoms]), ("stress",))["stress"][0]
    for i, j in [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]:
        strained = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[i, j] += 0.5 * sign * h
            strain[j, i] += 0.5 * sign * h
            frame = atoms.copy()
            frame.set_cell(np.array(atoms.cell) @ strain)
            frame.positions = atoms.positions @ strain
            strained.append(frame)
        plus, minus = titanium.evaluate(_graphs(titanium, strained))["energy"].tolist()
        slope = (plus - minus) / (2 * h) / atoms.cell.volume
        assert stress[i, j].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("probe", PROBES)
def test_gradients_of_a_loss_reach_every_parameter_that_the_probe_depends_on(
    titanium: Potential, probe: str
) -> None:
    output = titanium.evaluate(_graphs(titanium), (probe,), create_graph=True)[probe]
    parameters = titanium.trainable_parameters()
    gradients = torch.autograd.grad(output.square().sum(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        assert gradient.any(), name


def test_gradient_of_forces_equals_a_finite_difference(shared: Potential) -> None:
    """One weight of every tensor, to 1e-5 of the loss's own scale."""
    potential = Potential.from_module(shared.module)
    graphs = _graphs(potential, _frames()[1:])
    parameters = potential.trainable_parameters()

    def loss() -> torch.Tensor:
        output = potential.evaluate(graphs, ("forces", "stress"), create_graph=True)
        return output["forces"].square().sum() + 100 * output["stress"].square().sum()

    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        at = int(gradient.abs().argmax())
        values = []
        for sign in (1, -1):
            moved = parameter.detach().clone()
            moved.view(-1)[at] += sign * 1e-4
            with potential.holding({name: moved}):
                values.append(loss().item())
        slope = (values[0] - values[1]) / 2e-4
        assert gradient.view(-1)[at].item() == pytest.approx(slope, rel=1e-4, abs=1e-6), name


def test_no_graph_unless_it_is_asked_for(titanium: Potential) -> None:
    with torch.no_grad():
        output = titanium.evaluate(_graphs(titanium), PROBES)
    assert not output["energy"].requires_grad or not output["forces"].requires_grad
    assert not titanium.evaluate(_graphs(titanium), ("forces",))["forces"].requires_grad


def test_only_what_was_asked_for_is_returned(titanium: Potential) -> None:
    assert set(titanium.evaluate(_graphs(titanium))) == {"energy"}
    assert set(titanium.evaluate(_graphs(titanium), ("stress",))) == {"stress"}


def test_chunks_do_not_change_results(titanium: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
    structures = [titanium.graphs.from_atoms(a) for a in _frames() * 2]
    whole = titanium.evaluate(titanium.graphs.collate(structures), PROBES)
    for limit in (1, 20, 40, 1000):
        monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", limit)
        torch.testing.assert_close(
            titanium.energies(structures), whole["energy"].detach(), rtol=1e-12, atol=1e-10
        )
        parts = titanium.chunks(structures)
        assert [i for part in parts for i in range(*part.indices(6))] == list(range(6))
    assert titanium.energies([]).shape == (0,)


def test_a_batch_in_parts_equals_the_batch(titanium: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = _sorted(_graphs(titanium, _frames() * 2))
    whole = titanium.evaluate(graphs, PROBES)
    for limit in (1, 20, 40, 1000):
        monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", limit)
        parts = titanium.evaluate_chunked(graphs, PROBES)
        for name in PROBES:
            assert not parts[name].requires_grad
            torch.testing.assert_close(parts[name], whole[name].detach(), rtol=1e-12, atol=1e-10)


def _sorted(graphs: Graphs) -> Graphs:
    from dataclasses import replace

    order = torch.argsort(graphs.edge_index[1], stable=True)
    return replace(graphs, edge_index=graphs.edge_index[:, order], vectors=graphs.vectors[order])


def test_frozen_patterns_are_left_out_of_training(shared: Potential) -> None:
    names = set(shared.trainable_parameters())
    assert names == set(shared.parameters())
    frozen = Potential.from_module(shared.module, freeze=["interactions.*", "readouts.1.*"])
    left = set(frozen.trainable_parameters())
    assert left == {n for n in names if not n.startswith(("interactions.", "readouts.1."))}
    assert left
    assert names - left
    output = frozen.evaluate(_graphs(frozen))["energy"].sum()
    output.backward()
    assert all((p.grad is not None) == (n in left) for n, p in frozen.module.named_parameters())


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(shared: Potential) -> None:
    with pytest.raises(InputError, match="matches no parameter") as caught:
        Potential.from_module(shared.module, freeze=["node_embedding.linear.wieght"])
    assert "node_embedding.linear.weight" in str(caught.value)


def test_a_checkpoint_that_arrives_frozen_is_thawed(shared: Potential) -> None:
    module = copy.deepcopy(shared.module).requires_grad_(requires_grad=False)
    potential = Potential.from_module(module)
    assert set(potential.trainable_parameters()) == set(shared.parameters())


def test_a_module_of_the_caller_stays_as_it_is_unless_it_is_given_away(build: Build) -> None:
    module = build("residual", torch.float32).train()
    module.requires_grad_(requires_grad=False)
    before = {name: type(part) for name, part in module.named_modules()}
    potential = Potential.from_module(module)
    assert {name: type(part) for name, part in module.named_modules()} == before
    assert module.training
    assert not any(p.requires_grad for p in module.parameters())
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert potential.module is not module
    assert Potential.from_module(module, copy=False).module is module
    assert not module.training


def test_a_frozen_copy_is_independent_and_has_no_gradients(shared: Potential) -> None:
    original = Potential.from_module(shared.module)
    frozen = original.frozen_copy()
    graphs = _graphs(original)
    before = frozen.evaluate(graphs, PROBES)
    assert frozen.trainable_parameters() == {}
    assert frozen.hash == original.hash == shared.hash
    assert original.trainable_parameters()
    original.set_parameters({name: p * 1.1 for name, p in original.parameters().items()})
    after = frozen.evaluate(graphs, PROBES)
    assert all(torch.equal(before[name], after[name]) for name in PROBES)
    assert frozen.hash != original.hash
    changed = original.evaluate(graphs)["energy"].detach()
    frozen.set_parameters({name: p * 0.9 for name, p in frozen.parameters().items()})
    assert torch.equal(original.evaluate(graphs)["energy"].detach(), changed)
    assert set(original.trainable_parameters()) == set(original.parameters())


def test_a_frozen_copy_in_single_precision(titanium: Potential) -> None:
    frozen = titanium.frozen_copy("float32")
    assert frozen.dtype == torch.float32
    assert titanium.dtype == torch.float64
    exact = titanium.evaluate(_graphs(titanium), PROBES)
    found = frozen.evaluate(_graphs(frozen), PROBES)
    assert found["forces"].dtype == torch.float32
    torch.testing.assert_close(found["forces"].double(), exact["forces"], rtol=1e-4, atol=1e-4)


def test_holding_puts_parameters_back_whatever_happens(shared: Potential) -> None:
    potential = Potential.from_module(shared.module)
    own, graphs = potential.hash, _graphs(potential)
    before = potential.evaluate(graphs)["energy"].detach()
    other = {name: p * 1.05 for name, p in potential.parameters().items()}
    with potential.holding(other):
        assert potential.hash != own
        assert not torch.equal(potential.evaluate(graphs)["energy"].detach(), before)
    assert potential.hash == own
    with pytest.raises(ZeroDivisionError), potential.holding(other):
        _ = 1 / 0
    assert potential.hash == own
    assert torch.equal(potential.evaluate(graphs)["energy"].detach(), before)


def test_heads_are_chosen_by_name(build: Build, frames: list[Atoms]) -> None:
    module = build("density")
    with torch.no_grad():
        module.atomic_energies_fn.atomic_energies[1] += 1.0
    first, second = Potential.from_module(module), Potential.from_module(module, head="r2scan")
    assert first.heads == ["default", "r2scan"]
    assert (first.head, second.head) == ("default", "r2scan")
    graphs = _graphs(first, frames)
    gap = second.evaluate(graphs)["energy"] - first.evaluate(graphs)["energy"]
    assert gap.abs().min() > 0.1
    assert second.frozen_copy().head == "r2scan"
    module.heads = ["pbe", "r2scan"]
    with pytest.raises(InputError, match=r"several heads, and none .* default; .*pbe, r2scan"):
        Potential.from_module(module)


def test_an_unknown_head_is_refused_with_the_nearest_one(build: Build) -> None:
    with pytest.raises(InputError, match="no head") as caught:
        Potential.from_module(build("density"), head="r2scam")
    assert "r2scan" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "titanium-compct"}, "model: unknown model 'titanium-compct'"),
        ({"model": "titanium-compact", "head": "pbe"}, "head: the model has no head 'pbe'"),
        ({"model": "titanium-compact", "freeze": ["raedout*"]}, "freeze: 'raedout\\*' matches no parameter"),
    ],
)
def test_a_refusal_names_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}") as caught:
        Potential.load(**arguments)
    assert "potential." not in str(caught.value)


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="no CUDA device"):
        resolve_device("cuda:1")
    with pytest.raises(InputError, match="device: no such device; found gpu"):
        resolve_device("gpu")


def test_an_unknown_precision_is_refused(titanium: Potential) -> None:
    with pytest.raises(InputError, match="default_dtype: unknown precision; found single"):
        Potential.from_module(titanium.module, default_dtype="single")


def test_the_hash_knows_values_and_not_precision_of_the_copy(shared: Potential) -> None:
    other = Potential.from_module(shared.module)
    assert other.hash == shared.hash
    name, value = next(iter(other.parameters().items()))
    other.set_parameters({name: value + 1e-9})
    assert other.hash != shared.hash


@pytest.mark.parametrize("kind", ["residual", "density", "nonlinear", "three-layers", "scalars"])
def test_every_kind_of_model_equals_mace(
    build: Build, evaluate: Callable[..., dict[str, torch.Tensor]], frames: list[Atoms], kind: str
) -> None:
    module = build(kind)
    exact = evaluate(copy.deepcopy(module))
    potential = Potential.from_module(module, head=None)
    found = potential.evaluate(_graphs(potential, frames), PROBES)
    for name in PROBES:
        torch.testing.assert_close(found[name].detach(), exact[name], rtol=0, atol=1e-9)


def test_an_isolated_atom_has_the_energy_of_mace_and_no_forces(titanium: Potential) -> None:
    atoms = Atoms("Ti", positions=[[3.0, 1.0, 2.0]], cell=np.eye(3) * 20, pbc=True)
    path = resolve_model("titanium-compact", Path.cwd())
    found = titanium.evaluate(_graphs(titanium, [atoms]), PROBES)
    atoms.calc = MACECalculator(model_paths=[str(path)], device="cpu", default_dtype="float64")
    assert found["energy"].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    assert not found["forces"].any()
    assert not found["stress"].any()
