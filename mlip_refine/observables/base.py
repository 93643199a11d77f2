"""Samples of frames, and observables: columns of every frame, and a function of their weighted means.

Splitting an observable in these two parts makes every one reweightable and differentiable in one way, also
those that are no plain averages (heat capacities, elastic constants), and gives all of them the same standard
errors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol, Self

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.quantities import GPA, KB, Measured
from mlip_refine.statistics import log_weights as normalised
from mlip_refine.statistics import weighted_error, weighted_mean

_NUMBERS = 2**23
"""Float64 numbers in the largest temporary array: 64 MB, a few of which every machine has."""


@dataclass(frozen=True)
class Probe:
    """Values of the model that are known on some of the frames only.

    Attributes:
        values: Values of all frames `[n, ...]`, zero where they are not known; may require grad.
        mask: 1 on frames where they are known, else 0 `[n]`.
    """

    values: Tensor
    mask: Tensor


type Probes = Mapping[str, Tensor | Probe]
"""Values of the model on frames, by name; `Probe` where they are known on some of them only."""


def values_of(probe: Tensor | Probe) -> Tensor:
    """Return the values of a probe on all frames `[n, ...]`, zero where they are not known."""
    return probe.values if isinstance(probe, Probe) else probe


@dataclass(frozen=True)
class Sample:
    """The frames of one state with the model's values on them, which is all that an observable sees.

    Attributes:
        probes: Values of the model on the frames, by name; they may require grad: `energy` `[n]`, eV,
            `stress` of the configurations `[n, 3, 3]`, eV/Å³, tensile positive, `born` `[n, 6, 6]`, eV/Å³.
        positions: Unwrapped positions `[n, n_atoms, 3]`, Å, float64.
        cells: Cell vectors as rows `[n, 3, 3]`, Å, float64.
        numbers: Atomic numbers `[n_atoms]`.
        masses: Masses `[n_atoms]`, amu.
        temperature: Temperature, K.
        pressure: Pressure, GPa; only a label where the cell is fixed.
        free_cell: Whether the cell moved at that pressure (npt).

    Raises:
        InputError: Positions, cells, atoms and probes differ in number.
    """

    probes: Probes
    positions: Tensor
    cells: Tensor
    numbers: NDArray[np.int64]
    masses: Tensor
    temperature: float
    pressure: float
    free_cell: bool

    def __post_init__(self) -> None:
        """Check that positions, cells, atoms and probes agree in number."""
        n, atoms = self.positions.shape[0], self.positions.shape[1]
        found = {
            "cells": self.cells.shape[0],
            **{name: values_of(p).shape[0] for name, p in self.probes.items()},
        }
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
        """Volume of every frame `[n]`, Å³."""
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
        """Return a probe in float64.

        Raises:
            InputError: The probe was not evaluated.
        """
        if name not in self.probes:
            raise InputError(
                f"an observable needs the probe {name!r}", found=", ".join(sorted(self.probes)) or "none"
            )
        return values_of(self.probes[name]).double()

    def mask(self, name: str) -> Tensor:
        """Return 1 for frames on which a probe is known, else 0 `[n]`, float64."""
        probe = self.probes[name]
        return probe.mask.double() if isinstance(probe, Probe) else self.volumes.new_ones(len(self))

    def detached(self) -> Self:
        """Return the sample without derivatives of its probes."""
        return replace(
            self,
            probes={
                name: Probe(p.values.detach(), p.mask) if isinstance(p, Probe) else p.detach()
                for name, p in self.probes.items()
            },
        )

    def require_free_cell(self, what: str) -> None:
        """Refuse a fixed cell for a quantity, named by `what`, that needs a moving one.

        Raises:
            InputError: The cell is fixed.
        """
        if not self.free_cell:
            raise InputError(
                f"{what} follows from frames whose cell moves", found="a fixed cell", expected="npt"
            )

    def require_fixed_cell(self, what: str) -> None:
        """Refuse a moving cell for a quantity, named by `what`, that needs a fixed one.

        Raises:
            InputError: The cell moves.
        """
        if self.free_cell:
            raise InputError(f"{what} follows from frames of a fixed cell", found="npt", expected="nvt")


class Observable(ABC):
    """A function of weighted means over frames, with m outputs.

    Attributes:
        probes: Names of the probes that it needs beside the energy.
        labels: Names of the outputs `[m]`.
        unit: Unit of all outputs.
    """

    probes: ClassVar[frozenset[str]] = frozenset()
    labels: tuple[str, ...]
    unit: str

    @abstractmethod
    def columns(self, sample: Sample) -> Tensor:
        """Return k numbers of every frame to average `[n, k]`, float64, differentiable in the probes.

        They may be relative to a constant of the sample, so that variances keep their digits.
        """

    def derive(self, means: Tensor, sample: Sample) -> Tensor:  # noqa: ARG002 - others need the state
        """Return the outputs `[m]` from the means `[k]`; by default they are the means themselves."""
        return means

    def deviations(self, columns: Tensor, means: Tensor, log_weights: Tensor) -> Tensor:  # noqa: ARG002
        """Return the deviations of the columns from their means `[n, k]`, the origin of standard errors.

        A subclass scales the deviations of columns that were evaluated on some of the frames only. They are
        not finite where a single such frame is left.
        """
        return columns - means


def average(observable: Observable, sample: Sample, log_weights: Tensor | None = None) -> Tensor:
    """Return the outputs of an observable `[m]`, differentiable in the weights and the probes.

    Args:
        observable: The observable.
        sample: The frames.
        log_weights: Logarithms of the frames' weights `[n]`, normalised or not; None: equal weights.

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
    """Return the outputs of an observable with their standard errors.

    Every output is linearised in its means: frame i contributes w_i (c_i - ⟨c⟩)·∂f/∂⟨c⟩ to it, its influence
    (the infinitesimal jackknife, Efron 1982). The error of a weighted mean with the statistical inefficiency
    of the series of influences is then the error of the output.

    Args:
        observable: The observable.
        sample: The frames.
        inefficiency: Function that returns the statistical inefficiency of a series `[n]`, one value for
            each frame in their order.
        log_weights: Logarithms of the frames' weights `[n]`, normalised or not; None: equal weights.

    Returns:
        One value for each label; an error is infinite where no more than one independent frame is left.

    Raises:
        StatisticsError: No frames, or a number that is not finite.
    """
    with torch.no_grad():
        columns = observable.columns(sample)
    log_w = normalised(_weights(sample, log_weights).detach())
    means = weighted_mean(columns, log_w)
    outputs = observable.derive(means, sample).detach()
    slopes: Tensor = torch.autograd.functional.jacobian(lambda m: observable.derive(m, sample), means)
    deviations = observable.deviations(columns, means, log_w)
    errors = []
    for slope in slopes:
        linear = deviations @ slope
        if bool(linear.isfinite().all()):
            influence = len(linear) * log_w.exp() * linear
            errors.append(float(weighted_error(linear, log_w, inefficiency(influence))))
        else:
            errors.append(float("inf"))
    return tuple(
        Measured(value, error, observable.unit) for value, error in zip(outputs.tolist(), errors, strict=True)
    )


def _weights(sample: Sample, log_weights: Tensor | None) -> Tensor:
    return sample.volumes.new_zeros(len(sample)) if log_weights is None else log_weights


class SampledState(Protocol):
    """The conditions under which frames were drawn, such as a `StatePoint`."""

    @property
    def atoms(self) -> Atoms:
        """Structure with the atoms and masses of every frame."""

    @property
    def temperature(self) -> float:
        """Temperature, K."""

    @property
    def pressure(self) -> float:
        """Pressure, GPa."""

    @property
    def freedom(self) -> str:
        """What the cell may do; `fixed` where it is held."""


class SampledFrames(Protocol):
    """The frames of a simulation, such as a `Trajectory`; replicas and frames are the leading dimensions."""

    @property
    def point(self) -> SampledState:
        """The state that was sampled."""

    @property
    def positions(self) -> Tensor:
        """Unwrapped positions `[replicas, n_frames, n_atoms, 3]`, Å."""

    @property
    def cells(self) -> Tensor:
        """Cell vectors as rows `[replicas, n_frames, 3, 3]`, Å."""

    @property
    def model_energy(self) -> Tensor:
        """Potential energies `[replicas, n_frames]`, eV."""

    @property
    def stress(self) -> Tensor:
        """Stresses of the configurations `[replicas, n_frames, 3, 3]`, eV/Å³."""

    @property
    def kept(self) -> Tensor:
        """Frames that count `[replicas, n_frames]`, bool."""


def sample_of(trajectory: SampledFrames, probes: Probes | None = None) -> Sample:
    """Turn the kept frames of a simulation into a sample with the energies and stresses that it recorded.

        measure(RadialDistribution(8.0), sample_of(trajectory), trajectory.inefficiency)

    Args:
        trajectory: Frames of an ensemble at constant temperature (nvt or npt) for observables made of
            fluctuations; of any ensemble for structure and plain averages.
        probes: Further probes of the kept frames, or replacements of the recorded ones.
    """
    kept = trajectory.kept
    recorded = {"energy": trajectory.model_energy[kept], "stress": trajectory.stress[kept]}
    positions, cells = trajectory.positions[kept], trajectory.cells[kept]
    return sample_at(trajectory.point, positions, cells, recorded | dict(probes or {}))


def sample_at(point: SampledState, positions: Tensor, cells: Tensor, probes: Probes) -> Sample:
    """Return frames of a state point as a sample.

    Args:
        point: State point at which the frames were drawn.
        positions: Unwrapped positions `[n, n_atoms, 3]`, Å.
        cells: Cell vectors as rows `[n, 3, 3]`, Å.
        probes: Values of the model on the frames (see `Sample`).
    """
    return Sample(
        probes=probes,
        positions=positions,
        cells=cells,
        numbers=point.atoms.numbers,
        masses=torch.from_numpy(point.atoms.get_masses()),
        temperature=point.temperature,
        pressure=point.pressure,
        free_cell=point.freedom != "fixed",
    )


def portions(n: int, each: int) -> Iterator[slice]:
    """Yield slices that cover n items, each of which needs `each` numbers, in portions that fit into memory.

    A portion has at least one item.
    """
    size = max(1, _NUMBERS // max(each, 1))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
