"""The references of an ensemble: joining a draw to the others, and dropping those that have become useless.

Draws may also be lent between state points of a phase: neighbours in temperature and pressure help each
other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mlip_refine.errors import StatisticsError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential, Structure
from mlip_refine.quantities import Measured
from mlip_refine.sampling import StatePoint
from mlip_refine.statistics import require_overlap, stratified_error
from mlip_refine.training.ensembles.ensemble import Draw, Ensemble, reduced

USELESS = 0.05
"""A reference is dropped if at most this share of the effective frames of the current model goes with it."""

WORTH = 0.25
"""A lent frame must add at least this fraction of what a frame of the state itself would add."""

type Energies = Callable[[Draw, Sequence[Structure]], Tensor]
"""Energies `[n]`, eV, of the reference of a draw on any frames."""


def reference_energies(potential: Potential) -> Energies:
    """Energies under the parameters of a reference, by the model that is trained."""

    def energies(draw: Draw, structures: Sequence[Structure]) -> Tensor:
        with potential.holding(draw.reference):
            return potential.energies(structures)

    return energies


def joined(ensemble: Ensemble, draw: Draw, here: Tensor, energies: Energies) -> Ensemble:
    """The ensemble with one more draw, at its state or at another one.

    Args:
        ensemble: What is known so far.
        draw: The new draw.
        here: Energies of the new draw's reference on the frames of the ensemble `[n]`, eV.
        energies: Evaluates the older references on the frames of the new draw.

    Raises:
        StatisticsError: If the references overlap too little.
    """
    there = torch.stack([energies(d, draw.structures) for d in ensemble.draws])
    matrix = torch.cat([torch.cat([ensemble.energies, there], 1), torch.cat([here, draw.energy])[None]])
    influence = torch.cat([ensemble.shift_influence, torch.zeros_like(draw.energy)])
    grown = replace(ensemble, draws=(*ensemble.draws, draw), energies=matrix, shift_influence=influence)
    what = f"the chain of references of {ensemble.point.name}"
    require_overlap(1.0 - grown.mixture.second_eigenvalue, what)
    return grown


def without(ensemble: Ensemble, index: int) -> Ensemble:
    """The ensemble without one of its draws; if that is the anchor, the next draw at the state takes over.

    The new `shift` was estimated from frames that stay and from frames that go. What the former contribute to
    its error is kept frame by frame, for they are also in all later estimates; the latter's is kept as a
    number.
    """
    moved = ensemble
    if index == 0:
        own = ensemble.point.name
        successor = next(k for k, d in enumerate(ensemble.draws) if k > 0 and d.point.name == own)
        moved = _anchored(ensemble, successor)
    gone = next(k for k, d in enumerate(moved.draws) if d is ensemble.draws[index])
    order = [k for k in range(len(moved.draws)) if k != gone]
    sizes = [len(d) for d in moved.draws]
    columns, influences = moved.energies.split(sizes, dim=1), moved.shift_influence.split(sizes)
    lost = stratified_error(influences[gone], [sizes[gone]], [moved.draws[gone].inefficiency])
    return replace(
        moved,
        draws=tuple(moved.draws[k] for k in order),
        energies=torch.cat([columns[k][order] for k in order], dim=1),
        shift_influence=torch.cat([influences[k] for k in order]),
        shift=moved.shift + Measured(0.0, lost, "eV"),
    )


def _anchored(ensemble: Ensemble, anchor: int) -> Ensemble:
    """The same ensemble with another of its draws as the anchor."""
    order = [anchor, *(k for k in range(len(ensemble.draws)) if k != anchor)]
    sizes, kt = [len(d) for d in ensemble.draws], 1.0 / ensemble.point.beta
    energy = ensemble.energies[anchor]
    newest = ensemble.mixture.influence(reduced(ensemble.point, energy, ensemble.volume))
    influence = ensemble.shift_influence + kt * newest
    columns, influences = ensemble.energies.split(sizes, dim=1), influence.split(sizes)
    return replace(
        ensemble,
        draws=tuple(ensemble.draws[k] for k in order),
        energies=torch.cat([columns[k][order] for k in order], dim=1),
        shift_influence=torch.cat([influences[k] for k in order]),
        shift=ensemble.shift + Measured(kt * ensemble.mixture.difference(0, anchor)[0], 0.0, "eV"),
    )


def pruned(ensemble: Ensemble, energy: Tensor, most: int) -> tuple[Ensemble, Tensor]:
    """Drop references that the current model no longer needs, and the least needed ones beyond `most`.

    The newest draw at the state itself stays. Free energies keep their path to the initial model: `shift`
    moves with the anchor.

    Args:
        ensemble: Draws in the order in which they were joined.
        energy: Energies of the current model `[n]`, eV.
        most: References that may stay.

    Returns:
        The ensemble, and the energies of the current model on what is left of its frames.
    """
    while len(ensemble.draws) > 1:
        others = [k for k, d in enumerate(ensemble.draws) if d is not ensemble.latest]
        smaller = [_dropped(ensemble, energy, k) for k in others]
        left = [one.n_eff(u) for one, u in smaller]
        best = max(range(len(left)), key=left.__getitem__)
        if len(ensemble.draws) <= most and left[best] < (1.0 - USELESS) * ensemble.n_eff(energy):
            break
        ensemble, energy = smaller[best]
    return ensemble, energy


def _dropped(ensemble: Ensemble, energy: Tensor, index: int) -> tuple[Ensemble, Tensor]:
    smaller = without(ensemble, index)
    kept = dict(zip(map(id, ensemble.draws), energy.split([len(d) for d in ensemble.draws]), strict=True))
    return smaller, torch.cat([kept[id(d)] for d in smaller.draws])


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
        ensembles: Ensembles of all sources.
        drawn: New draws, of the current model.
        energies: Energies of the current model on all frames of every source `[n]`, eV.
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
