"""Files of initial free energies: written, read back, and refused when they belong to something else."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mlip_refine import testing
from mlip_refine.config import Config, config_from_dict
from mlip_refine.crystals.phonons.size_limit import harmonic_size_term
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.losses import FreeEnergyDifference, loss_specs
from mlip_refine.quantities import KB, Measured
from mlip_refine.sampling import FrameStore, StatePoint
from mlip_refine.workflows.free_energy.differences import (
    compute_free_energies,
    in_result_cells,
    read_initial,
    require_error,
    require_paths,
)
from mlip_refine.workflows.free_energy.records import (
    CELLS,
    EARLIER_CELLS,
    FORMAT,
    LIMIT,
    FreeEnergyResult,
    PhaseFreeEnergy,
)
from mlip_refine.workflows.from_config import free_energy_settings, state_points

N_ATOMS = 16


def _config(**changes: Any) -> Config:
    data: dict[str, Any] = {
        "name": "pair",
        "potential": {"model": "titanium-compact"},
        "phases": {
            "hcp": {"prototype": "hcp", "element": "Ti", "n_atoms": N_ATOMS, "a": 2.93, "c": 4.65},
            "bcc": {"prototype": "bcc", "element": "Ti", "n_atoms": N_ATOMS, "a": 3.25},
        },
        "losses": [
            {
                "type": "free_energy_difference",
                "name": "pair",
                "from": "hcp",
                "to": "bcc",
                "temperature": 1000,
                "pressure": 5,
            }
        ],
        "sampling": {"timestep": 4.0, "frames": 20, "dtype": "float64"},
    }
    return config_from_dict(data | changes)


def _loss(config: Config) -> FreeEnergyDifference:
    (spec,) = loss_specs(config.losses)
    loss = FreeEnergyDifference(spec.name, spec.weight, spec.options)
    assert isinstance(loss, FreeEnergyDifference)
    return loss


def _phase(point: StatePoint, gibbs: float) -> PhaseFreeEnergy:
    return PhaseFreeEnergy(
        phase=point.name.split("-")[0],
        numbers=point.atoms.numbers.tolist(),
        scaled_positions=point.atoms.get_scaled_positions(wrap=False).tolist(),
        cell=(point.atoms.cell.array * 1.01).tolist(),
        gibbs=Measured(gibbs, 0.1, "meV/atom"),
        overlap=0.3,
    )


@pytest.fixture
def setting() -> SimpleNamespace:
    """A config, its loss and points, a potential, and the result file that belongs to them."""
    config, potential = _config(), testing.IdealGas([22], 0.1)
    loss = _loss(config)
    points = state_points(config, loss.sources, potential, 2)
    result = FreeEnergyResult(
        model_hash=potential.hash,
        head=potential.head,
        temperature_K=1000.0,
        pressure_GPa=5.0,
        n_atoms=N_ATOMS,
        delta_g=Measured(-8.91, 0.23, "meV/atom"),
        from_=_phase(points[loss.phase_from], 10.0),
        to=_phase(points[loss.phase_to], 1.09),
        timestep_fs=4.0,
        settings={"reference": "harmonic", "windows": 5},
    )
    return SimpleNamespace(config=config, loss=loss, points=points, potential=potential, result=result)


def _read(setting: SimpleNamespace, path: Path) -> FreeEnergyResult:
    return read_initial(path, setting.loss, setting.points, setting.potential, 4.0)


def test_a_result_comes_back_as_it_was(setting: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    setting.result.write(path)
    assert FreeEnergyResult.read(path) == setting.result
    assert _read(setting, path) == setting.result
    assert str(setting.result.delta_g) == "-8.91(23) meV/atom"
    data = json.loads(path.read_text())
    assert data["format"] == FORMAT
    assert {"from", "to", "convention", "n_atoms"} <= set(data)
    assert list(tmp_path.iterdir()) == [path]


NAN = float("nan")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("delta_g", "se"), NAN, "delta_g: -8.91 ± nan meV/atom is no free energy"),
        (("delta_g", "se"), None, "delta_g: -8.91 ± nan meV/atom is no free energy"),
        (("delta_g", "se"), -1.0, "delta_g: .* is no free energy"),
        (("delta_g", "value"), 1e300, "delta_g: .* is no free energy"),
        (("delta_g", "value"), [1.0], "delta_g: .* is no measured number"),
        (("delta_g", "unit"), "K", "delta_g: -8.91 ± 0.23 K is no free energy in meV/atom"),
        (("from", "gibbs", "value"), NAN, "from.gibbs: nan"),
        (
            ("from", "scaled_positions"),
            [[0, 0], [0.5, 0.5, 0.5]],
            "from.scaled_positions.0: List should have",
        ),
        (("from", "scaled_positions", 0, 0), NAN, "from.scaled_positions.0.0: Input should be a finite"),
        (("from", "scaled_positions"), [[0, 0, 0]], "from: 1 sites of"),
        (("to", "cell", 1), [0, 3], "to.cell.1: List should have"),
        (("to", "numbers", 0), -5, "to.numbers.0: "),
        (("temperature_K",), NAN, "temperature_K: Input should be a finite"),
        (("temperature_K",), -300.0, "temperature_K: "),
        (("timestep_fs",), 0.0, "timestep_fs: "),
        (("n_atoms",), -1, "n_atoms: "),
    ],
)
def test_a_result_with_numbers_that_cannot_be_is_refused(setting, tmp_path, place, value, message) -> None:
    data = setting.result.as_json()
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "result.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=f"the free-energy file has a wrong value; found {message}"):
        FreeEnergyResult.read(tmp_path / "result.json")


def test_a_nested_result_is_refused(tmp_path) -> None:
    (tmp_path / "result.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(InputError, match="the free-energy file cannot be read; found maximum recursion"):
        FreeEnergyResult.read(tmp_path / "result.json")


def test_a_file_of_the_first_format_is_read(setting: SimpleNamespace, tmp_path: Path) -> None:
    """It has units in the names of ΔG and G, and their errors as `_se`."""
    path = tmp_path / "result.json"
    setting.result.write(path)
    data = json.loads(path.read_text()) | {"format": "mlip_refine free energies 1"}
    for entry, name in ((data, "delta_g"), (data["from"], "gibbs"), (data["to"], "gibbs")):
        measured = entry.pop(name)
        entry |= {f"{name}_mev_per_atom": measured["value"], f"{name}_se": measured["se"]}
    path.write_text(json.dumps(data))
    assert _read(setting, path) == setting.result
    del data["to"]["gibbs_se"]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"lacks a key; expected key 'to\.gibbs'"):
        FreeEnergyResult.read(path)


@pytest.mark.parametrize("version", [1, 2])
def test_files_from_before_the_limit_are_of_cells(
    setting: SimpleNamespace, tmp_path: Path, version: int
) -> None:
    path = tmp_path / "result.json"
    data = setting.result.as_json()
    for phase in (data["from"], data["to"]):
        del phase["size_term"]
    if version == 1:
        for entry, name in ((data, "delta_g"), (data["from"], "gibbs"), (data["to"], "gibbs")):
            measured = entry.pop(name)
            entry |= {f"{name}_mev_per_atom": measured["value"], f"{name}_se": measured["se"]}
    data |= {"convention": EARLIER_CELLS, "format": f"mlip_refine free energies {version}"}
    path.write_text(json.dumps(data))
    assert _read(setting, path).convention == CELLS
    with pytest.raises(InputError, match=r"convention .*found cells of N atoms, expected thermodynamic"):
        read_initial(path, setting.loss, setting.points, setting.potential, 4.0, "limit")


def test_a_liquid_refuses_a_difference_of_cells(setting: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    molten = _changed(setting.result, to=_changed(setting.result.to, kind="liquid"))
    molten.write(path)
    phase_to = setting.loss.phase_to
    points = setting.points | {phase_to: replace(setting.points[phase_to], identity="liquid")}
    with pytest.raises(InputError, match="expected thermodynamic limit"):
        read_initial(path, setting.loss, points, setting.potential, 4.0)
    assert read_initial(path, setting.loss, points, setting.potential, 4.0, "cells") == molten
    in_limit = _changed(molten, convention=LIMIT)
    in_limit.write(path)
    assert read_initial(path, setting.loss, points, setting.potential, 4.0) == in_limit


def test_the_points_take_the_cells_of_the_file(setting: SimpleNamespace) -> None:
    moved = in_result_cells(setting.points, setting.loss, setting.result)
    for source, point in setting.points.items():
        before, after = point.atoms, moved[source].atoms
        np.testing.assert_allclose(np.array(after.cell), 1.01 * np.array(before.cell))
        np.testing.assert_allclose(
            after.get_scaled_positions(wrap=False), before.get_scaled_positions(wrap=False), atol=1e-12
        )


def _changed(record: Any, **changes: Any) -> Any:
    return record.model_copy(update=changes)


def _shifted(phase: PhaseFreeEnergy) -> PhaseFreeEnergy:
    sites = np.array(phase.scaled_positions)
    sites[3, 1] += 1e-3
    return _changed(phase, scaled_positions=sites.tolist())


def _smaller(phase: PhaseFreeEnergy) -> PhaseFreeEnergy:
    return _changed(phase, numbers=phase.numbers[:-1], scaled_positions=phase.scaled_positions[:-1])


CHANGES: dict[str, Any] = {
    "model hash": lambda r: _changed(r, model_hash="0" * 64),
    "head": lambda r: _changed(r, head="r2scan"),
    "temperature": lambda r: _changed(r, temperature_K=1001.0),
    "pressure": lambda r: _changed(r, pressure_GPa=0.0),
    "timestep": lambda r: _changed(r, timestep_fs=2.0),
    "convention": lambda r: _changed(r, convention="lattice translations counted"),
    "finite_size": lambda r: _changed(r, convention=LIMIT),
    "phase name of fcc": lambda r: _changed(r, to=_changed(r.to, phase="fcc")),
    "number of atoms of hcp": lambda r: _changed(r, from_=_smaller(r.from_)),
    "elements of bcc": lambda r: _changed(r, to=_changed(r.to, numbers=[40] * N_ATOMS)),
    "lattice sites of bcc": lambda r: _changed(r, to=_shifted(r.to)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_result_of_something_else_is_refused_with_the_reason(
    setting: SimpleNamespace, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "result.json"
    CHANGES[what](setting.result).write(path)
    with pytest.raises(InputError, match=f"{what}.* differs") as caught:
        _read(setting, path)
    assert str(path) in str(caught.value)
    assert "initial: compute" in str(caught.value)


def test_swapped_phases_are_refused(setting: SimpleNamespace, tmp_path: Path) -> None:
    """ΔG has a sign: a file of bcc to hcp is not one of hcp to bcc."""
    path = tmp_path / "result.json"
    _changed(setting.result, from_=setting.result.to, to=setting.result.from_).write(path)
    with pytest.raises(InputError, match="phase name"):
        _read(setting, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\x80\x04\x95\xff", "cannot be read"),
        (b'{"format": ', "cannot be read"),
        (b"[1, 2]", "not a free-energy file"),
        (b'{"delta_g": 1.0}', "not a free-energy file"),
        (json.dumps({"format": FORMAT}).encode(), "lacks a key"),
    ],
)
def test_foreign_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        FreeEnergyResult.read(path)
    assert str(path) in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            FreeEnergyResult.read(path)


@pytest.mark.parametrize("edit", ["lose", "add"])
def test_files_with_other_keys_are_refused(setting: SimpleNamespace, tmp_path: Path, edit: str) -> None:
    path = tmp_path / "result.json"
    setting.result.write(path)
    data = json.loads(path.read_text())
    if edit == "lose":
        del data["from"]["cell"]
    else:
        data["temperature"] = 3
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="keys"):
        FreeEnergyResult.read(path)


def test_what_may_be_anything_has_no_path() -> None:
    phases = {
        "hcp": {"prototype": "hcp", "element": "Ti", "n_atoms": 16, "a": 2.93, "c": 4.65},
        "bcc": {"prototype": "bcc", "element": "Ti", "n_atoms": 16, "a": 3.25},
    }
    config = _config(phases=phases)
    loss = _loss(config)
    points = state_points(config, loss.sources, testing.IdealGas([22], 0.1), 1)
    require_paths(loss, points)
    points |= {s: replace(p, identity="none") for s, p in points.items() if s.phase == "bcc"}
    with pytest.raises(InputError, match="the free energy of 'bcc', which may be anything") as caught:
        require_paths(loss, points)
    assert "found identity none" in str(caught.value)


SHORT = {
    "reference": "harmonic",
    "windows": 2,
    "replicas": 2,
    "equilibration": 200.0,
    "production": 800.0,
    "interval": 40.0,
    "friction": 10.0,
    "fit": 800.0,
    "max_error": None,
}


def _pair(points: dict[Any, StatePoint]) -> tuple[Any, dict[str, Any]]:
    """A potential of two harmonic crystals of equal size, told apart by their cells; and the two by phase."""
    springs = {"hcp": {3.1: 2.4, 4.3: 0.5}, "bcc": {2.9: 2.0, 3.4: 0.8}}
    references = {s.phase: testing.harmonic_reference(p.atoms, springs[s.phase]) for s, p in points.items()}

    class Pair(testing.HarmonicCrystals):  # type: ignore[name-defined, misc]
        def parts(self, graphs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            cubic = graphs.cell[:, 1, 0].abs() < 1e-6
            energy, forces = graphs.cell.new_zeros(graphs.n_graphs), torch.zeros_like(graphs.positions)
            for mine, phase in ((cubic, "bcc"), (~cubic, "hcp")):
                reference, atoms = references[phase], mine[graphs.batch]
                x = graphs.positions[atoms].view(-1, N_ATOMS, 3)
                u, f = reference.energy_forces(x, reference.projected.to(x))
                energy[mine], forces[atoms] = u, f.reshape(-1, 3)
            return energy, forces, torch.zeros_like(graphs.cell)

    return Pair(list(references.values()), [22]), references


@pytest.mark.statistical
def test_differences_of_two_harmonic_crystals_are_exact(tmp_path: Path) -> None:
    """ΔG = G_bcc - G_hcp in given cells, in meV/atom, to an error below 2."""
    fixed = {name: phase | {"cell_freedom": "fixed"} for name, phase in _phases().items()}
    config = _config(phases=fixed, free_energy=SHORT)
    loss = _loss(config)
    points = state_points(config, loss.sources, testing.IdealGas([22], 0.1), 1)
    potential, references = _pair(points)
    result = compute_free_energies(
        [loss], points, potential, free_energy_settings(config), FrameStore(tmp_path, {})
    )["pair"]
    exact = 0.0
    for sign, source in ((-1, loss.phase_from), (1, loss.phase_to)):
        point = points[source]
        free = references[source.phase].free_energy(1000.0, point.atoms.cell.volume)
        exact += sign * (free + point.pv) / N_ATOMS * 1e3
    assert abs(result.delta_g.value - exact) < testing.sigma_bound() * result.delta_g.se
    assert result.delta_g.se < 2.0
    assert (result.from_.phase, result.to.phase, result.n_atoms) == ("hcp", "bcc", N_ATOMS)
    path = tmp_path / "result.json"
    result.write(path)
    again = read_initial(path, loss, points, potential, 4.0)
    assert again.delta_g == result.delta_g
    with pytest.raises(StatisticsError, match="max_error") as caught:
        require_error("hcp-bcc", result.delta_g.se, result.delta_g.se / 2)
    assert "about 4 times as long" in str(caught.value)


@pytest.mark.statistical
@pytest.mark.parametrize("reference", ["harmonic", pytest.param("einstein", marks=pytest.mark.slow)])
def test_one_crystal_in_two_cells_is_one_crystal_in_the_limit(tmp_path: Path, reference: str) -> None:
    """16 and 54 atoms of a bcc crystal of springs: G∞ is the same, the cells are 28 meV/atom apart."""
    phase = {"prototype": "bcc", "element": "Ti", "a": 3.25, "cell_freedom": "fixed"}
    names = {"small": N_ATOMS, "large": 54}
    loss_node = {"type": "free_energy_difference", "name": "sizes", "from": "small", "to": "large"}
    windows = {"harmonic": 2, "einstein": 6}[reference]
    further = {"reference": reference, "windows": windows, "finite_size": "limit", "production": 3000.0}
    config = _config(
        phases={name: phase | {"n_atoms": n} for name, n in names.items()},
        losses=[loss_node | {"temperature": 1000}],
        free_energy=SHORT | further,
    )
    loss = _loss(config)
    points = state_points(config, loss.sources, testing.IdealGas([22], 0.1), 1)
    crystals = [testing.harmonic_reference(p.atoms, {2.9: 2.0, 3.4: 0.8}) for p in points.values()]
    found = compute_free_energies(
        [loss],
        points,
        testing.HarmonicCrystals(crystals, [22]),
        free_energy_settings(config),
        FrameStore(tmp_path, {}),
    )["sizes"]
    assert (found.convention, found.size) == (LIMIT, "N → ∞ (from 16 and 54)")
    # The error of the size terms is from ten blocks.
    assert abs(found.delta_g.value) < testing.sigma_bound(dof=9) * found.delta_g.se
    assert found.delta_g.se < 2.5
    cells = [
        c.free_energy(1000.0, p.atoms.cell.volume) / len(p.atoms) * 1e3
        for c, p in zip(crystals, points.values(), strict=True)
    ]
    assert abs(cells[1] - cells[0]) > 25
    for point, crystal in zip(points.values(), crystals, strict=True):
        (term,) = [x.size_term for x in (found.from_, found.to) if len(x.numbers) == len(point.atoms)]
        exact = harmonic_size_term(point.atoms, crystal.force_constants, 1000.0)
        assert term is not None
        assert term.unit == "meV/atom"
        per_atom = KB * 1000.0 / len(point.atoms) * 1e3
        assert abs(term.value - exact * per_atom) < testing.sigma_bound(dof=9) * term.se
    found.write(tmp_path / "result.json")
    again = FreeEnergyResult.read(tmp_path / "result.json")
    assert again == found


def _phases() -> dict[str, dict[str, Any]]:
    return {
        "hcp": {"prototype": "hcp", "element": "Ti", "n_atoms": N_ATOMS, "a": 2.93, "c": 4.65},
        "bcc": {"prototype": "bcc", "element": "Ti", "n_atoms": N_ATOMS, "a": 3.25},
    }
