"""Equations of motion of a batch in which every system has its own ensemble, temperature, pressure and step.

One splitting serves all ensembles. A step is

    cell kick - kick - drift - thermostat - drift - forces - kick - cell kick

with half steps but for the thermostat. With a fixed cell and Langevin noise this is BAOAB (Leimkuhler and
Matthews 2013); without noise it is velocity Verlet (NVE). A moving cell follows Martyna, Tobias and Klein
(1994) with the symmetric rate of strain g as in Quigley and Probert (2004):

    dr/dt = p/m + g r                dp/dt = F - (g + tr(g)/N_f) p
    dh/dt = g h                    W dg/dt = P[Σ p⊗p/m - V σ - V P_ext + (Σ p²/m)/N_f] + noise

P projects onto the strains that are free (see `barostat`). The density it keeps is exp(-β(U + K + P_ext V))
in the measure dV d(shape): an ideal gas has ⟨V⟩ = (N + 1) kT / P_ext. Without noise this is NPH.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_refine.sampling.md.forcefield import ForceField
from mlip_refine.sampling.md.noise import NoiseStreams
from mlip_refine.sampling.md.state import BatchState
from mlip_refine.sampling.md.thermostats import NoseHooverChains


@dataclass(frozen=True)
class Controls:
    """What drives every system of a batch, in torch-sim's units.

    Attributes:
        kt: `[n_systems]`, eV.
        friction: Langevin friction of the atoms `[n_systems]`, 1/time; 0 for none.
        pressure: `[n_systems]`, eV/Å³.
        projection: Free strains `[n_systems, 9, 9]` (see `barostat.strain_projection`).
        cell_mass: Inertia of the rate of strain `[n_systems]`.
        cell_friction: Langevin friction of the rate of strain `[n_systems]`, 1/time; 0 for none.
        chain_time: Time of the Nosé-Hoover chain `[n_systems]`; infinite for none.
        conserves_momentum: Systems whose total momentum stays zero: without Langevin noise `[n_systems]`.
    """

    kt: Tensor
    friction: Tensor
    pressure: Tensor
    projection: Tensor
    cell_mass: Tensor
    cell_friction: Tensor
    chain_time: Tensor
    conserves_momentum: Tensor


class Integrator:
    """Steps a batch in place."""

    def __init__(
        self,
        state: BatchState,
        forcefield: ForceField,
        controls: Controls,
        timestep: Tensor,
        noise: NoiseStreams,
    ) -> None:
        """Compute the first forces.

        Args:
            state: The batch; its tensors are updated in place.
            forcefield: Of the same batch.
            controls: Thermostats and barostats.
            timestep: `[n_systems]`, torch-sim time.
            noise: Streams of the batch.
        """
        self.state, self.forcefield, self.controls, self.noise = state, forcefield, controls, noise
        self.flexible = bool(controls.projection.abs().sum() > 0)
        counts = torch.bincount(state.system_idx).to(state.positions)
        # A single atom keeps its momentum: it would have no motion without it.
        self.dof = 3.0 * counts - 3.0 * (controls.conserves_momentum & (counts > 1))
        self._eye = torch.eye(3).to(state.positions)
        chained = torch.isfinite(controls.chain_time)
        self.chains = (
            NoseHooverChains(controls.kt, self.dof, controls.chain_time) if bool(chained.any()) else None
        )
        self.set_timestep(timestep)
        self.compute_forces()

    def set_timestep(self, timestep: Tensor) -> None:
        """Change the step of every system `[n_systems]` and all that follows from it."""
        state, controls = self.state, self.controls
        self.timestep, index = timestep, state.system_idx
        decay = torch.exp(-controls.friction * timestep)
        masses = state.masses[:, None]
        self._kick_factor = (timestep / 2)[index, None]
        self._drift_factor = self._kick_factor / masses
        self._decay = decay[index, None]
        self._amplitude = ((1 - decay.square()) * controls.kt)[index, None].mul(masses).sqrt()
        cell_decay = torch.exp(-controls.cell_friction * timestep)
        variance = (1 - cell_decay.square()) * controls.kt / controls.cell_mass
        self._cell_decay, self._cell_amplitude = cell_decay[:, None, None], variance.sqrt()[:, None, None]

    def draw_momenta(self, systems: Sequence[int]) -> None:
        """Give systems momenta of the Maxwell distribution, total momentum zero, and stop their cells."""
        state, controls = self.state, self.controls
        for i in systems:
            atoms = state.system_idx == i
            masses = state.masses[atoms, None]
            momenta = (masses * controls.kt[i]).sqrt() * self.noise.initial(i).to(state.momenta)
            drift = momenta.sum(0) / masses.sum()
            state.momenta[atoms] = momenta - drift * masses if len(masses) > 1 else momenta
            state.strain_rate[i] = 0.0

    def compute_forces(self) -> None:
        """Forces, energies and, if the force field is asked for it, the stress at the present positions."""
        output = self.forcefield(self.state)
        self.state.forces.copy_(output["forces"])
        self.state.energy.copy_(output["energy"])
        if "stress" in output:
            self.state.stress.copy_(output["stress"])

    def step(self, number: int) -> None:
        """Take step `number`, which says what noise it uses."""
        atoms, cells = self.noise.at(number)
        self._half_kick(outer_first=True)
        self._half_drift()
        self.state.momenta.mul_(self._decay).addcmul_(atoms, self._amplitude)
        if self.flexible:
            noise = self._project(cells) * self._cell_amplitude
            self.state.strain_rate.mul_(self._cell_decay).add_(noise)
        self._half_drift()
        self.compute_forces()
        self._half_kick(outer_first=False)

    def _half_kick(self, *, outer_first: bool) -> None:
        if outer_first:
            self._outer()
        if self.flexible:
            rate = self.state.strain_rate
            shrink = -(rate + (_trace(rate) / self.dof)[:, None, None] * self._eye)
            root = self._per_atom(_exp(shrink * (self.timestep / 4)[:, None, None]))
            momenta = _apply(root, self.state.momenta).addcmul_(self.state.forces, self._kick_factor)
            self.state.momenta.copy_(_apply(root, momenta))
        else:
            self.state.momenta.addcmul_(self.state.forces, self._kick_factor)
        if not outer_first:
            self._outer()

    def _outer(self) -> None:
        """Half a step of the cell's velocity and of the chains; they act on different systems."""
        if self.flexible:
            self._half_cell_kick()
        if self.chains:
            scale = self.chains.half_step(self.state, self.timestep, self.kinetic())
            self.state.momenta.mul_(scale[self.state.system_idx, None])

    def _half_cell_kick(self) -> None:
        state, controls = self.state, self.controls
        kinetic = self.kinetic_tensor()
        volume = torch.linalg.det(state.cell).abs()
        hydrostatic = _trace(kinetic) / self.dof - volume * controls.pressure
        force = kinetic - volume[:, None, None] * state.stress
        force += hydrostatic[:, None, None] * self._eye
        factor = self.timestep / 2 / controls.cell_mass
        state.strain_rate.add_(self._project(force) * factor[:, None, None])

    def _half_drift(self) -> None:
        state = self.state
        if not self.flexible:
            state.positions.addcmul_(state.momenta, self._drift_factor)
            return
        root = _exp(state.strain_rate * (self.timestep / 4)[:, None, None])
        per_atom = self._per_atom(root)
        moved = _apply(per_atom, state.positions).addcmul_(state.momenta, self._drift_factor)
        state.positions.copy_(_apply(per_atom, moved))
        # torch-sim's cells hold their vectors as columns.
        state.cell.copy_(root @ root @ state.cell)

    def _project(self, matrices: Tensor) -> Tensor:
        flat = torch.bmm(self.controls.projection, matrices.reshape(-1, 9, 1))
        return flat.view(-1, 3, 3)

    def _per_atom(self, matrices: Tensor) -> Tensor:
        return matrices[self.state.system_idx]

    def kinetic(self) -> Tensor:
        """Kinetic energy of the atoms `[n_systems]`, eV."""
        state = self.state
        energy = 0.5 * state.momenta.square().sum(-1) / state.masses
        return torch.zeros_like(state.energy).index_add_(0, state.system_idx, energy)

    def kinetic_tensor(self) -> Tensor:
        """Σ p⊗p/m `[n_systems, 3, 3]`, eV."""
        state = self.state
        outer = state.momenta[:, :, None] * state.momenta[:, None, :] / state.masses[:, None, None]
        return torch.zeros_like(state.stress).index_add_(0, state.system_idx, outer)

    def temperature_ratio(self) -> Tensor:
        """Kinetic over set temperature `[n_systems]`."""
        return 2.0 * self.kinetic() / (self.dof.clamp(min=1.0) * self.controls.kt)

    def conserved(self) -> Tensor:
        """What the equations of motion conserve without Langevin noise `[n_systems]`, eV.

        U + K for NVE, U + K + P V + ½ W tr(g²) for NPH, U + K and the energy of the chain for Nosé-Hoover.
        """
        state, controls = self.state, self.controls
        moving = controls.projection.abs().sum((1, 2)) > 0
        cell = controls.pressure * torch.linalg.det(state.cell).abs()
        cell += 0.5 * controls.cell_mass * state.strain_rate.square().sum((1, 2))
        total = state.energy + self.kinetic() + torch.where(moving, cell, torch.zeros_like(cell))
        return total + self.chains.energy(state) if self.chains else total


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _exp(matrices: Tensor) -> Tensor:
    """Exponential of matrices of norm far below one: the series to fourth order is exact in float64."""
    square = matrices @ matrices
    eye = torch.diag_embed(torch.ones_like(matrices[..., 0]))
    return eye + matrices + square / 2 + matrices @ square / 6 + square @ square / 24


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrix times vector for every atom; summed by elements, so that no result depends on its neighbours."""
    return (matrices * vectors[:, None, :]).sum(-1)
