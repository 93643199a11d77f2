"""Result of `mlip-refine transition` and its files, `transition.json` and `boundary.csv`."""

import csv
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from mlip_refine.files import write_text
from mlip_refine.workflows.records import Estimate, MeasuredField, Record, read_record

FORMAT: Final = "mlip_refine transition 1"

Finite = Annotated[float, Field(allow_inf_nan=False)]
Row = tuple[Finite, Finite, Finite]
Matrix = tuple[Row, Row, Row]


class AnchorRecord(Record):
    """Absolute Gibbs energy of a phase at one state.

    Attributes:
        phase: Name of the phase in the config.
        temperature_K: Temperature.
        pressure_GPa: Pressure.
        n_atoms: Atoms of the cell.
        volume_A3_per_atom: Volume of the fixed cell in which it was computed.
        method: How: `frenkel_ladd` or `uhlenbeck_ford`.
        gibbs: G = F + PV of the cell, per atom, before any term of the finite size.
        size_term: What G of this cell has beyond the thermodynamic limit; 0 in the convention of cells.
        overlap: Smallest overlap between neighbouring windows.
    """

    phase: str
    temperature_K: float  # noqa: N815 - the unit's own case
    pressure_GPa: float  # noqa: N815 - the unit's own case
    n_atoms: int
    volume_A3_per_atom: float  # noqa: N815 - the unit's own case
    method: str
    gibbs: MeasuredField
    size_term: MeasuredField
    overlap: float


class ClosureRecord(Record):
    """Two anchors of a phase, compared through its ladder: their difference should vanish.

    Attributes:
        phase: Name of the phase in the config.
        temperatures_K: Temperatures of both anchors.
        pressures_GPa: Pressures of both anchors.
        difference: What the second has beyond the first by the anchors, less the same by the ladder.
    """

    phase: str
    temperatures_K: tuple[float, float]  # noqa: N815 - the unit's own case
    pressures_GPa: tuple[float, float]  # noqa: N815 - the unit's own case
    difference: MeasuredField


class BoundaryRecord(Record):
    """Where both phases coexist at one pressure.

    Attributes:
        pressure_GPa: Pressure.
        temperature: Temperature, K, with all its errors.
        se_common_K: Part of its standard error that all pressures share: that of the anchors.
        slope: dT/dP of the boundary, K/GPa.
        delta_s: ΔS, meV/atom/K.
        delta_h: ΔH, meV/atom.
        delta_v: ΔV, Å³/atom.
        independent_frames: Independent frames of the phase that has fewer.
    """

    pressure_GPa: float  # noqa: N815 - the unit's own case
    temperature: Estimate
    se_common_K: float | None = None  # noqa: N815 - the unit's own case
    slope: MeasuredField | None = None
    delta_s: MeasuredField | None = None
    delta_h: MeasuredField | None = None
    delta_v: MeasuredField | None = None
    independent_frames: float | None = None


class EndRecord(Record):
    """A phase at one temperature and pressure.

    Attributes:
        gibbs: G in the convention of the result, meV/atom.
        cell: Mean cell, rows in Å.
    """

    gibbs: MeasuredField
    cell: Matrix


class PhaseRecord(Record):
    """The atoms of a phase.

    Attributes:
        phase: Name of the phase in the config.
        kind: Kind of the phase, `crystal` or `liquid`.
        numbers: Atomic numbers `[n_atoms]`.
        scaled_positions: Lattice sites `[n_atoms, 3]`, in lattice vectors; of a liquid, a frame.
    """

    phase: str
    kind: Literal["crystal", "liquid"]
    numbers: tuple[int, ...]
    scaled_positions: tuple[Row, ...]


class DifferenceRecord(Record):
    """ΔG at one temperature and pressure.

    Attributes:
        temperature_K: Temperature.
        pressure_GPa: Pressure.
        delta_g: ΔG, meV/atom, with all its errors.
        se_common: Part of its standard error that all states share: that of the anchors, meV/atom.
        ends: Both phases, in the order from, to; empty in files of earlier versions.
    """

    temperature_K: float  # noqa: N815 - the unit's own case
    pressure_GPa: float  # noqa: N815 - the unit's own case
    delta_g: MeasuredField
    se_common: float
    ends: tuple[EndRecord, ...] = ()


class StateRecord(Record):
    """A phase at one rung of its ladder.

    Attributes:
        phase: Name of the phase in the config.
        temperature_K: Temperature.
        pressure_GPa: Pressure.
        n_atoms: Atoms of the cell.
        frames: Frames that count.
        gibbs: G in the convention of the result, meV/atom.
        enthalpy: H = ∂(βG)/∂β, with the kinetic energy, meV/atom.
        volume: V = ∂G/∂P, Å³/atom.
    """

    phase: str
    temperature_K: float  # noqa: N815 - the unit's own case
    pressure_GPa: float  # noqa: N815 - the unit's own case
    n_atoms: int
    frames: int
    gibbs: MeasuredField
    enthalpy: MeasuredField
    volume: MeasuredField


class BoxRecord(Record):
    """One box of crystal and liquid.

    Attributes:
        start_K: Temperature at which it started.
        n_atoms: Atoms of the box.
        outcome: What became of it: `coexists`, `drifts` (the interface still moved), `molten`, `frozen`,
            `unmixed` (one phase alone from the beginning) or `stopped`.
        temperature: Mean temperature after the equilibration.
        crystal_share: Mean share of atoms in neighbourhoods of the crystal, then.
        equilibration_ps: Time that was left out.
        times_ps: Times of the course of the box.
        temperatures_K: Temperatures at these times.
        crystal_shares: Shares of the crystal at these times.
    """

    start_K: float  # noqa: N815 - the unit's own case
    n_atoms: int
    outcome: str
    temperature: MeasuredField
    crystal_share: MeasuredField
    equilibration_ps: float
    times_ps: tuple[float, ...]
    temperatures_K: tuple[float, ...]  # noqa: N815 - the unit's own case
    crystal_shares: tuple[float, ...]


class CoexistenceRecord(Record):
    """Boxes of crystal and liquid at one pressure.

    Attributes:
        pressure_GPa: Pressure.
        temperature: Temperature of coexistence, K, of the boxes in which both phases stayed.
        beyond_boundary: That temperature less the one of the boundary at the same pressure; `None` without.
        boxes: The boxes.
    """

    pressure_GPa: float  # noqa: N815 - the unit's own case
    temperature: Estimate
    beyond_boundary: MeasuredField | None
    boxes: tuple[BoxRecord, ...]


class TransitionFile(Record):
    """Content of `transition.json`; differences are `to` less `from`.

    Attributes:
        format: Name and version of the format.
        name: Name of the run.
        model_hash: Hash of the model.
        head: Head of the model.
        from_: Phase I.
        to: Phase II.
        convention: What G is of: cells of N atoms, or the thermodynamic limit.
        timestep_fs: Time step of the dynamics.
        seed: Random seed of the run.
        settings: Section `transition` of the config.
        boundary: The boundary, pressure after pressure.
        anchors: Absolute Gibbs energies.
        closures: Anchors compared through the ladders.
        differences: ΔG over a grid of temperatures at every pressure of the boundary.
        states: Both phases at every rung that was used.
        lost: Rungs that were not used, one line each.
        phases: Atoms of both phases; empty in files of earlier versions.
        coexistence: Boxes of crystal and liquid, pressure after pressure.
    """

    format: Literal["mlip_refine transition 1"] = FORMAT
    name: str
    model_hash: str
    head: str
    from_: str = Field(alias="from")
    to: str
    convention: str
    timestep_fs: float
    seed: int
    settings: dict[str, Any]
    boundary: tuple[BoundaryRecord, ...]
    anchors: tuple[AnchorRecord, ...]
    closures: tuple[ClosureRecord, ...]
    differences: tuple[DifferenceRecord, ...]
    states: tuple[StateRecord, ...]
    lost: tuple[str, ...] = ()
    phases: tuple[PhaseRecord, ...] = ()
    coexistence: tuple[CoexistenceRecord, ...] = ()


@dataclass(frozen=True)
class TransitionResult:
    """Result of a run of `transition`.

    Attributes:
        folder: The run folder.
        file: Content of `transition.json`.
    """

    folder: Path
    file: TransitionFile

    def to_json(self) -> dict[str, Any]:
        """Return the content of `transition.json`."""
        return self.file.as_json()

    def files(self) -> dict[str, Any]:
        """Return the JSON files of the run folder by name."""
        return {"transition.json": self.file.as_json()}


def result_file(path: Path) -> Path:
    """Return the `transition.json` of a run folder, or the file itself."""
    return path / "transition.json" if path.is_dir() else path


def read_transition(path: Path) -> TransitionFile:
    """Read `transition.json`, or that of a run folder.

    Raises:
        InputError: If it is missing or is not one.
    """
    return read_record(result_file(path), TransitionFile, "result of transition")


def write_boundary(path: Path, points: tuple[BoundaryRecord, ...]) -> None:
    """Write the boundary as CSV; pressures without one have empty columns."""
    stream = StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    head = ("pressure (GPa)", "temperature (K)", "se (K)", "common se (K)", "slope (K/GPa)", "se (K/GPa)")
    lines.writerow(head)
    for point in points:
        slope = ("", "") if point.slope is None else (point.slope.value, point.slope.se)
        known = (point.temperature.value, point.temperature.se, point.se_common_K)
        lines.writerow([point.pressure_GPa, *("" if x is None else x for x in known), *slope])
    write_text(path, stream.getvalue())
