"""The compact titanium model in float64 with a few rattled crystals, and exact draws of harmonic wells."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from mlip_refine import data
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential, batching
from mlip_refine.quantities import KB, Measured
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.training.ensemble import Ensemble, Reference
from mlip_refine.training.replay import LabelledFrame


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


class Cramped:
    """Runs out of memory above so many atoms: going forward, or at the very end of going backward."""

    def __init__(self, potential: Potential, most: int, *, backward: bool) -> None:
        self.most, self.backward, self.sizes = most, backward, []
        self.handle = potential.module.node_embedding.register_forward_hook(self)

    def __call__(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.sizes.append(len(output))
        if self.backward and output.requires_grad:
            output.register_hook(lambda gradient: self.allocate(len(gradient)))
        elif not self.backward:
            self.allocate(len(output))

    def allocate(self, n_atoms: int) -> None:
        if n_atoms > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.fixture
def cramped(titanium: Potential, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cramped]]:
    """Return what leaves the model so little memory, which it does not know yet, until the test is over."""
    made: list[Cramped] = []

    def make(most: int, *, backward: bool) -> Cramped:
        monkeypatch.setattr(titanium, "chunker", batching.Chunker(titanium.device))
        made.append(Cramped(titanium, most, backward=backward))
        return made[-1]

    yield make
    for limited in made:
        limited.handle.remove()


@pytest.fixture
def make_ensemble(titanium: Potential) -> Callable[..., Ensemble]:
    """An ensemble of rattled copies of a crystal, as if the titanium model had drawn them."""

    def make(source: EnsembleSource, atoms: Atoms, n_frames: int = 4) -> Ensemble:
        point = StatePoint(source.name, atoms, source.temperature, source.pressure)
        noise = np.random.default_rng(len(source.phase)).normal(0, 0.1, (n_frames, len(atoms), 3))
        positions = torch.from_numpy(atoms.positions + noise)
        cells = torch.from_numpy(np.array(atoms.cell)).expand(n_frames, 3, 3)
        structures = titanium.graphs.frames(positions, cells, atoms.numbers)
        ends = (positions[-1:], cells[-1:])
        energy = titanium.energies(structures)
        return Ensemble(
            point=point,
            references=(Reference(point, titanium.parameters(), "made", n_frames, 1.0, ends),),
            structures=structures,
            volume=torch.linalg.det(cells).abs(),
            energies=energy[None],
            shift=Measured(0.0, 0.0, "eV"),
            shift_influence=torch.zeros_like(energy),
            frames_per_draw=n_frames,
        )

    return make


SITES = np.array([[0.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 2]])


@dataclass
class Frame:
    """Stands for a structure: an analytic potential needs no neighbours."""

    positions: torch.Tensor
    cell: torch.Tensor


class _Builder:
    def frames(self, positions: torch.Tensor, cells: torch.Tensor, numbers: np.ndarray) -> list[Frame]:
        return [Frame(x, h) for x, h in zip(positions, cells, strict=True)]


@dataclass
class Wells:
    """U = offset + ½ k Σ|x - site|²: the interface of a potential that ensembles need, with exact draws."""

    stiffness: float
    offset: float = 0.0
    graphs: _Builder = field(default_factory=_Builder)
    modes: ClassVar[int] = 3 * len(SITES)

    def energies(self, structures: Sequence[Frame]) -> torch.Tensor:
        x = torch.stack([s.positions for s in structures]) - torch.from_numpy(SITES)
        return self.offset + 0.5 * self.stiffness * x.square().sum((1, 2))

    def parameters(self) -> dict[str, torch.Tensor]:
        return {
            "stiffness": torch.tensor(self.stiffness, dtype=torch.float64),
            "offset": torch.tensor(self.offset, dtype=torch.float64),
        }

    def set_parameters(self, values: dict[str, torch.Tensor]) -> None:
        self.stiffness, self.offset = float(values["stiffness"]), float(values["offset"])

    def free_energy(self, temperature: float) -> float:
        """Configurational, eV, up to a constant of the temperature."""
        return self.offset + 0.5 * self.modes * KB * temperature * math.log(self.stiffness)

    def trajectory(
        self, seed: int, n_frames: int, replicas: int = 4, rho: float = 0.0, temperature: float = 500.0
    ) -> Trajectory:
        """Draws in place of molecular dynamics; `rho` correlates consecutive frames."""
        generator = torch.Generator().manual_seed(seed)
        shape = (replicas, len(SITES), 3)
        series = [torch.randn(shape, generator=generator, dtype=torch.float64)]
        while len(series) < n_frames:
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            series.append(rho * series[-1] + math.sqrt(1 - rho**2) * noise)
        x = torch.stack(series, 1) * math.sqrt(KB * temperature / self.stiffness)
        atoms = Atoms("Ti4", positions=SITES, cell=[4.0, 4, 4], pbc=True)
        zeros = torch.zeros(replicas, n_frames, dtype=torch.float64)
        name = f"wells-{temperature:g}K"
        return Trajectory(
            point=StatePoint(name, atoms, temperature, 3.0, replicas=replicas),
            positions=torch.from_numpy(SITES) + x,
            cells=torch.eye(3, dtype=torch.float64).expand(replicas, n_frames, 3, 3) * 4,
            model_energy=zeros,
            bias_energy=zeros,
            stress=zeros[..., None, None].expand(replicas, n_frames, 3, 3),
            kinetic_energy=zeros,
            kept=torch.ones(replicas, n_frames, dtype=torch.bool),
        )

    def draw(
        self, seed: int, n_frames: int = 500, inefficiency: float | None = None, **how: float
    ) -> Ensemble:
        """Frames of this model alone; with another statistical inefficiency than was measured, if given."""
        trajectory = self.trajectory(seed, n_frames, **how)
        drawn = Ensemble.from_trajectory(self, trajectory, f"seed-{seed}", self.parameters())
        if inefficiency is None:
            return drawn
        return replace(drawn, references=(replace(drawn.references[0], inefficiency=inefficiency),))


@pytest.fixture(scope="session")
def wells() -> type[Wells]:
    """The class of harmonic wells."""
    return Wells


@pytest.fixture
def label_errors() -> SimpleNamespace:
    """By how much the labels of `frames` are off: eV/atom, eV/Å, eV/Å³."""
    return SimpleNamespace(energy=0.032, forces=0.05, stress=0.002)


@pytest.fixture
def frames(titanium, hcp, bcc, label_errors) -> list[LabelledFrame]:
    """Frames whose labels are off by known amounts; the last has no stress."""
    made, rng = [], np.random.default_rng(0)
    for i, atoms in enumerate((hcp, bcc, hcp[:8])):
        crystal = atoms.copy()
        if len(crystal) == 8:
            crystal.set_cell(crystal.cell.array * [[0.5], [1], [1]])
        crystal.rattle(0.05, seed=i)
        graphs = titanium.graphs.collate([titanium.graphs.from_atoms(crystal)])
        out = titanium.evaluate(graphs, ("energy", "forces", "stress"))
        out = {name: value.detach().numpy() for name, value in out.items()}
        frame = data.Frame(
            numbers=crystal.numbers,
            positions=crystal.positions,
            cell=np.array(crystal.cell),
            pbc=(True, True, True),
            energy=float(out["energy"][0]) + label_errors.energy * len(crystal),
            # Of random sign: a constant one has no gradient, because forces add up to nothing.
            forces=out["forces"] + label_errors.forces * rng.choice([-1, 1], out["forces"].shape),
            stress=None if i == 2 else out["stress"][0] + label_errors.stress,
        )
        made.append(LabelledFrame.from_frame(titanium, frame))
    return made
