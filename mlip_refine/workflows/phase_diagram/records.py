"""Result of `mlip-refine phase-diagram` and its files, `phase_diagram.json` and `phase_diagram.csv`."""

import csv
import math
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from mlip_refine.files import write_text
from mlip_refine.statistics.boundary_curve import BoundaryCurve, CurvePoint
from mlip_refine.workflows.records import MeasuredField, Record, read_record

FORMAT: Final = "mlip_refine phase diagram 1"
FILE: Final = "phase_diagram.json"


class PointRecord(Record):
    """A boundary at one pressure.

    Attributes:
        pressure_GPa: Pressure.
        temperature: Temperature, K, with all its errors.
        se_common_K: Part of its standard error that all pressures share.
        slope: dT/dP, K/GPa.
        more_stable: Phase of which a boundary says that it is more stable there than both; `None` where no
            boundary does.
    """

    pressure_GPa: float = Field(allow_inf_nan=False)  # noqa: N815 - the unit's own case
    temperature: MeasuredField
    se_common_K: float  # noqa: N815 - the unit's own case
    slope: MeasuredField
    more_stable: str | None = None

    @model_validator(mode="after")
    def _usable(self) -> "PointRecord":
        numbers = (self.temperature.value, self.slope.value)
        errors = (self.temperature.se, self.slope.se, self.se_common_K)
        if not all(map(math.isfinite, (*numbers, *errors))) or self.temperature.value <= 0 or min(errors) < 0:
            raise ValueError(f"{self.temperature} and {self.slope} are not usable")
        return self


class CurveRecord(Record):
    """A boundary of two phases.

    Attributes:
        from_: Phase I.
        to: Phase II.
        upper: The phase that is stable at higher temperatures.
        name: Name of the run that it comes from.
        source: Its file.
        sampled: The boundary at the pressures of that run.
        interpolated: The boundary at those pressures of the report that lie between the sampled ones.
        notes: Pressures at which that run has refused it.
    """

    from_: str = Field(alias="from")
    to: str
    upper: str
    name: str
    source: str
    sampled: tuple[PointRecord, ...] = Field(min_length=1)
    interpolated: tuple[PointRecord, ...]
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _different_pressures(self) -> "CurveRecord":
        if len({point.pressure_GPa for point in self.sampled}) < len(self.sampled):
            raise ValueError("two points of a boundary have one pressure")
        return self

    @property
    def phases(self) -> frozenset[str]:
        """Both phases."""
        return frozenset((self.from_, self.to))

    @property
    def title(self) -> str:
        """Both phases in words."""
        return f"{self.from_} to {self.to}"

    def curve(self) -> BoundaryCurve:
        """Return the boundary over pressure."""
        points = [CurvePoint(p.temperature, p.se_common_K, p.slope) for p in self.sampled]
        return BoundaryCurve([p.pressure_GPa for p in self.sampled], points)


class TriplePointRecord(Record):
    """Where three phases coexist.

    Attributes:
        phases: The phases, in alphabetical order.
        boundaries: Number of boundaries that it was found from.
        pressure: Pressure, GPa.
        temperature: Temperature, K.
        covariance_K_GPa: Covariance of both.
        mismatch_sigma: How far three boundaries are from meeting in one point, in standard errors; `None` of
            two, which cross anyway.
    """

    phases: tuple[str, str, str]
    boundaries: int
    pressure: MeasuredField
    temperature: MeasuredField
    covariance_K_GPa: float  # noqa: N815 - the unit's own case
    mismatch_sigma: float | None


class ComparedPoint(Record):
    """A measured boundary at one pressure.

    Attributes:
        pressure_GPa: Pressure.
        temperature: Temperature, K; its standard error is null where it is not known.
        deviation: What the potential has beyond it there, K, with the errors of both as far as they are
            known; `None` outside the pressures of the potential's boundary.
    """

    pressure_GPa: float  # noqa: N815 - the unit's own case
    temperature: MeasuredField
    deviation: MeasuredField | None


class ExperimentRecord(Record):
    """A column of the experimental table.

    Attributes:
        from_: Phase I of the boundary.
        to: Phase II.
        column: Name of the column.
        source: Publication.
        points: The measured boundary, and the deviations from it.
        rms_K: Root of the mean square of the deviations; `None` where there are none.
    """

    from_: str = Field(alias="from")
    to: str
    column: str
    source: str
    points: tuple[ComparedPoint, ...]
    rms_K: float | None  # noqa: N815 - the unit's own case


class OtherRecord(Record):
    """Boundaries of another potential.

    Attributes:
        name: Name of the run.
        model_hash: Hash of its model.
        head: Head of its model.
        boundaries: Its boundaries.
    """

    name: str
    model_hash: str
    head: str
    boundaries: tuple[CurveRecord, ...]


class PhaseDiagramFile(Record):
    """Content of `phase_diagram.json`.

    Attributes:
        format: Name and version of the format.
        name: Name of the run.
        model_hash: Hash of the model.
        head: Head of the model.
        convention: What the free energies are of: the thermodynamic limit, or cells of so many atoms.
        boundaries: The boundaries.
        triple_points: Where three phases coexist.
        experiment: What was measured, and the deviations from it.
        others: Boundaries of other potentials.
        notes: Remarks.
    """

    format: Literal["mlip_refine phase diagram 1"] = FORMAT
    name: str
    model_hash: str
    head: str
    convention: str
    boundaries: tuple[CurveRecord, ...] = Field(min_length=1)
    triple_points: tuple[TriplePointRecord, ...]
    experiment: tuple[ExperimentRecord, ...]
    others: tuple[OtherRecord, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PhaseDiagramResult:
    """Result of a run of `phase-diagram`.

    Attributes:
        folder: The run folder.
        file: Content of `phase_diagram.json`.
    """

    folder: Path
    file: PhaseDiagramFile

    def to_json(self) -> dict[str, Any]:
        """Return the content of `phase_diagram.json`."""
        return self.file.as_json()

    def files(self) -> dict[str, Any]:
        """Return the JSON files of the run folder by name."""
        return {FILE: self.file.as_json()}


def read_phase_diagram(path: Path) -> PhaseDiagramFile:
    """Read `phase_diagram.json`, or that of a run folder.

    Raises:
        InputError: If it is missing or is not one.
    """
    file = path / FILE if path.is_dir() else path
    return read_record(file, PhaseDiagramFile, "result of phase-diagram")


def write_csv(path: Path, curves: tuple[CurveRecord, ...]) -> None:
    """Write the interpolated boundaries as CSV."""
    stream = StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    state = ("pressure (GPa)", "temperature (K)", "se (K)", "common se (K)")
    lines.writerow(["from", "to", *state, "slope (K/GPa)", "se (K/GPa)", "more stable phase"])
    for curve in curves:
        for point in curve.interpolated:
            t, slope = point.temperature, point.slope
            numbers = (point.pressure_GPa, t.value, t.se, point.se_common_K, slope.value, slope.se)
            lines.writerow([curve.from_, curve.to, *numbers, point.more_stable or ""])
    write_text(path, stream.getvalue())
