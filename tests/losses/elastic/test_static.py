"""Elastic constants as a loss: made-up stresses of which everything is known."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk
from scipy.spatial.transform import Rotation

from mlip_refine import testing
from mlip_refine.config import Elastic, Sampling
from mlip_refine.crystals.symmetry import INDEPENDENT, find_symmetry
from mlip_refine.crystals.tensors import stress_from_voigt, stress_to_voigt, to_stress_strain
from mlip_refine.data import read_table
from mlip_refine.errors import InputError
from mlip_refine.losses import Frames
from mlip_refine.losses.base import UNSTRAINED
from mlip_refine.losses.elastic.match import CellValues, ElasticMatch, SymmetricStress
from mlip_refine.losses.elastic.targets import CellTargets
from mlip_refine.losses.options import ElasticConstantsOptions
from mlip_refine.observables import Pressure, Stress, measure
from mlip_refine.quantities import GPA, KB

HCP = bulk("Ti", "hcp", a=2.95, c=4.68).repeat((2, 2, 2))
TARGET = {"temperature": 300, "lattice": [2.95, 4.68], "constants": {"C11": 160, "C13": 70}}
STRESS = torch.tensor([-9.0, -9.0, -4.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def _loss(**options: Any) -> ElasticMatch:
    """A loss of hcp titanium."""
    node = {"type": "elastic_constants", "phase": "hcp", "targets": [TARGET], "kind": "isothermal"}
    node |= {"pressure": 0, "born_every": 1} | options
    return testing.loss_of(node, HCP)


@pytest.fixture
def stressed(frames_of) -> Callable[..., Frames]:
    """Return frames with total stresses `[n, 6]`, GPa, all drawn by the model itself."""

    def make(stress: torch.Tensor) -> Frames:
        n, cell = len(stress), torch.from_numpy(HCP.cell.array)
        kinetic = len(HCP) * KB * 300.0 / float(torch.linalg.det(cell).abs())
        probe = stress_from_voigt(stress) * GPA + kinetic * torch.eye(3).double()
        energy = torch.zeros(n, dtype=torch.float64)
        born = 200 * GPA * torch.eye(6, dtype=torch.float64).expand(n, 6, 6)
        return frames_of(
            {"energy": energy, "stress": probe, "born": born},
            energy,
            torch.from_numpy(HCP.positions).expand(n, -1, 3),
            cell.expand(n, 3, 3),
        )

    return make


def _noisy(n: int, size: float) -> torch.Tensor:
    noise = torch.randn(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise[:, 1] = size * noise[:, 1] / 10 - noise[:, 0]  # xx and yy nearly cancel, as in a crystal
    return STRESS + size * noise


def test_deformation_tells_what_strained_cells_show(stressed):
    """Stresses that follow B give back (B + Bᵀ)/2, with the stress of 9 and 4 GPa in it."""
    found = _loss(method="deformation", targets=[{**TARGET, "constants": dict.fromkeys(_names(), 1.0)}])
    (symmetry,) = found.symmetries.values()
    constants = torch.tensor([160.0, 90.0, 66.0, 181.0, 46.0], dtype=torch.float64)
    (deformation,) = found.deformations.values()
    tensor = torch.einsum("m,mij->ij", constants, deformation.basis)
    coefficients = to_stress_strain(tensor, stress_from_voigt(STRESS))
    shears = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    frames = {}
    for source in found.sources:
        strain = torch.tensor(source.strain or UNSTRAINED, dtype=torch.float64)
        frames[source] = stressed((STRESS + coefficients @ (shears * strain)).expand(3, 6))
    values = [m.value for m in found.evaluate(frames).diagnostics.values()]
    wanted = symmetry.independent((coefficients + coefficients.T) / 2)
    assert values == pytest.approx([*(float(v) for v in wanted.values()), -9.0, -4.0, 22 / 3], rel=1e-9)
    assert abs(float(wanted["C13"]) - 66.0) > 3


def _names() -> tuple[str, ...]:
    return INDEPENDENT["6/mmm"]


def test_stress_counts_by_what_symmetry_leaves_of_it():
    """Two components of hcp in any frame, one of bcc; a shear that symmetry forbids is noise."""
    stress = np.diag([1.0, 3.0, 5.0])
    stress[0, 1] = stress[1, 0] = 7.0
    turn = Rotation.from_euler("zyx", [20, 40, 60], degrees=True).as_matrix()
    turned = HCP.copy()
    turned.set_cell(HCP.cell.array @ turn.T, scale_atoms=True)
    bcc = bulk("Ti", "bcc", a=3.27, cubic=True)
    for atoms, tensor, wanted in (
        (HCP, stress, {"xx": 2.0, "zz": 5.0}),
        (turned, turn @ stress @ turn.T, {"xx": 2.0, "zz": 5.0}),
        (bcc, stress, {"xx": 3.0}),
    ):
        components = SymmetricStress(find_symmetry(atoms.cell.array, atoms.positions, atoms.numbers))
        found = components.of(stress_to_voigt(torch.from_numpy(tensor)))
        assert dict(zip(components.labels, found.tolist(), strict=True)) == pytest.approx(wanted)
        assert components.under(2.0).tolist() == [-2.0] * len(wanted)


def test_a_stress_is_weighed_once(stressed):
    """Two constants and two components of the stress: the loss is the mean of four squares."""
    found = _loss(targets=[{**TARGET, "uncertainty": 1e4}], pressure=4.0, pressure_uncertainty=0.5)
    result = found.evaluate(dict.fromkeys(found.sources, stressed(STRESS.expand(8, 6))))
    assert float(result.value) == pytest.approx((5 / 0.5) ** 2 / 4, rel=1e-5)


def test_the_deviation_has_the_error_of_what_is_measured(stressed):
    """Of one constant alone, it is that of the constant in uncertainties of the target."""
    one = {**TARGET, "constants": {"C33": 160}, "uncertainty": 200.0}
    found = _loss(targets=[one], pressure=None)
    result = found.evaluate(dict.fromkeys(found.sources, stressed(_noisy(40, 1.0))))
    (measured,) = result.diagnostics.values()
    assert measured.se > 1
    assert result.deviation.se == pytest.approx(measured.se / 200)
    assert result.resolved


def test_every_value_has_its_target_in_records(stressed):
    """Names of targets are those of diagnostics; the pressure has one where it is matched."""
    found = _loss(pressure=2.0, targets=[{**TARGET, "uncertainty": 3.0}])
    diagnostics = found.evaluate(dict.fromkeys(found.sources, stressed(_noisy(40, 1.0)))).diagnostics
    targets = {name: (t.value, t.uncertainty) for name, t in found.targets.items()}
    stress = {f"stress {label} 300 K": (-2.0, 0.05) for label in ("xx", "zz")}
    assert targets == {"C11 300 K": (160.0, 3.0), "C13 300 K": (70.0, 3.0), **stress, "P 300 K": (2.0, 0.05)}
    assert set(diagnostics) == set(targets)
    assert all(found.targets[name].unit == m.unit for name, m in diagnostics.items())


def test_a_table_has_its_own_uncertainties_or_one_for_all():
    node = {
        "type": "elastic_constants",
        "phase": "hcp",
        "table": "titanium-hcp-elastic",
        "temperatures": [323],
    }
    found = []
    for options in ({}, {"uncertainty": "1.5 GPa"}):
        loss = testing.loss_of(node | options, HCP)
        found.append(loss.wanted[0].constants)
    assert found[0]["C33"] == (179.5, pytest.approx(1.795))
    assert found[1]["C33"] == (179.5, 1.5)
    assert {s for _, s in found[1].values()} == {1.5}
    with pytest.raises(InputError, match="no uncertainty beside targets"):
        _loss(uncertainty=1.0)


TABLE = """# title: x
# conditions: x
# source: x
# licence: x
# column: temperature | K | exact
# column: a | nm | exact
# column: C11 | kbar | unknown
# column: density | g/cm³ | unknown
temperature,a,C11,density
100,0.295,1700,4.5
300,0.296,1600,
"""


def test_a_table_of_other_units_is_converted(tmp_path):
    """Lattice constants need no uncertainty, and columns of something else are let be."""
    path = tmp_path / "mine.csv"
    path.write_text(TABLE)
    wanted = CellTargets.from_table(read_table(path), 300.0, 2.0)
    assert wanted.constants == {"C11": (pytest.approx(160.0), 2.0)}
    assert wanted.lattice == pytest.approx((2.96,))
    path.write_text(TABLE.replace("| K |", "| °C |").replace("100,", "-173.15,").replace("300,", "26.85,"))
    assert CellTargets.from_table(read_table(path), 300.0, 2.0) == wanted


@pytest.mark.parametrize(
    ("old", "new", "uncertainty", "message"),
    [
        ("", "", None, "mine.csv: the uncertainty of C11 is unknown"),
        ("C11 | kbar", "C11 | meV", 2.0, "mine.csv: the column C11 is no pressure; found unit meV"),
        ("a | nm", "a | g", 2.0, "mine.csv: the column a is no length"),
        ("C11", "B11", 2.0, "mine.csv: the table has no elastic constants; found temperature, a, B11"),
        ("temperature", "place", 2.0, "mine.csv: the table is not looked up by temperature"),
        ("300,0.296,1600", "300,0.296,", 2.0, "C11 was not measured there"),
    ],
)
def test_tables_that_do_not_tell_the_constants_are_refused(tmp_path, old, new, uncertainty, message):
    path = tmp_path / "mine.csv"
    path.write_text(TABLE.replace(old, new) if old else TABLE)
    with pytest.raises(InputError, match=message):
        CellTargets.from_table(read_table(path), 300.0, uncertainty)


def test_the_born_term_is_as_rare_as_in_the_command():
    """And with the defaults of `sampling` enough frames have one."""
    command, sampling = Elastic(), Sampling()
    assert ElasticConstantsOptions.model_fields["born_every"].default == command.born_every
    frames = sampling.replicas * sampling.frames
    assert frames // command.born_every >= sampling.min_effective_frames


def test_what_is_not_known_to_its_uncertainty_is_not_met_and_said_once(stressed):
    found = _loss(targets=[{**TARGET, "uncertainty": 1e-3}])
    frames = dict.fromkeys(found.sources, stressed(_noisy(40, 1.0)))
    with pytest.warns(UserWarning, match=r"standard error of C1[13] 300 K is [0-9.]+ times"):
        assert not found.evaluate(frames).resolved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not found.evaluate(frames).resolved


def test_the_pressure_has_the_error_of_its_own_series(stressed):
    """Components that cancel in every frame leave it far better known than each of them."""
    found = _loss(targets=[{**TARGET, "uncertainty": 1e4}], pressure_uncertainty=1e4)
    frames = stressed(_noisy(40, 1.0) * torch.tensor([1.0, 1, 0, 0, 0, 0]).double() + STRESS)
    pressure = found.evaluate(dict.fromkeys(found.sources, frames)).diagnostics["P 300 K"]
    (wanted,) = measure(Pressure(), frames, lambda _: 1.0)
    components = measure(Stress(), frames, lambda _: 1.0)
    assert pressure.se == pytest.approx(wanted.se)
    assert pressure.se < components[0].se / 10
    assert pressure.value == pytest.approx(wanted.value)


def test_cells_of_one_temperature_are_told_apart(stressed):
    targets = [TARGET, {**TARGET, "lattice": [2.94, 4.68]}]
    found = _loss(targets=targets)
    result = found.evaluate(dict.fromkeys(found.sources, stressed(_noisy(40, 1.0))))
    assert len(result.diagnostics) == 10
    assert f"C11 {found.cells[0].name}" in result.diagnostics


def _added(loss, constants: list[float]) -> dict:
    none = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    errors = [2.0] * 5, [0.1] * 2, [0.1]
    return {
        cell: CellValues(torch.full((5,), c, dtype=torch.float64), *none, errors)
        for cell, c in zip(loss.cells, constants, strict=True)
    }


def test_a_fit_that_misses_has_larger_errors():
    """χ²/ν of a curve that is off by 10 σ: errors of the fit are its square root times larger."""
    targets = [{**TARGET, "temperature": t} for t in (300, 600, 900)]
    smooth, rough = (_loss(method="static", targets=targets) for _ in range(2))
    smooth._added, rough._added = _added(smooth, [3.0, 6.0, 9.0]), _added(rough, [3.0, 66.0, 9.0])
    for one in (smooth, rough):
        one._smooth()
    values, wild = ([float(a.constants[0]) for a in one._added.values()] for one in (smooth, rough))
    known, unsure = ([a.errors[0][0] for a in one._added.values()] for one in (smooth, rough))
    chi = np.sqrt(sum(((w - c) / 2.0) ** 2 for w, c in zip(wild, (3.0, 66.0, 9.0), strict=True)))
    assert values == pytest.approx([3.0, 6.0, 9.0])
    assert chi > 5
    assert unsure == pytest.approx([chi * e for e in known])


def test_cells_of_one_temperature_are_not_smoothed():
    """A curve over temperature says nothing of two cells at one."""
    targets = [TARGET, {**TARGET, "lattice": [2.94, 4.68]}, {**TARGET, "temperature": 600}]
    found = _loss(method="static", targets=targets)
    added = _added(found, [1.0, 5.0, 9.0])
    found._difference = lambda _potential, cell, _frames: added[cell]
    found.follow(None, dict.fromkeys(found.cells))
    assert found._added == added
