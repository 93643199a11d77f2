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
        masses: Of the links `[n_systems, CHAIN_LENGTH]`; infinite for systems without a chain.
    """

    def __init__(self, kt: Tensor, dof: Tensor, time: Tensor) -> None:
        """Set the inertia of the links.

        Args:
            kt: `[n_systems]`, eV.
            dof: Degrees of freedom of the atoms `[n_systems]`.
            time: Of the chain `[n_systems]`, torch-sim time; infinite for none.
        """
        self.kt, self.dof = kt, dof
        self.active = torch.isfinite(time)
        links = torch.ones(len(kt), CHAIN_LENGTH).to(kt)
        links[:, 0] = dof
        self.masses = links * (kt * time.square())[:, None]

    def half_step(self, state: BatchState, timestep: Tensor, kinetic: Tensor) -> Tensor:
        """Move the chains by half a time step and return the factor of the momenta `[n_systems]`."""
        scale = torch.ones_like(kinetic)
        velocities, positions = state.chain_velocities, state.chain_positions
        for weight in _SCHEDULE:
            step = weight * timestep / 2
            self._kick_down(velocities, kinetic * scale.square(), step)
            scale = scale * torch.exp(-step * velocities[:, 0])
            positions.add_(step[:, None] * velocities)
            self._kick_up(velocities, kinetic * scale.square(), step)
        return torch.where(self.active, scale, torch.ones_like(scale))

    def _force(self, velocities: Tensor, kinetic: Tensor, link: int) -> Tensor:
        """Acceleration of a link."""
        if link == 0:
            heat = 2 * kinetic - self.dof * self.kt
        else:
            heat = self.masses[:, link - 1] * velocities[:, link - 1].square() - self.kt
        return torch.where(self.active, heat / self.masses[:, link], torch.zeros_like(heat))

    def _kick_down(self, velocities: Tensor, kinetic: Tensor, step: Tensor) -> None:
        last = CHAIN_LENGTH - 1
        velocities[:, last] += step / 2 * self._force(velocities, kinetic, last)
        for link in reversed(range(last)):
            self._damped_kick(velocities, kinetic, step, link)

    def _kick_up(self, velocities: Tensor, kinetic: Tensor, step: Tensor) -> None:
        last = CHAIN_LENGTH - 1
        for link in range(last):
            self._damped_kick(velocities, kinetic, step, link)
        velocities[:, last] += step / 2 * self._force(velocities, kinetic, last)

    def _damped_kick(self, velocities: Tensor, kinetic: Tensor, step: Tensor, link: int) -> None:
        damping = torch.exp(-step / 4 * velocities[:, link + 1])
        kicked = velocities[:, link] * damping + step / 2 * self._force(velocities, kinetic, link)
        velocities[:, link] = kicked * damping

    def energy(self, state: BatchState) -> Tensor:
        """Energy of the chains `[n_systems]`, eV."""
        motion = 0.5 * self.masses * state.chain_velocities.square()
        links = torch.ones_like(self.masses)
        links[:, 0] = self.dof
        heat = links * self.kt[:, None] * state.chain_positions
        total = (motion + heat).sum(1)
        return torch.where(self.active, total, torch.zeros_like(total))
