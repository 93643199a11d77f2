"""Replay of labelled frames: mean squared errors of energy, forces and stress."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.losses.base import BatchLoss, LossResult
from mlip_refine.losses.options import ReplayOptions

MACE_WEIGHTS = {"energy": 1.0, "forces": 100.0, "stress": 10.0}
"""Defaults of MACE's stress loss: 1/eV², Å²/eV², Å⁶/eV²."""

SIZE = 5.0
"""Size at which each part starts: as an error grows by 10 %, it grows by 1, like a target missed by 1 σ."""


class Replay(BatchLoss):
    """energy_weight ⟨(ΔE/N)²⟩ + forces_weight ⟨ΔF²⟩ + stress_weight ⟨Δσ²⟩ over a batch.

    Each mean is over the frames that have the label, that of the forces over the components of their atoms.
    The squares of a frame count with its weights, which are 1 unless the frame says otherwise. Where all
    labels are there, this is the stress loss of MACE.
    """

    Options = ReplayOptions
    squares = True

    def __init__(self, name: str, weight: float, options: ReplayOptions) -> None:
        """Create the loss; weights that the options lack are `MACE_WEIGHTS` until `scaled_to` sets them.

        Raises:
            InputError: If all weights are zero: the replay would be silently off.
        """
        super().__init__(name, weight)
        self.options = options
        self.weights = {name: getattr(options, f"{name}_weight") for name in MACE_WEIGHTS}
        if not any(weight is None or weight for weight in self.weights.values()):
            raise InputError(f"all weights of loss {name!r} are zero", expected="at least one above zero")
        self.weights = {k: MACE_WEIGHTS[k] if w is None else w for k, w in self.weights.items()}
        self.probes = frozenset(probe for probe, weight in self.weights.items() if weight > 0)

    def scaled_to(self, errors: Mapping[str, float]) -> Self:
        """Return the loss with weights that were not given such that each part has the same size, `SIZE`.

        Args:
            errors: Root mean square errors of the initial model: `energy`, eV/atom, `forces`, eV/Å, `stress`,
                eV/Å³, as far as there are labels.
        """
        # Two digits: weights do not depend on the last bits of a machine.
        weights = {f"{k}_weight": float(f"{SIZE / error**2:.2g}") for k, error in errors.items()}
        given = {k: w for k in weights if (w := getattr(self.options, k)) is not None}
        return type(self)(self.name, self.weight, self.options.model_copy(update=weights | given))

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
