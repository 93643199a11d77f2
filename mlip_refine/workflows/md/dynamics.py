"""Diffusion, viscosity and vibrational spectra of the trajectories of `md`, with errors over blocks."""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from math import sqrt
from pathlib import Path

import torch
from ase.data import chemical_symbols
from torch import Tensor

from mlip_refine.config.sections.md import Dynamics
from mlip_refine.errors import StatisticsError
from mlip_refine.files import write_text
from mlip_refine.observables import dynamics as formulas
from mlip_refine.quantities import GPA, KB, Measured
from mlip_refine.sampling import Trajectory
from mlip_refine.workflows.md.records import DynamicsPoint
from mlip_refine.workflows.records import Estimate

# Å²/fs in m²/s, and eV fs/Å³ in mPa s.
_SQUARE_METRES = 1e-5
_MILLIPASCALS = 1e-3 / GPA

LEAST_BLOCKS = 4

# What share of the vibrational spectrum may lie in the last quarter of the frequencies that frames resolve.
_UNRESOLVED = 0.01

type Curves = Mapping[str, Tensor]


@dataclass(frozen=True)
class Blocks:
    """Stretches of equal length of the replicas that ran without a gap.

    Attributes:
        trajectory: The trajectory that they are cut from.
        positions: Positions relative to the centre of mass `[blocks, n, n_atoms, 3]`, Å.
        stress: Stress of the configurations, without the kinetic part `[blocks, n, 3, 3]`, eV/Å³.
        kinetic_energy: Kinetic energy `[blocks, n]`, eV.
        interval: Time between frames, fs.
        lags: Longest lag, in frames.
    """

    trajectory: Trajectory
    positions: Tensor
    stress: Tensor
    kinetic_energy: Tensor
    interval: float
    lags: int

    @classmethod
    def cut(cls, trajectory: Trajectory, skipped: int, interval: float, window: float) -> "Blocks":
        """Cut the frames after the equilibration into as many blocks of two windows as there are.

        Args:
            trajectory: Trajectory with a fixed cell.
            skipped: Number of frames of the equilibration.
            interval: Time between frames, fs.
            window: Longest time of correlations, fs.

        Raises:
            StatisticsError: If there are too few blocks for an error.
        """
        lags = round(window / interval)
        whole = trajectory.kept[:, skipped:].all(1)
        frames, replicas = trajectory.kept.shape[1] - skipped, int(whole.sum())
        each = frames // (2 * lags + 1)
        if each * replicas < LEAST_BLOCKS:
            picoseconds = -(-LEAST_BLOCKS // max(replicas, 1)) * (2 * lags + 1) * interval / 1e3
            raise StatisticsError(
                f"{replicas} of {len(whole)} replicas ran without a gap, {frames * interval / 1e3:g} ps "
                f"each, which makes {each * replicas} blocks of two windows",
                needed=f"{LEAST_BLOCKS}, such as {picoseconds:g} ps of {max(replicas, 1)} replicas",
            )
        length = frames // each
        positions, stress, kinetic = (
            series[whole, skipped : skipped + each * length].unflatten(1, (each, length)).flatten(0, 1)
            for series in (trajectory.positions, trajectory.stress, trajectory.kinetic_energy)
        )
        still = formulas.without_drift(positions, torch.from_numpy(trajectory.point.atoms.get_masses()))
        return cls(trajectory, still, stress, kinetic, interval, lags)

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.positions)

    @property
    def duration(self) -> float:
        """Length of a block, fs."""
        return self.positions.shape[1] * self.interval

    @property
    def cell(self) -> Tensor:
        """Cell, rows `[3, 3]`, Å."""
        return self.trajectory.cells[0, 0]

    @cached_property
    def masses(self) -> Tensor:
        """Masses `[n_atoms]`, amu."""
        return torch.from_numpy(self.trajectory.point.atoms.get_masses())

    @cached_property
    def velocities(self) -> Tensor:
        """Velocities `[blocks, n - 1, n_atoms, 3]`, Å/fs."""
        return formulas.velocities(self.positions, self.interval)

    @cached_property
    def correlation(self) -> Tensor:
        """Mass-weighted velocity autocorrelation `[blocks, lags + 1]`, amu Å²/fs²."""
        return formulas.velocity_autocorrelation(self.velocities, self.masses, self.lags)

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Frequencies `[lags + 1]`, THz, and densities of states `[blocks, lags + 1]`, 1/THz."""
        return formulas.vibrational_spectrum(self.correlation, self.interval)

    @property
    def temperature(self) -> float:
        """Temperature: that of the ensemble where it is held, else that of the momenta, K."""
        point = self.trajectory.point
        if point.ensemble == "nvt":
            return point.temperature
        return float(self.kinetic_energy.mean()) * 2 / (KB * point.degrees_of_freedom)

    @cached_property
    def viscosities(self) -> Tensor:
        """Running Green-Kubo integral `[blocks, lags + 1]`, mPa s."""
        stress = formulas.stress_with_kinetic_part(
            self.stress, self.positions, self.cell, self.masses, self.interval
        )
        volume = float(torch.linalg.det(self.cell).abs())
        running = formulas.running_viscosity(stress, volume, self.temperature, self.interval, self.lags)
        return running * _MILLIPASCALS

    def elements(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every element with the indices of its atoms."""
        numbers = self.trajectory.point.atoms.numbers
        for number in sorted(set(numbers.tolist())):
            yield chemical_symbols[number], torch.from_numpy((numbers == number).nonzero()[0])

    def require_resolved(self, what: str) -> None:
        """Refuse what needs velocities when frames are too far apart to show the fastest motion.

        Raises:
            StatisticsError: The spectrum reaches the highest frequency that can be seen.
        """
        frequency, density = self.spectrum
        last = frequency >= 0.75 * frequency[-1]
        share = float(torch.trapezoid(density.mean(0)[last], frequency[last]))
        if share > _UNRESOLVED:
            raise StatisticsError(
                f"{what} needs frames that follow every vibration: {100 * share:.0f} % of the spectrum lies "
                f"above {0.75 * float(frequency[-1]):.3g} THz with frames {self.interval:g} fs apart",
                needed="a shorter md.interval",
            )


def dynamics(blocks: Blocks, options: Dynamics) -> tuple[DynamicsPoint, Curves, Curves]:
    """Compute diffusion, viscosity and spectrum of one point.

    Returns:
        Numbers, curves over time and curves over frequency, ready to be written.
    """
    values: dict[str, Estimate] = {}
    curves = {"time (ps)": torch.arange(blocks.lags + 1) * (blocks.interval / 1e3)}
    for symbol, atoms in blocks.elements():
        displacement = formulas.mean_square_displacement(blocks.positions[:, :, atoms], blocks.lags)
        curves |= _curve(f"msd {symbol} (Å²)", displacement)
        # By Einstein from the second half of the window, and by Green and Kubo.
        einstein = formulas.einstein_diffusion(displacement, blocks.interval, blocks.lags // 2)
        ones = torch.ones(len(atoms), dtype=torch.float64)
        correlation = formulas.velocity_autocorrelation(blocks.velocities[:, :, atoms], ones, blocks.lags)
        green_kubo = formulas.running_integral(correlation, blocks.interval)[:, -1] / (3 * len(atoms))
        values[f"diffusion_{symbol}"] = Estimate.of(_measured(einstein * _SQUARE_METRES, "m²/s"))
        values[f"diffusion_{symbol}_green_kubo"] = Estimate.of(_measured(green_kubo * _SQUARE_METRES, "m²/s"))
    curves |= _curve("vacf", blocks.correlation / blocks.correlation[:, :1])
    if options.finite_size_correction:
        values |= _bulk(blocks, options, values)
        if options.viscosity is None:
            curves |= _curve("viscosity (mPa s)", blocks.viscosities)
    frequency, density = blocks.spectrum
    spectrum = {"frequency (THz)": frequency, **_curve("density (1/THz)", density)}
    point = DynamicsPoint(
        name=blocks.trajectory.point.name,
        interval_fs=blocks.interval,
        window_ps=blocks.lags * blocks.interval / 1e3,
        blocks=len(blocks),
        block_ps=blocks.duration / 1e3,
        values=values,
    )
    return point, curves, spectrum


def _bulk(blocks: Blocks, options: Dynamics, values: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Viscosity, correction for the size of the box and diffusion of the bulk, as far as they are known."""
    try:
        viscosity = _viscosity(blocks, options)
    except StatisticsError as error:
        return {"viscosity": Estimate.refuse("mPa s", str(error))}
    found = {"viscosity": Estimate.of(viscosity)}

    gram = blocks.cell @ blocks.cell.T
    length = float(gram[0, 0].sqrt())
    if not torch.allclose(gram, length**2 * torch.eye(3, dtype=gram.dtype), rtol=1e-6, atol=1e-6 * length**2):
        reason = "the correction for the size of the box is that of a cube; needed: a cubic box"
        return found | {"finite_size_correction": Estimate.refuse("m²/s", reason)}
    inside = viscosity.value / _MILLIPASCALS
    value = formulas.finite_size_correction(blocks.temperature, inside, length) * _SQUARE_METRES
    correction = Measured(value, value * viscosity.se / viscosity.value, "m²/s")
    found["finite_size_correction"] = Estimate.of(correction)
    for symbol, _ in blocks.elements():
        box = values[f"diffusion_{symbol}"].measured
        if box is not None:
            found[f"diffusion_{symbol}_bulk"] = Estimate.of(box + correction)
    return found


def _viscosity(blocks: Blocks, options: Dynamics) -> Measured:
    if options.viscosity is not None:
        return Measured(options.viscosity, 0.0, "mPa s")
    blocks.require_resolved("the viscosity")
    found = _measured(blocks.viscosities[:, -1], "mPa s")
    if found.value < 3 * found.se:
        raise StatisticsError(
            f"the viscosity, {found}, is not known to three standard errors",
            needed="a longer run, or md.dynamics.viscosity",
        )
    return found


def _measured(values: Tensor, unit: str) -> Measured:
    return Measured(float(values.mean()), float(values.std()) / sqrt(len(values)), unit)


def _curve(name: str, blocks: Tensor) -> dict[str, Tensor]:
    """Mean and standard error of a function over blocks `[blocks, n]`."""
    return {name: blocks.mean(0), f"{name} se": blocks.std(0) / sqrt(len(blocks))}


def write_dynamics(
    folder: Path, runs: Mapping[str, Trajectory], skipped: int, interval: float, options: Dynamics
) -> tuple[DynamicsPoint, ...]:
    """Evaluate the dynamics of every point, and write its curves, `POINT-times.csv` and `POINT-spectrum.csv`.

    Args:
        folder: Folder of the files.
        runs: Trajectories by name of the point.
        skipped: Number of frames of the equilibration.
        interval: Time between frames, fs.
        options: Options of the config.
    """
    folder.mkdir(exist_ok=True)
    points = []
    for run in runs.values():
        try:
            blocks = Blocks.cut(run, skipped, interval, options.window)
        except StatisticsError as error:
            refused = {"diffusion": Estimate.refuse("m²/s", str(error))}
            points.append(
                DynamicsPoint(
                    name=run.point.name,
                    interval_fs=interval,
                    window_ps=options.window / 1e3,
                    blocks=0,
                    block_ps=0.0,
                    values=refused,
                )
            )
            continue
        point, times, spectrum = dynamics(blocks, options)
        _write_columns(folder / f"{point.name}-times.csv", times)
        _write_columns(folder / f"{point.name}-spectrum.csv", spectrum)
        points.append(point)
    return tuple(points)


def _write_columns(path: Path, columns: Mapping[str, Tensor]) -> None:
    stream = StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    lines.writerow(columns)
    rows = torch.stack([column.double() for column in columns.values()], dim=1).tolist()
    lines.writerows([f"{value:.8g}" for value in row] for row in rows)
    write_text(path, stream.getvalue())
