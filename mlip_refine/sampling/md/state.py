"""State of a running batch: that of torch-sim, with what barostats and thermostat chains add."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch_sim as ts
from ase import Atoms
from torch import Tensor
from torch_sim.integrators import MDState

# Links of a Nosé-Hoover chain.
CHAIN_LENGTH = 3

_SAVED = (
    "positions",
    "momenta",
    "forces",
    "energy",
    "cell",
    "stress",
    "strain_rate",
    "chain_positions",
    "chain_velocities",
)


@dataclass(kw_only=True)
class BatchState(MDState):
    """A torch-sim MD state with what a barostat and a Nosé-Hoover chain add.

    Attributes:
        stress: Stress of the Hamiltonian `[n_systems, 3, 3]`, eV/Å³, tensile positive.
        strain_rate: Symmetric rate of strain of the cells `[n_systems, 3, 3]`, per torch-sim time.
        chain_positions: Positions of the thermostat chains `[n_systems, CHAIN_LENGTH]`.
        chain_velocities: Velocities of the thermostat chains `[n_systems, CHAIN_LENGTH]`.
    """

    stress: Tensor
    strain_rate: Tensor
    chain_positions: Tensor
    chain_velocities: Tensor

    _system_attributes = MDState._system_attributes | {
        "stress",
        "strain_rate",
        "chain_positions",
        "chain_velocities",
    }

    @classmethod
    def from_atoms(cls, atoms: list[Atoms], device: torch.device, dtype: torch.dtype) -> Self:
        """Return systems at rest, forces not yet computed."""
        plain = ts.io.atoms_to_state(atoms, device, dtype)
        matrix = torch.zeros_like(plain.cell)
        chain = matrix.new_zeros(len(atoms), CHAIN_LENGTH)
        return cls(
            positions=plain.positions,
            masses=plain.masses,
            cell=plain.cell,
            pbc=plain.pbc,
            atomic_numbers=plain.atomic_numbers,
            system_idx=plain.system_idx,
            momenta=torch.zeros_like(plain.positions),
            forces=torch.zeros_like(plain.positions),
            energy=matrix.new_zeros(len(atoms)),
            stress=matrix,
            strain_rate=torch.zeros_like(matrix),
            chain_positions=chain,
            chain_velocities=torch.zeros_like(chain),
        )

    def dynamic(self) -> dict[str, Tensor]:
        """Return the tensors that the dynamics changes, not copies of them."""
        return {name: getattr(self, name) for name in _SAVED}

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of all tensors that the dynamics changes."""
        return {name: value.clone() for name, value in self.dynamic().items()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Set all tensors that the dynamics changes, in place."""
        for name, value in self.dynamic().items():
            value.copy_(saved[name])

    def copy_systems(
        self, chosen: Tensor, source: Mapping[str, Tensor], target: Mapping[str, Tensor]
    ) -> None:
        """Copy the chosen systems `[n_systems]` from one set of dynamic tensors into another, in place."""
        chosen = chosen.to(self.energy.device)
        for name in _SAVED:
            rows = chosen[self.system_idx] if name in self._atom_attributes else chosen
            rows = rows.view(-1, *[1] * (target[name].dim() - 1))
            target[name].copy_(torch.where(rows, source[name], target[name]))
