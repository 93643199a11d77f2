"""The targets after training: every loss is measured on new frames, which the refined potential drew itself.

What a loss measures during training is reweighted from frames that helped to choose the parameters, and the
thermal part of static elastic constants is that of an earlier model. Neither is a verdict.
"""

from collections.abc import Sequence

from mlip_refine.errors import MlipRefineError, SamplingError, StatisticsError
from mlip_refine.losses import EnsembleLoss, FreeEnergyDifference, Loss, PotentialLoss
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.training.tracker import EnsembleSampler, own_frames

STAGE = "evaluation-targets"
"""Name of the frames in the store."""


def measured_afresh(
    potential: Potential, losses: Sequence[Loss], sampler: EnsembleSampler
) -> tuple[dict[str, dict[str, Measured]], list[str]]:
    """Measure what losses on ensembles, and losses on the potential with targets, measure.

    Free-energy differences are left out: they have an evaluation of their own (see `evaluation`).

    Args:
        potential: The refined potential.
        losses: Losses of the run.
        sampler: Draws frames, with another seed than that of the training.

    Returns:
        Quantities by loss and name, and a line for every loss that cannot be measured.
    """
    measured: dict[str, dict[str, Measured]] = {}
    notes = []
    judged = [
        loss
        for loss in losses
        if (isinstance(loss, EnsembleLoss) and not isinstance(loss, FreeEnergyDifference))
        or (isinstance(loss, PotentialLoss) and loss.targets)
    ]
    sources = sorted({source for loss in judged for source in loss.sources})
    try:
        together = sampler.draw(potential, sources, STAGE) if sources else {}
    except (SamplingError, StatisticsError):
        # One of the systems fails: each loss is then measured by itself.
        together = None
    for loss in judged:
        try:
            drawn = together
            if drawn is None:
                drawn = sampler.draw(potential, loss.sources, f"{STAGE}-{loss.name}") if loss.sources else {}
            frames = own_frames(potential, loss, drawn)
            if isinstance(loss, EnsembleLoss):
                result = loss.evaluate(frames)
            else:
                if frames:
                    loss.follow(potential, frames)
                result = loss.measure(potential)
            measured[loss.name] = dict(result.diagnostics)
        except MlipRefineError as error:
            notes.append(f"{loss.name} could not be measured after training: {error}")
    return measured, notes
