"""The section ``free_energy``: how absolute free energies of solids are computed."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mlip_refine.config.section import Count, Section
from mlip_refine.config.units import PositiveEnergyPerAtom, Rate, Time, TimeOrZero, problem


class FreeEnergy(Section):
    """A ladder of Hamiltonians from a solvable reference to the potential (Frenkel–Ladd)."""

    reference: Literal["einstein", "harmonic"] = Field(
        "harmonic", description="Solvable end: independent springs, or the full harmonic crystal."
    )
    windows: int = Field(5, ge=2, description="Rungs of the ladder, both ends counted.")
    replicas: Count = Field(4, description="Independent copies of every rung.")
    equilibration: TimeOrZero = Field(2000.0, description="Time that is thrown away on every rung, fs.")
    production: Time = Field(20000.0, description="Time that is measured on every rung, fs.")
    interval: Time = Field(50.0, description="Time between two measurements, fs.")
    friction: Rate = Field(5.0, description="Friction of the Langevin thermostat, 1/ps.")
    fit: Time = Field(10000.0, description="Length of the run that the reference is fitted to, fs.")
    max_error: PositiveEnergyPerAtom | None = Field(
        0.3, description="Largest accepted standard error of a difference, meV/atom; null: any."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.interval > self.production:
            raise problem(f"at most production ({self.production:g} fs)", key="interval")
        return self
