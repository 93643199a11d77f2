"""Results of `mlip-refine elastic` and their files, `elastic.json` and `thermal_elastic.json`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, computed_field, model_validator

from mlip_refine.crystals.symmetry import CrystalLattice
from mlip_refine.quantities import Measured
from mlip_refine.workflows.records import MeasuredField, Record, read_record

FORMAT: Final = "mlip_refine elastic 1"
THERMAL_FORMAT: Final = "mlip_refine thermal elastic 1"

type Matrix = list[list[float]]
type Values = dict[str, MeasuredField]


class PolycrystalModuli(Record):
    """Isotropic moduli by one average over all orientations.

    Attributes:
        bulk_GPa: Bulk modulus K.
        shear_GPa: Shear modulus G.
        young_GPa: Young's modulus E.
        poisson: Poisson's ratio ν.
    """

    bulk_GPa: float  # noqa: N815 - the unit's own case
    shear_GPa: float  # noqa: N815 - the unit's own case
    young_GPa: float  # noqa: N815 - the unit's own case
    poisson: float


class ElasticPoint(Record):
    """Elastic constants of one phase at one pressure, in the standard axes of its crystal.

    Matrices are in Voigt order xx, yy, zz, yz, xz, xy.

    Attributes:
        name: Name of the point.
        phase: Name of the phase in the config.
        relaxed: What was relaxed: `cell` or `atoms`.
        pressure_GPa: Pressure on the relaxed cell; `None` where the cell was held.
        n_atoms: Atoms of the primitive cell in which the constants were computed.
        n_atoms_given: Atoms of the phase's own cell.
        space_group: International symbol of the space group.
        laue_class: Laue class, which says what constants are independent.
        volume_A3_per_atom: Volume of the crystal at rest.
        energy_eV_per_atom: Energy of the crystal at rest.
        cell_A: Rows of the primitive cell.
        stress_GPa: Stress, tensile positive.
        independent_GPa: Independent constants by name.
        constants_GPa: C: second derivatives in the Lagrangian strain, with internal relaxation.
        clamped_GPa: C without internal relaxation.
        stress_strain_GPa: B: derivative of the stress in the strain; C where there is no stress.
        moduli: Moduli of B by average: `voigt`, and for a stable crystal `reuss` and `hill`.
        stability_GPa: Eigenvalues of B; the crystal is stable if all are above zero (Born).
        softest_eV_per_A2: Smallest curvature against internal displacements; `None` for one atom.
        asymmetry_GPa: Largest component that the symmetry forbids, before any projection.
        given: Space group and lattice constants of the phase before relaxation; `None` in files of versions
            that did not keep them.
        lattice: The same of the crystal at rest.
    """

    name: str
    phase: str
    relaxed: str
    pressure_GPa: float | None  # noqa: N815 - the unit's own case
    n_atoms: int
    n_atoms_given: int
    space_group: str
    laue_class: str
    volume_A3_per_atom: float  # noqa: N815 - the unit's own case
    energy_eV_per_atom: float  # noqa: N815 - the unit's own case
    cell_A: Matrix  # noqa: N815 - the unit's own case
    stress_GPa: Matrix  # noqa: N815 - the unit's own case
    independent_GPa: dict[str, float]  # noqa: N815 - the unit's own case
    constants_GPa: Matrix  # noqa: N815 - the unit's own case
    clamped_GPa: Matrix  # noqa: N815 - the unit's own case
    stress_strain_GPa: Matrix  # noqa: N815 - the unit's own case
    moduli: dict[str, PolycrystalModuli]
    stability_GPa: list[float]  # noqa: N815 - the unit's own case
    softest_eV_per_A2: float | None  # noqa: N815 - the unit's own case
    asymmetry_GPa: float  # noqa: N815 - the unit's own case
    given: CrystalLattice | None = None
    lattice: CrystalLattice | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def stable(self) -> bool:
        """Whether strains and internal displacements, each by themselves, cost energy."""
        return self.stability_GPa[0] > 0 and (self.softest_eV_per_A2 or 1.0) > 0

    @model_validator(mode="before")
    @classmethod
    def _without_computed(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in data.items() if name != "stable"}


class ThermalElasticPoint(Record):
    """Elastic constants of one crystal in one fixed cell at one temperature, by one method.

    A point that is refused has null in place of all values in its file.

    Attributes:
        name: Name of the state.
        phase: Name of the phase in the config.
        method: `fluctuation` or `deformation`.
        kind: `adiabatic` or `isothermal`.
        temperature_K: Temperature.
        lattice_A: Lattice constants (a) or (a, c) that the table gives; empty for the cell of the phase.
        n_atoms: Atoms of the cell.
        frames: Number of frames that count.
        atom_steps: Steps of molecular dynamics times atoms, the equilibration included.
        targets: Measured values of the table, GPa.
        verdicts: What happened to systems, one line each.
        constants: Independent constants C in the standard axes, GPa.
        isothermal: Isothermal C, GPa.
        stress_strain: Independent components of the symmetric part of the stress-strain coefficients B at the
            stress of the cell, GPa, which measurements show; they are C where there is no stress.
        moduli: K, G, E (GPa) and nu by Voigt's average of B.
        pressure: Pressure of the cell, GPa; `None` where it is refused.
        rest_strain: Strain xx, yy, zz in the standard axes that would bring the cell to no pressure, to
            first order; fluctuation only.
        refused: Why there are no values; empty where there are.
    """

    name: str
    phase: str
    method: str
    kind: str
    temperature_K: float  # noqa: N815 - the unit's own case
    lattice_A: tuple[float, ...]  # noqa: N815 - the unit's own case
    n_atoms: int
    frames: int
    atom_steps: int
    targets: Values
    verdicts: tuple[str, ...]
    constants: Values = Field(default_factory=dict)
    isothermal: Values = Field(default_factory=dict)
    stress_strain: Values = Field(default_factory=dict)
    moduli: Values = Field(default_factory=dict)
    pressure: MeasuredField | None = None
    rest_strain: Values = Field(default_factory=dict)
    refused: str = ""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rest_lattice(self) -> Values:
        """Lattice constants at no pressure, Å, where the cell has (a, c) or (a)."""
        if not self.lattice_A or not self.rest_strain:
            return {}
        xx, yy, zz = (self.rest_strain[n] for n in ("xx", "yy", "zz"))
        across = Measured((xx.value + yy.value) / 2, (xx.se + yy.se) / 2, "")
        along = {"a": across, "c": zz}
        return {
            axis: Measured(length * (1 + along[axis].value), length * along[axis].se, "Å")
            for axis, length in zip("ac", self.lattice_A, strict=False)
        }

    def as_json(self) -> dict[str, Any]:
        """Return the record as plain data."""
        data = super().as_json()
        if not self.refused:
            return data | {"refused": None}
        return data | dict.fromkeys((*_FOUND, "pressure", "rest_lattice"))

    @model_validator(mode="before")
    @classmethod
    def _without_computed(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in data.items() if name != "rest_lattice" and value is not None}


_FOUND = ("constants", "isothermal", "stress_strain", "moduli", "rest_strain")


class _ElasticFile(Record):
    """Content of `elastic.json`."""

    format: Literal["mlip_refine elastic 1"] = FORMAT
    name: str
    model_hash: str
    head: str | None = None
    points: tuple[ElasticPoint, ...]


class _ThermalFile(Record):
    """Content of `thermal_elastic.json`."""

    format: Literal["mlip_refine thermal elastic 1"] = THERMAL_FORMAT
    name: str
    model_hash: str
    head: str | None = None
    points: tuple[ThermalElasticPoint, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the record as plain data."""
        return super().as_json() | {"points": [point.as_json() for point in self.points]}


@dataclass(frozen=True)
class ElasticResult:
    """Result of a run.

    Attributes:
        folder: The run folder.
        name: Name of the run.
        model_hash: Hash of the potential.
        points: Every phase at every pressure.
        thermal: Every phase at every temperature, if there are any; kept in a file of its own.
        head: Head of the model that was evaluated; `None` in files of earlier versions.
    """

    folder: Path
    name: str
    model_hash: str
    points: tuple[ElasticPoint, ...]
    thermal: tuple[ThermalElasticPoint, ...] = ()
    head: str | None = None

    def __getitem__(self, name: str) -> ElasticPoint:
        """Return the point of a name such as ``hcp-0GPa``."""
        return {point.name: point for point in self.points}[name]

    def to_json(self) -> dict[str, Any]:
        """Return the content of all files, by file name."""
        return self.files()

    def files(self) -> dict[str, Any]:
        """Return the JSON files of the run folder by name."""
        run = {"name": self.name, "model_hash": self.model_hash, "head": self.head}
        found = {"elastic.json": _ElasticFile(**run, points=self.points).as_json()}
        if self.thermal:
            found["thermal_elastic.json"] = _ThermalFile(**run, points=self.thermal).as_json()
        return found


def read_elastic(folder: Path) -> ElasticResult:
    """Read `elastic.json` of a run folder.

    Raises:
        InputError: The file is missing or was not written by `mlip-refine elastic`.
    """
    data = read_record(Path(folder) / "elastic.json", _ElasticFile, "result of elastic")
    return ElasticResult(Path(folder), data.name, data.model_hash, data.points, head=data.head)


def read_thermal_elastic(folder: Path) -> tuple[ThermalElasticPoint, ...]:
    """Read `thermal_elastic.json` of a run folder.

    Raises:
        InputError: The file is missing or was not written by `mlip-refine elastic`.
    """
    path = Path(folder) / "thermal_elastic.json"
    return read_record(path, _ThermalFile, "result of elastic constants at temperatures").points
