"""One thread for every test, and analytic potentials that stand in for MACE in molecular dynamics."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from torch import Tensor

torch.set_num_threads(1)


class Analytic:
    """What sampling asks of a potential; subclasses give `parts`: energies, forces and stresses."""

    head = "Default"

    def __init__(self, numbers: Iterable[int], cutoff: float, dtype: torch.dtype = torch.float64) -> None:
        from mlip_refine.potential import GraphBuilder

        self.device, self.dtype, self.calls = torch.device("cpu"), dtype, 0
        self.graphs = GraphBuilder(tuple(sorted(set(numbers))), cutoff, dtype, self.device)

    @property
    def hash(self) -> str:
        return hashlib.sha256(repr((type(self).__name__, self.describe())).encode()).hexdigest()

    def describe(self) -> Any:
        return None

    def evaluate(
        self, graphs: Any, probes: Iterable[str] = ("energy",), *, create_graph: bool = False
    ) -> dict[str, Tensor]:
        self.calls += 1
        found = dict(zip(("energy", "forces", "stress"), self.parts(graphs), strict=True))
        if "born" in probes:
            found["born"] = self.born(graphs)
        return {name: found[name] for name in probes}

    def evaluate_chunked(self, graphs: Any, probes: Iterable[str]) -> dict[str, Tensor]:
        return self.evaluate(graphs, probes)

    def frozen_copy(self, default_dtype: str | None = None, accelerate: str = "none") -> "Analytic":
        return self

    def energies(self, structures: Sequence[Any]) -> Tensor:
        return self.evaluate(self.graphs.collate(structures))["energy"]

    def parts(self, graphs: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class IdealGas(Analytic):
    """No energy at all."""

    def parts(self, graphs: Any) -> tuple[Tensor, Tensor, Tensor]:
        zero = graphs.cell.new_zeros
        return zero(graphs.n_graphs), torch.zeros_like(graphs.positions), zero(graphs.n_graphs, 3, 3)


class ElasticGas(Analytic):
    """No energy but that of the cell: U = ½ stiffness tr(e²), e = ½ ln FFᵀ its logarithmic strain.

    F takes the cell of rest to the present one. U is an isotropic function of FFᵀ, so V σ = dU/de, whatever
    the rotation.
    """

    def __init__(self, numbers: Iterable[int], stiffness: float, rest: np.ndarray) -> None:
        super().__init__(numbers, 0.1)
        self.stiffness, self.rest = stiffness, torch.from_numpy(np.array(rest))

    def describe(self) -> Any:
        return self.stiffness, self.rest.numpy().tobytes()

    def strain(self, cells: Tensor) -> Tensor:
        """Logarithmic strain `[..., 3, 3]` of cells (rows)."""
        deformation = torch.linalg.solve(self.rest, cells).mT
        values, vectors = torch.linalg.eigh(deformation @ deformation.mT)
        return vectors @ torch.diag_embed(values.log() / 2) @ vectors.mT

    def parts(self, graphs: Any) -> tuple[Tensor, Tensor, Tensor]:
        strain = self.strain(graphs.cell)
        energy = 0.5 * self.stiffness * strain.square().sum((1, 2))
        return (
            energy,
            torch.zeros_like(graphs.positions),
            self.stiffness * strain / graphs.volume[:, None, None],
        )


_TURNS = (("ik", "jl"), ("il", "jk"), ("jk", "il"), ("jl", "ik"))


class LennardJones(Analytic):
    """Pairs with the shifted-force Lennard-Jones energy, smooth at the cutoff."""

    def __init__(self, numbers: Iterable[int], epsilon: float, sigma: float, cutoff: float) -> None:
        super().__init__(numbers, cutoff)
        self.epsilon, self.sigma = epsilon, sigma

    def describe(self) -> Any:
        return self.epsilon, self.sigma, self.graphs.cutoff

    def pair(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and its derivative at distances."""
        u, du = self._bare(r)
        edge, slope = self._bare(torch.tensor(self.graphs.cutoff, dtype=r.dtype))
        inside = r < self.graphs.cutoff
        return inside * (u - edge - (r - self.graphs.cutoff) * slope), inside * (du - slope)

    def _bare(self, r: Tensor) -> tuple[Tensor, Tensor]:
        # Powers by products: torch's own have other last bits in the last elements of a tensor.
        square = (self.sigma / r).square()
        six = square * square * square
        return 4 * self.epsilon * (six * six - six), -24 * self.epsilon * (2 * six * six - six) / r

    def born(self, graphs: Any) -> Tensor:
        """(1/V) ∂²U/∂ε∂ε in the linear symmetric strain `[n_graphs, 6, 6]`."""
        from mlip_refine.crystals.tensors import to_voigt

        vectors, one = graphs.vectors, torch.eye(3, dtype=self.dtype)
        r = vectors.norm(dim=-1)
        with torch.enable_grad():
            distance = r.detach().requires_grad_()
            (curvature,) = torch.autograd.grad(self.pair(distance)[1].sum(), distance)
        pull = self.pair(r)[1] / r
        square = vectors[:, :, None] * vectors[:, None, :]
        stretch = ((curvature - pull) / r**2)[:, None, None, None, None] * (
            square[:, :, :, None, None] * square[:, None, None]
        )
        turns = [torch.einsum(f"{a},e{b}->eijkl", one, square) for a, b in _TURNS]
        terms = stretch + 0.25 * pull[:, None, None, None, None] * sum(turns)
        system = graphs.batch[graphs.edge_index[0]]
        total = graphs.cell.new_zeros(graphs.n_graphs, 3, 3, 3, 3).index_add(0, system, 0.5 * terms)
        return to_voigt(total) / graphs.volume[:, None, None]

    def parts(self, graphs: Any) -> tuple[Tensor, Tensor, Tensor]:
        i, j = graphs.edge_index
        system = graphs.batch[i]
        vectors = graphs.vectors
        r = vectors.norm(dim=-1)
        u, du = self.pair(r)
        pull = (du / r)[:, None] * vectors
        energy = graphs.cell.new_zeros(graphs.n_graphs).index_add(0, system, 0.5 * u)
        forces = torch.zeros_like(graphs.positions).index_add(0, j, -pull)
        virial = 0.5 * pull[:, :, None] * vectors[:, None, :]
        stress = torch.zeros_like(graphs.cell).index_add(0, system, virial) / graphs.volume[:, None, None]
        return energy, forces, stress


class HarmonicCrystals(Analytic):
    """Harmonic crystals, told apart by their number of atoms; no stress."""

    def __init__(self, references: Sequence[Any], numbers: Iterable[int]) -> None:
        super().__init__(numbers, 0.1)
        self.references = {len(r.masses): r for r in references}

    def describe(self) -> Any:
        return [(n, r.projected.numpy().tobytes()) for n, r in self.references.items()]

    def parts(self, graphs: Any) -> tuple[Tensor, Tensor, Tensor]:
        energy, forces = graphs.cell.new_zeros(graphs.n_graphs), torch.zeros_like(graphs.positions)
        sizes = torch.bincount(graphs.batch, minlength=graphs.n_graphs)
        for n, reference in self.references.items():
            mine = sizes == n
            if bool(mine.any()):
                atoms = mine[graphs.batch]
                x = graphs.positions[atoms].view(-1, n, 3)
                u, f = reference.energy_forces(x, reference.projected.to(x))
                energy[mine], forces[atoms] = u, f.reshape(-1, 3)
        return energy, forces, torch.zeros_like(graphs.cell)


def bond_springs(atoms: Atoms, springs: dict[float, float]) -> Tensor:
    """Force constants `[3N, 3N]`, eV/Å², of springs along bonds; `springs`: stiffness by largest length."""
    n, lengths = len(atoms), sorted(springs)
    blocks = np.zeros((n, n, 3, 3))
    for i, j, d, vector in zip(*neighbor_list("ijdD", atoms, max(lengths)), strict=True):
        k = springs[next(length for length in lengths if d <= length)]
        along = k * np.outer(vector, vector) / d**2
        blocks[i, i] += along
        blocks[i, j] -= along
    return torch.from_numpy(blocks.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n).copy())


def _harmonic(atoms: Atoms, springs: dict[float, float]) -> Any:
    from mlip_refine.sampling import HarmonicReference

    sites, masses = torch.from_numpy(atoms.positions.copy()), torch.from_numpy(atoms.get_masses())
    return HarmonicReference(sites, bond_springs(atoms, springs), masses)


def _crystal(kind: str) -> tuple[Atoms, dict[float, float]]:
    if kind == "fcc":
        return bulk("Al", "fcc", a=4.05, cubic=True) * (2, 2, 2), {3.2: 2.0, 4.2: 0.6}
    if kind == "hcp":
        return bulk("Ti", "hcp", a=2.93, c=4.65) * (3, 3, 2), {3.1: 2.4, 4.3: 0.5}
    return bulk("NaCl", "rocksalt", a=5.64, cubic=True), {2.9: 2.5, 4.1: 0.8}


@pytest.fixture(scope="session")
def analytic() -> SimpleNamespace:
    """Potentials with exact answers, and harmonic crystals of springs along bonds."""

    def crystal(kind: str) -> tuple[Atoms, Any]:
        atoms, springs = _crystal(kind)
        return atoms, _harmonic(atoms, springs)

    return SimpleNamespace(
        IdealGas=IdealGas,
        ElasticGas=ElasticGas,
        LennardJones=LennardJones,
        HarmonicCrystals=HarmonicCrystals,
        harmonic=_harmonic,
        bond_springs=bond_springs,
        crystal=crystal,
    )


@pytest.fixture(scope="session")
def open_guards() -> Callable[..., Any]:
    """Return settings of dynamics whose guards never stop anything."""

    def settings(**options: Any) -> Any:
        from mlip_refine.sampling import GuardSettings, MDSettings

        return MDSettings(guards=GuardSettings(1e6, 1e6), **options)

    return settings


class Springs(torch.nn.Module):
    """Springs along bonds, as MACE is called: stiffness and rest length by shells of neighbours."""

    def __init__(self, numbers: tuple[int, ...], shells: dict[float, tuple[float, float]]) -> None:
        """Keep the shells: stiffness, eV/Å², and rest length, Å, by largest length."""
        super().__init__()
        stiffness, lengths = zip(*shells.values(), strict=True)
        self.stiffness = torch.nn.Parameter(torch.tensor(stiffness, dtype=torch.float64))
        self.register_buffer("lengths", torch.tensor(lengths, dtype=torch.float64))
        self.register_buffer("ends", torch.tensor(list(shells), dtype=torch.float64))
        self.register_buffer("atomic_numbers", torch.tensor(sorted(numbers)))
        self.register_buffer("r_max", torch.tensor(max(shells)))

    def forward(self, inputs: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        distance = inputs["shifts"].norm(dim=1)
        shell = torch.bucketize(distance.detach(), self.ends)
        inside = shell < len(self.ends)
        shell = shell.clamp(max=len(self.ends) - 1)
        pairs = 0.5 * self.stiffness[shell] * (distance - self.lengths[shell]).square() * inside
        system = inputs["batch"][inputs["edge_index"][0]]
        energy = pairs.new_zeros(len(inputs["ptr"]) - 1).index_add(0, system, 0.5 * pairs)
        return {"energy": energy}


@pytest.fixture(scope="session")
def springs() -> Callable[..., Any]:
    """Return crystals of balls and springs as potentials that train the stiffness."""

    from mlip_refine.potential import Potential

    def make(atoms: Atoms, shells: dict[float, tuple[float, float]], **options: Any) -> Any:
        return Potential(Springs(tuple({int(z) for z in atoms.numbers}), shells), **options)

    return make


@pytest.fixture(scope="session")
def phonons_of() -> Callable[..., Any]:
    """Return a reference of the supercell of a unit cell, with a Hessian that is given or computed of it."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    from mlip_refine.data.phonons.reference import PhononMetadata, PhononReference
    from mlip_refine.data.phonons.spacegroups import Translations, crystal_symmetry

    def make(
        unit: Atoms,
        multiples: tuple[int, int, int],
        hessian: Callable[[Atoms], Tensor] | None,
        *,
        primitive: Any = None,
        displacements: tuple[Any, ...] = (),
    ) -> Any:
        cell = PhonopyAtoms(numbers=unit.numbers, cell=unit.cell.array, positions=unit.positions)
        phonons = Phonopy(cell, np.diag(multiples), primitive_matrix=primitive, log_level=0)
        built = phonons.supercell
        atoms = Atoms(built.numbers, cell=built.cell, positions=built.positions, pbc=True)
        translations = Translations(
            torch.tensor(phonons.primitive.atomic_permutations).long(),
            torch.tensor(phonons.primitive.p2s_map).long(),
        )
        found = phonons.symmetry
        rotations = np.array(found.symmetry_operations["rotations"])
        permutations = np.array(found.atomic_permutations).astype(np.int64)
        compact = None
        if hessian is not None:
            n = len(atoms)
            blocks = hessian(atoms).view(n, 3, n, 3).permute(0, 2, 1, 3)
            compact = blocks[translations.primitive_atoms].contiguous()
        return PhononReference(
            name=str(unit.symbols),
            supercell=atoms,
            translations=translations,
            symmetry=crystal_symmetry(atoms.cell.array, rotations, permutations, translations),
            primitive_matrix=torch.tensor(np.array(phonons.primitive_matrix)).double(),
            supercell_matrix=torch.tensor(np.diag(multiples)).double(),
            force_constants=compact,
            displacements=displacements,
            metadata=PhononMetadata(str(unit.symbols)),
        )

    return make


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20250117)


@pytest.fixture
def gaussian(generator: torch.Generator) -> Callable[..., Tensor]:
    """Draw standard normal float64 numbers."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw
