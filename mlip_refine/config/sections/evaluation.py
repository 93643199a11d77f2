"""The section ``evaluation``: fresh sampling that gives the verdict after training."""

from pydantic import Field

from mlip_refine.config.section import Count, Section
from mlip_refine.config.units import Time, TimeOrZero


class Evaluation(Section):
    """Both potentials sampled anew, each in its own cell."""

    replicas: Count = Field(4, description="Independent copies of every system.")
    equilibration: TimeOrZero = Field(
        1000.0, description="Time that is thrown away before frames are stored, fs."
    )
    frames: Count = Field(20, description="Frames that each replica stores.")
    interval: Time = Field(100.0, description="Time between two stored frames, fs.")
    cell_iterations: Count = Field(2, description="Newton steps from the initial cells to the refined ones.")
    seed_offset: Count = Field(
        1000, description="Added to the seed, so that no frame of the training is met again."
    )
