"""The crystals of `mlip-refine phonons`: phases of the config, and materials that have a reference."""

from dataclasses import dataclass

import numpy as np

from mlip_refine.config import Config
from mlip_refine.crystals.phonons.harmonic import HarmonicCrystal
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.crystals.symmetry import primitive_cell, supercell_matrix
from mlip_refine.data.phonons.collections import calculation_names, read_phonon_set, second_order
from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.errors import InputError, nearest
from mlip_refine.workflows.from_config import crystal
from mlip_refine.workflows.phonons import chosen_phases

MOST_ATOMS = 10_000
"""Atoms of a supercell: the force constants of more, `[3N, 3N]`, are beyond the memory of most machines."""


@dataclass(frozen=True)
class Task:
    """One crystal in one kind of cell.

    Attributes:
        name: Name of the phase or material.
        cell: `reference` or `relaxed`.
        crystal: Crystal in a supercell, before relaxation.
        rest: Conditions of its relaxation by the model; None where it stays as it is.
        reference: Reference calculation to compare with; None for a phase.
    """

    name: str
    cell: str
    crystal: HarmonicCrystal
    rest: Rest | None
    reference: PhononReference | None = None

    @property
    def title(self) -> str:
        """Name in messages."""
        return f"{self.name} ({self.cell})"


def phonon_tasks(config: Config) -> tuple[list[Task], dict[str, str]]:
    """Return the crystals to compute, and by name the reasons why materials that cannot be read are left out.

    Raises:
        InputError: A phase or material is unknown, of two kinds at once, or cannot be read; or there is none.
    """
    section, left_out = config.phonons, dict[str, str]()
    tasks = []
    for name in chosen_phases(config):
        primitive = primitive_cell(crystal(config, name))
        matrix = supercell_matrix(primitive, section.supercell)
        n_atoms = round(abs(np.linalg.det(np.asarray(matrix, dtype=float)))) * len(primitive)
        if n_atoms > MOST_ATOMS:
            raise InputError(
                f"the supercell of {name} is too large for force constants",
                where=config.where("phonons", "supercell") or config.where("phonons"),
                found=f"{section.supercell:g} Å, {n_atoms:,} atoms",
                expected=f"at most {MOST_ATOMS:,} atoms",
            )
        harmonic = HarmonicCrystal.of_cell(primitive, matrix)
        held = config.phases[name].cell_freedom == "fixed"
        tasks.append(Task(name, "relaxed", harmonic, Rest("atoms" if held else "cell")))
    for name, reference in _references(config, left_out).items():
        for cell in section.cell:
            rest = Rest("cell") if cell == "relaxed" else None
            tasks.append(Task(name, cell, HarmonicCrystal.of_reference(reference), rest, reference))
    if not tasks:
        found = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise InputError(
            "there is nothing to do: no phases, no data", where=config.where("phonons"), found=found or None
        )
    names = [(task.name, task.cell) for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            "a phase and a material have one name", where=config.where("phonons"), found=twice[0]
        )
    return tasks, left_out


def _references(config: Config, left_out: dict[str, str]) -> dict[str, PhononReference]:
    """Return the references that the config asks for by name, in the order in which it names them.

    Materials that cannot be read are added to `left_out` where the config allows that.
    """
    section = config.phonons

    def leave_out(name: str, error: InputError) -> None:
        if section.materials is None or name in section.materials:
            left_out[name] = str(error)

    known: dict[str, PhononReference] = {}
    for path in map(config.resolve, section.data or ()):
        found = read_phonon_set(
            path,
            split=section.split,
            lowest_frequency=section.lowest_frequency,
            names=section.materials,
            skip_refused=leave_out if section.skip_refused else False,
        )
        for reference in second_order(found) if section.materials is None else found:
            if reference.name in known:
                raise InputError("a material comes twice", where=str(path), found=reference.name)
            known[reference.name] = reference
    wanted = [name for name in section.materials or known if name not in left_out]
    missing = next((name for name in wanted if name not in known), None)
    if missing is None:
        return {name: known[name] for name in wanted}
    where = config.where("phonons", "materials")
    names = [name for path in section.data or () for name in calculation_names(config.resolve(path))]
    if missing in names:
        raise InputError(
            f"the material {missing!r} is not in the part of the data that is asked for",
            where=where,
            found=f"split {section.split}, lowest_frequency {section.lowest_frequency}",
        )
    word = nearest(missing, names)
    raise InputError(
        f"the data has no material {missing!r}",
        where=where,
        expected=f"one of {len(names)} names",
        fix=f"Did you mean {word!r}?" if word else None,
    )
