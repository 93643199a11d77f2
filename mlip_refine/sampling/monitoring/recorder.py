"""Frames of a running batch, and which of them count."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mlip_refine.sampling.md.integrators import Integrator
from mlip_refine.sampling.state_points import StatePoint, Trajectory

# A step that no run reaches.
NEVER = 2**62


class Recorder:
    """Collects frames of all systems; frames of a system can be discarded afterwards."""

    def __init__(self, n_systems: int) -> None:
        """Start without frames."""
        self._n_systems = n_systems
        self._steps: list[int] = []
        self._revoked = torch.full((n_systems,), NEVER)
        self._kept: list[Tensor] = []
        self._series: dict[str, list[Tensor]] = {}

    def take(self, step: int, integrator: Integrator, idle: Sequence[int]) -> None:
        """Store the present frame; systems that are idle do not count."""
        state, forcefield = integrator.state, integrator.forcefield
        frame = {
            "positions": state.positions,
            "cells": state.row_vector_cell,
            "model_energy": forcefield.model_energy,
            "bias_energy": forcefield.bias_energy,
            "stress": forcefield.stress,
            "kinetic_energy": integrator.kinetic(),
        }
        for name, value in frame.items():
            # A copy in any case: the dynamics goes on in place.
            self._series.setdefault(name, []).append(value.detach().to("cpu", torch.float64, copy=True))
        kept = torch.ones(self._n_systems, dtype=torch.bool)
        kept[list(idle)] = False
        self._kept.append(kept)
        self._steps.append(step)

    def discard(self, system: int, since: int) -> None:
        """Let the frames of a system after a step not count, here and in earlier segments."""
        self._revoked[system] = min(int(self._revoked[system]), since)
        for step, kept in zip(self._steps, self._kept, strict=True):
            if step > since:
                kept[system] = False

    def trajectories(
        self, points: Sequence[StatePoint], verdicts: Sequence[Sequence[str]]
    ) -> dict[str, Trajectory]:
        """What was recorded, by point; the replicas of a point are consecutive systems.

        Args:
            points: In the order of the batch.
            verdicts: Of every point.
        """
        series = {name: torch.stack(values) for name, values in self._series.items()}
        kept = torch.stack(self._kept).T
        result, system, atom = {}, 0, 0
        for point, lines in zip(points, verdicts, strict=True):
            n, systems = len(point.atoms), slice(system, system + point.replicas)
            block = series["positions"][:, atom : atom + n * point.replicas]
            per_system = {
                name: value[:, systems].transpose(0, 1).contiguous()
                for name, value in series.items()
                if name != "positions"
            }
            result[point.name] = Trajectory(
                point=point,
                positions=block.view(len(block), point.replicas, n, 3).transpose(0, 1).contiguous(),
                **per_system,
                kept=kept[systems].clone(),
                steps=torch.tensor(self._steps),
                revoked=self._revoked[systems].clone(),
                verdicts=tuple(lines),
            )
            system, atom = systems.stop, atom + n * point.replicas
        return result
