"""The force field that torch-sim integrates: a frozen potential, neighbours with a skin, and a bias."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch_sim as ts
from torch import Tensor
from torch_sim.models.interface import ModelInterface

from mlip_refine.errors import SamplingError
from mlip_refine.potential import Potential
from mlip_refine.sampling.biases import BatchBias
from mlip_refine.sampling.md.skin_list import SkinList
from mlip_refine.sampling.no_potential import NoPotential
from mlip_refine.sampling.state_points import Hamiltonian

# A cell whose stretch since the first call has a larger norm than this, or a smaller volume ratio than its
# inverse cube, has blown up or collapsed.
MAX_STRETCH = 4.0


@dataclass(frozen=True)
class _Biased:
    """Systems that share one bias: their numbers, atoms and scales, tensors on the device of the batch."""

    bias: BatchBias
    systems: Tensor
    atoms: Tensor
    scale: Tensor

    def positions(self, positions: Tensor) -> Tensor:
        """Return the positions of these systems `[n, n_atoms, 3]` out of those of the batch."""
        return positions[self.atoms].view(len(self.systems), -1, 3)


class ForceField(ModelInterface):
    """Energies, forces and stresses of every system under its own Hamiltonian.

    A system whose positions or cell became non-finite, or whose cell blew up or collapsed, is evaluated where
    it was first seen, without forces, and marked in `failed`: the other systems of the batch do not notice.
    This is found when a neighbour list no longer holds, so that a healthy step pays nothing for it.

    Systems whose Hamiltonian has a scale of 0 follow their bias alone. The model is evaluated for them only
    where `evaluates_all` asks for it, because a frame is taken; never with `NoPotential`.

    Attributes:
        evaluates_all: Whether calls evaluate the model for systems too that do not follow it.
        model_energy: Unscaled model energies of the last call `[n_systems]`, eV; zero where the model was not
            evaluated.
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

        Raises:
            SamplingError: If a system is to follow a potential that is none.
        """
        super().__init__()
        self._device, self._dtype = potential.device, potential.dtype
        self._compute_forces, self._compute_stress = True, False
        self.potential = potential
        real: dict[str, Any] = {"device": self._device, "dtype": self._dtype}
        self.scale = torch.tensor([h.scale for h in hamiltonians], **real)
        self._scaled = any(h.scale != 1.0 for h in hamiltonians)
        self._follows = self.scale != 0.0
        self._idle, self.evaluates_all = any(h.scale == 0.0 for h in hamiltonians), True
        self._nothing_follows = all(h.scale == 0.0 for h in hamiltonians)
        self.biases = _group_biases(hamiltonians, atoms_per_system, real)
        self.model_energy = torch.zeros(len(hamiltonians), **real)
        self.bias_energy = torch.zeros_like(self.model_energy)
        self.stress = torch.zeros(len(hamiltonians), 3, 3, **real)
        self.failed = torch.zeros(len(hamiltonians), dtype=torch.bool, device=self._device)
        self.alarm = False
        self.cell = torch.zeros_like(self.stress)
        modelled = not isinstance(potential, NoPotential)
        if not (modelled or self._nothing_follows):
            raise SamplingError("without a potential, every Hamiltonian must have a scale of 0")
        self._neighbours = SkinList(potential.graphs, rigid=rigid) if modelled else None
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
        if self._neighbours:
            self._neighbours.forget()
        for biased in self.biases:
            biased.bias.forget()

    def neighbours_found_at(self) -> dict[str, Tensor]:
        """Return positions and cells at which the neighbours were found; nothing if they are to be found.

        Those of biases have the number of the bias before their names.
        """
        found = self._neighbours.found_at() if self._neighbours else {}
        for i, biased in enumerate(self.biases):
            found |= {f"{i}.{name}": value for name, value in biased.bias.found_at().items()}
        return found

    def find_neighbours_at(self, state: ts.SimState, found_at: Mapping[str, Tensor]) -> None:
        """Find the neighbours where they were found before (see `neighbours_found_at`)."""
        if self._neighbours and "positions" in found_at:
            positions, cell = (found_at[name].to(state.positions) for name in ("positions", "cell"))
            self._neighbours.find(state, positions, cell)
        for i, biased in enumerate(self.biases):
            if f"{i}.positions" in found_at:
                places = (found_at[f"{i}.{name}"].to(state.positions) for name in ("positions", "cells"))
                biased.bias.find(*places)

    def forward(self, state: ts.SimState, **_: object) -> dict[str, Tensor]:
        """Return energies `[n_systems]`, forces `[n_atoms, 3]` and stresses `[n_systems, 3, 3]` if wanted."""
        positions, index = self._valid_positions(state), state.system_idx
        energy, forces, stress = self._model(positions, index)
        self.model_energy, self.stress = energy, stress
        if self._scaled:
            energy, forces = self.scale * energy, forces * self.scale[index, None]
            stress = stress * self.scale[:, None, None]
        if self._idle and self.evaluates_all:
            # What the model says of systems that do not follow it may be anything, not a number too.
            energy = torch.where(self._follows, energy, 0.0)
            forces = torch.where(self._follows[index, None], forces, 0.0)
            stress = torch.where(self._follows[:, None, None], stress, 0.0)
        if self.biases:
            energy, forces, stress = energy.clone(), forces.clone(), stress.clone()
            self._add_biases(positions, energy, forces, stress)
        if self.alarm:
            forces = torch.where(self.failed[index, None], torch.zeros_like(forces), forces)
        result = {"energy": energy, "forces": forces}
        if self._compute_stress:
            result["stress"] = stress
        return result

    def _model(self, positions: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return energies, forces and stresses of the model; the last stress where none is wanted.

        They are zero for systems that do not follow the model, unless those are to be evaluated too.
        """
        everything = self.evaluates_all or not self._idle
        energy, forces, stress = torch.zeros_like(self.model_energy), torch.zeros_like(positions), self.stress
        if self._neighbours is None or (self._nothing_follows and not everything):
            return energy, forces, torch.zeros_like(stress) if self._compute_stress else stress
        graphs = self._neighbours.graphs(positions, self.cell, index)
        probes = ("energy", "forces", "stress") if self._compute_stress else ("energy", "forces")
        if everything:
            output = self.potential.evaluate_chunked(graphs, probes)
            stress = output["stress"].detach() if self._compute_stress else stress
            return output["energy"].detach(), output["forces"], stress
        output = self.potential.evaluate_chunked(graphs.select(self._follows), probes)
        energy[self._follows], forces[self._follows[index]] = output["energy"].detach(), output["forces"]
        if self._compute_stress:
            stress = torch.zeros_like(stress)
            stress[self._follows] = output["stress"].detach()
        return energy, forces, stress

    def _add_biases(self, positions: Tensor, energy: Tensor, forces: Tensor, stress: Tensor) -> None:
        """Add what the biases contribute, in place; sets `bias_energy`."""
        self.bias_energy = torch.zeros_like(self.model_energy)
        for biased in self.biases:
            bias, systems, scale = biased.bias, biased.systems, biased.scale
            cell = self.cell[systems]
            u, f, virial = bias.energy_forces(biased.positions(positions), cell, virial=self._compute_stress)
            self.bias_energy[systems] = u
            energy[systems] += scale * u
            forces[biased.atoms] += (scale[:, None, None] * f).view(-1, 3)
            if virial is not None and self._compute_stress:
                volume = torch.linalg.det(cell).abs()
                stress[systems] += (scale / volume)[:, None, None] * virial

    def _valid_positions(self, state: ts.SimState) -> Tensor:
        """Return positions at which to evaluate, with neighbours that hold there; sets `cell` and `failed`.

        A neighbour list of one system that was lost would be endless, and end the whole batch: such systems
        are where they were first seen.
        """
        positions, cell, index = state.positions, state.row_vector_cell.contiguous(), state.system_idx
        self._first = self._first or (positions.clone(), cell.clone())
        if self.alarm or not self._holds(positions, cell, index):
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
            if self._neighbours and not self._neighbours.holds(positions, cell, index):
                self._neighbours.find(state, positions, cell)
            for biased in self.biases:
                x, h = biased.positions(positions), cell[biased.systems]
                if not biased.bias.holds(x, h):
                    biased.bias.find(x, h)
        self.cell = cell
        return positions

    def _holds(self, positions: Tensor, cell: Tensor, index: Tensor) -> bool:
        """Return whether all neighbour lists hold; false where positions are not finite."""
        if self._neighbours is None and not bool(torch.isfinite(positions.sum())):
            return False
        if self._neighbours and not self._neighbours.holds(positions, cell, index):
            return False
        biases = (b.bias.holds(b.positions(positions), cell[b.systems]) for b in self.biases)
        return all(biases)


def _group_biases(hamiltonians: list[Hamiltonian], sizes: list[int], real: dict[str, Any]) -> list[_Biased]:
    """Return the biases; systems that share one are evaluated together."""
    starts = list(accumulate(sizes, initial=0))
    groups: dict[int, list[int]] = {}
    for i, h in enumerate(hamiltonians):
        if h.bias is not None:
            groups.setdefault(id(h.bias), []).append(i)
    biases = []
    for systems in groups.values():
        bias = hamiltonians[systems[0]].bias
        if bias is not None:
            atoms = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in systems])
            biases.append(
                _Biased(
                    bias=bias.on(real["device"], real["dtype"]),
                    systems=torch.tensor(systems, device=real["device"]),
                    atoms=atoms.to(real["device"]),
                    scale=torch.tensor([hamiltonians[i].bias_scale for i in systems], **real),
                )
            )
    return biases
