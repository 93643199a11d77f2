"""What `mlip-refine phonons` found, and its file `phonons.json`."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlip_refine.errors import InputError
from mlip_refine.quantities import Measured
from mlip_refine.statistics.paired import Reduction, paired_reduction

FORMAT = "mlip_refine phonons 1"

_SAME = 1e-6
"""Values of one reference differ by less than this."""


class Quantity(NamedTuple):
    """A quantity that is compared with references.

    Attributes:
        key: Of `PhononPoint.properties`.
        symbol: How tables and figures name it.
        unit: Of its values; per primitive cell where there is a mole.
    """

    key: str
    symbol: str
    unit: str


QUANTITIES = (
    Quantity("max_THz", "ω_max", "THz"),
    Quantity("entropy_J_K_mol", "S", "J/K/mol"),
    Quantity("free_energy_kJ_mol", "F", "kJ/mol"),
    Quantity("heat_capacity_J_K_mol", "C_V", "J/K/mol"),
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
    """

    folder: Path
    name: str
    model_hash: str
    mesh: tuple[int, int, int]
    temperature_K: float  # noqa: N815 - the unit's own case
    points: tuple[PhononPoint, ...]
    left_out: Mapping[str, str]

    def compared(self, cell: str) -> list[PhononPoint]:
        """Points with a reference, in one kind of cell."""
        return [point for point in self.points if point.cell == cell and point.reference is not None]

    @property
    def cells(self) -> list[str]:
        """Kinds of cells that have points with a reference."""
        return list(dict.fromkeys(p.cell for p in self.points if p.reference is not None))

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
            "left_out": dict(self.left_out),
        }


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
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            "the result of phonons cannot be read", where=str(path), found=str(error), expected="phonons.json"
        ) from error


def mean_absolute_error(points: Sequence[PhononPoint], quantity: Quantity) -> Measured:
    """Mean over materials, its standard error from their spread."""
    errors = torch.tensor([point.error(quantity) for point in points], dtype=torch.float64)
    spread = float(errors.std() / len(errors) ** 0.5) if len(errors) > 1 else float("nan")
    return Measured(float(errors.mean()), spread, quantity.unit)


def reduction(before: PhononResult, after: PhononResult, cell: str) -> tuple[Reduction, int]:
    """Share by which errors of ω_max, S, F and C_V became smaller, on the materials that both have.

    Args:
        before: Of one potential.
        after: Of another, with the same mesh and temperature.
        cell: Kind of cell.

    Returns:
        The reduction, and the number of materials.

    Raises:
        InputError: Mesh or temperature differ, or the references of a material do.
        StatisticsError: There are too few materials in both.
    """
    if (before.mesh, before.temperature_K) != (after.mesh, after.temperature_K):
        raise InputError(
            "the baseline is of another mesh or temperature",
            where=str(before.folder),
            found=f"{before.mesh}, {before.temperature_K:g} K",
            expected=f"{after.mesh}, {after.temperature_K:g} K",
        )
    known = {point.name: point for point in before.compared(cell)}
    pairs = [(known[p.name], p) for p in after.compared(cell) if p.name in known]
    for old, new in pairs:
        if not _same(old.reference, new.reference):
            raise InputError("the baseline has another reference", where=str(before.folder), found=new.name)
    old_errors, new_errors = (_errors(pair[k] for pair in pairs) for k in (0, 1))
    return paired_reduction(old_errors, new_errors), len(pairs)


def _same(one: Mapping[str, float] | None, other: Mapping[str, float] | None) -> bool:
    if one is None or other is None:
        return False
    return all(abs(one[q.key] - other[q.key]) < _SAME for q in QUANTITIES)


def _errors(points: Iterable[PhononPoint]) -> torch.Tensor:
    rows = [[point.error(q) for q in QUANTITIES] for point in points]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(QUANTITIES))


def _errors_json(points: Sequence[PhononPoint]) -> dict[str, Any]:
    errors = {q.key: mean_absolute_error(points, q) for q in QUANTITIES}
    unstable = sum(point.properties["imaginary"] > 0 for point in points)
    shares = [point.properties["imaginary"] for point in points]
    found = {
        key: {"value": error.value, "se": error.se if len(points) > 1 else None, "unit": error.unit}
        for key, error in errors.items()
    }
    return {
        "materials": len(points),
        **found,
        "unstable": unstable,
        "imaginary": sum(shares) / len(shares),
    }
