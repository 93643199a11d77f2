"""AdamW with clipped gradients, and a running mean of the parameters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mlip_refine.config import Training
from mlip_refine.errors import MlipRefineError
from mlip_refine.losses import BatchLoss, EnsembleLoss, EnsembleSource, LossResult, PotentialLoss
from mlip_refine.observables.base import Probes
from mlip_refine.potential import Potential
from mlip_refine.training.ensemble import Ensemble
from mlip_refine.training.replay import LabelledFrame, backpropagate_batch
from mlip_refine.training.streaming import backpropagate, ensemble_losses


class Trial(Protocol):
    """What is known of a proposed step before it is taken."""

    def settle(self, fewest: float = 0.0) -> float:
        """Shorten the step where it leads too far; the part of it that is left.

        Args:
            fewest: Effective frames, in whole draws, that every state must have at its end in any case.
        """

    def objective(self) -> float:
        """Weighted sum of the losses where the parameters are now, on the frames of this update."""

    def refuse(self) -> None:
        """Record that the step was rejected and the parameters are unchanged."""


def trained(potential: Potential) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name.

    Raises:
        MlipRefineError: There are none.
    """
    parameters = potential.trainable_parameters()
    if not parameters:
        raise MlipRefineError("every parameter is frozen: there is nothing to train")
    return parameters


class AdamW:
    """AdamW, gradient clipping and an exponential moving average (EMA) with bias correction."""

    def __init__(self, potential: Potential, settings: Training) -> None:
        """Take the trainable parameters of a potential.

        Raises:
            MlipRefineError: If nothing is trainable.
        """
        self.potential = potential
        self.parameters = trained(potential)
        self.settings = settings
        self.adam = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._taken = 0
        self._sum = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._weight = 0.0

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def ensembles(
        self,
        losses: Sequence[EnsembleLoss],
        current: Mapping[EnsembleSource, Ensemble],
        probes: Mapping[EnsembleSource, Probes],
    ) -> dict[str, LossResult]:
        """Evaluate losses on ensembles, and add their gradients to those of the parameters."""
        results, adjoints = ensemble_losses(losses, current, probes)
        for source, adjoint in adjoints.items():
            backpropagate(self.potential, current[source].structures, adjoint)
        return results

    def direct(self, loss: PotentialLoss) -> LossResult:
        """Evaluate a loss on the potential, and add its gradient."""
        return loss.backpropagate(self.potential)

    def batch(
        self, losses: Sequence[BatchLoss], frames: Sequence[LabelledFrame], scale: float
    ) -> dict[str, LossResult]:
        """Evaluate batch losses on labelled frames, and add their gradients."""
        return backpropagate_batch(self.potential, losses, frames, scale)

    def step(self, trial: Trial | None = None) -> float:
        """Clip, update, average.

        Args:
            trial: May shorten the step. The moments of Adam are those of the whole gradient all the same.

        Returns:
            The norm of the gradient before clipping.

        Raises:
            MlipRefineError: If the gradient is not finite; the parameters are then untouched.
        """
        for group in self.adam.param_groups:
            group["lr"] = self._learning_rate()
        limit = self.settings.clip_gradient or torch.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if not torch.isfinite(torch.tensor(norm)):
            raise MlipRefineError("the gradient is not finite: the parameters were left as they were")
        self.adam.step()
        self._taken += 1
        if trial is not None:
            trial.settle()
        decay = self.settings.ema_decay
        self._weight = decay * self._weight + (1 - decay)
        for name, parameter in self.parameters.items():
            self._sum[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)
        return norm

    def _learning_rate(self) -> float:
        """Step size of the next update: it grows, then falls along half a cosine (Loshchilov 2017)."""
        grown = min(1.0, (self._taken + 1) / (self.settings.warmup + 1))
        first, last = grown * self.settings.learning_rate, self.settings.final_learning_rate
        if last is None:
            return first
        done = min(1.0, self._taken / max(1, self.settings.steps - 1))
        return last + 0.5 * (first - last) * (1.0 + math.cos(math.pi * done))

    def averaged(self) -> dict[str, Tensor]:
        """The parameters to keep: their running mean, or the current ones where averaging is off."""
        if self.settings.ema_decay == 0 or self._weight == 0:
            return {name: p.detach().clone() for name, p in self.parameters.items()}
        return {name: total / self._weight for name, total in self._sum.items()}

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "adam": self.adam.state_dict(),
            "sum": self._sum,
            "weight": self._weight,
            "taken": self._taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.adam.load_state_dict(state["adam"])
        for name, total in state["sum"].items():
            self._sum[name].copy_(total)
        self._weight, self._taken = float(state["weight"]), int(state["taken"])
