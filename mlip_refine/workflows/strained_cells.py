"""What the stress of strained cells tells, with the errors of their series."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlip_refine.observables.base import Observable, Sample, average, measure
from mlip_refine.observables.crystal import INDEPENDENT
from mlip_refine.observables.deformation import Deformation, deformation_constants
from mlip_refine.observables.frames import sample_of
from mlip_refine.observables.moduli import voigt_average
from mlip_refine.observables.stress import Stress
from mlip_refine.quantities import Measured
from mlip_refine.sampling import GoodFrames

MODULI = {"K": "GPa", "G": "GPa", "E": "GPa", "nu": ""}
"""Units of what a polycrystal has."""


class _Combinations(Observable):
    """Linear combinations of the mean components of the stress of one cell."""

    probes = Stress.probes
    unit = Stress.unit

    def __init__(self, slopes: Tensor) -> None:
        """Take the slopes in the six components `[m, 6]`."""
        self.slopes, self.labels = slopes, tuple(str(i) for i in range(len(slopes)))

    def columns(self, sample: Sample) -> Tensor:
        """Six components of every frame `[n, 6]`."""
        return Stress().columns(sample)

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002 - as of any observable
        """The combinations `[m]`."""
        return self.slopes @ means


def of_strained_cells(deformation: Deformation, runs: Sequence[GoodFrames]) -> dict[str, Any]:
    """Isothermal constants C and coefficients B, Voigt's moduli of B, and the mean pressure.

    Args:
        deformation: Strains.
        runs: The cells in the order of the strains.

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
    """All of them from the mean stress of every cell `[2 n_directions, 6]`, GPa."""
    nothing = torch.zeros_like(stress)
    c, _ = deformation_constants(deformation, stress, nothing)
    b, _ = deformation_constants(deformation, stress, nothing, stress_strain=True)
    mean = voigt_average(torch.einsum("m,mij->ij", b, deformation.basis.to(b)))
    moduli = torch.stack([mean.bulk, mean.shear, mean.young, mean.poisson])
    return torch.cat([c, b, moduli, -stress[:, :3].mean().reshape(1)])


def of_stresses(
    function: Callable[[Tensor], Tensor], runs: Sequence[GoodFrames]
) -> list[tuple[float, float]]:
    """Values and standard errors of a function of the mean stresses of independent cells.

    Each cell adds to an error what the series of its own combination of components tells: xx, yy and zz of
    one cell are anything but independent.

    Args:
        function: Of `[n_runs, 6]`, GPa, differentiable; gives `[m]`.
        runs: The cells.
    """
    samples = [sample_of(frames) for frames in runs]
    stress = torch.stack([average(Stress(), sample) for sample in samples])
    slopes = torch.autograd.functional.jacobian(function, stress)
    errors = [
        [m.se for m in measure(_Combinations(slopes[:, i]), sample, frames.inefficiency)]
        for i, (sample, frames) in enumerate(zip(samples, runs, strict=True))
    ]
    total = torch.tensor(errors, dtype=torch.float64).norm(dim=0)
    return list(zip(function(stress).tolist(), total.tolist(), strict=True))
