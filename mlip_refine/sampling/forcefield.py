"""The force field that torch-sim integrates: a frozen potential, neighbours with a skin, and a bias."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch_sim as ts
from torch import Tensor
from torch_sim.models.interface import ModelInterface
from torch_sim.neighbors import torch_nl_linked_cell, torchsim_nl

from mlip_refine.potential import Graphs, Potential
from mlip_refine.sampling.harmonic import HarmonicReference
from mlip_refine.sampling.state_points import Hamiltonian

try:
    from nvalchemiops.neighbors.neighbor_utils import NeighborOverflowError
except ImportError:  # torch-sim then takes another neighbour search, which cannot overflow

    class NeighborOverflowError(Exception):  # type: ignore[no-redef]
        """Stands for the error of the search that is not installed."""


SKIN = 0.8

# A cell whose stretch since the first call has a larger norm than this, or a smaller volume ratio than its
# inverse cube, has blown up or collapsed.
MAX_STRETCH = 4.0


@dataclass
class _NeighbourList:
    positions: Tensor
    cell: Tensor
    edge_index: Tensor
    unit_shifts: Tensor
    node_attrs: Tensor
    ptr: Tensor


@dataclass(frozen=True)
class _Bias:
    reference: HarmonicReference
    force_constants: Tensor
    systems: Tensor
    atoms: Tensor
    scale: Tensor


class ForceField(ModelInterface):
    """Energies, forces and stresses of every system under its own Hamiltonian.

    Non-finite results never reach the integrator: the system's forces become zero and `failed` marks it, so
    the other systems of the batch go on undisturbed. So do cells that blow up or collapse.

    Attributes:
        model_energy: Unscaled model energies of the last call `[n_systems]`, eV.
        bias_energy: Unscaled bias energies of the last call `[n_systems]`, eV.
        stress: Unscaled model stress of the last call that asked for it `[n_systems, 3, 3]`, eV/Å³.
        cell: Cells of the last call, rows `[n_systems, 3, 3]`, Å, always finite.
        failed: Systems that have been non-finite since the last `clear` `[n_systems]`.
    """

    def __init__(
        self, potential: Potential, hamiltonians: list[Hamiltonian], atoms_per_system: list[int]
    ) -> None:
        """Prepare for a batch of systems.

        Args:
            potential: A frozen copy.
            hamiltonians: One per system.
            atoms_per_system: Sizes, in the order of the batch.
        """
        super().__init__()
        self._device, self._dtype = potential.device, potential.dtype
        self._compute_forces, self._compute_stress = True, False
        self.potential = potential
        real: dict[str, Any] = {"device": self._device, "dtype": self._dtype}
        self.scale = torch.tensor([h.scale for h in hamiltonians], **real)
        self.biases = _group_biases(hamiltonians, atoms_per_system, real)
        self.model_energy = torch.zeros(len(hamiltonians), **real)
        self.bias_energy = torch.zeros_like(self.model_energy)
        self.stress = torch.zeros(len(hamiltonians), 3, 3, **real)
        self.failed = torch.zeros(len(hamiltonians), dtype=torch.bool, device=self._device)
        self.cell = torch.zeros_like(self.stress)
        self._list: _NeighbourList | None = None
        self._first: tuple[Tensor, Tensor] | None = None

    @property
    def compute_stress(self) -> bool:
        """Whether calls return the stress."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, compute_stress: bool) -> None:
        self._compute_stress = compute_stress

    def clear(self) -> None:
        """Forget failures, after the failed systems have been set back."""
        self.failed = torch.zeros_like(self.failed)

    def forget_neighbours(self) -> None:
        """Find the neighbours anew at the next call: their order, and so the last bits, start afresh."""
        self._list = None

    def forward(self, state: ts.SimState, **_: object) -> dict[str, Tensor]:
        """Energy `[n_systems]`, forces `[n_atoms, 3]` and, if asked for, stress `[n_systems, 3, 3]`."""
        bad, positions, self.cell = self._readable(state)
        graphs = self._graphs(state, positions)
        probes = ("energy", "forces", "stress") if self._compute_stress else ("energy", "forces")
        output = self.potential.evaluate_chunked(graphs, probes)
        self.model_energy = output["energy"].detach()
        forces = output["forces"] * self.scale[state.system_idx, None]
        energy = self.scale * self.model_energy
        self.bias_energy = torch.zeros_like(self.model_energy)
        for bias in self.biases:
            self._add_bias(bias, positions, energy, forces)
        result = {"energy": energy, "forces": self._guard(energy, forces, bad, state.system_idx)}
        if self._compute_stress:
            stress = torch.nan_to_num(output["stress"].detach())
            self.stress = torch.where(self.failed[:, None, None], torch.zeros_like(stress), stress)
            result["stress"] = self.stress * self.scale[:, None, None]
        return result

    def _add_bias(self, bias: _Bias, positions: Tensor, energy: Tensor, forces: Tensor) -> None:
        x = positions[bias.atoms].view(len(bias.systems), -1, 3)
        u, f = bias.reference.energy_forces(x, bias.force_constants)
        self.bias_energy[bias.systems] = u
        energy[bias.systems] += bias.scale * u
        forces[bias.atoms] += (bias.scale[:, None, None] * f).view(-1, 3)

    def _readable(self, state: ts.SimState) -> tuple[Tensor, Tensor, Tensor]:
        """Which systems have lost their positions or cell; positions and cells with theirs as first seen.

        A neighbour list of one such system would be endless, and end the whole batch.
        """
        cell = state.row_vector_cell.contiguous()
        if self._first is None:
            self._first = state.positions.clone(), cell.clone()
        first_positions, first_cell = self._first
        bad = self._any_atom(~torch.isfinite(state.positions).all(-1), state.system_idx)
        stretch = torch.linalg.solve(first_cell, cell)
        whole = torch.linalg.matrix_norm(stretch) < MAX_STRETCH
        bad = bad | ~(whole & (torch.linalg.det(stretch) > MAX_STRETCH**-3))
        positions = torch.where(bad[state.system_idx, None], first_positions, state.positions)
        return bad, positions, torch.where(bad[:, None, None], first_cell, cell)

    def _any_atom(self, atoms: Tensor, system_idx: Tensor) -> Tensor:
        return torch.zeros_like(self.failed).index_put_((system_idx,), atoms, accumulate=True)

    def _guard(self, energy: Tensor, forces: Tensor, bad: Tensor, system_idx: Tensor) -> Tensor:
        bad = bad | self._any_atom(~torch.isfinite(forces).all(-1), system_idx)
        self.failed = self.failed | bad | ~torch.isfinite(energy)
        return torch.where(self.failed[system_idx, None], torch.zeros_like(forces), forces)

    def _graphs(self, state: ts.SimState, positions: Tensor) -> Graphs:
        cell, neighbours = self.cell, self._list
        if neighbours is None or not self._still_valid(neighbours, positions, cell, state.system_idx):
            neighbours = self._list = self._find(state, positions, cell)
        sender, receiver = neighbours.edge_index
        shifts = torch.bmm(neighbours.unit_shifts.unsqueeze(1), cell[state.system_idx[sender]]).squeeze(1)
        vectors = positions[receiver] - positions[sender] + shifts
        inside = vectors.square().sum(-1) < self.potential.graphs.cutoff**2
        return Graphs(
            positions=positions,
            cell=cell,
            node_attrs=neighbours.node_attrs,
            batch=state.system_idx,
            ptr=neighbours.ptr,
            edge_index=neighbours.edge_index[:, inside],
            unit_shifts=neighbours.unit_shifts[inside],
        )

    def _species(self, state: ts.SimState) -> Tensor:
        table = torch.tensor(self.potential.graphs.atomic_numbers, device=self._device)
        return (state.atomic_numbers[:, None] == table).to(self._dtype)

    def _still_valid(
        self, neighbours: _NeighbourList, positions: Tensor, cell: Tensor, system_idx: Tensor
    ) -> bool:
        """Whether no pair can have come inside the cutoff since the list was made.

        A pair at least R = cutoff + skin apart is at least (1 - s)R - 2d apart now: s the largest strain of
        the cell, d the largest displacement beside the affine one.
        """
        reach = self.potential.graphs.cutoff + SKIN
        deformation = torch.linalg.solve(neighbours.cell, cell)
        affine = torch.bmm(neighbours.positions.unsqueeze(1), deformation[system_idx]).squeeze(1)
        moved = (positions - affine).norm(dim=-1).max()
        eye = torch.eye(3, device=cell.device, dtype=cell.dtype)
        strain = torch.linalg.matrix_norm(deformation - eye).max()
        return bool((1 - strain) * reach - 2 * moved > self.potential.graphs.cutoff)

    def _find(self, state: ts.SimState, positions: Tensor, cell: Tensor) -> _NeighbourList:
        fractional = torch.bmm(positions.unsqueeze(1), torch.linalg.inv(cell)[state.system_idx]).squeeze(1)
        wraps = fractional.floor()
        wrapped = torch.bmm((fractional - wraps).unsqueeze(1), cell[state.system_idx]).squeeze(1)
        reach = self.potential.graphs.cutoff + SKIN
        pairs, shifts = _find_pairs(wrapped, cell, state.pbc, reach, state.system_idx)
        # Sorted by receiver, so that sums over neighbours read memory in order.
        order = torch.argsort(pairs[1], stable=True)
        sender, receiver = pairs[0, order], pairs[1, order]
        unit_shifts = shifts[order].to(self._dtype) - wraps[receiver] + wraps[sender]
        counts = torch.bincount(state.system_idx)
        return _NeighbourList(
            positions=positions.clone(),
            cell=cell.clone(),
            edge_index=torch.stack([sender, receiver]),
            unit_shifts=unit_shifts,
            node_attrs=self._species(state),
            ptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        )


def _find_pairs(
    positions: Tensor, cell: Tensor, pbc: Tensor, reach: float, system_idx: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs `[2, n]` and shifts `[n, 3]`; the fast search gives up on more than about 0.2 atoms per Å³."""
    try:
        pairs, _, shifts = torchsim_nl(positions, cell, pbc, reach, system_idx)
    except NeighborOverflowError:
        pairs, _, shifts = torch_nl_linked_cell(positions, cell, pbc, reach, system_idx)
    return pairs, shifts


def _group_biases(hamiltonians: list[Hamiltonian], sizes: list[int], real: dict[str, Any]) -> list[_Bias]:
    """Systems that share a reference are evaluated together."""
    starts = list(accumulate(sizes, initial=0))
    groups: dict[int, list[int]] = {}
    for i, h in enumerate(hamiltonians):
        if h.bias is not None:
            groups.setdefault(id(h.bias), []).append(i)
    biases = []
    for systems in groups.values():
        reference = hamiltonians[systems[0]].bias
        atoms = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in systems])
        biases.append(
            _Bias(
                reference=reference,  # type: ignore[arg-type]
                force_constants=reference.projected.to(**real),  # type: ignore[union-attr]
                systems=torch.tensor(systems, device=real["device"]),
                atoms=atoms.to(real["device"]),
                scale=torch.tensor([hamiltonians[i].bias_scale for i in systems], **real),
            )
        )
    return biases
