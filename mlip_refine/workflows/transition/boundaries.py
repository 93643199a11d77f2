"""From rungs and anchors to the boundary: both phases over the ladder, the roots of ΔG, and where to look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mlip_refine.losses import EnsembleSource
from mlip_refine.quantities import GPA
from mlip_refine.sampling import StatePoint
from mlip_refine.sampling.sampler import Start
from mlip_refine.statistics.boundary import BoundaryPoint, boundary_point
from mlip_refine.workflows.free_energy.records import LIMIT
from mlip_refine.workflows.transition.anchors import Anchors, size_term
from mlip_refine.workflows.transition.ladder import (
    Climbed,
    join_rungs,
    lost_rungs,
)
from mlip_refine.workflows.transition.prepare import Prepared
from mlip_refine.workflows.transition.surface import Anchor, AnchoredSurface


@dataclass(frozen=True)
class Surfaces:
    """Both phases, and what was left out on the way to them.

    Attributes:
        phases: Gibbs energies of both, in the order from, to.
        used: Trajectories that they rest on.
        lost: Rungs that were not used, one line each.
    """

    phases: tuple[AnchoredSurface, AnchoredSurface]
    used: tuple[Climbed, Climbed]
    lost: tuple[str, ...]


def anchored_surfaces(prepared: Prepared, climbed: Climbed, anchors: Anchors) -> Surfaces:
    """Join the rungs that can be used, and anchor them."""
    lost = lost_rungs(climbed)
    surfaces, used = [], []
    for phase in prepared.phases:
        mine = {s: run for s, run in climbed.items() if s.phase == phase and s not in lost}
        known = [
            Anchor(source.temperature, source.pressure * GPA, found.gibbs, size_term(found))
            for source, found in anchors.items()
            if source.phase == phase
        ]
        surface = AnchoredSurface(
            join_rungs(phase, list(mine.values())),
            known,
            liquid=next(iter(mine.values())).point.is_liquid,
            limit=prepared.convention == LIMIT,
        )
        surfaces.append(surface)
        used.append(mine)
    return Surfaces((surfaces[0], surfaces[1]), (used[0], used[1]), tuple(lost.values()))


def find_boundary(prepared: Prepared, surfaces: Surfaces) -> list[tuple[float, BoundaryPoint | None, str]]:
    """Return pressure, GPa, point of the boundary or None, and the reason for none."""
    section, (one, two) = prepared.section, surfaces.phases
    low, high = common_range(surfaces)
    points = []
    for pressure in sorted(section.report_at or section.pressure):
        found, note = boundary_point(
            partial(one.at, pressure=pressure * GPA), partial(two.at, pressure=pressure * GPA), low, high
        )
        if found is not None and (refusal := _refusal(prepared, found)):
            found, note = None, refusal
        points.append((pressure, found, note))
    return points


def _refusal(prepared: Prepared, found: BoundaryPoint) -> str:
    """Return why a point of the boundary is refused, with what would do; empty if it is not."""
    t, least, most = found.temperature, prepared.min_effective, prepared.section.max_error
    if found.difference.n_eff < least:
        return (
            f"{found.difference.n_eff:.1f} independent frames at {t.value:.0f} K are fewer than {least:g} "
            "(sampling.min_effective_frames): sample longer, or at temperatures and pressures nearer to it"
        )
    if most is not None and t.se > most:
        return (
            f"{t} has a larger error than transition.max_error = {most:g} K, {found.common:.2g} K of it from "
            f"the anchors: sample about {(t.se / most) ** 2:.2g} times as long (transition.duration, and "
            "free_energy.production for the anchors)"
        )
    return ""


def common_range(surfaces: Surfaces) -> tuple[float, float]:
    """Return the temperatures that both phases are known at, lowest and highest, K."""
    ranges = [surface.ladder.temperatures for surface in surfaces.phases]
    return max(low for low, _ in ranges), min(high for _, high in ranges)


def temperature_beyond(
    surfaces: Surfaces,
    points: Sequence[tuple[float, BoundaryPoint | None, str]],
    temperatures: Sequence[float],
) -> float | None:
    """Return the temperature by which the ladder grows towards a boundary outside it, K; None if by none.

    A phase that did not survive on that side cannot be followed there.
    """
    one, two = surfaces.phases
    ends = common_range(surfaces)
    for pressure in (pressure for pressure, found, _ in points if found is None):
        gaps = [
            float(two.at(t, pressure * GPA, errors=False).gibbs[0])
            - float(one.at(t, pressure * GPA, errors=False).gibbs[0])
            for t in ends
        ]
        if gaps[0] * gaps[1] <= 0:
            continue
        # The boundary lies on the side on which ΔG is closer to zero.
        if abs(gaps[1]) < abs(gaps[0]):
            edge, wanted = temperatures[-1] == ends[1], 2 * temperatures[-1] - temperatures[-2]
        else:
            edge, wanted = temperatures[0] == ends[0], 2 * temperatures[0] - temperatures[1]
        if edge and wanted > 0:
            return wanted
    return None


def further_rungs(
    points: Mapping[EnsembleSource, StatePoint], surfaces: Surfaces, temperature: float
) -> tuple[dict[EnsembleSource, StatePoint], Start]:
    """Return rungs at a further temperature, and the last frames of the nearest ones, to start from."""
    further, start = {}, {}
    used = {source: run for each in surfaces.used for source, run in each.items()}
    for source in {replace(each, temperature=temperature) for each in used}:
        nearest = min(
            (s for s in used if (s.phase, s.pressure) == (source.phase, source.pressure)),
            key=lambda s: abs(s.temperature - temperature),
        )
        further[source] = replace(points[nearest], name=source.name, temperature=temperature)
        start[source.name] = used[nearest].last()
    return dict(sorted(further.items())), start
