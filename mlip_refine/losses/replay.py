"""Replay of labelled frames: mean squared errors of energy, forces and stress."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.losses.base import BatchLoss, LossResult
from mlip_refine.losses.options import ReplayOptions


class Replay(BatchLoss):
    """energy_weight ⟨(ΔE/N)²⟩ + forces_weight ⟨ΔF²⟩ + stress_weight ⟨Δσ²⟩ over a batch.

    Each mean is over the frames that have the label, that of the forces over the components of their atoms.
    The squares of a frame count with its weights, which are 1 unless the frame says otherwise. Where all
    labels are there, this is the stress loss of MACE.
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
            labels: The same, `n_atoms` `[B]`, and for every label which frames have it (`has_energy`, ...,
                1 or 0) and how they are weighted (`energy_weight`, ...) `[B]`.
        """
        n_atoms, errors = labels["n_atoms"], dict[str, Tensor]()
        for probe in ("energy", "forces", "stress"):
            if probe not in self.probes:
                continue
            has, weight = labels[f"has_{probe}"], labels[f"has_{probe}"] * labels[f"{probe}_weight"]
            squares = outputs[probe] - labels[probe]
            if probe == "energy":
                squares = (squares / n_atoms).square()
            elif probe == "forces":
                squares = squares.square().mean(1)
                has, weight = (values.repeat_interleave(n_atoms.long()) for values in (has, weight))
            else:
                squares = squares.square().mean((1, 2))
            errors[probe] = (weight * squares).sum() / has.sum().clamp(min=1)
        parts = {probe: self.weights[probe] * error for probe, error in errors.items()}
        value = torch.stack(list(parts.values())).sum()
        components = {f"{self.name}.{probe}": float(part.detach()) for probe, part in parts.items()}
        return LossResult(value, components)
