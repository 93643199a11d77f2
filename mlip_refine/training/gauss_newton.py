"""Gauss-Newton: steps to the minimum of a model that is quadratic in the parameters, as far as it holds.

Targets are few and parameters many, so the residuals of targets and all their derivatives are known exactly
(`streaming`). The curvature of replay is sampled: its Gauss-Newton matrix JᵀDJ, with D second derivatives
of the loss in energies, forces and stress, is the mean of g gᵀ over gradients g = Jᵀ√D v with random signs v
(Hutchinson 1990). A step

    δ = -(AᵀA + λS)⁻¹ g

minimises the model g·δ + ½|Aδ|² of the objective with damping λ (Levenberg 1944, Marquardt 1963). S is
diagonal, √(d d̄) with d the diagonal of AᵀA and d̄ its mean: parameters that matter more are damped more, as
by Adam. So targets are approached along directions that labelled frames do not feel.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlip_refine.config import Training
from mlip_refine.errors import MlipRefineError
from mlip_refine.losses import BatchLoss, EnsembleLoss, EnsembleSource, LossResult, PotentialLoss
from mlip_refine.observables.base import Probes
from mlip_refine.potential import Potential
from mlip_refine.training.adamw import Trial, trained
from mlip_refine.training.ensemble import Ensemble
from mlip_refine.training.replay import LabelledFrame, linearise_batch
from mlip_refine.training.streaming import Rows, ensemble_rows, potential_rows

TRIES = 6
"""Most steps that are tried in one update, each shorter than the one before."""

FEWEST = 0.05
"""Effective frames, in whole draws, that an estimate of the objective at the end of a step needs."""

POOR, GOOD = 0.25, 0.75
"""Gain, in parts of what the quadratic model promised, below and above which the damping grows and falls."""

FACTOR = 3.0
"""By how much."""

FLOOR = 1e-4
"""Least damping of a parameter, in parts of the mean: of some, sampled rows know nothing."""

LEAST, MOST = 1e-9, 1e9
"""Limits of the damping."""

BLOCK = 4096
"""Parameters that are turned to double precision at a time."""


class GaussNewton:
    """Damped Gauss-Newton steps on everything that was added since the last one.

    Attributes:
        parameters: What is trained, by name.
        damping: λ of the next step.
    """

    def __init__(self, potential: Potential, settings: Training, seed: int) -> None:
        """Take the trainable parameters of a potential.

        Args:
            potential: Changed in place.
            settings: The first damping.
            seed: Seed of the random signs that sample the curvature of replay.

        Raises:
            MlipRefineError: If nothing is trainable.
        """
        self.potential = potential
        self.parameters = trained(potential)
        self.damping = settings.damping
        self._signs = torch.Generator().manual_seed(seed)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget what was added."""
        self._value = 0.0
        self._rows: list[Tensor] = []
        self._gradient = torch.zeros(sum(p.numel() for p in self.parameters.values()), dtype=torch.float64)

    def ensembles(
        self,
        losses: Sequence[EnsembleLoss],
        current: Mapping[EnsembleSource, Ensemble],
        probes: Mapping[EnsembleSource, Probes],
    ) -> dict[str, LossResult]:
        """Evaluate losses on ensembles, and add them to the next step."""
        results, rows = ensemble_rows(self.potential, losses, current, probes)
        self._add_squares(rows)
        return results

    def direct(self, loss: PotentialLoss) -> LossResult:
        """Evaluate a loss on the potential, and add it to the next step."""
        result, rows = potential_rows(self.potential, loss)
        self._add_squares(rows)
        return result

    def batch(
        self, losses: Sequence[BatchLoss], frames: Sequence[LabelledFrame], scale: float
    ) -> dict[str, LossResult]:
        """Evaluate batch losses on labelled frames, and add them to the next step."""
        results, gradient, rows = linearise_batch(self.potential, losses, frames, scale, self._signs)
        self._value += scale * sum(loss.weight * float(results[loss.name].value) for loss in losses)
        self._gradient += gradient.double()
        self._rows.append(rows)
        return results

    def _add_squares(self, rows: Rows) -> None:
        """Add Σ s²: its gradient is 2 Σ s ∂s, its Gauss-Newton matrix 2 Σ ∂s ∂sᵀ."""
        values, derivatives = rows
        self._value += float(values.square().sum())
        self._gradient += 2 * (values.double().cpu() @ derivatives.double())
        self._rows.append(2**0.5 * derivatives)

    def step(self, trial: Trial) -> float:
        """Take the step that the quadratic model proposes, with as much damping as the objective demands.

        Args:
            trial: Shortens a step, and evaluates what was added at its end.

        Returns:
            The norm of the gradient.

        Raises:
            MlipRefineError: If the gradient is not finite; the parameters are then untouched.
        """
        norm = float(self._gradient.norm())
        if not torch.isfinite(torch.tensor(norm)):
            raise MlipRefineError("the gradient is not finite: the parameters were left as they were")
        model = QuadraticModel(torch.cat(self._rows), self._gradient)
        self._rows = []
        start, damping = self.potential.parameters(), self.damping
        sizes = [p.numel() for p in self.parameters.values()]
        for _ in range(TRIES):
            proposed = model.step(damping)
            parts = zip(self.parameters.items(), proposed.split(sizes), strict=True)
            moved = {name: start[name] + part.view_as(p).to(start[name]) for (name, p), part in parts}
            self.potential.set_parameters({**start, **moved})
            alpha = trial.settle(FEWEST)
            promised = model.change(alpha * proposed)
            gain = (trial.objective() - self._value) / promised if promised < 0 else 0.0
            if gain > 0:
                # More damping after a step that was poor or had to be shortened, less after a good one.
                self.damping = damping
                if gain < POOR or alpha < 0.5:
                    self.damping = min(FACTOR * damping, MOST)
                elif gain > GOOD and alpha == 1.0:
                    self.damping = max(damping / FACTOR, LEAST)
                return norm
            damping = min(FACTOR**2 * damping, MOST)
        # Nothing helps: the objective is at its minimum, or what frames and batch say of it is noise.
        self.potential.set_parameters(start)
        self.damping = min(FACTOR * self.damping, MOST)
        trial.refuse()
        return norm

    def averaged(self) -> dict[str, Tensor]:
        """The parameters to keep: the current ones."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"damping": self.damping, "signs": self._signs.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.damping = float(state["damping"])
        self._signs.set_state(state["signs"])


class QuadraticModel:
    """g·δ + ½|Aδ|², with A of fewer rows than columns."""

    def __init__(self, rows: Tensor, gradient: Tensor) -> None:
        """Take A `[R, P]` and g `[P]`."""
        self.rows, self.gradient = rows, gradient
        diagonal = torch.cat([block.square().sum(0) for _, block in self._blocks()])
        mean = diagonal.mean()
        self.scale = (diagonal * mean).sqrt() + FLOOR * mean
        """Diagonal of S."""
        root = self.scale.rsqrt()
        self._gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for part, block in self._blocks():
            scaled = block * root[part]
            self._gram.addmm_(scaled, scaled.T)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        parts = [slice(i, i + BLOCK) for i in range(0, self.rows.shape[1], BLOCK)]
        return ((part, self.rows[:, part].double()) for part in parts)

    def step(self, damping: float) -> Tensor:
        """-(AᵀA + λS)⁻¹ g, by a matrix of the size of the rows (Woodbury)."""
        damped = self._gram + damping * torch.eye(len(self.rows), dtype=torch.float64)
        scaled = self.gradient / self.scale
        inner = torch.cholesky_solve(self.times(scaled)[:, None], torch.linalg.cholesky(damped))[:, 0]
        back = torch.cat([inner @ block for _, block in self._blocks()])
        return -(self.gradient - back) / (damping * self.scale)

    def times(self, step: Tensor) -> Tensor:
        """Aδ."""
        return torch.stack([block @ step[part] for part, block in self._blocks()]).sum(0)

    def change(self, step: Tensor) -> float:
        """What the objective should change by: below zero for the steps that are proposed."""
        return float(self.gradient @ step + 0.5 * self.times(step).square().sum())
