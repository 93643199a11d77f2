"""The leaf of the package: constants, measured values with errors, and targets.

Units inside are eV, Å, K and amu, with stress in eV/Å³ and time in fs.
"""

import math
from dataclasses import dataclass

from ase import units

from mlip_refine.errors import InputError

KB: float = float(units.kB)
"""Boltzmann constant, eV/K."""

GPA: float = float(units.GPa)
"""One gigapascal in eV/Å³."""

MEV: float = 1.0e-3
"""One millielectronvolt in eV."""

HBAR: float = float(units._hbar * units.J) * 1.0e15
"""Reduced Planck constant, eV fs."""

IMAGINARY: float = -0.1
"""Phonon frequencies below this, THz, are imaginary; acoustic modes near Γ may be above it by rounding."""

VOIGT: tuple[tuple[int, int], ...] = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
"""Components of symmetric tensors in Voigt order: xx, yy, zz, yz, xz, xy."""


@dataclass(frozen=True)
class Measured:
    """A number with its standard error and unit.

    Sums and differences take the errors as independent.

    Attributes:
        value: The estimate.
        se: Its standard error, one sigma, in the same unit; not a number where it is not known.
        unit: Unit of both, such as ``meV/atom``.
    """

    value: float
    se: float
    unit: str

    def __add__(self, other: "Measured") -> "Measured":
        """Return the sum of two independent values of one unit."""
        self._same_unit(other)
        return Measured(self.value + other.value, math.hypot(self.se, other.se), self.unit)

    def __sub__(self, other: "Measured") -> "Measured":
        """Return the difference of two independent values of one unit."""
        self._same_unit(other)
        return Measured(self.value - other.value, math.hypot(self.se, other.se), self.unit)

    def __neg__(self) -> "Measured":
        """Return the value with its sign turned."""
        return Measured(-self.value, self.se, self.unit)

    def scaled(self, factor: float, unit: str | None = None) -> "Measured":
        """Return the value times an exact factor, in a new unit where one is given."""
        return Measured(self.value * factor, self.se * abs(factor), unit or self.unit)

    def __str__(self) -> str:
        """Return the value with its error in the last two digits: ``-8.91(23) meV/atom``."""
        value, se = self.value, self.se
        if math.isfinite(value) and math.isnan(se):
            text = f"{value:.4g}(?)"
        elif not (math.isfinite(value) and math.isfinite(se)):
            text = f"{value:.6g} ± {se:.2g}"
        elif se <= 0:
            text = f"{value:.6g}(0)"
        else:
            decimals = 1 - math.floor(math.log10(float(f"{se:.1e}")))
            if decimals <= 0:
                text = f"{round(value, decimals):.0f}({round(se, decimals):.0f})"
            else:
                error = f"{se:.{decimals}f}" if se >= 1 else f"{round(se * 10**decimals)}"
                text = f"{value:.{decimals}f}({error})"
        return f"{text} {self.unit}".rstrip()

    @property
    def known_se(self) -> float | None:
        """The standard error as files have it: None where it is not known."""
        return None if math.isnan(self.se) else self.se

    def _same_unit(self, other: "Measured") -> None:
        if self.unit != other.unit:
            raise InputError(
                "values of different units cannot be combined", found=f"{self.unit} and {other.unit}"
            )


def error_of(known_se: float | None) -> float:
    """The standard error from what files have of it, `Measured.known_se`."""
    return math.nan if known_se is None else float(known_se)


@dataclass(frozen=True)
class Target:
    """A wanted value: data with an error and the conditions where it holds.

    Attributes:
        value: The wanted value.
        uncertainty: Its standard uncertainty, above zero, in the same unit.
        unit: Unit of both.
        temperature: Where it holds, K.
        pressure: Where it holds, GPa.
        source: Where the number comes from.

    Raises:
        InputError: A value that is not finite, or an uncertainty that is not above zero.
    """

    value: float
    uncertainty: float
    unit: str
    temperature: float | None = None
    pressure: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse a target that is not data with an error."""
        if not math.isfinite(self.value):
            raise InputError("a target must be a finite number", found=self.value)
        if not (math.isfinite(self.uncertainty) and self.uncertainty > 0):
            raise InputError(
                "a target needs an uncertainty", found=self.uncertainty, expected="a finite number above 0"
            )

    def deviation(self, measured: Measured) -> Measured:
        """Return measured minus target, in units of the target's uncertainty."""
        if measured.unit != self.unit:
            raise InputError("a value and its target differ in unit", found=measured.unit, expected=self.unit)
        return Measured(measured.value - self.value, measured.se, self.unit).scaled(
            1 / self.uncertainty, "sigma"
        )
