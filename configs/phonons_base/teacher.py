"""A public foundation potential as the source of labels.

`load` takes the name of a potential and returns a function from crystals to their energies, forces and
stresses. The scripts beside this file take `--teacher FILE` with another one, for instance a faster one.
"""

from collections.abc import Callable, Sequence

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

type Label = tuple[float, NDArray[np.float64], NDArray[np.float64]]
"""Energy, eV; forces `[N, 3]`, eV/Å; stress `[3, 3]`, eV/Å³, tensile positive."""

type Teacher = Callable[[Sequence[Atoms]], list[Label]]


def load(name: str) -> Teacher:
    """A potential of the package `nequix` (PyPI), which fetches its weights at the first use."""
    from nequix.calculator import NequixCalculator  # noqa: PLC0415

    calculator = NequixCalculator(name, use_kernel=False)

    def label(crystals: Sequence[Atoms]) -> list[Label]:
        found = []
        for crystal in crystals:
            atoms = crystal.copy()
            atoms.calc = calculator
            stress = atoms.get_stress(voigt=False)
            found.append((atoms.get_potential_energy(), atoms.get_forces(), stress))
        return found

    return label
