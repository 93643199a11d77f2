"""Free-energy matching of two analytic phases converges to the exact coexistence."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mlip_refine.losses import EnsembleSource, Frames, FreeEnergyDifference
from mlip_refine.losses.options import FreeEnergyDifferenceOptions
from mlip_refine.quantities import KB, MEV, Measured
from mlip_refine.statistics import bar_estimate, kish_size, log_weights, statistical_inefficiency
from mlip_refine.testing import chi_squared_bounds, sigma_bound

T = 800.0
KT, BETA = KB * T, 1 / (KB * T)
N_ATOMS, N_FRAMES = 10, 600
MODES = 3 * N_ATOMS


# Energy of phase two above phase one at their sites, eV.
WELL = 0.45


@dataclass
class Model:
    """Two harmonic crystals: U_one = ½ k Σx² and U_two = WELL + ½ r k Σx², with k and r to be learnt."""

    stiffness: torch.Tensor
    ratio: torch.Tensor

    def curvature(self, phase: str) -> torch.Tensor:
        return self.stiffness * self.ratio if phase == "two" else self.stiffness

    def potential(self, phase: str, squares: torch.Tensor) -> torch.Tensor:
        return (WELL if phase == "two" else 0.0) + 0.5 * self.curvature(phase) * squares

    def free_energy(self, phase: str) -> float:
        well = WELL if phase == "two" else 0.0
        return well + 0.5 * MODES * KT * math.log(self.curvature(phase).item())

    @property
    def delta_g(self) -> float:
        """Exact ΔG = G_two - G_one, meV/atom."""
        return (self.free_energy("two") - self.free_energy("one")) / (MEV * N_ATOMS)

    def copy(self) -> "Model":
        return Model(self.stiffness.detach().clone(), self.ratio.detach().clone())


@dataclass
class Drawn:
    """Exact draws of one phase under a reference model, reduced to what the energy depends on."""

    reference: Model
    phase: str
    squares: torch.Tensor
    shift: Measured

    @classmethod
    def draw(cls, model: Model, phase: str, generator: torch.Generator, shift: Measured) -> "Drawn":
        k = model.curvature(phase).item()
        x = torch.randn(N_FRAMES, MODES, generator=generator, dtype=torch.float64) * math.sqrt(KT / k)
        return cls(model.copy(), phase, x.square().sum(1), shift)

    def frames(self, model: Model) -> Frames:
        own = self.reference.potential(self.phase, self.squares)
        probes = {"energy": model.potential(self.phase, self.squares)}
        g = statistical_inefficiency(own)
        return Frames(
            probes=probes,
            positions=torch.zeros(N_FRAMES, N_ATOMS, 3, dtype=torch.float64),
            cells=torch.eye(3, dtype=torch.float64).expand(N_FRAMES, 3, 3),
            numbers=np.full(N_ATOMS, 22),
            masses=torch.ones(N_ATOMS, dtype=torch.float64),
            temperature=T,
            pressure=0.0,
            free_cell=False,
            log_q=-BETA * own,
            inefficiency=g,
            shift=self.shift,
        )

    def n_eff(self, model: Model) -> float:
        return float(kish_size(log_weights(-self.frames(model).work.detach()))) / N_FRAMES

    def renewed(self, model: Model, generator: torch.Generator) -> "Drawn":
        """Draws of the current model, with BAR from the old reference to it."""
        fresh = self.draw(model, self.phase, generator, self.shift)
        works = []
        for squares in (self.squares, fresh.squares):
            old = self.reference.potential(self.phase, squares)
            works.append((BETA * (fresh.reference.potential(self.phase, squares) - old)).detach())
        step = bar_estimate(*works)
        fresh.shift = self.shift + Measured(float(step.value) * KT, step.se * KT, "eV")
        return fresh


def _run(seed: int, target: float) -> tuple[float, Measured, int]:
    """Train; return the exact final ΔG, the measured one, and how often a phase was drawn anew."""
    start = Model(torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64))
    options = {"from": "one", "to": "two", "temperature": T, "target": target, "uncertainty": 1.0}
    checked = FreeEnergyDifferenceOptions.model_validate(options)
    loss = FreeEnergyDifference("one-two", 1.0, checked, Measured(start.delta_g, 0.0, "meV/atom"))
    model = start.copy()
    parameters = [model.stiffness.requires_grad_(), model.ratio.requires_grad_()]
    optimiser = torch.optim.Adam(parameters, lr=0.01, betas=(0.8, 0.9))
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[EnsembleSource, Drawn] = {
        s: Drawn.draw(model, s.phase, generator, Measured(0.0, 0.0, "eV")) for s in loss.sources
    }
    redrawn = 0
    for step in range(250):
        for source, old in drawn.items():
            if old.n_eff(model) < 0.8:
                drawn[source], redrawn = old.renewed(model, generator), redrawn + 1
        optimiser.param_groups[0]["lr"] = 0.01 * 0.98**step
        optimiser.zero_grad()
        loss.evaluate({s: d.frames(model) for s, d in drawn.items()}).value.backward()
        optimiser.step()
    result = loss.evaluate({s: d.frames(model) for s, d in drawn.items()})
    return model.delta_g, result.diagnostics["delta_g"], redrawn


@pytest.mark.statistical
def test_converges_to_the_exact_coexistence():
    """From ΔG = +34 meV/atom to 0: measured and exact value agree to an error below 0.5 meV/atom."""
    exact, measured, redrawn = _run(seed=0, target=0.0)
    assert redrawn >= 2
    assert abs(measured.value) < 0.05
    assert 0 < measured.se < 0.5
    assert abs(exact) < sigma_bound() * measured.se


@pytest.mark.statistical
def test_converges_to_any_target_and_its_error_is_honest():
    """Ten runs to ΔG = -4 meV/atom: the exact end is off by the stated error, by χ² of 10 and by the sum."""
    chi2, signs = 0.0, 0.0
    for seed in range(10):
        exact, measured, _ = _run(seed, target=-4.0)
        assert abs(measured.value + 4.0) < 0.05
        pull = (exact + 4.0) / measured.se
        chi2, signs = chi2 + pull**2, signs + pull
    low, high = chi_squared_bounds(10, comparisons=2)
    assert low < chi2 < high
    assert abs(signs) < sigma_bound(2) * math.sqrt(10)
