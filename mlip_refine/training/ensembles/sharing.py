"""Frames lent between state points of a phase: neighbours in temperature and pressure help each other."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.losses import EnsembleSource
from mlip_refine.sampling import StatePoint
from mlip_refine.training.ensembles.ensemble import Draw, Ensemble
from mlip_refine.training.ensembles.mixture import Energies, joined, pruned

WORTH = 0.25
"""A lent frame must add at least this part of what a frame of the state itself would."""


def may_lend(one: StatePoint, other: StatePoint) -> bool:
    """Whether frames of one state are configurations of the other: cells free alike, or one fixed cell."""
    kinds = (one.ensemble, one.cell_freedom) == (other.ensemble, other.cell_freedom)
    same_cell = np.array_equal(one.atoms.cell.array, other.atoms.cell.array)
    return kinds and (one.ensemble == "npt" or same_cell)


def with_lent(
    ensembles: Mapping[EnsembleSource, Ensemble],
    drawn: Mapping[EnsembleSource, Draw],
    energies: Mapping[EnsembleSource, Tensor],
    references: Energies,
    most: int,
) -> tuple[dict[EnsembleSource, Ensemble], dict[EnsembleSource, Tensor]]:
    """Lend the newest draws to the other state points of their phase, where they are worth their evaluation.

    Args:
        ensembles: Of all sources.
        drawn: New draws, of the current model.
        energies: Of the current model on all frames of every source `[n]`, eV.
        references: Evaluates older references on the frames of a new draw.
        most: References that may stay at a state, lent ones among them (see `pruned`).

    Returns:
        The ensembles that have changed, and the energies of the current model on their frames.
    """
    changed: dict[EnsembleSource, Ensemble] = {}
    known: dict[EnsembleSource, Tensor] = {}
    for source, ensemble in ensembles.items():
        current, energy = ensemble, energies[source]
        for lender, draw in drawn.items():
            if lender.phase == source.phase and lender != source and may_lend(draw.point, ensemble.point):
                current, energy = _helped(current, draw, energy, references, most)
        if current is not ensemble:
            changed[source], known[source] = current, energy
    return changed, known


def _helped(
    ensemble: Ensemble, draw: Draw, energy: Tensor, references: Energies, most: int
) -> tuple[Ensemble, Tensor]:
    """The ensemble with a lent draw of the current model, if it overlaps and is worth it.

    It counts with what the state gains once references that then help least have made room for it.
    """
    try:
        grown = joined(ensemble, draw, energy, references)
    except StatisticsError:
        return ensemble, energy
    left, now = pruned(grown, grown.energies[-1], most)
    gain = left.n_eff(now) - ensemble.n_eff(energy)
    return (left, now) if gain >= WORTH * len(draw) / ensemble.frames_per_draw else (ensemble, energy)
