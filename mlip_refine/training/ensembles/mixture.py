"""The references of an ensemble: joining a draw to the others, dropping those that have become useless."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mlip_refine.potential import Potential, Structure
from mlip_refine.quantities import Measured
from mlip_refine.statistics import require_overlap, stratified_error
from mlip_refine.training.ensembles.ensemble import Draw, Ensemble, reduced

USELESS = 0.05
"""A reference is dropped if at most this share of the effective frames of the current model goes with it."""

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
    moved = _anchored(ensemble, _successor(ensemble)) if index == 0 else ensemble
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


def _successor(ensemble: Ensemble) -> int:
    own = ensemble.point.name
    return next(k for k, d in enumerate(ensemble.draws) if k > 0 and d.point.name == own)


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
