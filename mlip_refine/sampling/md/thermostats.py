"""Nosé-Hoover chains (Martyna, Klein, Tuckerman 1992), a chain for every system that asks for one."""

import torch
from torch import Tensor

from mlip_refine.sampling.md.state import CHAIN_LENGTH, BatchState

# Suzuki-Yoshida weights of sixth order in total (Martyna et al. 1996).
_WEIGHTS = (0.784513610477560, 0.235573213359357, -1.17767998417887, 1.3151863206839063)
_SCHEDULE = (*_WEIGHTS[:3], _WEIGHTS[3], *_WEIGHTS[2::-1])


class NoseHooverChains:
    """Scales momenta so that systems sample the canonical ensemble; systems without a chain keep theirs.

    Attributes:
        masses: Inertia of the links `[n_systems, CHAIN_LENGTH]`; infinite for systems without a chain.
        active: Systems that have a chain `[n_systems]`.
    """

    def __init__(self, kt: Tensor, dof: Tensor, time: Tensor) -> None:
        """Set the inertia of the links.

        Args:
            kt: Thermal energies `[n_systems]`, eV.
            dof: Degrees of freedom of the atoms `[n_systems]`.
            time: Relaxation times of the chains `[n_systems]`, torch-sim time; infinite for none.
        """
        self.kt, self.dof = kt, dof
        self.active = torch.isfinite(time)
        links = torch.ones(len(kt), CHAIN_LENGTH).to(kt)
        links[:, 0] = dof
        self.masses = links * (kt * time.square())[:, None]

    def half_step(self, state: BatchState, timestep: Tensor, kinetic: Tensor) -> Tensor:
        """Move the chains by half a time step and return the factor of the momenta `[n_systems]`."""
        scale, last = torch.ones_like(kinetic), CHAIN_LENGTH - 1
        velocities, positions = state.chain_velocities, state.chain_positions
        for weight in _SCHEDULE:
            step = weight * timestep / 2
            now = kinetic * scale.square()
            velocities[:, last] += step / 2 * self._force(velocities, now, last)
            for link in reversed(range(last)):
                self._damped_kick(velocities, now, step, link)
            scale = scale * torch.exp(-step * velocities[:, 0])
            positions.add_(step[:, None] * velocities)
            now = kinetic * scale.square()
            for link in range(last):
                self._damped_kick(velocities, now, step, link)
            velocities[:, last] += step / 2 * self._force(velocities, now, last)
        return torch.where(self.active, scale, torch.ones_like(scale))

    def _force(self, velocities: Tensor, kinetic: Tensor, link: int) -> Tensor:
        """Return the acceleration of a link `[n_systems]`."""
        if link == 0:
            heat = 2 * kinetic - self.dof * self.kt
        else:
            heat = self.masses[:, link - 1] * velocities[:, link - 1].square() - self.kt
        return torch.where(self.active, heat / self.masses[:, link], torch.zeros_like(heat))

    def _damped_kick(self, velocities: Tensor, kinetic: Tensor, step: Tensor, link: int) -> None:
        damping = torch.exp(-step / 4 * velocities[:, link + 1])
        kicked = velocities[:, link] * damping + step / 2 * self._force(velocities, kinetic, link)
        velocities[:, link] = kicked * damping

    def energy(self, state: BatchState) -> Tensor:
        """Return the energies of the chains `[n_systems]`, eV."""
        motion = 0.5 * self.masses * state.chain_velocities.square()
        links = torch.ones_like(self.masses)
        links[:, 0] = self.dof
        heat = links * self.kt[:, None] * state.chain_positions
        total = (motion + heat).sum(1)
        return torch.where(self.active, total, torch.zeros_like(total))
