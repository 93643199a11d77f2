"""After training the losses are measured on new frames, which the refined potential drew itself."""

import math
from types import SimpleNamespace

import pytest
import torch

from mlip_refine.errors import SamplingError, StatisticsError
from mlip_refine.losses import EnsembleLoss, EnsembleSource, LossResult, PotentialLoss
from mlip_refine.quantities import KB, Measured, Target
from mlip_refine.sampling import FrameStore, Length, MDSettings, StatePoint
from mlip_refine.testing import HarmonicCrystals, harmonic_crystal, sigma_bound
from mlip_refine.training.tracker import EnsembleSampler
from mlip_refine.workflows.finetune.targets import STAGE, measured_afresh

COLD, HOT = (EnsembleSource("fcc", temperature, 0.0) for temperature in (100.0, 300.0))


class MeanEnergy(EnsembleLoss):
    """Mean energy of one ensemble."""

    def __init__(self, name, source):
        super().__init__(name, 1.0)
        self.source = source

    @property
    def sources(self):
        return (self.source,)

    def evaluate(self, frames):
        energy, inefficiency = frames[self.source].probes["energy"], frames[self.source].inefficiency
        se = float(energy.std()) * math.sqrt(inefficiency / len(energy))
        return LossResult(energy.mean(), diagnostics={"energy": Measured(float(energy.mean()), se, "eV")})


class Thermal(PotentialLoss):
    """A target for a number to which frames add something."""

    def __init__(self, name, sources=(), targets=True):
        super().__init__(name, 1.0)
        self.needs, self.added = sources, 0.0
        self.aims = {"sum": Target(1.0, 0.1, "eV")} if targets else {}

    @property
    def sources(self):
        return self.needs

    @property
    def targets(self):
        return self.aims

    def follow(self, potential, frames):
        self.added = float(torch.stack([f.probes["energy"].mean() for f in frames.values()]).sum())

    def evaluate(self, potential):
        total = torch.tensor(10.0 + self.added)
        return LossResult(total, diagnostics={"sum": Measured(float(total), 0.0, "eV")})


class Harmonic(HarmonicCrystals):
    """A harmonic crystal without parameters."""

    def parameters(self):
        return {}


@pytest.fixture
def potential():
    atoms, reference = harmonic_crystal("fcc")
    return Harmonic([reference], atoms.numbers)


@pytest.fixture
def sampler(tmp_path):
    atoms, _ = harmonic_crystal("fcc")
    points = {
        source: StatePoint(source.name, atoms, temperature=source.temperature, replicas=8, identity="none")
        for source in (COLD, HOT)
    }
    settings = MDSettings(timestep=2.0, friction=10.0, interval=40.0)
    return EnsembleSampler(
        points, settings, Length(1000.0, 40), FrameStore(tmp_path, {}), 1001, "float64", min_effective=10.0
    )


@pytest.mark.statistical
def test_averages_of_new_frames_are_those_of_the_potential(potential, sampler):
    """Of a harmonic crystal ⟨U⟩ = 3/2 (N - 1) kT, but for what the time step adds, a percent."""
    thermal = Thermal("thermal", (COLD,))
    measured, notes = measured_afresh(potential, [MeanEnergy("cold", COLD), thermal], sampler)
    assert notes == []
    found, exact = measured["cold"]["energy"], 1.5 * 31 * KB * 100.0
    assert 0 < found.se < 0.05 * exact
    assert abs(found.value - exact) < sigma_bound(dof=20) * found.se + 0.01 * exact
    assert measured["thermal"]["sum"].value == pytest.approx(10.0 + found.value)
    assert sampler.store.path(STAGE, 0).exists()


def test_what_has_no_target_or_another_evaluation_is_left_out(potential, sampler):
    measured, notes = measured_afresh(potential, [Thermal("phonons", targets=False)], sampler)
    assert (measured, notes) == ({}, [])
    measured, _ = measured_afresh(potential, [Thermal("static")], sampler)
    assert measured == {"static": {"sum": Measured(10.0, 0.0, "eV")}}


@pytest.mark.parametrize("error", [SamplingError("melted"), StatisticsError("too few frames")])
def test_one_failure_leaves_the_others(potential, sampler, error):
    """A phase that does not survive costs the losses that need it, and the run keeps the rest."""
    draw = sampler.draw

    def failing(potential, sources, stage):
        if HOT in sources:
            raise error
        return draw(potential, sources, stage)

    losses = [MeanEnergy("hot", HOT), MeanEnergy("cold", COLD)]
    measured, notes = measured_afresh(potential, losses, SimpleNamespace(draw=failing))
    assert set(measured) == {"cold"}
    assert notes == [f"hot could not be measured after training: {error}"]
