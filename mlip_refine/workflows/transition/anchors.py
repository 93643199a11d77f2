"""Absolute free energies of both phases at the anchors of their ladders."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from mlip_refine.errors import SamplingError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.sampling import FrameStore, StatePoint
from mlip_refine.training.tracker import stage_seed
from mlip_refine.workflows.free_energy.cells import LiquidCell, liquid_cell
from mlip_refine.workflows.free_energy.frenkel_ladd import AbsoluteFreeEnergy, absolute_free_energies
from mlip_refine.workflows.free_energy.liquid_path import liquid_free_energies
from mlip_refine.workflows.free_energy.records import LIMIT
from mlip_refine.workflows.transition.ladder import (
    Climbed,
    lost_rungs,
    mean_cell,
)
from mlip_refine.workflows.transition.prepare import Prepared

type Anchors = dict[EnsembleSource, AbsoluteFreeEnergy]
"""Absolute free energies by the states of the anchors."""


def compute_anchors(
    prepared: Prepared,
    frozen: Potential,
    rungs: Mapping[EnsembleSource, StatePoint],
    climbed: Climbed,
    store: FrameStore,
) -> Anchors:
    """Compute the absolute free energies of both phases, each in the mean cell of the rung of its anchor.

    Raises:
        SamplingError: If a phase did not survive at an anchor.
        StatisticsError: If windows do not overlap, or frames do not determine a finite-size term.
    """
    settings, lost = prepared.free_energy, lost_rungs(climbed)
    crystals, liquids = dict[EnsembleSource, StatePoint](), dict[EnsembleSource, LiquidCell]()
    for phase, anchor in product(prepared.phases, prepared.section.anchors):
        source = EnsembleSource(phase, anchor.temperature, anchor.pressure)
        if source in lost:
            raise SamplingError(
                f"there is no anchor where the phase does not survive: {lost[source]}; choose another "
                "transition.anchor"
            )
        point = replace(rungs[source], ensemble="nvt", replicas=settings.replicas)
        if point.is_liquid:
            liquids[source] = liquid_cell(point, climbed[source])
        else:
            crystals[source] = point.with_cell(mean_cell(climbed[source]))
    limit = {point.name for point in crystals.values()} if prepared.convention == LIMIT else set()
    found: dict[str, AbsoluteFreeEnergy] = {}
    if crystals:
        found |= absolute_free_energies(
            frozen,
            list(crystals.values()),
            settings.md,
            settings.ladder,
            seed=settings.seed,
            stage="anchors",
            store=store,
            limit=limit,
        )
    if liquids:
        found |= liquid_free_energies(
            frozen,
            list(liquids.values()),
            settings.md,
            settings.liquid,
            seed=stage_seed(settings.seed, "liquid"),
            stage="liquid-anchors",
            store=store,
        )
    return {source: found[source.name] for source in (*crystals, *liquids)}


def size_term(found: AbsoluteFreeEnergy) -> Measured:
    """Return the finite-size term of an anchor's cell, eV; 0 where it is part of the convention."""
    return Measured(found.size_term or 0.0, found.size_term_se, "eV")
