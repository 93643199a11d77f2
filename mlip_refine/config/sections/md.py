"""The section ``md``: molecular dynamics for its own sake, and the time correlations of its frames."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mlip_refine.config.section import Copies, Section
from mlip_refine.config.sections.phases import CellFreedom, PhaseIdentity
from mlip_refine.config.units import Dimension, Pressure, Temperature, Time, TimeOrZero, problem


def several(value: object) -> object:
    """Read one value as a list of one."""
    several = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not several:
        raise problem("one value or a list of at least one")
    return several


Temperatures = Annotated[
    tuple[Temperature, ...],
    BeforeValidator(several, json_schema_input_type=Temperature | list[Temperature]),
]
Pressures = Annotated[
    tuple[Pressure, ...], BeforeValidator(several, json_schema_input_type=Pressure | list[Pressure])
]
Names = Annotated[tuple[str, ...], BeforeValidator(several, json_schema_input_type=str | list[str])]


VISCOSITY = Dimension(
    "viscosity",
    {"mPa*s": 1.0, "mPa s": 1.0, "mPa·s": 1.0, "Pa*s": 1e3, "Pa s": 1e3, "Pa·s": 1e3, "cP": 1.0},
    above=0.0,
)

Viscosity = Annotated[float, VISCOSITY]


class Dynamics(Section):
    """Time correlations of the frames; the errors come from blocks of at least two windows."""

    window: Time = Field(1000.0, description="Longest time of displacements and correlations, fs.")
    finite_size_correction: bool = Field(
        False,
        description="Correct the diffusion of a liquid for the size of its cubic box (Yeh and Hummer 2004).",
    )
    viscosity: Viscosity | None = Field(
        None, description="Of that correction, mPa*s; null: from the stress of the frames."
    )

    @model_validator(mode="after")
    def _every_key_counts(self) -> Self:
        if self.viscosity is not None and not self.finite_size_correction:
            raise problem("finite_size_correction: true beside it", key="viscosity")
        return self


class MD(Section):
    """Every phase at every temperature and pressure, all in one batch."""

    phases: Names | None = Field(None, description="Names of phases; null: all.")
    temperature: Temperatures = Field(description="One temperature or several, K.")
    pressure: Pressures = Field((0.0,), description="One pressure or several, GPa; of npt and nph.")
    ensemble: Literal["nvt", "npt", "nve", "nph"] = Field(
        "nvt",
        description="Cell fixed (nvt, nve) or free at the pressure (npt, nph); the temperature held "
        "(nvt, npt) or only that of the start (nve, nph). A phase with a fixed cell keeps it in all of them.",
    )
    thermostat: Literal["langevin", "nose_hoover"] = Field(
        "langevin", description="Of nvt: Langevin noise, or a Nosé-Hoover chain. npt is Langevin."
    )
    cell: CellFreedom | None = Field(
        None,
        description="What npt and nph may change, as cell_freedom of a phase; null: what the phase says.",
    )
    identity: PhaseIdentity | None = Field(
        None, description="What makes a system its phase, as identity of a phase; null: what the phase says."
    )
    duration: Time = Field(
        20000.0, description="Time after the equilibration, fs; a run may be resumed with a longer one."
    )
    equilibration: TimeOrZero = Field(
        2000.0, description="Time whose frames are stored, but do not enter averages, fs."
    )
    interval: Time = Field(100.0, description="Time between two stored frames, fs.")
    segment: Time = Field(
        5000.0, description="Time between two writes to disk, fs: what an interruption costs at most."
    )
    replicas: Copies = Field(1, description="Independent copies of every system.")
    export: bool = Field(False, description="Write the frames that count as extended XYZ too.")
    dynamics: Dynamics | None = Field(
        None,
        description="Diffusion, viscosity and vibrational spectra from the frames; of nve, or nvt with a "
        "Nosé-Hoover chain.",
    )

    @model_validator(mode="after")
    def _points_differ(self) -> Self:
        for key in ("phases", "temperature", "pressure"):
            values = [value if isinstance(value, str) else f"{value:g}" for value in getattr(self, key) or ()]
            if len(set(values)) < len(values):
                raise problem("values that differ", key=key)
        return self

    @model_validator(mode="after")
    def _times_fit(self) -> Self:
        for key, value in (("duration", self.duration), ("segment", self.segment)):
            if value < self.interval:
                raise problem(f"at least one interval ({self.interval:g} fs)", key=key)
        return self

    @model_validator(mode="after")
    def _dynamics_are_seen(self) -> Self:
        if self.dynamics is None:
            return self
        if not (self.ensemble == "nve" or (self.ensemble == "nvt" and self.thermostat == "nose_hoover")):
            raise problem(
                "nve, or nvt with thermostat: nose_hoover",
                "Langevin noise and a moving cell change how atoms move.",
                key="dynamics",
            )
        if self.dynamics.window < 10 * self.interval:
            raise problem(f"a window of at least ten intervals ({10 * self.interval:g} fs)", key="dynamics")
        return self

    @model_validator(mode="after")
    def _every_key_counts(self) -> Self:
        """Refuse keys without an effect: a run should be what its config seems to say."""
        if self.thermostat == "nose_hoover" and self.ensemble != "nvt":
            raise problem(
                "langevin",
                f"A Nosé-Hoover chain goes with nvt, not with {self.ensemble}.",
                key="thermostat",
            )
        if self.ensemble in ("nvt", "nve"):
            if self.cell is not None:
                raise problem(f"no key 'cell': {self.ensemble} keeps the cell", key="cell")
            if self.pressure != (0.0,):
                raise problem(f"no key 'pressure': {self.ensemble} keeps the volume", key="pressure")
        elif self.cell == "fixed":
            without = {"npt": "nvt", "nph": "nve"}[self.ensemble]
            raise problem("a cell that can move", f"With a fixed one it is ensemble {without}.", key="cell")
        return self
