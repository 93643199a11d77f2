"""What `mlip-refine elastic` found, and its file `elastic.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from mlip_refine.errors import InputError
from mlip_refine.workflows.elastic.thermal_records import ThermalElasticPoint, thermal_json

FORMAT = "mlip_refine elastic 1"

type Matrix = list[list[float]]


@dataclass(frozen=True)
class PolycrystalModuli:
    """Isotropic moduli by one average over all orientations.

    Attributes:
        bulk_GPa: K.
        shear_GPa: G.
        young_GPa: E.
        poisson: ν.
    """

    bulk_GPa: float  # noqa: N815 - the unit's own case
    shear_GPa: float  # noqa: N815 - the unit's own case
    young_GPa: float  # noqa: N815 - the unit's own case
    poisson: float


@dataclass(frozen=True)
class ElasticPoint:
    """Elastic constants of one phase at one pressure, in the standard axes of its crystal.

    Matrices are in Voigt order xx, yy, zz, yz, xz, xy.

    Attributes:
        name: Of the point.
        phase: Of the config.
        relaxed: `cell` or `atoms`: what came to rest.
        pressure_GPa: That the cell came to rest at; `None` where it was held.
        n_atoms: Of the primitive cell that it was computed in.
        n_atoms_given: Of the phase's own cell.
        space_group: International symbol.
        laue_class: Which constants are independent.
        volume_A3_per_atom: Of the crystal at rest.
        energy_eV_per_atom: Of the crystal at rest.
        cell_A: Rows of the primitive cell.
        stress_GPa: Tensile positive.
        independent_GPa: Independent constants by name.
        constants_GPa: C: second derivatives in the Lagrangian strain, with internal relaxation.
        clamped_GPa: C without internal relaxation.
        stress_strain_GPa: B: derivative of the stress in the strain; C where there is no stress.
        moduli: Of B, by average: `voigt`, and for a stable crystal `reuss` and `hill`.
        stability_GPa: Eigenvalues of B; the crystal is stable if all are above zero (Born).
        softest_eV_per_A2: Smallest curvature against internal displacements; `None` for one atom.
        asymmetry_GPa: Largest component that the symmetry forbids, before any projection.
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
    independent_GPa: Mapping[str, float]  # noqa: N815 - the unit's own case
    constants_GPa: Matrix  # noqa: N815 - the unit's own case
    clamped_GPa: Matrix  # noqa: N815 - the unit's own case
    stress_strain_GPa: Matrix  # noqa: N815 - the unit's own case
    moduli: Mapping[str, PolycrystalModuli]
    stability_GPa: list[float]  # noqa: N815 - the unit's own case
    softest_eV_per_A2: float | None  # noqa: N815 - the unit's own case
    asymmetry_GPa: float  # noqa: N815 - the unit's own case

    @property
    def stable(self) -> bool:
        """Whether strains and internal displacements, each by themselves, cost energy."""
        return self.stability_GPa[0] > 0 and (self.softest_eV_per_A2 or 1.0) > 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read plain data; `KeyError`, `TypeError` or `ValueError` if it is not this."""
        given = {name: value for name, value in data.items() if name != "stable"}
        moduli = {name: PolycrystalModuli(**entry) for name, entry in dict(data["moduli"]).items()}
        return cls(**given | {"moduli": moduli})


@dataclass(frozen=True)
class ElasticResult:
    """What a run found.

    Attributes:
        folder: The run folder.
        name: Of the run.
        model_hash: Of the potential.
        points: Every phase at every pressure.
        thermal: Every phase at every temperature, if there are any; kept in a file of its own.
    """

    folder: Path
    name: str
    model_hash: str
    points: tuple[ElasticPoint, ...]
    thermal: tuple[ThermalElasticPoint, ...] = ()

    def __getitem__(self, name: str) -> ElasticPoint:
        """Return the point of a name such as ``hcp-0GPa``."""
        return {point.name: point for point in self.points}[name]

    def to_json(self) -> dict[str, Any]:
        """Return the content of all files, by file name."""
        return self.files()

    def files(self) -> dict[str, Any]:
        """Return the JSON files of the run folder by name."""
        found = {"elastic.json": self.as_json()}
        if self.thermal:
            found["thermal_elastic.json"] = thermal_json(self.name, self.model_hash, self.thermal)
        return found

    def as_json(self) -> dict[str, Any]:
        """What `elastic.json` holds."""
        points = [asdict(point) | {"stable": point.stable} for point in self.points]
        return {"format": FORMAT, "name": self.name, "model_hash": self.model_hash, "points": points}


def read_elastic(folder: Path) -> ElasticResult:
    """Read `elastic.json` of a run folder.

    Raises:
        InputError: The file is missing or was not written by `mlip-refine elastic`.
    """
    path = Path(folder) / "elastic.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        points = tuple(ElasticPoint.from_json(entry) for entry in data["points"])
        return ElasticResult(Path(folder), str(data["name"]), str(data["model_hash"]), points)
    except FileNotFoundError as error:
        raise InputError("the result file is missing", where=str(path)) from error
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("this is no result of elastic", where=str(path), found=str(error)) from error
