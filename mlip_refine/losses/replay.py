"""Replay of labelled frames: mean squared errors of energy, forces and stress."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.losses.base import BatchLoss, LossResult
from mlip_refine.losses.options import ReplayOptions


class Replay(BatchLoss):
    """energy_weight ⟨(ΔE/N)²⟩ + forces_weight ⟨ΔF²⟩ + stress_weight ⟨Δσ²⟩ over a batch.

    The mean of the forces is over components of all atoms, that of the stress over the frames that have one.
    """

    Options = ReplayOptions
    squares = True

    def __init__(self, name: str, weight: float, options: ReplayOptions) -> None:
        """Keep the weights.

        Raises:
            InputError: If all weights are zero: the replay would be silently off.
        """
        super().__init__(name, weight)
        self.weights = {
            "energy": options.energy_weight,
            "forces": options.forces_weight,
            "stress": options.stress_weight,
        }
        if not any(self.weights.values()):
            raise InputError(f"all weights of loss {name!r} are zero", expected="at least one above zero")
        self.probes = frozenset(probe for probe, weight in self.weights.items() if weight > 0)

    def evaluate(self, outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> LossResult:
        """The loss of one batch.

        Args:
            outputs: `energy` `[B]`, `forces` `[N, 3]`, `stress` `[B, 3, 3]` as the weights need.
            labels: The same, `n_atoms` `[B]`, and `has_stress` `[B]`.
        """
        errors = {}
        if "energy" in self.probes:
            errors["energy"] = ((outputs["energy"] - labels["energy"]) / labels["n_atoms"]).square().mean()
        if "forces" in self.probes:
            errors["forces"] = (outputs["forces"] - labels["forces"]).square().mean()
        if "stress" in self.probes:
            squares = (outputs["stress"] - labels["stress"]).square().mean((1, 2)) * labels["has_stress"]
            errors["stress"] = squares.sum() / labels["has_stress"].sum().clamp(min=1)
        parts = {probe: self.weights[probe] * error for probe, error in errors.items()}
        value = torch.stack(list(parts.values())).sum()
        components = {f"{self.name}.{probe}": float(part.detach()) for probe, part in parts.items()}
        return LossResult(value, components)
