"""The section ``phases``: the crystals and liquids of a run, by name."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mlip_refine.config.section import Count, Section
from mlip_refine.config.units import Length, Temperature, Time, problem
from mlip_refine.errors import nearest

CellFreedom = Literal["isotropic", "hexagonal", "anisotropic", "triclinic", "fixed"]
PhaseIdentity = Literal["structure", "sites", "liquid", "none"]

Prototype = Literal["hcp", "bcc", "fcc", "diamond", "sc"]

ATOMS_PER_CELL: dict[str, int] = {"hcp": 2, "bcc": 2, "fcc": 4, "diamond": 8, "sc": 1}
"""Atoms of the cell that is repeated: the primitive cell of hcp, the cubic cells of the others."""

IDEAL_C_OVER_A = (8 / 3) ** 0.5
"""c/a of hcp-packed spheres."""

_KEYS_OF = {
    "prototype": ("element", "a", "c", "n_atoms"),
    "file": ("supercell", "format"),
    "melt": (),
}
"""What a phase may come from, and the keys that go with each."""


def _known_element(value: object) -> object:
    from ase.data import chemical_symbols

    if isinstance(value, str) and value not in chemical_symbols[1:]:
        word = nearest(value, chemical_symbols[1:])
        raise problem("the symbol of an element", f"Did you mean {word!r}?" if word else "")
    return value


def _default_freedom(data: dict[str, Any]) -> CellFreedom:
    return "anisotropic" if data.get("prototype") == "hcp" else "isotropic"


def _default_identity(data: dict[str, Any]) -> PhaseIdentity:
    return "structure" if data.get("melt") is None else "liquid"


def _reference_volume(reference: dict[str, Any]) -> float:
    """Volume per atom of ASE's reference state of an element, Å³."""
    symmetry, a = reference.get("symmetry"), reference.get("a")
    if a is not None and symmetry == "hcp":
        return float(3**0.5 / 4 * reference.get("c/a", IDEAL_C_OVER_A) * a**3)
    if a is None or symmetry not in ATOMS_PER_CELL:
        raise problem("a length: ASE has no simple crystal of this element to take it from", key="a")
    return float(a**3 / ATOMS_PER_CELL[symmetry])


class Melt(Section):
    """A liquid that is made by melting a crystal of the same config."""

    from_: str = Field(
        alias="from", description="Phase whose crystal is melted: its atoms and starting cell."
    )
    temperature: Temperature = Field(
        description="Temperature at which it melts, K: well above the melting point of the potential."
    )
    duration: Time = Field(
        6000.0,
        description="Time at that temperature, and again at that of the state, both at its pressure, fs.",
    )


class Phase(Section):
    """A crystal, a prototype with an element or a structure file; or a liquid, molten or from a file."""

    prototype: Prototype | None = Field(
        None, description="Crystal to build; needs element and n_atoms. Otherwise give file or melt."
    )
    element: Annotated[str, BeforeValidator(_known_element)] | None = Field(
        None, description="Chemical symbol, for a prototype."
    )
    n_atoms: Count | None = Field(
        None,
        description="Atoms in the cell, for a prototype; phases that are compared need equal numbers, unless "
        "free_energy.finite_size is limit.",
    )
    a: Length | None = Field(
        None,
        description="Lattice constant to start from, Å; null keeps the volume of ASE's reference state.",
    )
    c: Length | None = Field(
        None, description="Second lattice constant of hcp to start from, Å; null: from a."
    )
    file: str | None = Field(
        None, min_length=1, description="Structure file that ASE can read, with a periodic cell."
    )
    supercell: Annotated[tuple[Count, Count, Count], Field(strict=False)] = Field(
        (1, 1, 1), description="Repetitions of the file's cell along its three vectors."
    )
    format: str | None = Field(
        None, description="ASE's name of the file's format; null: from the file's name."
    )
    melt: Melt | None = Field(None, description="Crystal that is melted into this liquid, and how.")
    cell_freedom: CellFreedom = Field(
        default_factory=_default_freedom,
        description="How the cell follows the pressure: one scale (isotropic), x with y and z by itself "
        "(hexagonal), every axis by itself (anisotropic), lengths and angles (triclinic), or not at all "
        "(fixed). Default: anisotropic for hcp, else isotropic.",
    )
    identity: PhaseIdentity = Field(
        default_factory=_default_identity,
        description="What makes a system this phase: its structure, the very sites of the ideal crystal, "
        "that it is liquid (no crystal; needs ovito), or nothing (none: it is not judged). Default: liquid "
        "for melt, else structure.",
    )

    @property
    def lattice(self) -> tuple[float, float | None]:
        """Lattice constants (a, c) to build a prototype with, Å; c is None unless hcp.

        What the config leaves open follows the atomic volume of ASE's reference state of the element
        and, for hcp, its c/a where the reference is hexagonal too, else the ideal one.
        """
        if self.prototype is None or self.element is None:
            raise problem("a prototype and its element: a file has its own lattice")
        from ase.data import atomic_numbers, reference_states

        reference: dict[str, Any] = reference_states[atomic_numbers[self.element]] or {}
        ratio = float(reference.get("c/a", IDEAL_C_OVER_A))
        if self.prototype == "hcp":
            a = self.a or float((_reference_volume(reference) * 4 / (3**0.5 * ratio)) ** (1 / 3))
            return a, self.c or ratio * a
        n_sites = ATOMS_PER_CELL[self.prototype]
        return self.a or float((_reference_volume(reference) * n_sites) ** (1 / 3)), None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        origins = [name for name in _KEYS_OF if getattr(self, name) is not None]
        if len(origins) != 1:
            raise problem("one of prototype (with element and n_atoms), file and melt")
        for key in (key for name in _KEYS_OF if name not in origins for key in _KEYS_OF[name]):
            if key in self.model_fields_set and getattr(self, key) not in (None, (1, 1, 1)):
                raise problem(f"no key {key!r} in a phase that is given by its {origins[0]}", key=key)
        if self.melt is not None and self.identity in ("structure", "sites"):
            raise problem(
                "liquid or none for a phase that is molten", "Leave it out: it is liquid.", "identity"
            )
        if self.melt is not None and self.cell_freedom not in ("isotropic", "fixed"):
            raise problem(
                "isotropic or fixed: a liquid does not resist a change of shape", key="cell_freedom"
            )
        if self.prototype is None:
            return self
        missing = [key for key in ("element", "n_atoms") if getattr(self, key) is None]
        if missing:
            raise problem(f"{' and '.join(missing)} beside prototype")
        if self.c is not None and self.prototype != "hcp":
            raise problem(f"no key 'c' for the cubic prototype {self.prototype!r}", key="c")
        if self.a is None:
            _ = self.lattice  # refuses elements without a lattice constant to start from
        return self
