"""ΔG of a loss from a finished run of `transition`, made up from functions that are known."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlip_refine.errors import InputError
from mlip_refine.losses import FreeEnergyDifference, loss_specs
from mlip_refine.quantities import KB, MEV, Measured
from mlip_refine.workflows.finetune.run import prepare
from mlip_refine.workflows.free_energy.differences import in_result_cells
from mlip_refine.workflows.free_energy.from_transition import read_difference
from mlip_refine.workflows.from_config import crystal, load_potential
from mlip_refine.workflows.records import write_record
from mlip_refine.workflows.transition.records import (
    AnchorRecord,
    DifferenceRecord,
    EndRecord,
    PhaseRecord,
    TransitionFile,
)

GRID = np.linspace(950.0, 1250.0, 13)
PAIR = ("hcp", "bcc")


def vibrations(t: float, temperature: float) -> float:
    """Free energy of a quantum oscillator of that temperature, meV: more curved than any classical ΔG."""
    return KB / MEV * (temperature / 2 + t * math.log(1 - math.exp(-temperature / t)))


def gibbs(t: float, p: float) -> tuple[float, float]:
    one = 3 * vibrations(t, 400.0)
    return one, 3 * vibrations(t, 260.0) + 110.0 - 9.0 * p


def cells(t: float) -> tuple[np.ndarray, np.ndarray]:
    growth = 1 + 1e-5 * t + 3e-9 * t**2
    return np.diag([5.9, 5.1, 4.7]) * growth, np.eye(3) * 6.5 * growth


def finished(folder: Path, **changes: Any) -> Path:
    numbers, sites = (22, 22), ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    differences = []
    for p in (0.0, 2.0):
        for t in GRID.tolist():
            one, two = gibbs(t, p)
            ends = tuple(
                EndRecord(gibbs=Measured(g, 0.2, "meV/atom"), cell=cell.tolist())
                for g, cell in zip((one, two), cells(t), strict=True)
            )
            error = Measured(two - one, 1e-4 * t, "meV/atom")
            differences.append(
                DifferenceRecord(temperature_K=t, pressure_GPa=p, delta_g=error, se_common=0.05, ends=ends)
            )
    anchors = tuple(
        AnchorRecord(
            phase=phase,
            temperature_K=1100.0,
            pressure_GPa=0.0,
            n_atoms=2,
            volume_A3_per_atom=17.0,
            method="frenkel_ladd",
            gibbs=Measured(0.0, 0.1, "meV/atom"),
            size_term=Measured(0.0, 0.0, "meV/atom"),
            overlap=overlap,
        )
        for phase in PAIR
        for overlap in (0.2, 0.4)
    )
    file = TransitionFile(
        name="run",
        model_hash="abc",
        head="default",
        from_="hcp",
        to="bcc",
        convention="cells of 2 atoms",
        timestep_fs=4.0,
        seed=1,
        settings={},
        boundary=(),
        anchors=anchors,
        closures=(),
        differences=tuple(differences),
        states=(),
        phases=tuple(
            PhaseRecord(phase=name, kind="crystal", numbers=numbers, scaled_positions=sites) for name in PAIR
        ),
    )
    folder.mkdir(exist_ok=True)
    write_record(folder / "transition.json", file.model_copy(update=changes))
    return folder


@pytest.mark.parametrize("t", [950.0, 961.7, 1098.2, 1154.7, 1246.0, 1250.0])
@pytest.mark.parametrize("p", [0.0, 2.0])
def test_between_the_grid_points_nothing_is_lost(tmp_path, t, p):
    found = read_difference(finished(tmp_path / "run"), PAIR, t, p)
    one, two = gibbs(t, p)
    assert found.delta_g.value == pytest.approx(two - one, abs=1e-6)
    assert found.delta_g.se == pytest.approx(1e-4 * t)
    assert (found.from_.gibbs.value, found.to.gibbs.value) == pytest.approx((one, two), abs=1e-5)
    for phase, cell in zip((found.from_, found.to), cells(t), strict=True):
        assert np.abs(np.array(phase.cell) - cell).max() < 1e-9
    assert (found.from_.phase, found.to.phase, found.from_.overlap) == ("hcp", "bcc", 0.2)
    assert (found.temperature_K, found.pressure_GPa) == (t, p)
    # A straight line between the neighbours would be off by more than the tolerance.
    i = int(np.searchsorted(GRID, t))
    if i > 0 and GRID[i] != t:
        low, high = (np.subtract(*gibbs(x, p)[::-1]) for x in GRID[i - 1 : i + 1])
        line = np.interp(t, GRID[i - 1 : i + 1], [low, high])
        assert abs(line - (two - one)) > 1e-5


def test_the_phases_may_stand_in_the_other_order(tmp_path):
    run = finished(tmp_path / "run")
    forth, back = (read_difference(run, pair, 1100.0, 0.0) for pair in (PAIR, PAIR[::-1]))
    assert back.delta_g.value == -forth.delta_g.value
    assert (back.from_, back.to) == (forth.to, forth.from_)


def test_a_file_may_have_any_name(tmp_path):
    run = finished(tmp_path / "run")
    other = tmp_path / "anchor.json"
    (run / "transition.json").rename(other)
    assert read_difference(other, PAIR, 1100.0, 0.0).n_atoms == 2


@pytest.mark.parametrize(
    ("state", "changes", "message"),
    [
        ((1100.0, 1.0), {}, "no ΔG at that pressure; found 1 GPa, expected one of 0, 2 GPa.*report_at"),
        ((1300.0, 0.0), {}, "no ΔG at that temperature; found 1300 K, expected 950 to 1250 K"),
        ((1100.0, 0.0), {"to": "fcc"}, "of other phases; found hcp and fcc, expected hcp and bcc"),
        ((1100.0, 0.0), {"phases": ()}, "nothing of atoms and cells"),
        ((1100.0, 0.0), {"differences": ()}, r"expected one of \(none\) GPa"),
    ],
)
def test_what_the_run_does_not_know_is_refused(tmp_path, state, changes, message):
    run = finished(tmp_path / "run", **changes)
    with pytest.raises(InputError, match=message):
        read_difference(run, PAIR, *state)


def test_numbers_that_are_none_are_refused(tmp_path):
    run = finished(tmp_path / "run")
    data = json.loads((run / "transition.json").read_text())
    data["differences"][3]["delta_g"]["value"] = math.nan
    (run / "transition.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="delta_g: nan"):
        read_difference(run, PAIR, 1100.0, 0.0)
    with pytest.raises(InputError, match="missing"):
        read_difference(tmp_path, PAIR, 1100.0, 0.0)


def made_for(config: Any, folder: Path, **changes: Any) -> Path:
    """A run of the potential and crystals of a config."""
    potential = load_potential(config)
    phases = []
    for name in PAIR:
        atoms = crystal(config, name)
        sites = np.round(atoms.get_scaled_positions(wrap=False), 12).tolist()
        phases.append(
            PhaseRecord(phase=name, kind="crystal", numbers=atoms.numbers.tolist(), scaled_positions=sites)
        )
    known = {"model_hash": potential.hash, "head": potential.head, "phases": tuple(phases)}
    return finished(folder, **(known | {"convention": "cells of 16 atoms"} | changes))


@pytest.fixture
def losses(tiny):
    """The losses of a tiny run, of which the transition starts from a run of `transition`."""
    one, two = (node.to_dict() for node in tiny().losses)
    return [one | {"temperature": 1154.7, "initial": "run"}, two]


def test_finetune_starts_from_a_run_of_transition(tiny, losses, tmp_path):
    config = tiny(losses=losses)
    made_for(config, tmp_path / "run")
    prepared = prepare(config)
    (result,) = prepared.given.values()
    one, two = gibbs(1154.7, 0.0)
    assert result.delta_g.value == pytest.approx(two - one, abs=1e-6)
    (spec,) = (s for s in loss_specs(config.losses) if s.type.loss_class is FreeEnergyDifference)
    loss = FreeEnergyDifference(spec.name, spec.weight, spec.options)
    moved = in_result_cells(prepared.points, loss, result)
    assert np.abs(moved[loss.phase_to].atoms.cell.array - cells(1154.7)[1]).max() < 1e-9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_hash": "other"}, "model hash differs"),
        ({"head": "other"}, "head differs"),
        ({"timestep_fs": 3.0}, "timestep"),
        ({"convention": "thermodynamic limit"}, "convention"),
    ],
)
def test_finetune_refuses_a_run_of_something_else(tiny, losses, tmp_path, changes, message):
    config = tiny(losses=losses)
    made_for(config, tmp_path / "run", **changes)
    with pytest.raises(InputError, match=message):
        prepare(config)
