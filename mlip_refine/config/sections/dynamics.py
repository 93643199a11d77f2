"""The section ``md.dynamics``: diffusion, viscosity and vibrational spectra of a run."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from mlip_refine.config.section import Section
from mlip_refine.config.units import Dimension, Time, problem

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
