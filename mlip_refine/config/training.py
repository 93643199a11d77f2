"""The section ``training``: the optimiser and when to stop."""

from pydantic import Field

from mlip_refine.config.section import Count, Section
from mlip_refine.config.units import PositiveEnergyPerAtom


class Training(Section):
    """AdamW on all losses together."""

    steps: Count = Field(40, description="Most updates of the parameters.")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False, description="Step size of AdamW.")
    final_learning_rate: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Step size at the last of all steps, reached along a cosine; null: it stays.",
    )
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Weight decay of AdamW.")
    clip_gradient: float | None = Field(
        10.0, gt=0, allow_inf_nan=False, description="Largest norm of the gradient; null: not clipped."
    )
    trust_region: bool = Field(
        True,
        description="Shorten a step that would leave a state point fewer effective frames than "
        "sampling.n_eff_threshold, and sample anew only where little of the step is left.",
    )
    ema_decay: float = Field(
        0.9, ge=0, lt=1, description="Decay of the running mean of the parameters; 0: off."
    )
    checkpoint_every: Count = Field(1, description="Updates between two checkpoints.")
    tolerance: PositiveEnergyPerAtom = Field(
        0.3, description="Distance from every target at which the run may stop, meV/atom."
    )
    patience: Count = Field(3, description="Updates in a row inside the tolerance that end the run.")
    replay_batches: Count = Field(1, description="Replay batches in one update.")
