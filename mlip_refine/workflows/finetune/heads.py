"""What training one head of a model did to its other heads, which share most of its weights."""

from collections.abc import Sequence

import numpy as np
import torch
from ase import Atoms

from mlip_refine.potential import Graphs, Potential, Structure, Work
from mlip_refine.quantities import MEV
from mlip_refine.workflows.finetune.records import HeadDrift

MOST_STRUCTURES = 32
"""Structures that heads are compared on, at most."""

_DISPLACEMENT = 0.05
"""Standard deviation of the displacements, Å, of crystals, on whose sites there may be no forces at all."""


def displaced_crystals(potential: Potential, crystals: Sequence[Atoms]) -> list[Structure]:
    """Return crystals with atoms off their sites, always the same; no more than `MOST_STRUCTURES`."""
    found = []
    for atoms in _thinned(crystals):
        moved = atoms.copy()
        shifts = np.random.default_rng(0).normal(scale=_DISPLACEMENT, size=moved.positions.shape)
        moved.positions += shifts
        found.append(potential.graphs.from_atoms(moved))
    return found


def head_drifts(
    initial: Potential, refined: Potential, structures: Sequence[Structure]
) -> dict[str, HeadDrift]:
    """Return how far energies and forces of every head moved that was not trained.

    Args:
        initial: The potential before training.
        refined: The potential after it.
        structures: What they are compared on; beyond `MOST_STRUCTURES` they are thinned out.

    Returns:
        The changes by head; nothing for a model with one head, or without structures.
    """
    if not structures:
        return {}
    chosen = _thinned(structures)
    sizes = torch.tensor([len(s.species) for s in chosen], dtype=torch.float64)

    def values(potential: Potential, head: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return energies per atom `[n]`, eV, and forces `[n_atoms, 3]`, eV/Å."""
        other = potential.with_head(head)

        def evaluated(_: slice, graphs: Graphs) -> tuple[torch.Tensor, torch.Tensor]:
            found = other.evaluate(graphs, ("energy", "forces"))
            return found["energy"].detach().double().cpu(), found["forces"].detach().double().cpu()

        energies, forces = zip(*other.in_chunks(Work.FORCES, chosen, evaluated), strict=True)
        return torch.cat(energies) / sizes, torch.cat(forces)

    def rms(tensor: torch.Tensor) -> float:
        return float(tensor.square().mean().sqrt()) / MEV

    drifts = {}
    for head in refined.heads:
        if head == refined.head:
            continue
        (energy, forces), (energy_after, forces_after) = values(initial, head), values(refined, head)
        drifts[head] = HeadDrift(
            energy_meV_per_atom=rms(energy_after - energy),
            forces_meV_per_A=rms(forces_after - forces),
            forces_before_meV_per_A=rms(forces),
            n_structures=len(chosen),
        )
    return drifts


def _thinned[T](items: Sequence[T]) -> list[T]:
    """Return every n-th item, so that they are `MOST_STRUCTURES` at most."""
    return list(items[:: max(1, -(-len(items) // MOST_STRUCTURES))])
