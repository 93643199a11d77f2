"""The force field that torch-sim integrates: a frozen potential, neighbours with a skin, and a bias."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch_sim as ts
from torch import Tensor
from torch_sim.models.interface import ModelInterface

from mlip_refine.potential import Potential
from mlip_refine.sampling.md.skin_list import SkinList
from mlip_refine.sampling.references import HarmonicReference
from mlip_refine.sampling.state_points import Hamiltonian

# A cell whose stretch since the first call has a larger norm than this, or a smaller volume ratio than its
# inverse cube, has blown up or collapsed.
MAX_STRETCH = 4.0


@dataclass(frozen=True)
class _Bias:
    """Systems held by one reference: their numbers, atoms and scales, tensors on the device of the batch."""

    reference: HarmonicReference
    force_constants: Tensor
    systems: Tensor
    atoms: Tensor
    scale: Tensor


class ForceField(ModelInterface):
    """Energies, forces and stresses of every system under its own Hamiltonian.

    A system whose positions or cell became non-finite, or whose cell blew up or collapsed, is evaluated where
    it was first seen, without forces, and marked in `failed`: the other systems of the batch do not notice.
    This is found when the neighbour list no longer holds, so that a healthy step pays nothing for it.

    Attributes:
        model_energy: Unscaled model energies of the last call `[n_systems]`, eV.
        bias_energy: Unscaled bias energies of the last call `[n_systems]`, eV.
        stress: Unscaled model stress of the last call that asked for it `[n_systems, 3, 3]`, eV/Å³.
        cell: Cells of the last call, rows `[n_systems, 3, 3]`, Å, always finite.
        failed: Systems that were lost since the last `clear` `[n_systems]`.
        alarm: Whether any system failed.
    """

    def __init__(
        self,
        potential: Potential,
        hamiltonians: list[Hamiltonian],
        atoms_per_system: list[int],
        *,
        rigid: bool = False,
    ) -> None:
        """Set up for a batch of systems.

        Args:
            potential: Frozen copy of a potential (see `Potential.frozen_copy`).
            hamiltonians: Hamiltonian of every system.
            atoms_per_system: Number of atoms of every system, in the order of the batch.
            rigid: Whether no cell ever changes.
        """
        super().__init__()
        self._device, self._dtype = potential.device, potential.dtype
        self._compute_forces, self._compute_stress = True, False
        self.potential = potential
        real: dict[str, Any] = {"device": self._device, "dtype": self._dtype}
        self.scale = torch.tensor([h.scale for h in hamiltonians], **real)
        self._scaled = any(h.scale != 1.0 for h in hamiltonians)
        self.biases = _group_biases(hamiltonians, atoms_per_system, real)
        self.model_energy = torch.zeros(len(hamiltonians), **real)
        self.bias_energy = torch.zeros_like(self.model_energy)
        self.stress = torch.zeros(len(hamiltonians), 3, 3, **real)
        self.failed = torch.zeros(len(hamiltonians), dtype=torch.bool, device=self._device)
        self.alarm = False
        self.cell = torch.zeros_like(self.stress)
        self._neighbours = SkinList(potential.graphs, rigid=rigid)
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
        self.failed, self.alarm = torch.zeros_like(self.failed), False

    def forget_neighbours(self) -> None:
        """Find the neighbours anew at the next call."""
        self._neighbours.forget()

    def neighbours_found_at(self) -> dict[str, Tensor]:
        """Return positions and cells at which the neighbours were found; nothing if they are to be found."""
        return self._neighbours.found_at()

    def find_neighbours_at(self, state: ts.SimState, found_at: Mapping[str, Tensor]) -> None:
        """Find the neighbours where they were found before (see `neighbours_found_at`)."""
        positions, cell = (found_at[name].to(state.positions) for name in ("positions", "cell"))
        self._neighbours.find(state, positions, cell)

    def forward(self, state: ts.SimState, **_: object) -> dict[str, Tensor]:
        """Return energies `[n_systems]`, forces `[n_atoms, 3]` and stresses `[n_systems, 3, 3]` if wanted."""
        positions, index = self._valid_positions(state), state.system_idx
        graphs = self._neighbours.graphs(positions, self.cell, index)
        probes = ("energy", "forces", "stress") if self._compute_stress else ("energy", "forces")
        output = self.potential.evaluate_chunked(graphs, probes)
        self.model_energy = energy = output["energy"].detach()
        forces = output["forces"]
        if self._scaled:
            energy, forces = self.scale * energy, forces * self.scale[index, None]
        if self.biases:
            energy, forces = energy.clone(), forces.clone()
            self.bias_energy = torch.zeros_like(self.model_energy)
            for bias in self.biases:
                x = positions[bias.atoms].view(len(bias.systems), -1, 3)
                u, f = bias.reference.energy_forces(x, bias.force_constants)
                self.bias_energy[bias.systems] = u
                energy[bias.systems] += bias.scale * u
                forces[bias.atoms] += (bias.scale[:, None, None] * f).view(-1, 3)
        if self.alarm:
            forces = torch.where(self.failed[index, None], torch.zeros_like(forces), forces)
        result = {"energy": energy, "forces": forces}
        if self._compute_stress:
            self.stress = output["stress"].detach()
            result["stress"] = self.stress * self.scale[:, None, None]
        return result

    def _valid_positions(self, state: ts.SimState) -> Tensor:
        """Return positions at which to evaluate, with neighbours that hold there; sets `cell` and `failed`.

        A neighbour list of one system that was lost would be endless, and end the whole batch: such systems
        are where they were first seen.
        """
        positions, cell, index = state.positions, state.row_vector_cell.contiguous(), state.system_idx
        self._first = self._first or (positions.clone(), cell.clone())
        if self.alarm or not self._neighbours.holds(positions, cell, index):
            first_positions, first_cell = self._first
            finite = torch.isfinite(positions).all(-1)
            lost = torch.zeros_like(self.failed).index_put_((index,), ~finite, accumulate=True)
            stretch = torch.linalg.solve(first_cell, cell)
            sound = torch.linalg.matrix_norm(stretch) < MAX_STRETCH
            lost = lost | ~(sound & (torch.linalg.det(stretch) > MAX_STRETCH**-3))
            self.failed = self.failed | lost
            self.alarm = bool(self.failed.any())
            positions = torch.where(self.failed[index, None], first_positions, positions)
            cell = torch.where(self.failed[:, None, None], first_cell, cell)
            if not self._neighbours.holds(positions, cell, index):
                self._neighbours.find(state, positions, cell)
        self.cell = cell
        return positions


def _group_biases(hamiltonians: list[Hamiltonian], sizes: list[int], real: dict[str, Any]) -> list[_Bias]:
    """Return the biases; systems that share a reference are evaluated together."""
    starts = list(accumulate(sizes, initial=0))
    groups: dict[int, list[int]] = {}
    for i, h in enumerate(hamiltonians):
        if h.bias is not None:
            groups.setdefault(id(h.bias), []).append(i)
    biases = []
    for systems in groups.values():
        reference: HarmonicReference = hamiltonians[systems[0]].bias  # type: ignore[assignment]
        atoms = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in systems])
        biases.append(
            _Bias(
                # Sites that lie elsewhere would be copied to the device at every step.
                reference=replace(reference, sites=reference.sites.to(**real)),
                force_constants=reference.projected.to(**real),
                systems=torch.tensor(systems, device=real["device"]),
                atoms=atoms.to(real["device"]),
                scale=torch.tensor([hamiltonians[i].bias_scale for i in systems], **real),
            )
        )
    return biases
