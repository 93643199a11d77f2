"""Steps end where enough frames still count, state by state."""

import pytest
import torch

from mlip_refine.losses import EnsembleSource
from mlip_refine.training.trust_region import CLOSE, TrustRegion

SOFT, HARD = EnsembleSource("soft", 500.0, 3.0), EnsembleSource("hard", 500.0, 3.0)


@pytest.fixture
def ensembles(wells):
    """Drawn under k = 2.0 and 2.1: on the way to stiffer wells the first state runs out of frames first."""
    return {SOFT: wells(2.0).draw(1), HARD: wells(2.1).draw(2)}


def _settled(region, model, ensembles, stop):
    """Settle a step from the model to another stiffness; the model ends there."""
    start = model.parameters()
    before = {s: e.n_eff(model.energies(e.structures)) for s, e in ensembles.items()}
    model.set_parameters(start | {"stiffness": torch.tensor(stop, dtype=torch.float64)})
    return region.settle(model, start, ensembles, before)


def test_a_step_inside_is_taken_whole(wells, ensembles):
    model = wells(2.05)
    settled = _settled(TrustRegion(0.8), model, ensembles, 2.15)
    assert (settled.alpha, settled.exhausted) == (1.0, ())
    assert model.stiffness == 2.15
    for source, energy in settled.energies.items():
        assert torch.equal(energy, model.energies(ensembles[source].structures))
    assert set(settled.energies) == {SOFT, HARD}


@pytest.mark.parametrize("stop", [3.2, 4.0, 6.0])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_a_step_too_far_ends_at_the_threshold(wells, ensembles, stop, threshold):
    model = wells(2.0)
    settled = _settled(TrustRegion(threshold), model, ensembles, stop)
    sizes = {s: e.n_eff(model.energies(e.structures)) for s, e in ensembles.items()}
    assert 0 < settled.alpha < 1
    assert model.stiffness == pytest.approx(2.0 + settled.alpha * (stop - 2.0), rel=1e-12)
    assert threshold <= min(sizes.values()) <= (CLOSE if stop < 5 else 1.3) * threshold
    for source, energy in settled.energies.items():
        assert torch.equal(energy, model.energies(ensembles[source].structures))


def test_only_states_that_allow_little_are_exhausted(wells, ensembles):
    """From k = 2.7 to 3.1 with N_eff ≥ 0.6: a quarter of the step for one state, three for the other."""
    settled = _settled(TrustRegion(0.6), wells(2.7), ensembles, 3.1)
    assert settled.alpha < 0.5
    assert settled.exhausted == (SOFT,)
    longer = _settled(TrustRegion(0.6), wells(2.0), ensembles, 3.2)
    assert 0.5 <= longer.alpha < 1
    assert longer.exhausted == ()


def test_a_step_into_nonsense_is_shortened(wells, ensembles):
    """Energies that are not finite count as no frames at all: the model stays where it was."""
    model = wells(2.0)
    settled = _settled(TrustRegion(0.9), model, ensembles, torch.inf)
    assert (settled.alpha, model.stiffness) == (0.0, 2.0)
    assert set(settled.exhausted) == {SOFT, HARD}


def test_a_state_below_the_threshold_may_still_move(wells, ensembles):
    """It keeps 95 % of what it has, so that the run does not stand still."""
    model = wells(2.4)
    before = ensembles[SOFT].n_eff(model.energies(ensembles[SOFT].structures))
    assert before < 0.95
    settled = _settled(TrustRegion(0.95), model, ensembles, 2.8)
    assert 0 < settled.alpha < 0.5
    assert ensembles[SOFT].n_eff(model.energies(ensembles[SOFT].structures)) >= 0.95 * before
    assert SOFT in settled.exhausted
