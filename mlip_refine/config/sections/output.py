"""The section ``output``: what a run leaves behind, and where."""

from pydantic import Field

from mlip_refine.config.section import Section


class Output(Section):
    """The run folder."""

    folder: str = Field(
        "runs",
        min_length=1,
        description="The run goes to folder/name; a relative folder starts where you are.",
    )
    keep_frames: bool = Field(True, description="Keep the sampled frames (HDF5) when the run has ended.")
    figures: bool = Field(True, description="Draw figures (PNG).")
