"""What an observable is: columns of every frame, averaged with weights, and a function of the averages.

Splitting an observable in these two parts makes every one reweightable and differentiable in one way, also
those that are no plain averages (heat capacities, elastic constants), and gives all of them the same standard
errors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.quantities import GPA, KB, Measured
from mlip_refine.statistics import log_weights as normalised
from mlip_refine.statistics import weighted_error, weighted_mean


@dataclass(frozen=True)
class Sample:
    """What an observable sees of the frames of one state.

    Attributes:
        probes: Of the model, per frame, as asked for; may require grad: `energy` `[n]`, eV, `stress`
            `[n, 3, 3]`, eV/Å³, of the configurations and tensile positive, `born` `[n, 6, 6]`, eV/Å³.
        positions: `[n, n_atoms, 3]`, Å, unwrapped, float64.
        cells: Rows `[n, 3, 3]`, Å, float64.
        numbers: Atomic numbers `[n_atoms]`.
        masses: `[n_atoms]`, amu.
        temperature: K.
        pressure: GPa; of a fixed cell only a label.
        free_cell: Whether the cell moved at that pressure (npt).

    Raises:
        InputError: Positions, cells and atoms that do not belong together.
    """

    probes: Mapping[str, Tensor]
    positions: Tensor
    cells: Tensor
    numbers: NDArray[np.int64]
    masses: Tensor
    temperature: float
    pressure: float
    free_cell: bool

    def __post_init__(self) -> None:
        """Refuse frames and atoms that do not belong together."""
        n, atoms = self.positions.shape[0], self.positions.shape[1]
        found = {"cells": self.cells.shape[0], **{name: v.shape[0] for name, v in self.probes.items()}}
        wrong = {name: length for name, length in found.items() if length != n}
        if wrong or len(self.numbers) != atoms or len(self.masses) != atoms:
            raise InputError(
                "frames, atoms and probes of a sample differ in number",
                found=f"{n} frames of {atoms} atoms, {len(self.numbers)} atomic numbers, "
                f"{len(self.masses)} masses, {found}",
            )

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.positions)

    @property
    def n_atoms(self) -> int:
        """Atoms per frame."""
        return self.positions.shape[1]

    @property
    def kt(self) -> float:
        """Thermal energy, eV."""
        return KB * self.temperature

    @cached_property
    def volumes(self) -> Tensor:
        """`[n]`, Å³."""
        volumes: Tensor = torch.linalg.det(self.cells).abs()
        return volumes

    @property
    def energy(self) -> Tensor:
        """Potential energy of every frame `[n]`, eV, float64."""
        return self.probe("energy")

    @property
    def enthalpy(self) -> Tensor:
        """U + P V of every frame with the pressure of the state `[n]`, eV, float64."""
        return self.energy + self.pressure * GPA * self.volumes

    @property
    def total_stress(self) -> Tensor:
        """Stress with its kinetic part, σ - N kT/V `[n, 3, 3]`, eV/Å³, float64, tensile positive.

        Frames hold no momenta: the kinetic part is its mean.
        """
        eye = torch.eye(3, dtype=torch.float64, device=self.cells.device)
        return self.probe("stress") - (self.n_atoms * self.kt / self.volumes)[:, None, None] * eye

    def probe(self, name: str) -> Tensor:
        """A probe in float64.

        Raises:
            InputError: It was not evaluated.
        """
        if name not in self.probes:
            raise InputError(
                f"an observable needs the probe {name!r}", found=", ".join(sorted(self.probes)) or "none"
            )
        return self.probes[name].double()

    def require_free_cell(self, what: str) -> None:
        """Refuse what only a moving cell tells.

        Raises:
            InputError: The cell is fixed.
        """
        if not self.free_cell:
            raise InputError(
                f"{what} follows from frames whose cell moves", found="a fixed cell", expected="npt"
            )

    def require_fixed_cell(self, what: str) -> None:
        """Refuse what only a fixed cell tells.

        Raises:
            InputError: The cell moves.
        """
        if self.free_cell:
            raise InputError(f"{what} follows from frames of a fixed cell", found="npt", expected="nvt")


class Observable(ABC):
    """A function of weighted means over frames.

    Attributes:
        probes: What is evaluated on every frame beside the energy.
        labels: Names of the m outputs.
        unit: Of all outputs.
    """

    probes: ClassVar[frozenset[str]] = frozenset()
    labels: tuple[str, ...]
    unit: str

    @abstractmethod
    def columns(self, sample: Sample) -> Tensor:
        """What is averaged: k numbers of every frame `[n, k]`, float64, differentiable in the probes.

        They may be relative to a constant of the sample, where a variance would lose its digits otherwise.
        """

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002 - others need the state
        """The outputs `[m]` from the means `[k]`; the means themselves unless a subclass says otherwise."""
        return means

    def deviations(self, columns: Tensor, means: Tensor, log_weights: Tensor) -> Tensor:  # noqa: ARG002
        """Deviations of the columns from their means `[n, k]`, of which errors are made.

        Columns that hold fewer samples than there are frames have them scaled. Not finite where a single
        sample is left.
        """
        return columns - means


def average(observable: Observable, sample: Sample, log_weights: Tensor | None = None) -> Tensor:
    """Outputs of an observable `[m]`, differentiable in the weights and the probes.

    Args:
        observable: What to average.
        sample: Frames.
        log_weights: Logarithms of their weights `[n]`, normalised or not; None: all count the same.

    Raises:
        StatisticsError: No frames, or a number that is not finite.
    """
    means = weighted_mean(observable.columns(sample), _weights(sample, log_weights))
    return observable.derive(means, sample)


def measure(
    observable: Observable,
    sample: Sample,
    inefficiency: Callable[[Tensor], float],
    log_weights: Tensor | None = None,
) -> tuple[Measured, ...]:
    """Outputs of an observable with their standard errors.

    Every output is linearised in its means: frame i contributes w_i (c_i - ⟨c⟩)·∂f/∂⟨c⟩ to it, its influence
    (the infinitesimal jackknife, Efron 1982). The error of a weighted mean with the statistical inefficiency
    of the series of influences is then the error of the output.

    Args:
        observable: What to average.
        sample: Frames.
        inefficiency: Statistical inefficiency of one value of every frame `[n]`, in the order of the frames.
        log_weights: Logarithms of their weights `[n]`, normalised or not; None: all count the same.

    Returns:
        One value for each label; an error is infinite where one independent frame or less is left.

    Raises:
        StatisticsError: No frames, or a number that is not finite.
    """
    with torch.no_grad():
        columns = observable.columns(sample)
    log_w = normalised(_weights(sample, log_weights).detach())
    means = weighted_mean(columns, log_w)
    outputs = observable.derive(means, sample).detach()
    slopes = _slopes(observable, sample, means)
    deviations = observable.deviations(columns, means, log_w)
    errors = [_error(deviations @ slope, log_w, inefficiency) for slope in slopes]
    return tuple(
        Measured(value, error, observable.unit) for value, error in zip(outputs.tolist(), errors, strict=True)
    )


def _weights(sample: Sample, log_weights: Tensor | None) -> Tensor:
    return sample.volumes.new_zeros(len(sample)) if log_weights is None else log_weights


def _slopes(observable: Observable, sample: Sample, means: Tensor) -> Tensor:
    """∂ outputs / ∂ means `[m, k]`."""
    slopes: Tensor = torch.autograd.functional.jacobian(lambda m: observable.derive(m, sample), means)
    return slopes


def _error(linear: Tensor, log_w: Tensor, inefficiency: Callable[[Tensor], float]) -> float:
    if not bool(linear.isfinite().all()):
        return float("inf")
    influence = len(linear) * log_w.exp() * linear
    return float(weighted_error(linear, log_w, inefficiency(influence)))
