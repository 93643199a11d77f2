"""What `mlip-refine phonons` found, and its file `phonons.json`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured

FORMAT = "mlip_refine phonons 1"


class Quantity(NamedTuple):
    """A quantity that is compared with references.

    Attributes:
        key: Of `PhononPoint.properties`.
        symbol: How tables name it.
        title: How figures name it.
        unit: Of its values; per primitive cell where there is a mole.
    """

    key: str
    symbol: str
    title: str
    unit: str


QUANTITIES = (
    Quantity("max_THz", "ω_max", "largest frequency", "THz"),
    Quantity("entropy_J_K_mol", "S", "entropy", "J/K/mol"),
    Quantity("free_energy_kJ_mol", "F", "free energy", "kJ/mol"),
    Quantity("heat_capacity_J_K_mol", "C_V", "heat capacity", "J/K/mol"),
)


@dataclass(frozen=True)
class PhononPoint:
    """Phonons of one crystal in one cell.

    Attributes:
        name: Of the material or phase.
        cell: `reference`, or `relaxed`: at rest by the model.
        formula: Reduced.
        n_primitive: Atoms of the primitive cell.
        n_atoms: Of the supercell.
        volume_A3_per_atom: Of this cell.
        properties: By the potential, per primitive cell: the fields of `PhononProperties`, by name.
        reference: The same of the reference calculation, in its own cell; None without one.
        frequency_error_THz: Mean absolute error of the frequencies on the mesh; None without a reference, or
            where the relaxed cell has another symmetry.
        reference_volume_A3_per_atom: None without a reference.
        band_error_THz: Mean absolute error of bands along lines of high symmetry; None without them.
        gruneisen: Mode Grüneisen parameters, as `Gruneisen.as_json` has them.
        quasi_harmonic: Thermal expansion, as `QuasiHarmonic.as_json` has it.
        conductivity: `temperatures_K`, `kappa_W_m_K` `[n_T, 3, 3]`, `mean_W_m_K`, `mesh`, `isotopes`.
        refused: Why there is no expansion and the like, by their names.
        material: Whose crystal it is, by the data: one material may have several; None for a phase.
        method_difference: Largest difference between force constants by both methods, over the largest; None
            when there is one method.
    """

    name: str
    cell: str
    formula: str
    n_primitive: int
    n_atoms: int
    volume_A3_per_atom: float  # noqa: N815 - the unit's own case
    properties: Mapping[str, float]
    reference: Mapping[str, float] | None = None
    frequency_error_THz: float | None = None  # noqa: N815 - the unit's own case
    reference_volume_A3_per_atom: float | None = None  # noqa: N815 - the unit's own case
    material: str | None = None
    method_difference: float | None = None
    band_error_THz: float | None = None  # noqa: N815 - the unit's own case
    gruneisen: Mapping[str, Any] | None = None
    quasi_harmonic: Mapping[str, Any] | None = None
    conductivity: Mapping[str, Any] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def error(self, quantity: Quantity) -> float:
        """Absolute error of a quantity; NaN without a reference."""
        wanted = math.nan if self.reference is None else self.reference[quantity.key]
        return abs(self.properties[quantity.key] - wanted)


@dataclass(frozen=True)
class PhononResult:
    """Phonons of all crystals.

    Attributes:
        folder: Of the run.
        name: Of the run.
        model_hash: Of the potential.
        mesh: Points along each reciprocal vector.
        temperature_K: Of thermodynamic functions.
        points: What was found.
        left_out: Why by name, of materials that could not be done.
        baseline: By how much errors became smaller, as `compared_with` has it; None without a baseline.
    """

    folder: Path
    name: str
    model_hash: str
    mesh: tuple[int, int, int]
    temperature_K: float  # noqa: N815 - the unit's own case
    points: tuple[PhononPoint, ...]
    left_out: Mapping[str, str]
    baseline: Mapping[str, Any] | None = None

    def compared(self, cell: str) -> list[PhononPoint]:
        """Points with a reference, in one kind of cell."""
        return [point for point in self.points if point.cell == cell and point.reference is not None]

    @property
    def cells(self) -> list[str]:
        """Kinds of cells that have points with a reference."""
        return list(dict.fromkeys(p.cell for p in self.points if p.reference is not None))

    def to_json(self) -> dict[str, Any]:
        """Return the content of `phonons.json`."""
        return self.as_json()

    def files(self) -> dict[str, Any]:
        """Return the JSON files of the run folder by name."""
        return {"phonons.json": self.as_json()}

    def as_json(self) -> dict[str, Any]:
        """The document of `phonons.json`."""
        return {
            "format": FORMAT,
            "name": self.name,
            "model_hash": self.model_hash,
            "mesh": list(self.mesh),
            "temperature_K": self.temperature_K,
            "points": [asdict(point) for point in self.points],
            "mean_absolute_errors": {cell: _errors_json(self.compared(cell)) for cell in self.cells},
            "baseline": self.baseline,
            "left_out": dict(self.left_out),
        }


def file_of_crystal(folder: Path, name: str, cell: str, suffix: str) -> Path:
    """A file of one crystal in one cell: names of materials may hold what names of files may not.

    Args:
        folder: Of the file.
        name: Of the material or phase.
        cell: `reference` or `relaxed`.
        suffix: What it is, such as `.json`.
    """
    return folder / f"{quote(name, safe='')}-{cell}{suffix}"


def read_phonons_json(path: Path) -> PhononResult:
    """Read the result of a run.

    Args:
        path: `phonons.json`, or its folder.

    Raises:
        InputError: It is missing, or something else.
    """
    path = path / "phonons.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise InputError(
                "not a result of phonons", where=str(path), found=data["format"], expected=FORMAT
            )
        return PhononResult(
            path.parent,
            data["name"],
            data["model_hash"],
            (data["mesh"][0], data["mesh"][1], data["mesh"][2]),
            data["temperature_K"],
            tuple(PhononPoint(**point) for point in data["points"]),
            data["left_out"],
            data.get("baseline"),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            "the result of phonons cannot be read", where=str(path), found=str(error), expected="phonons.json"
        ) from error


def materials_of(points: Sequence[PhononPoint]) -> list[str]:
    """The material of every point."""
    return [point.material or point.name for point in points]


def errors_of_materials(points: Sequence[PhononPoint], materials: Sequence[str]) -> torch.Tensor:
    """Absolute errors of `QUANTITIES`, the mean over the points of one material `[n_materials, 4]`.

    Args:
        points: With references.
        materials: Of every point.
    """
    index = {name: k for k, name in enumerate(dict.fromkeys(materials))}
    owners = torch.tensor([index[name] for name in materials], dtype=torch.long)
    errors = torch.tensor([[p.error(q) for q in QUANTITIES] for p in points], dtype=torch.float64)
    sums = torch.zeros(len(index), len(QUANTITIES), dtype=torch.float64)
    sums.index_add_(0, owners, errors.reshape(-1, len(QUANTITIES)))
    return sums / owners.bincount(minlength=len(index))[:, None]


def mean_absolute_error(points: Sequence[PhononPoint], quantity: Quantity) -> Measured:
    """Mean over materials, its standard error from their spread."""
    errors = errors_of_materials(points, materials_of(points))[:, QUANTITIES.index(quantity)]
    spread = float(errors.std() / len(errors) ** 0.5) if len(errors) > 1 else float("nan")
    return Measured(float(errors.mean()), spread, quantity.unit)


def _errors_json(points: Sequence[PhononPoint]) -> dict[str, Any]:
    errors = {q.key: mean_absolute_error(points, q) for q in QUANTITIES}
    unstable = sum(point.properties["imaginary"] > 0 for point in points)
    shares = [point.properties["imaginary"] for point in points]
    found = {
        key: {"value": error.value, "se": error.se if math.isfinite(error.se) else None, "unit": error.unit}
        for key, error in errors.items()
    }
    return {
        "materials": len(set(materials_of(points))),
        **found,
        "unstable": unstable,
        "imaginary": sum(shares) / len(shares),
    }
