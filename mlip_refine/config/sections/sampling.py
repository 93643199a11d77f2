"""The sections ``sampling`` and ``free_energy``: how ensembles of phases, and of ladders, are drawn."""

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mlip_refine.config.section import Copies, Count, CountOrZero, Section
from mlip_refine.config.units import Length, PositiveEnergyPerAtom, Rate, Time, TimeOrZero, problem

FiniteSize = Literal["limit", "cells"]


class Guards(Section):
    """When a running system is set back to its last good state, reported, and in the end given up."""

    max_temperature_ratio: float = Field(
        3.0, gt=1, allow_inf_nan=False, description="Highest kinetic temperature over the set one, no unit."
    )
    max_displacement: float = Field(
        0.2,
        gt=0,
        allow_inf_nan=False,
        description="Root-mean-square distance of time-averaged positions from the lattice sites, over the "
        "nearest-neighbour distance, beyond which its structure is looked at (without ovito: it is lost).",
    )
    restarts: CountOrZero = Field(
        3, description="Restarts from the last good state before a system is given up."
    )
    forgiving_time: Time = Field(
        50_000.0, description="Time without a fault after which one restart of a system is forgiven, fs."
    )


class Sampling(Section):
    """Molecular dynamics of every phase at every state point."""

    ensemble: Literal["nvt", "npt"] = Field(
        "nvt", description="Cell fixed at its equilibrium, or free at the pressure."
    )
    thermostat: Literal["langevin", "nose_hoover"] = Field(
        "langevin", description="Of nvt: Langevin noise, or a Nosé-Hoover chain. npt is Langevin."
    )
    timestep: Time | None = Field(
        None,
        description="Integration step, fs; null: a thirtieth of the phase's fastest vibration, at most 5.",
    )
    friction: Rate | None = Field(
        None,
        description="Friction of the Langevin thermostat, 1/ps; null: a tenth of the "
        "angular frequency of the phase's fastest vibration.",
    )
    replicas: Copies = Field(4, description="Independent copies of every system.")
    equilibration: TimeOrZero = Field(
        1000.0, description="Time that is thrown away before frames are stored, fs."
    )
    interval: Time = Field(100.0, description="Time between two stored frames, fs.")
    frames: Count = Field(20, description="Frames that each replica stores.")
    n_eff_threshold: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Effective frames of all references over those of a first draw, below which a state "
        "point is sampled again.",
    )
    max_references: Count = Field(
        6,
        description="Reference models whose frames are kept at a state point, joined by MBAR; "
        "1: the newest alone.",
    )
    refresh: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Least share of equilibration and frames that sampling anew takes where old frames "
        "are kept.",
    )
    lend: bool = Field(
        False,
        description="Lend new frames to the other temperatures and pressures of their phase, where cells are "
        "free or the same.",
    )
    min_effective_frames: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="Independent frames, below which an estimate is refused."
    )
    cell_equilibration: Time = Field(
        1500.0, description="Length of each run towards the cell of a phase at the wanted pressure, fs."
    )
    cell_iterations: Count = Field(4, description="Runs, each followed by a Newton step of the cell.")
    barostat_time: Time | None = Field(
        None,
        description="Period of volume oscillations in NPT, fs; null: four of the phase's fastest vibration.",
    )
    dtype: Literal["float32", "float64"] = Field(
        "float32", description="Precision of the dynamics; energies that enter weights are recomputed."
    )
    accelerate: Literal["auto", "none", "compile", "cueq"] = Field(
        "auto",
        description="How forces are found: plainly, with torch.compile or cuEquivariance; auto: on a GPU the "
        "fastest of these, timed on the spot, that agrees with the plain model. One that fails is left.",
    )
    guards: Guards = Field(default_factory=Guards, description="When a running system is stopped.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.timestep is not None and self.interval < self.timestep:
            raise problem(f"at least one timestep ({self.timestep:g} fs)", key="interval")
        if self.lend and self.max_references == 1:
            raise problem("at least 2 with lend: lent frames are a reference too", key="max_references")
        if self.min_effective_frames > self.frames * self.replicas:
            most = self.frames * self.replicas
            raise problem(
                f"at most replicas × frames = {most}, else every estimate is refused",
                key="min_effective_frames",
            )
        return self


EVERY_PAIR = "*"
"""The key of a length that holds for all pairs of elements."""


def _automatic(value: object) -> object:
    return None if value == "auto" else value


def _pair_lengths(value: object) -> object:
    if value is None or value == "auto":
        return {}
    if not isinstance(value, dict):
        return {EVERY_PAIR: value}
    for name in value:
        if name != EVERY_PAIR and not (isinstance(name, str) and _PAIR.fullmatch(name)):
            raise problem("pairs of elements such as Ti-O")
    return value


_PAIR = re.compile(r"[A-Z][a-z]?-[A-Z][a-z]?")


class LiquidPath(Section):
    """A ladder from a liquid to a Uhlenbeck–Ford fluid, and the ladder of the fluid to the ideal gas."""

    strength: float = Field(
        100.0,
        ge=1,
        le=1000,
        description="Strength p of the fluid, no unit: a small one lets atoms too close.",
    )
    sigma: Annotated[
        dict[str, Length],
        BeforeValidator(_pair_lengths, json_schema_input_type=str | float | dict[str, str | float] | None),
    ] = Field(
        default_factory=dict,
        description="Length σ of the fluid, Å, for all pairs or by pair of elements (Ti-O: 1.2 Å); auto: of "
        "five around 0.51 of the first peak of g(r) the one with the shortest path.",
    )
    windows: Annotated[
        int | None, BeforeValidator(_automatic, json_schema_input_type=int | Literal["auto"] | None)
    ] = Field(
        None,
        ge=2,
        le=1000,
        description="Rungs from liquid to fluid, both ends counted; auto: by a short run.",
    )
    cell: Time = Field(
        20_000.0,
        description="Length of the run at constant pressure that gives volume and compressibility, fs.",
    )
    fluid_steps: Count = Field(
        20_000, description="Steps of every rung of the fluid's own ladder; they need no potential."
    )


class FreeEnergy(Section):
    """A ladder of Hamiltonians from a solvable reference to the potential."""

    reference: Literal["einstein", "harmonic"] = Field(
        "harmonic", description="Solvable end: independent springs, or the full harmonic crystal."
    )
    windows: int = Field(5, ge=2, le=1000, description="Rungs of the ladder, both ends counted.")
    replicas: Copies = Field(4, description="Independent copies of every rung.")
    equilibration: TimeOrZero = Field(2000.0, description="Time that is thrown away on every rung, fs.")
    production: Time = Field(20000.0, description="Time that is measured on every rung, fs.")
    interval: Time = Field(50.0, description="Time between two measurements, fs.")
    friction: Rate = Field(5.0, description="Friction of the Langevin thermostat, 1/ps.")
    fit: Time = Field(10000.0, description="Length of the run that the reference is fitted to, fs.")
    max_error: PositiveEnergyPerAtom | None = Field(
        0.3, description="Largest accepted standard error of a difference, meV/atom; null: any."
    )

    finite_size: FiniteSize | None = Field(
        None,
        description="What ΔG is of: large systems, the finite-size term of each cell taken out (limit), or "
        "the cells themselves, which then need equal numbers of atoms (cells). null: limit if a phase is a "
        "liquid, else cells.",
    )

    liquid: LiquidPath = Field(default_factory=LiquidPath, description="The path of a liquid.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.interval > self.production:
            raise problem(f"at most production ({self.production:g} fs)", key="interval")
        return self
