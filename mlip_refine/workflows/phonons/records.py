"""Results of `mlip-refine phonons`, their file `phonons.json`, and comparison of two potentials."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import quote

import torch

from mlip_refine.crystals.symmetry import CrystalLattice
from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.quantities import Measured
from mlip_refine.statistics import Reduction, paired_reduction
from mlip_refine.workflows.records import MeasuredField, Record, read_record

FORMAT: Final = "mlip_refine phonons 1"

_SAME = 1e-6
"""Largest difference between values of one reference."""


class Quantity(NamedTuple):
    """A quantity that is compared with references.

    Attributes:
        key: Key of `PhononPoint.properties`.
        symbol: Name in tables.
        title: Name in figures.
        unit: Unit of its values; per mole of primitive cells where there is a mole.
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
        name: Name of the material or phase.
        cell: `reference`, or `relaxed`: at rest by the model.
        formula: Reduced formula.
        n_primitive: Atoms of the primitive cell, which entropies and the like are of; beside a reference that
            of the reference.
        n_atoms: Atoms of the supercell.
        volume_A3_per_atom: Volume of this cell.
        properties: Properties by the potential, per primitive cell: the fields of `PhononProperties`.
        reference: Properties by the reference calculation, in its own cell; None without one.
        frequency_error_THz: Mean absolute error of the frequencies on the mesh; None without a reference, or
            where the relaxed cell has another symmetry.
        reference_volume_A3_per_atom: Volume of the reference's cell; None without a reference.
        band_error_THz: Mean absolute error of bands along lines of high symmetry; None without them.
        gruneisen: Mode Grüneisen parameters, as `Gruneisen.as_json` has them.
        quasi_harmonic: Thermal expansion, as `QuasiHarmonicResult.as_json` has it.
        conductivity: `temperatures_K`, `kappa_W_m_K` `[n_T, 3, 3]`, `mean_W_m_K`, `mesh`, `isotopes`.
        refused: Reasons why there is no expansion and the like, by name.
        material: Material of the crystal, by the data: one material may have several; None for a phase.
        method_difference: Largest difference between force constants by both methods, over the largest; None
            when there is one method.
        given: Space group and lattice constants before relaxation; None in files of versions without it.
        lattice: The same of the crystal whose phonons these are.
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
    given: CrystalLattice | None = None
    lattice: CrystalLattice | None = None

    def error(self, quantity: Quantity) -> float:
        """Return the absolute error of a quantity; NaN without a reference."""
        wanted = math.nan if self.reference is None else self.reference[quantity.key]
        return abs(self.properties[quantity.key] - wanted)


class PhononErrors(Record):
    """Mean absolute errors over the materials in one kind of cell.

    Attributes:
        materials: Number of materials.
        max_THz: Error of the largest frequency.
        entropy_J_K_mol: Error of the entropy.
        free_energy_kJ_mol: Error of the free energy.
        heat_capacity_J_K_mol: Error of the heat capacity.
        unstable: Number of crystals with imaginary modes.
        imaginary: Mean share of modes that are imaginary.
    """

    materials: int
    max_THz: MeasuredField  # noqa: N815 - the unit's own case
    entropy_J_K_mol: MeasuredField  # noqa: N815 - the unit's own case
    free_energy_kJ_mol: MeasuredField  # noqa: N815 - the unit's own case
    heat_capacity_J_K_mol: MeasuredField  # noqa: N815 - the unit's own case
    unstable: int
    imaginary: float


class _PhononsFile(Record):
    """Content of `phonons.json`."""

    format: Literal["mlip_refine phonons 1"] = FORMAT
    name: str
    model_hash: str
    head: str | None = None
    mesh: tuple[int, int, int]
    temperature_K: float  # noqa: N815 - the unit's own case
    points: tuple[PhononPoint, ...]
    mean_absolute_errors: dict[str, PhononErrors] = {}  # noqa: RUF012 - pydantic copies it
    baseline: dict[str, Any] | None = None
    left_out: dict[str, str]


@dataclass(frozen=True)
class PhononResult:
    """Phonons of all crystals.

    Attributes:
        folder: The run folder.
        name: Name of the run.
        model_hash: Hash of the potential.
        mesh: Points along each reciprocal vector.
        temperature_K: Temperature of thermodynamic functions.
        points: Phonons of every crystal.
        left_out: Reasons why materials were left out, by name.
        baseline: Reduction of the errors, as `compared_with` returns it; None without a baseline.
        head: Head of the model that was evaluated; `None` in files of earlier versions.
    """

    folder: Path
    name: str
    model_hash: str
    mesh: tuple[int, int, int]
    temperature_K: float  # noqa: N815 - the unit's own case
    points: tuple[PhononPoint, ...]
    left_out: Mapping[str, str]
    baseline: Mapping[str, Any] | None = None
    head: str | None = None

    def compared(self, cell: str) -> list[PhononPoint]:
        """Return the points with a reference, in one kind of cell."""
        return [point for point in self.points if point.cell == cell and point.reference is not None]

    @property
    def cells(self) -> list[str]:
        """Kinds of cells with points that have a reference."""
        return list(dict.fromkeys(p.cell for p in self.points if p.reference is not None))

    def to_json(self) -> dict[str, Any]:
        """Return the content of `phonons.json`."""
        return self.as_json()

    def files(self) -> dict[str, Any]:
        """Return the JSON files of the run folder by name."""
        return {"phonons.json": self.as_json()}

    def as_json(self) -> dict[str, Any]:
        """Return the content of `phonons.json`."""
        return _PhononsFile(
            name=self.name,
            model_hash=self.model_hash,
            head=self.head,
            mesh=self.mesh,
            temperature_K=self.temperature_K,
            points=self.points,
            mean_absolute_errors={cell: mean_absolute_errors(self.compared(cell)) for cell in self.cells},
            baseline=None if self.baseline is None else dict(self.baseline),
            left_out=dict(self.left_out),
        ).as_json()


_LONGEST = 150
"""Characters of a name that file names have in full."""


def file_of_crystal(folder: Path, name: str, cell: str, suffix: str) -> Path:
    """Return a file of one crystal in one cell; names of materials may hold what file names may not.

    Args:
        folder: Folder of the file.
        name: Name of the material or phase.
        cell: `reference` or `relaxed`.
        suffix: End of the file's name, such as `.json`.
    """
    quoted = quote(name, safe="")
    if len(quoted) > _LONGEST:
        # File systems allow 255 bytes.
        quoted = f"{quoted[:_LONGEST]}-{sha256(name.encode()).hexdigest()[:16]}"
    return folder / f"{quoted}-{cell}{suffix}"


def read_phonons_json(path: Path) -> PhononResult:
    """Read the result of a run.

    Args:
        path: `phonons.json`, or its folder.

    Raises:
        InputError: The file is missing, or is no result of phonons.
    """
    path = path / "phonons.json" if path.is_dir() else path
    data = read_record(path, _PhononsFile, "result of phonons")
    return PhononResult(
        path.parent,
        data.name,
        data.model_hash,
        data.mesh,
        data.temperature_K,
        data.points,
        data.left_out,
        data.baseline,
        data.head,
    )


def materials_of(points: Sequence[PhononPoint]) -> list[str]:
    """Return the material of every point."""
    return [point.material or point.name for point in points]


def errors_of_materials(points: Sequence[PhononPoint], materials: Sequence[str]) -> torch.Tensor:
    """Return absolute errors of `QUANTITIES`, means over the points of one material `[n_materials, 4]`.

    Args:
        points: Points with references.
        materials: Material of every point.
    """
    index = {name: k for k, name in enumerate(dict.fromkeys(materials))}
    owners = torch.tensor([index[name] for name in materials], dtype=torch.long)
    errors = torch.tensor([[p.error(q) for q in QUANTITIES] for p in points], dtype=torch.float64)
    sums = torch.zeros(len(index), len(QUANTITIES), dtype=torch.float64)
    sums.index_add_(0, owners, errors.reshape(-1, len(QUANTITIES)))
    return sums / owners.bincount(minlength=len(index))[:, None]


def mean_absolute_error(points: Sequence[PhononPoint], quantity: Quantity) -> Measured:
    """Return the mean over materials, with its standard error from their spread."""
    errors = errors_of_materials(points, materials_of(points))[:, QUANTITIES.index(quantity)]
    spread = float(errors.std() / len(errors) ** 0.5) if len(errors) > 1 else float("nan")
    return Measured(float(errors.mean()), spread, quantity.unit)


def mean_absolute_errors(points: Sequence[PhononPoint]) -> PhononErrors:
    """Return the mean absolute errors of points with references."""
    shares = [point.properties["imaginary"] for point in points]
    return PhononErrors(
        materials=len(set(materials_of(points))),
        **{q.key: mean_absolute_error(points, q) for q in QUANTITIES},
        unstable=sum(share > 0 for share in shares),
        imaginary=sum(shares) / len(shares),
    )


def require_comparable(before: PhononResult, mesh: tuple[int, int, int], temperature: float) -> None:
    """Refuse a baseline with another mesh or temperature.

    Args:
        before: Result of the baseline.
        mesh: Points along each reciprocal vector.
        temperature: Temperature, K.

    Raises:
        InputError: Mesh or temperature differ.
    """
    if (before.mesh, before.temperature_K) != (mesh, temperature):
        raise InputError(
            "the baseline has another mesh or temperature",
            where=str(before.folder),
            found=f"{before.mesh}, {before.temperature_K:g} K",
            expected=f"{mesh}, {temperature:g} K",
        )


def reduction(before: PhononResult, after: PhononResult, cell: str) -> tuple[Reduction, int]:
    """Return the share by which errors of ω_max, S, F and C_V became smaller, on the common materials.

    Args:
        before: Result of one potential.
        after: Result of another one, with the same mesh and temperature.
        cell: Kind of cell.

    Returns:
        The reduction, and the number of materials; points of one material count as one.

    Raises:
        InputError: Mesh or temperature differ, or the references of a material do.
        StatisticsError: There are too few materials in both.
    """
    require_comparable(before, after.mesh, after.temperature_K)
    pairs = _pairs(before, after, cell)
    for old, new in pairs:
        theirs, ours = old.reference or {}, new.reference or {}
        if any(not abs(theirs[q.key] - ours[q.key]) < _SAME for q in QUANTITIES):
            raise InputError("the baseline has another reference", where=str(before.folder), found=new.name)
    materials = materials_of([new for _, new in pairs])
    old_errors, new_errors = (errors_of_materials([pair[k] for pair in pairs], materials) for k in (0, 1))
    return paired_reduction(old_errors, new_errors), len(old_errors)


def compared_with(before: PhononResult, after: PhononResult) -> dict[str, Any]:
    """Return plain data of the reduction in every kind of cell, or the reason why there is none.

    Args:
        before: Result of the baseline.
        after: Result of another potential.

    Returns:
        `name` and `model_hash` of the baseline, and `cells`: by kind `materials`, their number, with `value`,
        `low` and `high` of the mean reduction and `of_quantities`, the three of each; or with `refused`.
    """
    cells: dict[str, dict[str, Any]] = {}
    for cell in after.cells:
        try:
            found, n = reduction(before, after, cell)
        except MlipRefineError as error:
            common = [new for _, new in _pairs(before, after, cell)]
            cells[cell] = {"materials": len(set(materials_of(common))), "refused": str(error)}
            continue
        ends = zip(QUANTITIES, found.of_quantities, strict=True)
        cells[cell] = {
            "materials": n,
            "value": found.value,
            "low": found.low,
            "high": found.high,
            "of_quantities": {quantity.key: list(three) for quantity, three in ends},
        }
    return {"name": before.name, "model_hash": before.model_hash, "cells": cells}


def _pairs(before: PhononResult, after: PhononResult, cell: str) -> list[tuple[PhononPoint, PhononPoint]]:
    """Return the points of both results with the same name."""
    known = {point.name: point for point in before.compared(cell)}
    return [(known[p.name], p) for p in after.compared(cell) if p.name in known]
