"""The section ``transition``: where two phases coexist, over temperature and pressure."""

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from mlip_refine.config.section import Copies, Count, CountOrZero, Section
from mlip_refine.config.sections.md import Pressures, Temperatures
from mlip_refine.config.units import Pressure, Temperature, Time, TimeOrZero, problem


class Anchor(Section):
    """A state at which the absolute free energies of both phases are computed."""

    temperature: Temperature = Field(description="Temperature, K.")
    pressure: Pressure = Field(0.0, description="Pressure, GPa.")


class Coexistence(Section):
    """Boxes in which a crystal and a liquid run side by side, at constant pressure and enthalpy."""

    starts: Temperatures = Field(
        description="Temperatures at which boxes start, K: three to five, within 150 K of the transition."
    )
    pressure: Pressures = Field((0.0,), description="One pressure or several, GPa.")
    n_atoms: Count = Field(2000, description="Atoms of a box, about.")
    preparation: Time = Field(
        3000.0,
        description="Time of each step before a box is on its own, fs: the lattice at the start, melting one "
        "half, and both at the temperature of the start and the pressure.",
    )
    duration: Time = Field(100_000.0, description="Time at constant pressure and enthalpy, fs.")


def _anchors(value: object) -> object:
    """Read one anchor as a list of one."""
    if value is None:
        return value
    several = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not several:
        raise problem("an anchor or a list of at least one")
    return several


class Transition(Section):
    """Two phases over temperature and pressure: a ladder of NPT ensembles of each, joined by MBAR."""

    from_: str = Field(alias="from", description="Phase I; differences are phase II less phase I.")
    to: str = Field(description="Phase II.")
    temperature: Temperatures = Field(
        description="Temperatures of the ladder, K: two or more, about 2T/√(N c_P/k) apart, 170 K for 128 "
        "atoms at 2000 K."
    )
    pressure: Pressures = Field(
        (0.0,), description="Pressures of the ladder, GPa, about 2 GPa apart for 128 atoms of a metal."
    )
    anchor: Annotated[
        tuple[Anchor, ...] | None, BeforeValidator(_anchors, json_schema_input_type=Anchor | list[Anchor])
    ] = Field(
        None,
        description="States of the absolute free energies, among the temperatures and pressures of the "
        "ladder; two check each other. Null: the middle temperature at the lowest pressure.",
    )
    report_at: Pressures | None = Field(
        None, description="Pressures of the boundary, GPa, within those of the ladder; null: all of those."
    )
    duration: Time = Field(60_000.0, description="Time of every rung after the equilibration, fs.")
    equilibration: TimeOrZero = Field(5000.0, description="Time thrown away on every rung, fs.")
    interval: Time = Field(100.0, description="Time between two frames, fs.")
    replicas: Copies = Field(1, description="Independent copies of every rung.")
    coexistence: Coexistence | None = Field(
        None,
        description="Boxes of crystal and liquid, which check the boundary without any free energy; null: "
        "none.",
    )
    extensions: CountOrZero = Field(
        2, description="How often the ladder grows by a temperature if the boundary lies outside."
    )
    max_error: Temperature | None = Field(
        10.0, description="Largest accepted standard error of a transition temperature, K; null: any."
    )

    @model_validator(mode="after")
    def _a_ladder(self) -> Self:
        if self.from_ == self.to:
            raise problem("two phases that differ", key="to")
        for key in ("temperature", "pressure"):
            values = getattr(self, key)
            if len({f"{value:g}" for value in values}) < len(values):
                raise problem("values that differ", key=key)
        if len(self.temperature) < 2:
            raise problem("at least two temperatures: the boundary lies between them", key="temperature")
        if self.duration < self.interval:
            raise problem(f"at least one interval ({self.interval:g} fs)", key="duration")
        return self

    @model_validator(mode="after")
    def _inside(self) -> Self:
        for anchor in self.anchor or ():
            if anchor.temperature not in self.temperature:
                raise problem(
                    f"temperatures among those of the ladder ({_listed(self.temperature)} K)", key="anchor"
                )
            if anchor.pressure not in self.pressure:
                raise problem(
                    f"pressures among those of the ladder ({_listed(self.pressure)} GPa)", key="anchor"
                )
        low, high = min(self.pressure), max(self.pressure)
        if any(not low <= pressure <= high for pressure in self.report_at or ()):
            raise problem(f"pressures within those of the ladder, {low:g} to {high:g} GPa", key="report_at")
        return self

    @property
    def anchors(self) -> tuple[Anchor, ...]:
        """States of the absolute free energies, with the default."""
        if self.anchor is not None:
            return self.anchor
        middle = sorted(self.temperature)[len(self.temperature) // 2]
        return (Anchor(temperature=middle, pressure=min(self.pressure)),)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values))
