"""The section ``potential``: which model, in which precision, with what kept fixed."""

from typing import Literal

from pydantic import Field

from mlip_refine.config.section import Section, Words


class Potential(Section):
    """The pretrained model that a run starts from."""

    model: str = Field(
        min_length=1,
        description="Embedded name (titanium-compact), path of a checkpoint, or name of a foundation model.",
    )
    head: str | None = Field(
        None,
        description="Head of a multi-head model; null: the only one, the one called default, or the first.",
    )
    default_dtype: Literal["float32", "float64"] = Field("float64", description="Precision of the model.")
    trust_pickle: bool = Field(
        False, description="Load a checkpoint that may run code while it is read: only for files you trust."
    )
    freeze: Words = Field((), description="Glob patterns of parameter names that stay as they are.")
