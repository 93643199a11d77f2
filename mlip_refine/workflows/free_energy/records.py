"""The file of a free-energy difference: `free-energy` writes it, and losses read it as `initial:`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from mlip_refine.errors import InputError
from mlip_refine.files import require_regular
from mlip_refine.quantities import Measured
from mlip_refine.workflows.records import MeasuredField, Record, validated, write_record

FORMAT: Final = "mlip_refine free energies 2"
FORMAT_1 = "mlip_refine free energies 1"
CELLS: Final = "cells of N atoms"
"""Convention of a difference of cells as they are: G = F + PV of N atoms in a periodic cell, whose centre of
mass moves in V/N (Freitas, Asta and de Koning 2016)."""

LIMIT: Final = "thermodynamic limit"
"""Convention of a difference of large systems: the finite-size term of each cell is subtracted."""

EARLIER_CELLS = "G = F + PV of the whole cell, centre of mass in V/N (Freitas, Asta and de Koning 2016)"
"""What files said of `CELLS` before there was another convention."""


def _energy(measured: Measured) -> Measured:
    """Let free energies through that are numbers with an error, in meV/atom."""
    if not (abs(measured.value) < _LARGEST and 0 <= measured.se < _LARGEST and measured.unit == "meV/atom"):
        raise ValueError(
            f"{measured.value:g} ± {measured.se:g} {measured.unit} is no free energy in meV/atom"
        )
    return measured


_LARGEST = 1e12
"""Size that no free energy has, meV/atom."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Vector = Annotated[list[Finite], Field(min_length=3, max_length=3)]
EnergyField = Annotated[MeasuredField, AfterValidator(_energy)]
"""A free energy with its error, meV/atom."""


class LiquidReference(Record):
    """The Uhlenbeck-Ford fluid that a liquid was joined to.

    Attributes:
        strength: Strength p.
        sigma_A: Lengths σ `[n_species, n_species]`, in the order of the atomic numbers.
        packing: Reduced density x = ½ ρ (πσ²)^(3/2).
        dissipation_kT_per_atom: Dissipation of the path from liquid to fluid in one step.
        windows: Values of λ from the potential (0) to the fluid (1).
        closest_A: Shortest distance between two atoms in every window.
        closest_in_liquid_A: The same in the liquid.
        excess: Free energy of the fluid beyond that of the ideal gas, meV/atom.
        strengths: Windows of the fluid's own ladder from the ideal gas.
    """

    strength: Finite
    sigma_A: list[list[Finite]]  # noqa: N815 - the unit's own case
    packing: Finite
    dissipation_kT_per_atom: Finite  # noqa: N815
    windows: list[Finite]
    closest_A: list[Finite]  # noqa: N815
    closest_in_liquid_A: Finite  # noqa: N815
    excess: EnergyField
    strengths: list[Finite]


class PhaseFreeEnergy(Record):
    """Absolute free energy of one phase in its cell.

    Attributes:
        phase: Name of the phase in the config.
        numbers: Atomic numbers `[n_atoms]`.
        kind: Kind of the phase, `crystal` or `liquid`.
        scaled_positions: Lattice sites `[n_atoms, 3]`, in lattice vectors; of a liquid, a frame.
        cell: Cell at the wanted pressure, rows in Å.
        gibbs: G = F + PV by the convention of the result, meV/atom.
        overlap: Smallest overlap between neighbouring windows.
        size_term: Finite-size term kT δ_N/N of the cell, meV/atom, which `gibbs` does not contain in the
            thermodynamic limit; `None` where it was not computed, in cells of N atoms. Its error is that of
            the sampling: what the harmonic crystal or the compressibility leave out is not in it.
        liquid: What a liquid was joined to.
    """

    phase: str
    kind: Literal["crystal", "liquid"] = "crystal"
    numbers: list[Annotated[int, Field(ge=1, le=118)]] = Field(min_length=1)
    scaled_positions: list[Vector]
    cell: Annotated[list[Vector], Field(min_length=3, max_length=3)]
    gibbs: EnergyField
    overlap: Finite
    size_term: EnergyField | None = None
    liquid: LiquidReference | None = None

    @model_validator(mode="after")
    def _a_site_for_every_atom(self) -> Self:
        if len(self.scaled_positions) != len(self.numbers):
            raise ValueError(f"{len(self.scaled_positions)} sites of {len(self.numbers)} atoms")
        return self


class FreeEnergyResult(Record):
    """ΔG = G_to - G_from of one model at one state.

    Attributes:
        format: Name and version of the format.
        model_hash: Hash of the model.
        head: Head of the model.
        temperature_K: Temperature.
        pressure_GPa: Pressure.
        n_atoms: Atoms of the cell of phase I.
        delta_g: The difference, meV/atom.
        from_: Phase I.
        to: Phase II.
        timestep_fs: Time step of the dynamics.
        settings: How it was computed.
        convention: What G is of: `CELLS` or `LIMIT`.
    """

    format: Literal["mlip_refine free energies 2"] = FORMAT
    model_hash: str
    head: str
    temperature_K: Annotated[Finite, Field(gt=0)]  # noqa: N815 - the unit's own case
    pressure_GPa: Finite  # noqa: N815 - the unit's own case
    n_atoms: int = Field(ge=1)
    delta_g: EnergyField
    from_: PhaseFreeEnergy = Field(alias="from")
    to: PhaseFreeEnergy
    timestep_fs: Annotated[Finite, Field(gt=0)]
    settings: dict[str, Any]
    convention: str = CELLS

    @property
    def size(self) -> str:
        """The cells in words (see `size_in_words`)."""
        return size_in_words(self.convention, len(self.from_.numbers), len(self.to.numbers))

    def write(self, path: Path) -> None:
        """Write the result as JSON, atomically."""
        write_record(path, self)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a result file, also of the first format, and of a time when there was one convention.

        Raises:
            InputError: If the file is missing or is not one.
        """
        try:
            data = json.loads(require_regular(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            problem = "the free-energy file cannot be read"
            raise InputError(problem, where=str(path), found=str(error)) from error
        known = data.get("format") if isinstance(data, dict) else None
        if known not in (FORMAT, FORMAT_1):
            raise InputError("this is not a free-energy file", where=str(path), expected=f"format: {FORMAT}")
        if known == FORMAT_1:
            # Units stood in the names of measured numbers, and their errors beside them.
            data["format"] = FORMAT
            for entry, name in ((data, "delta_g"), (data.get("from"), "gibbs"), (data.get("to"), "gibbs")):
                keys = f"{name}_mev_per_atom", f"{name}_se"
                if isinstance(entry, dict) and all(key in entry for key in keys):
                    value, se = (entry.pop(key) for key in keys)
                    entry[name] = {"value": value, "se": se, "unit": "meV/atom"}
        if data.get("convention") == EARLIER_CELLS:
            data["convention"] = CELLS
        return validated(cls, data, str(path), "free-energy file")


def size_in_words(convention: str, n_from: int, n_to: int) -> str:
    """Return what a difference is of: `N = 54`, or `N → ∞ (from 54 and 128)`.

    Args:
        convention: Its convention, `CELLS` or `LIMIT`.
        n_from: Atoms of the cell of phase I.
        n_to: Atoms of the cell of phase II.
    """
    sizes = f"{n_from}" if n_from == n_to else f"{n_from} and {n_to}"
    return f"N → ∞ (from {sizes})" if convention == LIMIT else f"N = {sizes}"


@dataclass(frozen=True)
class FreeEnergies:
    """Differences of a run of `free-energy`.

    Attributes:
        folder: The run folder.
        results: The differences by name of the loss.
    """

    folder: Path
    results: dict[str, FreeEnergyResult]

    def to_json(self) -> dict[str, Any]:
        """Return the differences by name of the loss."""
        return {name: result.as_json() for name, result in self.results.items()}

    def files(self) -> dict[str, Any]:
        """Return the JSON files of the run folder by name."""
        return {f"initial-{name}.json": result.as_json() for name, result in self.results.items()}
