"""The section ``replay``: labelled frames that hold what the model knows."""

from pydantic import Field

from mlip_refine.config.section import Count, Paths, Section


class Replay(Section):
    """Frames with energies, forces and stresses in extended XYZ."""

    train: Paths = Field(description="File or files to train on.")
    valid: Paths = Field(description="File or files held out, to measure errors before and after.")
    energy_key: str = Field("REF_energy", min_length=1, description="Key of the energy of a frame, eV.")
    forces_key: str = Field("REF_forces", min_length=1, description="Key of the forces, eV/Å.")
    stress_key: str = Field(
        "REF_stress", min_length=1, description="Key of the stress, eV/Å³, tensile positive."
    )
    functional: str | None = Field(
        None, description="Of the labels, such as PBE: phonons of another one are named when trained on."
    )
    max_frames: Count | None = Field(None, description="Read at most this many training frames; null: all.")
    batch_size: Count = Field(4, description="Frames in one batch.")
