"""Potentials with exact answers, for tests of losses, observables and sampling.

They stand in for a `Potential` wherever frames are sampled or evaluated, cost next to nothing, and what they
do is known in closed form:

    atoms, reference = harmonic_crystal("hcp")
    potential = HarmonicCrystals([reference], atoms.numbers)
    point = StatePoint("hcp", atoms, temperature=300.0, identity="none")
    runs = sample(potential, [point], MDSettings(), Length(1000.0, 100), seed=1, stage="test")
    # free energy: reference.free_energy(300.0, atoms.cell.volume); mean energy: 3 (N - 1) kT / 2

Random samples agree with exact answers up to noise. `sigma_bound`, `chi_squared_bounds` and `count_bounds`
say how much of it to allow for, so that a test fails by chance in one of 200,000 runs, whatever the seed.

`Springs` is different: a module that is called as MACE is, for tests that train parameters;
`Potential.from_module(Springs(...))` is a whole potential.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from scipy import stats
from torch import Tensor

from mlip_refine.config import config_from_dict
from mlip_refine.crystals.tensors import to_voigt
from mlip_refine.errors import InputError
from mlip_refine.losses import EnsembleSource, Loss, Setting, loss_specs
from mlip_refine.potential import GraphBuilder, Graphs, Potential, Structure
from mlip_refine.quantities import KB
from mlip_refine.sampling import HarmonicReference

FALSE_ALARM = 5e-6
"""Probability that one statistical test fails by chance: one of two hundred does in one run of 1,000."""

_PERMUTATIONS = (("ik", "jl"), ("il", "jk"), ("jk", "il"), ("jl", "ik"))


class AnalyticPotential:
    """What sampling and evaluation ask of a potential; a subclass gives `parts`.

    Attributes:
        head: Name of the head, as a MACE model has one.
        device: The CPU.
        dtype: Floating type of energies, forces and stresses.
        graphs: Makes the batches on which it is evaluated.
        calls: Number of calls of `evaluate` so far.
    """

    head = "Default"

    def __init__(self, numbers: Iterable[int], cutoff: float, dtype: torch.dtype = torch.float64) -> None:
        """Set the elements and the reach.

        Args:
            numbers: Atomic numbers that may occur; repetitions do not matter.
            cutoff: Largest distance at which atoms are neighbours, Å.
            dtype: Floating type of the results.
        """
        self.device, self.dtype, self.calls = torch.device("cpu"), dtype, 0
        self.graphs = GraphBuilder(tuple(sorted(set(numbers))), cutoff, dtype, self.device)

    @property
    def hash(self) -> str:
        """SHA-256 of the class and its parameters: what a store of frames tells models apart by."""
        return hashlib.sha256(repr((type(self).__name__, self.describe())).encode()).hexdigest()

    def describe(self) -> object:
        """Return the parameters, in a form whose `repr` tells them apart."""
        return None

    def parts(self, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
        """Return energies, forces and stresses.

        Returns:
            Energies `[n_graphs]`, eV, forces `[n_atoms, 3]`, eV/Å, and stresses `[n_graphs, 3, 3]`, eV/Å³,
            tensile positive.
        """
        raise NotImplementedError

    def born(self, graphs: Graphs) -> Tensor:
        """Return the Born term (1/V) ∂²U/∂ε∂ε `[n_graphs, 6, 6]`, eV/Å³."""
        raise NotImplementedError

    def evaluate(
        self,
        graphs: Graphs,
        probes: Iterable[str] = ("energy",),
        *,
        create_graph: bool = False,  # noqa: ARG002 - results are exact: no graph is needed for them
    ) -> dict[str, Tensor]:
        """Return `energy`, `forces`, `stress` and `born`, as far as they are asked for (see `parts`)."""
        self.calls += 1
        found = dict(zip(("energy", "forces", "stress"), self.parts(graphs), strict=True))
        if "born" in probes:
            found["born"] = self.born(graphs)
        return {name: found[name] for name in probes}

    def evaluate_chunked(self, graphs: Graphs, probes: Iterable[str]) -> dict[str, Tensor]:
        """Return what `evaluate` does: memory is no concern here."""
        return self.evaluate(graphs, probes)

    def energies(self, structures: Sequence[Structure]) -> Tensor:
        """Return the energies of structures `[n]`, eV."""
        return self.evaluate(self.graphs.collate(structures))["energy"]

    def frozen_copy(
        self,
        default_dtype: str | None = None,  # noqa: ARG002 - as a Potential has it
        accelerate: str = "none",  # noqa: ARG002
    ) -> Self:
        """Return the potential itself: it has nothing to freeze."""
        return self


class IdealGas(AnalyticPotential):
    """No energy, forces or stress at all."""

    def parts(self, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
        """Return zeros."""
        zero = graphs.cell.new_zeros
        return zero(graphs.n_graphs), torch.zeros_like(graphs.positions), zero(graphs.n_graphs, 3, 3)


class ElasticGas(AnalyticPotential):
    """No energy but that of the cell: U = ½ stiffness tr(e²), e = ½ ln FFᵀ its logarithmic strain.

    F takes the cell of rest to the present one. U is an isotropic function of FFᵀ, so V σ = dU/de, whatever
    the rotation.
    """

    def __init__(self, numbers: Iterable[int], stiffness: float, rest: np.ndarray) -> None:
        """Set the stiffness, eV, and the cell of rest (rows `[3, 3]`, Å)."""
        super().__init__(numbers, 0.1)
        self.stiffness, self.rest = stiffness, torch.from_numpy(np.array(rest))

    def describe(self) -> object:
        """Return the stiffness and the cell of rest."""
        return self.stiffness, self.rest.numpy().tobytes()

    def strain(self, cells: Tensor) -> Tensor:
        """Return the logarithmic strain `[..., 3, 3]` of cells (rows)."""
        deformation = torch.linalg.solve(self.rest, cells).mT
        values, vectors = torch.linalg.eigh(deformation @ deformation.mT)
        strain: Tensor = vectors @ torch.diag_embed(values.log() / 2) @ vectors.mT
        return strain

    def parts(self, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
        """Return energies, zero forces and stresses."""
        strain = self.strain(graphs.cell)
        energy = 0.5 * self.stiffness * strain.square().sum((1, 2))
        return (
            energy,
            torch.zeros_like(graphs.positions),
            self.stiffness * strain / graphs.volume[:, None, None],
        )


class LennardJones(AnalyticPotential):
    """Pairs with the shifted-force Lennard-Jones energy, smooth at the cutoff."""

    def __init__(self, numbers: Iterable[int], epsilon: float, sigma: float, cutoff: float) -> None:
        """Set the depth `epsilon`, eV, and the diameter `sigma`, Å, of the pair energy, and its cutoff, Å."""
        super().__init__(numbers, cutoff)
        self.epsilon, self.sigma = epsilon, sigma

    def describe(self) -> object:
        """Return depth, diameter and cutoff."""
        return self.epsilon, self.sigma, self.graphs.cutoff

    def pair(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return the energy, eV, and its derivative, eV/Å, at distances in Å, both of the shape of `r`."""
        u, du = self._bare(r)
        edge, slope = self._bare(torch.tensor(self.graphs.cutoff, dtype=r.dtype))
        inside = r < self.graphs.cutoff
        return inside * (u - edge - (r - self.graphs.cutoff) * slope), inside * (du - slope)

    def _bare(self, r: Tensor) -> tuple[Tensor, Tensor]:
        # Powers by products: torch's own have other last bits in the last elements of a tensor.
        square = (self.sigma / r).square()
        six = square * square * square
        return 4 * self.epsilon * (six * six - six), -24 * self.epsilon * (2 * six * six - six) / r

    def born(self, graphs: Graphs) -> Tensor:
        """Return (1/V) ∂²U/∂ε∂ε in the linear symmetric strain `[n_graphs, 6, 6]`, eV/Å³."""
        vectors, one = graphs.vectors, torch.eye(3, dtype=self.dtype)
        r = vectors.norm(dim=-1)
        with torch.enable_grad():
            distance = r.detach().requires_grad_()
            (curvature,) = torch.autograd.grad(self.pair(distance)[1].sum(), distance)
        tension = self.pair(r)[1] / r
        square = vectors[:, :, None] * vectors[:, None, :]
        stretch = ((curvature - tension) / r**2)[:, None, None, None, None] * (
            square[:, :, :, None, None] * square[:, None, None]
        )
        rotations = [torch.einsum(f"{a},e{b}->eijkl", one, square) for a, b in _PERMUTATIONS]
        terms = stretch + 0.25 * tension[:, None, None, None, None] * sum(rotations)
        system = graphs.batch[graphs.edge_index[0]]
        total = graphs.cell.new_zeros(graphs.n_graphs, 3, 3, 3, 3).index_add(0, system, 0.5 * terms)
        return to_voigt(total) / graphs.volume[:, None, None]

    def parts(self, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
        """Return energies, forces and stresses of all pairs."""
        i, j = graphs.edge_index
        system = graphs.batch[i]
        vectors = graphs.vectors
        r = vectors.norm(dim=-1)
        u, du = self.pair(r)
        tension = (du / r)[:, None] * vectors
        energy = graphs.cell.new_zeros(graphs.n_graphs).index_add(0, system, 0.5 * u)
        forces = torch.zeros_like(graphs.positions).index_add(0, j, -tension)
        virial = 0.5 * tension[:, :, None] * vectors[:, None, :]
        stress = torch.zeros_like(graphs.cell).index_add(0, system, virial) / graphs.volume[:, None, None]
        return energy, forces, stress


class LennardJonesTS(LennardJones):
    """Pairs with the Lennard-Jones energy, truncated at 2.5 σ and shifted to zero there.

    The model of most published liquids, crystals and melting points (LJTS): at T* = 0.8 its fcc crystal and
    its liquid coexist at P* = 2.185 (Pedersen, J. Chem. Phys. 139, 104102 (2013)), and Thol et al., Int. J.
    Thermophys. 36, 25 (2015), give the equation of state of its fluid. Forces jump by 0.039 ε/σ at the
    cutoff; energies do not, so dynamics conserves them. It is not the model of torch-sim or of LAMMPS without
    a shift, whose energies jump, nor `LennardJones`, whose forces are shifted too: those coexist elsewhere.
    """

    REACH = 2.5
    """Cutoff, in σ."""

    def __init__(
        self, numbers: Iterable[int] = (18,), epsilon: float = 119.8 * KB, sigma: float = 3.405
    ) -> None:
        """Set depth, eV, and diameter, Å; by default those of argon (ε/k = 119.8 K).

        Args:
            numbers: Atomic numbers that may occur.
            epsilon: Depth of the pair energy before it is shifted, eV.
            sigma: Distance at which it vanishes, Å.
        """
        super().__init__(numbers, epsilon, sigma, self.REACH * sigma)

    def pair(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return the energy, eV, and its derivative, eV/Å, at distances in Å, both of the shape of `r`."""
        u, du = self._bare(r)
        edge, _ = self._bare(torch.tensor(self.graphs.cutoff, dtype=r.dtype))
        inside = r < self.graphs.cutoff
        return inside * (u - edge), inside * du


class HarmonicCrystals(AnalyticPotential):
    """Harmonic crystals, told apart by their number of atoms; no stress."""

    def __init__(self, references: Sequence[HarmonicReference], numbers: Iterable[int]) -> None:
        """Set the crystals, no two of the same size, and their atomic numbers."""
        super().__init__(numbers, 0.1)
        self.references = {len(r.masses): r for r in references}

    def describe(self) -> object:
        """Return sizes and force constants."""
        return [(n, r.projected.numpy().tobytes()) for n, r in self.references.items()]

    def parts(self, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
        """Return energies, forces and zero stresses."""
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


def bond_springs(atoms: Atoms, springs: Mapping[float, float]) -> Tensor:
    """Return the force constants `[3N, 3N]`, eV/Å², of springs along bonds.

    Args:
        atoms: The crystal at rest.
        springs: Stiffness, eV/Å², of bonds by their largest length, Å: the first length that a bond fits in.
    """
    n, lengths = len(atoms), sorted(springs)
    blocks = np.zeros((n, n, 3, 3))
    for i, j, d, vector in zip(*neighbor_list("ijdD", atoms, max(lengths)), strict=True):
        k = springs[next(length for length in lengths if d <= length)]
        along = k * np.outer(vector, vector) / d**2
        blocks[i, i] += along
        blocks[i, j] -= along
    return torch.from_numpy(blocks.transpose(0, 2, 1, 3).reshape(3 * n, 3 * n).copy())


def harmonic_reference(atoms: Atoms, springs: Mapping[float, float]) -> HarmonicReference:
    """Return the harmonic crystal about the positions of `atoms` with springs along its bonds."""
    sites, masses = torch.from_numpy(atoms.positions.copy()), torch.from_numpy(atoms.get_masses())
    return HarmonicReference(sites, bond_springs(atoms, springs), masses)


def harmonic_crystal(kind: Literal["fcc", "hcp", "NaCl"]) -> tuple[Atoms, HarmonicReference]:
    """Return one of three crystals and its springs: 32 atoms of fcc Al, 36 of hcp Ti, or 8 of NaCl."""
    if kind == "fcc":
        atoms, springs = bulk("Al", "fcc", a=4.05, cubic=True) * (2, 2, 2), {3.2: 2.0, 4.2: 0.6}
    elif kind == "hcp":
        atoms, springs = bulk("Ti", "hcp", a=2.93, c=4.65) * (3, 3, 2), {3.1: 2.4, 4.3: 0.5}
    else:
        atoms, springs = bulk("NaCl", "rocksalt", a=5.64, cubic=True), {2.9: 2.5, 4.1: 0.8}
    return atoms, harmonic_reference(atoms, springs)


def sigma_bound(comparisons: int = 1, dof: float = math.inf) -> float:
    """Return the deviation from the truth, in standard errors, that means a failure.

    Args:
        comparisons: Number of deviations that one test looks at (Bonferroni).
        dof: Degrees of freedom of the standard errors (Student's t); infinite where they are known.
    """
    tail = FALSE_ALARM / comparisons / 2
    return float(stats.norm.isf(tail) if math.isinf(dof) else stats.t.isf(tail, dof))


def chi_squared_bounds(dof: float, comparisons: int = 1) -> tuple[float, float]:
    """Return the lowest and highest chi-squared of `dof` degrees of freedom that is no failure."""
    tail = FALSE_ALARM / comparisons / 2
    return float(stats.chi2.ppf(tail, dof)), float(stats.chi2.isf(tail, dof))


def count_bounds(trials: int, probability: float, comparisons: int = 1) -> tuple[int, int]:
    """Return the lowest and highest number of successes in independent trials that is no failure."""
    tail = FALSE_ALARM / comparisons / 2
    return int(stats.binom.ppf(tail, trials, probability)), int(stats.binom.isf(tail, trials, probability))


class Springs(torch.nn.Module):
    """Springs along bonds, called as MACE is, with a trainable stiffness per shell of neighbours.

    Attributes:
        stiffness: Trainable stiffness of every shell `[n_shells]`, eV/Å², float64.
    """

    def __init__(self, numbers: Sequence[int], shells: Mapping[float, tuple[float, float]]) -> None:
        """Set the shells.

        Args:
            numbers: Atomic numbers that may occur.
            shells: Stiffness, eV/Å², and rest length, Å, by the largest length of a bond, Å, ascending.
        """
        super().__init__()
        stiffness, lengths = zip(*shells.values(), strict=True)
        self.stiffness = torch.nn.Parameter(torch.tensor(stiffness, dtype=torch.float64))
        self.lengths: Tensor
        self.ends: Tensor
        self.register_buffer("lengths", torch.tensor(lengths, dtype=torch.float64))
        self.register_buffer("ends", torch.tensor(list(shells), dtype=torch.float64))
        self.register_buffer("atomic_numbers", torch.tensor(sorted(numbers)))
        self.register_buffer("r_max", torch.tensor(max(shells)))

    def forward(self, inputs: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Return the `energy` `[n_graphs]`, eV, from the vectors of the edges (`shifts`)."""
        distance = inputs["shifts"].norm(dim=1)
        shell = torch.bucketize(distance.detach(), self.ends)
        inside = shell < len(self.ends)
        shell = shell.clamp(max=len(self.ends) - 1)
        pairs = 0.5 * self.stiffness[shell] * (distance - self.lengths[shell]).square() * inside
        system = inputs["batch"][inputs["edge_index"][0]]
        energy = pairs.new_zeros(len(inputs["ptr"]) - 1).index_add(0, system, 0.5 * pairs)
        return {"energy": energy}


def loss_of(
    node: Mapping[str, Any],
    crystals: Atoms | Mapping[str, Atoms] | None = None,
    potential: Potential | None = None,
) -> Loss:
    """Return a loss as a config gives it, bound to ideal crystals in cells that move as it needs.

    Args:
        node: An entry of `losses` of a config.
        crystals: Ideal crystal of all phases, or of each by name; none where the loss needs none.
        potential: The potential that the loss may refuse; nothing is checked without one.

    Raises:
        InputError: Wrong options, or a loss that does not suit crystals or potential.
    """
    config = config_from_dict({"name": "x", "potential": {"model": "m"}, "losses": [dict(node)]})
    (spec,) = loss_specs(config.losses)

    def crystal(source: EnsembleSource) -> Atoms:
        if crystals is None:
            raise InputError("the loss needs a crystal", found=source.phase)
        return crystals if isinstance(crystals, Atoms) else crystals[source.phase]

    moves = getattr(spec.options, "cell", "free") != "fixed"
    return spec.bind(Setting(crystal, lambda _: moves, config.resolve, potential))
