"""Phonon fine-tuning: exact on balls and springs, gradients of differences, chunks, refusals."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms
from torch import Tensor

from mlip_refine import testing
from mlip_refine.config import config_from_dict
from mlip_refine.crystals.phonons.hessian import hessian_columns
from mlip_refine.data.phonons.reference import Displacement, PhononReference
from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.losses import PhononHVP, loss_specs
from mlip_refine.losses.phonons.probes import SOFTEST, ThermalSpread
from mlip_refine.potential import Potential, batching

STENCIL = {2: -1 / 12, 1: 2 / 3, -1: -2 / 3, -2: 1 / 12}
"""Central difference of fourth order."""

SALT = bulk("NaCl", "rocksalt", a=5.64)
BONDS = {2.9: (2.5, 2.82), 4.1: (0.8, 2.82 * 2**0.5)}
"""Nearest and next neighbours: stiffness and length by largest length."""

TITANIUM = bulk("Ti", "hcp", a=2.93, c=4.65)


def loss_of(
    *references: PhononReference, held_out: Sequence[PhononReference] | None = None, **options: Any
) -> PhononHVP:
    """Return the loss on materials that are known already."""
    node = {"type": "phonon_hvp", "data": "unused", **options}
    config = config_from_dict({"name": "x", "potential": {"model": "m"}, "losses": [node]})
    (spec,) = loss_specs(config.losses)
    return PhononHVP(spec.name, spec.weight, spec.options, references, held_out)


@pytest.fixture(scope="module")
def salt(phonons_of) -> PhononReference:
    """Rock salt of springs, 2 x 2 x 2."""
    stiffness = {end: k for end, (k, _) in BONDS.items()}
    return phonons_of(SALT, (2, 2, 2), lambda atoms: testing.bond_springs(atoms, stiffness))


@pytest.fixture
def stiffer(springs) -> Potential:
    """The same with springs 1.1 and 0.7 times as stiff."""
    factors = dict(zip(BONDS, (1.1, 0.7), strict=True))
    return springs(SALT, {end: (factors[end] * k, d) for end, (k, d) in BONDS.items()})


@pytest.fixture(scope="module")
def titanium() -> Potential:
    """Titanium in float64; tests must leave it as it is."""
    return Potential.load("titanium-compact")


@pytest.fixture(scope="module")
def hcp(phonons_of) -> PhononReference:
    """Titanium of springs, 2 x 2 x 2, with forces of two displaced cells."""
    made = phonons_of(TITANIUM, (2, 2, 2), lambda atoms: testing.bond_springs(atoms, {3.1: 2.4, 4.3: 0.5}))
    random = torch.Generator().manual_seed(3)
    moves = [0.03 * torch.randn(16, 3, generator=random).double() for _ in range(2)]
    forces = [torch.randn(16, 3, generator=random).double() for _ in range(2)]
    return replace(made, displacements=tuple(map(Displacement, moves, forces)))


def gradients(loss: PhononHVP, potential: Potential) -> tuple[float, list[Tensor]]:
    """Value of the loss, and its gradient; no other is left behind."""
    value = loss.evaluate(potential).value
    return float(value.detach()), list(
        torch.autograd.grad(
            value, list(potential.trainable_parameters().values()), materialize_grads=True, allow_unused=True
        )
    )


def of_springs(hessian: Tensor, other: Tensor) -> float:
    """Mean square of the entries of a difference."""
    return float((hessian - other).square().mean())


def test_the_whole_hessian_of_springs(salt, stiffer):
    model = testing.bond_springs(salt.supercell, {2.9: 1.1 * 2.5, 4.1: 0.7 * 0.8})
    reference = salt.dense().reshape(48, 48)
    value, (gradient,) = gradients(loss_of(salt, probe="full"), stiffer)
    assert value == pytest.approx(of_springs(model, reference), rel=1e-12)
    for shell, (end, (k, _)) in enumerate(BONDS.items()):
        unit = testing.bond_springs(salt.supercell, {e: float(e == end) for e in BONDS})
        assert float(gradient[shell]) == pytest.approx(
            float(2 * ((model - reference) * unit).mean()), rel=1e-10
        ), k


def test_irreducible_columns_are_the_whole_hessian(titanium, hcp):
    """Weighted columns of a model that knows nothing of the reference: all 48 columns, to 1e-10."""
    places = [(atom, axis) for atom in range(16) for axis in range(3)]
    columns = hessian_columns(titanium, titanium.graphs.from_atoms(hcp.supercell), places)
    expected = float((columns - torch.stack([hcp.columns(*place) for place in places])).square().mean())
    loss = loss_of(hcp, probe="full")
    assert len(loss.drawn(0)) < 6
    assert float(loss.evaluate(titanium).value.detach()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.statistical
def test_kinds_of_probes_expect_the_same(salt, stiffer):
    """Means over draws are that of the whole Hessian to their standard errors."""
    with torch.no_grad():
        whole = float(loss_of(salt, probe="full").evaluate(stiffer).value)
        for kind in ("one_hot", "irreducible", "rademacher"):
            loss, values = loss_of(salt, probe=kind, probes=2), []
            for step in range(60):
                loss.at(step)
                values.append(float(loss.evaluate(stiffer).value))
            error = np.std(values, ddof=1) / 60**0.5
            assert abs(np.mean(values) - whole) < testing.sigma_bound(3, 59) * error + 1e-12, kind
            assert loss.drawn(0)[0].direction.norm() == pytest.approx(1.0)


def test_mass_weights_compare_dynamical_matrices(salt, stiffer):
    masses = torch.from_numpy(salt.supercell.get_masses()).repeat_interleave(3)
    scale = (masses.mean() / masses).sqrt()
    model = testing.bond_springs(salt.supercell, {2.9: 1.1 * 2.5, 4.1: 0.7 * 0.8})
    difference = (model - salt.dense().reshape(48, 48)) * scale[:, None] * scale
    loss = loss_of(salt, probe="full", mass_weighted=True)
    assert float(loss.evaluate(stiffer).value) == pytest.approx(float(difference.square().mean()), rel=1e-12)


def test_relative_losses_do_not_know_the_unit_of_stiffness(salt, stiffer, hcp, titanium):
    """Divided by the mean square of the entries of the reference; of forces, by theirs."""
    whole, relative = (loss_of(salt, probe="full", relative=r).evaluate(stiffer).value for r in (False, True))
    expected = float(whole.detach() / salt.dense().square().mean())
    assert float(relative.detach()) == pytest.approx(expected, rel=1e-10)
    soft = replace(
        hcp,
        force_constants=None,
        displacements=tuple(replace(d, forces=1e-3 * d.forces) for d in hcp.displacements),
    )
    squares = [float((d.forces / d.displacement.norm()).square().mean()) for d in soft.displacements]
    options = {"backend": "displacements", "probes": 2}
    plain, scaled = (loss_of(soft, relative=r, **options).evaluate(titanium).value for r in (False, True))
    assert float(scaled.detach()) == pytest.approx(float(plain.detach()) / np.mean(squares), rel=1e-10)


def test_the_error_of_a_mean_is_the_spread_of_materials_and_unknown_of_one(salt, stiffer):
    one = loss_of(salt, probe="full").measure_all(stiffer)
    assert str(one["loss"]).endswith("(?)")
    softer = replace(salt, name="softer", force_constants=0.9 * salt.force_constants)
    values = [loss_of(r, probe="full").measure_all(stiffer)["loss"].value for r in (salt, softer)]
    both = loss_of(salt, softer, probe="full")
    found = both.measure_all(stiffer)["loss"]
    assert found.value == pytest.approx(np.mean(values), rel=1e-12)
    assert found.se == pytest.approx(np.std(values, ddof=1) / 2**0.5, rel=1e-10)


def test_functionals_of_base_and_replay_that_differ_are_told(salt, capsys):
    sol = replace(salt, metadata=replace(salt.metadata, functional="PBEsol"))
    loss = loss_of(sol)
    loss.warn_of_functionals(base="PBE", replay="PBEsol")
    assert "but the base model was trained on PBE" in capsys.readouterr().err
    loss.warn_of_functionals(replay="PBE")
    assert "but the replay data are PBE" in capsys.readouterr().err


def test_validation_is_of_whole_hessians_at_its_updates(salt, stiffer, hcp):
    options = {"probe": "rademacher", "split": "train", "validation": "val", "validate_every": 3}
    loss = loss_of(salt, held_out=[salt], **options)
    whole = loss_of(salt, probe="full").evaluate(stiffer)
    measured = loss.validation.measure(stiffer)
    assert loss.validation.every == 3
    assert measured["validation, loss"].value == pytest.approx(float(whole.value.detach()), rel=1e-12)
    assert measured["validation, relative error"] == whole.diagnostics["relative error"]
    assert loss_of(salt).validation is None
    displaced = loss_of(hcp, held_out=[hcp], backend="displacements", validation="val")
    with pytest.raises(InputError, match="does not know every element"):
        displaced.evaluate(stiffer)
    with pytest.raises(InputError, match="another part than split"):
        loss_of(salt, validation="train")


def test_parts_that_share_a_material_are_told(tmp_path, capsys):
    """B6P is in both; the loss goes on, since the index said so."""
    source = Path(__file__).parents[2] / "data" / "phonons" / "set"
    rows = (source / "index.csv").read_text().splitlines()
    pair = [rows[4].replace("mp-28395,test", words) for words in ("one,train", "twin,val")]
    lines = [rows[0].replace("file,", "file,material,", 1)]
    lines += [f"{source}/{row.replace(',', ',mp-28395,', 1)}" for row in pair]
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    node = {"type": "phonon_hvp", "data": str(tmp_path / "index.csv"), "validation": "val"}
    loss = testing.loss_of(node)
    assert "train and val share a material" in capsys.readouterr().err
    assert len(loss.references) == 1


def test_strange_elements_are_left_out_when_asked(salt, stiffer, hcp):
    loss = loss_of(salt, hcp, probe="full", batch_size=2, skip_refused=True)
    alone = loss_of(salt, probe="full").evaluate(stiffer).value
    assert float(loss.evaluate(stiffer).value.detach()) == pytest.approx(float(alone.detach()), rel=1e-12)
    assert [r.name for r in loss.references] == [salt.name]
    with pytest.raises(InputError, match="does not know every element"):
        loss_of(salt, hcp, probe="full", batch_size=2).evaluate(stiffer)


def test_relative_error_of_springs_that_are_all_too_stiff(salt, springs):
    model = springs(SALT, {end: (1.2 * k, d) for end, (k, d) in BONDS.items()})
    for options in ({}, {"probe": "rademacher", "probes": 3}):
        result = loss_of(salt, **options).evaluate(model)
        assert result.diagnostics["relative error"].value == pytest.approx(20.0, rel=1e-10)
        assert result.deviation is None


def test_central_differences_are_of_second_order(salt, stiffer):
    with torch.no_grad():
        exact, fine, rough = (
            float(loss_of(salt, probe="rademacher", **options).evaluate(stiffer).value)
            for options in ({}, *({"backend": "central", "step": step} for step in (0.01, 0.02)))
        )
    assert abs(fine - exact) < 1e-3 * exact
    assert (rough - exact) / (fine - exact) == pytest.approx(4.0, rel=0.02)


def test_displacements_need_no_force_constants(phonons_of, springs, stiffer):
    """Forces of displaced cells, with those at rest or without; none are left of the reference's model."""
    own = springs(SALT, BONDS)

    def forces(potential: Potential, atoms: Atoms) -> Tensor:
        graphs = potential.graphs.collate([potential.graphs.from_atoms(atoms)])
        return potential.evaluate(graphs, ("forces",))["forces"].detach()

    bare = phonons_of(SALT, (2, 2, 2), None)
    bare.supercell.rattle(0.01, seed=1)
    moves, expected, plain = [], [], []
    for axis in range(3):
        u = torch.zeros(16, 3).double()
        u[2 * axis, axis], u[5, 0] = 0.04, -0.03
        moved = bare.supercell.copy()
        moved.positions += u.numpy()
        moves.append(Displacement(u, forces(own, moved) - forces(own, bare.supercell)))
        change = forces(stiffer, moved) - forces(stiffer, bare.supercell) - moves[-1].forces
        expected.append(float((change / u.norm()).square().mean()))
        plain.append(float(((forces(stiffer, moved) - moves[-1].forces) / u.norm()).square().mean()))
    reference = replace(bare, displacements=tuple(moves))
    loss = loss_of(reference, backend="displacements", probes=3)
    assert float(loss.evaluate(stiffer).value) == pytest.approx(np.mean(expected), rel=1e-12)
    assert float(loss.evaluate(own).value) < 1e-24
    with_rest = loss_of(reference, backend="forces", probes=3)
    assert float(with_rest.evaluate(stiffer).value) == pytest.approx(np.mean(plain), rel=1e-12)
    assert np.mean(plain) > 1.1 * np.mean(expected)
    one = loss_of(reference, backend="displacements")
    assert float(one.evaluate(stiffer).value) in [pytest.approx(e, rel=1e-12) for e in expected]
    with pytest.raises(InputError, match="no force constants"):
        loss_of(reference)


@pytest.mark.parametrize(
    "options",
    [
        {"probe": "rademacher", "error": "mse", "mass_weighted": True},
        {"probe": "one_hot", "probes": 2, "error": "huber", "huber_delta": 0.2},
        {"probe": "full", "error": "l1"},
        {"probe": "thermal", "relative": True, "mass_weighted": True},
        {"backend": "central", "probe": "irreducible"},
        {"backend": "displacements", "probes": 2, "error": "huber"},
        {"backend": "forces", "probes": 2, "relative": True},
    ],
    ids=str,
)
def test_gradients_are_those_of_differences(hcp, titanium, options: dict[str, Any]):
    """Along a random change of all parameters, relative to their size."""
    potential, loss = Potential.from_module(titanium.module), loss_of(hcp, **options)
    random, start = torch.Generator().manual_seed(6), potential.parameters()
    change = {
        name: p.std().nan_to_num(1.0) * torch.randn(p.shape, generator=random).double()
        for name, p in start.items()
    }
    _, found = gradients(loss, potential)
    slope = sum(
        float((change[n] * g).sum()) for n, g in zip(potential.trainable_parameters(), found, strict=True)
    )
    h, difference = 1e-5, 0.0
    for steps, weight in STENCIL.items():
        with potential.holding({n: p + steps * h * change[n] for n, p in start.items()}), torch.no_grad():
            difference += weight / h * float(loss.evaluate(potential).value)
    assert slope == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("backend", ["hvp", "central", "displacements", "forces"])
def test_chunks_give_the_same(hcp, titanium, monkeypatch, backend: str):
    loss = loss_of(hcp, backend=backend, probes=2)
    whole, one = gradients(loss, titanium)
    monkeypatch.setitem(batching.CHUNK_ATOMS, "cpu", 16)
    parts, many = gradients(loss, titanium)
    assert parts == pytest.approx(whole, rel=1e-12)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * max(1.0, float(a.abs().max())))
    with torch.no_grad():
        bare = loss.evaluate(titanium).value
    assert not bare.requires_grad
    assert float(bare) == pytest.approx(whole, rel=1e-12)


def test_a_batch_is_told_by_seed_and_number_of_the_update_alone(salt, stiffer):
    first, again = (loss_of(salt, probe="rademacher", seed=5) for _ in range(2))
    values = []
    for step in (0, 1, 2):
        first.at(step)
        values.append(float(first.evaluate(stiffer).value))
    again.at(2)
    assert float(again.evaluate(stiffer).value) == values[2]
    assert len(set(values)) == 3


def test_a_model_in_single_precision_may_be_evaluated_in_double(hcp, titanium):
    single = Potential.load("titanium-compact", default_dtype="float32")
    options = {"probe": "rademacher", "probes": 4}
    exact, wanted = gradients(loss_of(hcp, **options), titanium)
    rough, of_single = gradients(loss_of(hcp, **options), single)
    fine, of_double = gradients(loss_of(hcp, precision="float64", **options), single)
    assert fine == pytest.approx(exact, rel=1e-12)
    assert rough == pytest.approx(exact, rel=1e-4)
    for a, b, c in zip(wanted, of_double, of_single, strict=True):
        assert b.dtype == torch.float32
        assert (b - a).norm() <= 1e-6 * a.norm()
        assert (c - a).norm() <= 1e-3 * a.norm() + 1e-6


class _Once(torch.autograd.Function):
    """A square whose derivative has none, like a kernel that was written for forces alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0].detach()


def test_wrong_second_derivatives_are_refused(salt, stiffer, monkeypatch):
    right = type(stiffer.module).forward

    def wrong(module: torch.nn.Module, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        found = right(module, inputs, **options)
        system = inputs["batch"][inputs["edge_index"][0]]
        extra = 0.01 * _Once.apply(inputs["shifts"]).sum(1)
        return {"energy": found["energy"].index_add(0, system, extra * (inputs["shifts"].norm(dim=1) < 4.1))}

    monkeypatch.setattr(type(stiffer.module), "forward", wrong)
    with pytest.raises(MlipRefineError, match="contradict differences of forces: a relative error of"):
        loss_of(salt).evaluate(stiffer)


def test_input_that_cannot_be_used_is_refused(salt, titanium, phonons_of):
    with pytest.raises(InputError, match="does not know every element"):
        loss_of(salt).evaluate(titanium)
    with pytest.raises(InputError, match="no forces of displaced cells"):
        loss_of(salt, backend="displacements")
    with pytest.raises(InputError, match="no materials"):
        loss_of()
    with pytest.raises(InputError, match="no probe: the displacements are those of the reference"):
        loss_of(salt, backend="displacements", probe="one_hot")
    with pytest.raises(InputError, match="full has all irreducible columns"):
        loss_of(salt, probe="full", probes=2)
    with pytest.raises(InputError, match="Did you mean 'huber_delta'"):
        loss_of(salt, huber_dleta=1.0)


def test_phonon_calculations_are_read_and_told_apart(salt, springs, tmp_path, monkeypatch, capsys):
    """From phonopy's own file to the loss of a model that is too stiff. Rock salt is among the 103."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cell = PhonopyAtoms(numbers=SALT.numbers, cell=SALT.cell.array, positions=SALT.positions)
    phonons = Phonopy(cell, np.diag([2, 2, 2]), log_level=0)
    phonons.force_constants = salt.dense().permute(0, 2, 1, 3).numpy()
    file = tmp_path / "phonopy_params.yaml"
    phonons.save(file, settings={"force_constants": True})

    def read(**options: Any) -> PhononHVP:
        node = {"type": "phonon_hvp", "data": str(file), **options}
        return testing.loss_of(node)

    model = springs(SALT, {end: (1.2 * k, d) for end, (k, d) in BONDS.items()})
    result = read(split=None).evaluate(model)
    assert result.diagnostics["relative error"].value == pytest.approx(20.0, rel=1e-6)
    assert "is not known" in capsys.readouterr().err
    with pytest.raises(InputError, match="found split train"):
        read()
    with pytest.raises(InputError, match="a material comes twice"):
        read(split=None, data=[str(file), str(file)])


@pytest.mark.statistical
def test_thermal_probes_expect_what_covariances_of_displacements_say(salt, stiffer):
    """tr[(H - Φ) Φ⁻¹ (H - Φ)]/(3N tr Φ⁻¹) over modes that are not translations, all of them stiff enough."""
    phi = salt.dense().reshape(48, 48)
    model = testing.bond_springs(salt.supercell, {2.9: 1.1 * 2.5, 4.1: 0.7 * 0.8})
    inverse = torch.linalg.pinv(phi, hermitian=True, rtol=1e-8)
    values = torch.linalg.eigvalsh(phi)[3:]
    assert values[0] > SOFTEST**2 * values.sum() / 48
    difference = model - phi
    expected = float((difference @ inverse @ difference).trace() / inverse.trace() / 48)
    loss = loss_of(salt, probe="thermal", probes=64)
    drawn = loss.drawn(0)
    assert np.mean([float(p.direction.square().sum()) for p in drawn]) == pytest.approx(1.0, abs=0.1)
    torch.testing.assert_close(drawn[0].product, salt.product(drawn[0].direction))
    with torch.no_grad():
        values = [float(loss_of(salt, probe="thermal", seed=s).evaluate(stiffer).value) for s in range(100)]
        relative = float(loss_of(salt, probe="thermal", relative=True).evaluate(stiffer).value)
        plain = float(loss_of(salt, probe="thermal").evaluate(stiffer).value)
    assert abs(np.mean(values) - expected) < testing.sigma_bound(dof=99) * np.std(values, ddof=1) / 10
    size = float((phi @ inverse @ phi).trace() / inverse.trace() / 48)
    assert plain / relative == pytest.approx(size, rel=1e-6)


@pytest.mark.statistical
def test_thermal_loss_with_masses_is_that_of_frequencies(salt, springs):
    """Springs that are all too stiff: 4 m̄ δω² over the modes, for a small change."""
    change = 1e-4
    model = springs(SALT, {end: ((1 + change) * k, d) for end, (k, d) in BONDS.items()})
    masses = torch.from_numpy(salt.supercell.get_masses()).repeat_interleave(3)
    scale = (masses.mean() / masses).sqrt()
    squares = torch.linalg.eigvalsh(salt.dense().reshape(48, 48) * scale[:, None] * scale)[3:]
    shift = squares.sqrt() * ((1 + change) ** 0.5 - 1)
    expected = float(4 * shift.square().sum() / (1 / squares).sum() / 48)
    options = {"probe": "thermal", "mass_weighted": True, "probes": 400}
    with torch.no_grad():
        found = float(loss_of(salt, **options).evaluate(model).value)
    assert found == pytest.approx(expected, rel=0.02)


def test_thermal_displacements_of_soft_modes_are_bounded(hcp):
    """Along an unstable mode it is displaced no more than along the softest that it may have."""
    n = 3 * hcp.n_atoms
    unstable = replace(hcp, force_constants=-hcp.force_constants)
    scale = torch.ones(hcp.n_atoms, 1, dtype=torch.float64)
    for reference in (hcp, unstable):
        spread = ThermalSpread.of(reference, scale)
        assert bool(torch.isfinite(spread.root).all())
        assert float(spread.root.norm()) == pytest.approx(1.0, abs=1e-5)
        uniform = spread.root.double().reshape(-1, 3, n).sum(0)
        assert float(uniform.abs().max()) < 1e-5
    # Modes that are all unstable are all taken as the softest: displacements are random but for translations.
    found = torch.linalg.eigvalsh(ThermalSpread.of(unstable, scale).root.double())
    assert found.tolist() == pytest.approx([0.0] * 3 + [(n - 3) ** -0.5] * (n - 3), abs=1e-5)
