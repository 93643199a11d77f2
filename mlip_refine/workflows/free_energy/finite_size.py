"""Free energies of cells and of large systems: which of them a difference is of, and what lies between.

The free energy of N atoms in a periodic cell is F(N) = N f∞ + kT δ_N. For a crystal δ_N = -½ ln N + c
(`mlip_refine.crystals.phonons.size_limit`), for a liquid it is ½ ln(2πN S₀): the two have opposite signs, and
only between crystals of equal N do they cancel, and only in part.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from mlip_refine.config import FiniteSize
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.losses import EnsembleSource, FreeEnergyDifference
from mlip_refine.quantities import GPA, KB, Measured
from mlip_refine.sampling import StatePoint
from mlip_refine.workflows.free_energy.records import CELLS, LIMIT


def convention_of(
    loss: FreeEnergyDifference,
    points: Mapping[EnsembleSource, StatePoint],
    finite_size: FiniteSize | None,
) -> str:
    """Return the convention of a difference, `LIMIT` or `CELLS`.

    Args:
        loss: The difference.
        points: State points of its sources.
        finite_size: What the config says; `None`: `limit` where a phase is a liquid, else `cells`.
    """
    return _convention([points[source] for source in loss.sources], finite_size)


def _convention(points: Iterable[StatePoint], finite_size: FiniteSize | None) -> str:
    if finite_size is None:
        finite_size = "limit" if any(point.is_liquid for point in points) else "cells"
    return LIMIT if finite_size == "limit" else CELLS


def require_comparable(
    loss: FreeEnergyDifference,
    points: Mapping[EnsembleSource, StatePoint],
    finite_size: FiniteSize | None,
) -> None:
    """Refuse phases whose difference per atom means nothing.

    Args:
        loss: The difference.
        points: State points of its sources.
        finite_size: What the config says (see `convention_of`).

    Raises:
        InputError: For phases of different composition; and for cells of different size, unless the
            difference is that of the thermodynamic limit.
    """
    one, two = (points[source] for source in loss.sources)
    compared(one, two, finite_size, f"loss {loss.name!r}", None)


def compared(
    one: StatePoint, two: StatePoint, finite_size: FiniteSize | None, who: str, where: str | None
) -> str:
    """Return the convention in which two phases are compared.

    Args:
        one: State point of phase I.
        two: State point of phase II.
        finite_size: What the config says (see `convention_of`).
        who: What compares them, for messages.
        where: Its place in the config.

    Raises:
        InputError: For phases of different composition; and for cells of different size, unless the
            difference is that of the thermodynamic limit.
    """
    formulas = [point.atoms.symbols.formula.reduce()[0].format("hill") for point in (one, two)]
    if formulas[0] != formulas[1]:
        raise InputError(
            f"{who} compares phases of different composition",
            where=where,
            found=f"{formulas[0]} of {one.name}, {formulas[1]} of {two.name}",
        )
    convention, sizes = _convention((one, two), finite_size), (len(one.atoms), len(two.atoms))
    if sizes[0] != sizes[1] and convention == CELLS:
        raise InputError(
            f"{who} compares cells of different size",
            where=where,
            found=f"{sizes[0]} atoms of {one.name}, {sizes[1]} of {two.name}",
            expected="equal numbers of atoms: finite-size errors of ΔG cancel only then",
            fix="Or set free_energy.finite_size: limit, which takes them out.",
        )
    return convention


def liquid_size_term(n_atoms: int | Sequence[int], s0: Measured) -> Measured:
    """Return δ_N of a liquid in a periodic cell, ½ ln(2πN S₀), in kT.

    In the grand ensemble P(N) ∝ exp(βμN - βF(N)) is a Gaussian of variance N S₀ about its mean, to leading
    order, and its value there, 1/√(2πN S₀), is what distinguishes F(N) from N f∞. For the ideal gas, S₀ = 1,
    it is the part of ln N! = N ln N - N + ½ ln(2πN) + 1/(12N) that grows slower than N. What is left out is
    of order 1/N.

    Of a mixture the determinant of all number fluctuations stands in place of N S₀. It is that of a random
    mixture here, S₀ Π N_i (Bhatia and Thornton, Phys. Rev. B 2, 3004, 1970: N S₀ for the total number times
    N c₁c₂ for the composition of two species). Species that avoid or seek each other fluctuate otherwise:
    that is a constant of the order of kT for the whole cell.

    Args:
        n_atoms: Atoms of the cell; of a mixture the atoms of every species.
        s0: S₀ = ρ kT κ_T, the limit of the structure factor at q = 0 (`compressibility_limit`), without unit.

    Returns:
        δ_N, with the error that follows from that of S₀.

    Raises:
        StatisticsError: If S₀ is not known to be positive.
    """
    if not (s0.value > 0 and s0.se < s0.value):
        raise StatisticsError(
            f"the compressibility of the liquid is not known: ρ kT κ_T = {s0}",
            needed="a longer run at its pressure",
        )
    counts = [n_atoms] if isinstance(n_atoms, int) else n_atoms
    value = 0.5 * math.log(s0.value) + sum(0.5 * math.log(2 * math.pi * n) for n in counts)
    return Measured(value, 0.5 * s0.se / s0.value, "")


def compressibility_limit(density: float, temperature: float, bulk_modulus: Measured) -> Measured:
    """Return S₀ = ρ kT/K_T, the structure factor of a fluid at q = 0 (Hansen and McDonald 2013, Eq. 2.6.12).

    Args:
        density: Number density ρ, 1/Å³.
        temperature: Temperature, K.
        bulk_modulus: Isothermal bulk modulus K_T = 1/κ_T, GPa (`mlip_refine.observables.BulkModulus`).
    """
    s0 = density * KB * temperature / (bulk_modulus.value * GPA)
    return Measured(s0, s0 * bulk_modulus.se / abs(bulk_modulus.value), "")
