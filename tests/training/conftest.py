"""The compact titanium model in float64, and ensembles of a few rattled crystals."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.sampling import StatePoint
from mlip_refine.training.ensembles import Ensemble


@pytest.fixture(scope="session")
def _titanium() -> Potential:
    return Potential.load("titanium-compact", default_dtype="float64")


@pytest.fixture
def titanium(_titanium: Potential) -> Potential:
    """The model, set back after the test."""
    before = _titanium.parameters()
    for parameter in _titanium.trainable_parameters().values():
        parameter.grad = None
    yield _titanium
    _titanium.set_parameters(before)


@pytest.fixture
def hcp() -> Atoms:
    return bulk("Ti", "hcp", a=2.95, c=4.68).repeat((2, 2, 2))


@pytest.fixture
def bcc() -> Atoms:
    return bulk("Ti", "bcc", a=3.27, cubic=True).repeat((2, 2, 2))


@pytest.fixture
def make_ensemble(titanium: Potential) -> Callable[..., Ensemble]:
    """An ensemble of rattled copies of a crystal, as if the titanium model had drawn them."""

    def make(source: EnsembleSource, atoms: Atoms, n_frames: int = 4) -> Ensemble:
        point = StatePoint(source.name, atoms, source.temperature, source.pressure)
        noise = np.random.default_rng(len(source.phase)).normal(0, 0.1, (n_frames, len(atoms), 3))
        positions = torch.from_numpy(atoms.positions + noise)
        cells = torch.from_numpy(np.array(atoms.cell)).expand(n_frames, 3, 3)
        structures = titanium.graphs.frames(positions, cells, atoms.numbers)
        return Ensemble(
            point=point,
            structures=structures,
            energy=titanium.energies(structures),
            pv=torch.full((n_frames,), point.pv, dtype=torch.float64),
            inefficiency=1.0,
            shift=Measured(0.0, 0.0, "eV"),
            stage="made",
            reference=titanium.parameters(),
        )

    return make
