"""What the stress of strained cells tells, with the errors of their series."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlip_refine.crystals.moduli import voigt_average
from mlip_refine.crystals.symmetry import INDEPENDENT
from mlip_refine.observables.base import Observable, average, measure, sample_of
from mlip_refine.observables.cell import Stress
from mlip_refine.observables.elasticity import Deformation, deformation_constants, errors_of_stresses
from mlip_refine.quantities import Measured
from mlip_refine.sampling import Trajectory

MODULI = {"K": "GPa", "G": "GPa", "E": "GPa", "nu": ""}
"""Units of what a polycrystal has."""


def of_strained_cells(deformation: Deformation, runs: Sequence[Trajectory]) -> dict[str, Any]:
    """Isothermal constants C and coefficients B, Voigt's moduli of B, and the pressure.

    Args:
        deformation: Strains.
        runs: The cell itself, then the strained ones in the order of the strains.

    Returns:
        `constants`, `stress_strain` and `moduli` (K, G, E, nu) by name, and `pressure`.
    """
    names = INDEPENDENT[deformation.symmetry.laue]
    labels = [(kind, name, "GPa") for kind in ("constants", "stress_strain") for name in names]
    labels += [("moduli", name, unit) for name, unit in MODULI.items()]
    *values, pressure = of_stresses(partial(_values, deformation), runs)
    found: dict[str, Any] = {"pressure": Measured(*pressure, "GPa")}
    for (kind, name, unit), value in zip(labels, values, strict=True):
        found.setdefault(kind, {})[name] = Measured(*value, unit)
    return found


def _values(deformation: Deformation, stress: Tensor) -> Tensor:
    """All of them from the mean stress of every cell `[1 + 2 n_directions, 6]`, GPa."""
    c = deformation_constants(deformation, stress)
    b = deformation_constants(deformation, stress, stress_strain=True)
    mean = voigt_average(torch.einsum("m,mij->ij", b, deformation.basis.to(b)))
    moduli = torch.stack([mean.bulk, mean.shear, mean.young, mean.poisson])
    return torch.cat([c, b, moduli, -stress[0, :3].mean().reshape(1)])


def of_stresses(
    function: Callable[[Tensor], Tensor], runs: Sequence[Trajectory]
) -> list[tuple[float, float]]:
    """Values and standard errors of a function of the mean stresses of independent cells.

    Args:
        function: Of `[n_runs, 6]`, GPa, differentiable; gives `[m]`.
        runs: The cells.
    """
    stress = torch.stack([average(Stress(), sample_of(run)) for run in runs])
    errors = errors_of_stresses(function, stress, [partial(_errors, run) for run in runs])
    return list(zip(function(stress).tolist(), errors, strict=True))


def _errors(run: Trajectory, observable: Observable) -> list[float]:
    return [m.se for m in measure(observable, sample_of(run), run.inefficiency)]
