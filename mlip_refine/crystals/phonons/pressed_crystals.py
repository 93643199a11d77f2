"""Crystals at rest under pressures: what changes of volume and shape do to vibrations."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.cell import Cell
from numpy.typing import NDArray
from phonopy import Phonopy

from mlip_refine.crystals.elasticity import static_elasticity
from mlip_refine.crystals.moduli import reuss_average
from mlip_refine.crystals.phonons.harmonic import DISPLACEMENT, HarmonicCrystal, Method
from mlip_refine.crystals.relaxation import Rest
from mlip_refine.crystals.symmetry import TOLERANCE, symmetry_dataset
from mlip_refine.errors import StatisticsError
from mlip_refine.potential import Potential
from mlip_refine.quantities import GPA

type Floats = NDArray[np.float64]

_SAME = 1e-6
"""Lengths, relative, and angles, degrees, that differ by less in every cell are the same."""

_STIFFENING = 4.0
"""Derivative of the bulk modulus in the pressure, as most crystals have it."""


@dataclass(frozen=True, eq=False)
class PressedCrystal:
    """A crystal at rest under a pressure, with its energy and its vibrations.

    Attributes:
        crystal: At rest.
        pressure: GPa.
        energy: Of its primitive cell without vibrations, eV.
        phonon: With force constants.
    """

    crystal: HarmonicCrystal
    pressure: float
    energy: float
    phonon: Phonopy


def pressed_crystals(
    potential: Potential,
    crystal: HarmonicCrystal,
    pressures: Sequence[float],
    method: Method = "hessian",
    displacement: float = DISPLACEMENT,
) -> tuple[PressedCrystal, ...]:
    """A crystal at rest under pressures, the largest pressure first.

    Args:
        potential: In float64.
        crystal: To start from.
        pressures: GPa; below zero for larger volumes.
        method: Of the force constants.
        displacement: Of one atom where these are differences, Å.

    Raises:
        InputError: The potential is in single precision, or does not know an element.
        MlipRefineError: A crystal does not come to rest, or memory runs out for a single system.
    """
    done: list[PressedCrystal] = []
    for pressure in sorted(set(pressures), key=abs):
        near = min(done, key=lambda one: abs(one.pressure - pressure)).crystal if done else crystal
        rest = near.at_rest(potential, Rest("cell", pressure))
        energy = float(potential.energies([potential.graphs.from_atoms(rest.primitive)])[0])
        phonon = rest.phonopy(rest.force_constants(potential, method, displacement))
        done.append(PressedCrystal(rest, pressure, energy, phonon))
    return tuple(sorted(done, key=lambda one: -one.pressure))


def pressures_of_volumes(
    potential: Potential, crystal: HarmonicCrystal, ratios: Sequence[float], pressure: float = 0.0
) -> tuple[float, ...]:
    """Pressures under which a crystal has about some volumes, GPa.

    Murnaghan's P = (B/B')[(V₀/V)^B' - 1] with B' = 4 (Proc. Natl. Acad. Sci. 30, 244, 1944).

    Args:
        potential: In float64.
        crystal: At rest under the pressure.
        ratios: Volumes over the one of the crystal.
        pressure: Of the crystal, GPa.

    Raises:
        InputError: The potential is in single precision, or does not know an element.
        StatisticsError: The crystal does not resist pressure.
        MlipRefineError: The crystal does not come to rest.
    """
    bulk = _bulk_modulus(potential, crystal, pressure)
    return tuple(pressure + bulk / _STIFFENING * (ratio**-_STIFFENING - 1) for ratio in ratios)


def lattice_constants(crystals: Sequence[HarmonicCrystal]) -> dict[str, Floats]:
    """Constants of the conventional unit cell of one crystal in several sizes.

    Args:
        crystals: Whose lattice vectors correspond.

    Returns:
        By name, of every crystal `[n]`: lengths a, b, c, Å, equal ones only once, and the angles alpha, beta,
        gamma, degrees, that are not the same in all.
    """
    cells = [one.primitive for one in crystals]
    first = cells[0]
    crystal = (first.cell.array, first.get_scaled_positions(), first.numbers)
    # One setting for all: a monoclinic or triclinic cell could change it from one volume to the next.
    setting = np.linalg.inv(symmetry_dataset(crystal, TOLERANCE).transformation_matrix).T
    constants = np.array([Cell(setting @ cell.cell.array).cellpar() for cell in cells])
    lengths, angles = constants[:, :3], constants[:, 3:]
    found = {
        name: lengths[:, i]
        for i, name in enumerate("abc")
        if not any(np.allclose(lengths[:, i], lengths[:, j], rtol=_SAME, atol=0) for j in range(i))
    }
    names = enumerate(("alpha", "beta", "gamma"))
    return found | {name: angles[:, i] for i, name in names if np.ptp(angles[:, i]) > _SAME}


def _bulk_modulus(potential: Potential, crystal: HarmonicCrystal, pressure: float) -> float:
    """-V ∂P/∂V with the shape free: Reuss's average of the stress-strain coefficients, GPa."""
    elastic = static_elasticity(potential, crystal.primitive, Rest("cell", pressure))
    bulk = float(reuss_average(elastic.coefficients).bulk) / GPA
    if bulk <= 0:
        raise StatisticsError(
            f"the crystal does not resist pressure: its bulk modulus is {bulk:.3g} GPa",
            needed="a crystal that is stable under strain",
        )
    return bulk
