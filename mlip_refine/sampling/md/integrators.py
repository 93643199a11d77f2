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
class IntegratorSettings:
    """Time steps, thermostats and barostats of a batch, in torch-sim's units.

    Attributes:
        timestep: Time steps `[n_systems]`.
        kt: Thermal energies `[n_systems]`, eV.
        friction: Langevin friction of the atoms `[n_systems]`, 1/time; 0 for none.
        pressure: Pressures `[n_systems]`, eV/Å³.
        projection: Free strains `[n_systems, 9, 9]` (see `barostat.strain_projection`).
        cell_mass: Inertia of the rate of strain `[n_systems]`.
        cell_friction: Langevin friction of the rate of strain `[n_systems]`, 1/time; 0 for none.
        chain_time: Relaxation time of the Nosé-Hoover chain `[n_systems]`; infinite for none.
        conserves_momentum: Systems whose total momentum stays zero: without Langevin noise `[n_systems]`.
    """

    timestep: Tensor
    kt: Tensor
    friction: Tensor
    pressure: Tensor
    projection: Tensor
    cell_mass: Tensor
    cell_friction: Tensor
    chain_time: Tensor
    conserves_momentum: Tensor


class Integrator:
    """Steps a batch in place.

    Attributes:
        dof: Degrees of freedom of the momenta `[n_systems]`.
        flexible: Whether any cell moves.
        timestep: Time steps in use `[n_systems]`, torch-sim time.
    """

    def __init__(
        self,
        state: BatchState,
        forcefield: ForceField,
        settings: IntegratorSettings,
        noise: NoiseStreams,
    ) -> None:
        """Set up a batch; `compute_forces` comes before the first step.

        Args:
            state: State of the batch; its tensors are updated in place.
            forcefield: Force field of the same batch.
            settings: Time steps, thermostats and barostats.
            noise: Random numbers of the batch.
        """
        self.state, self.forcefield, self.settings, self.noise = state, forcefield, settings, noise
        self.flexible = bool(settings.projection.abs().sum() > 0)
        counts = torch.bincount(state.system_idx).to(state.positions)
        # A single atom keeps its momentum: it would have no motion without it.
        self.dof = 3.0 * counts - 3.0 * (settings.conserves_momentum & (counts > 1))
        self._eye = torch.eye(3).to(state.positions)
        chained = torch.isfinite(settings.chain_time)
        self.chains = (
            NoseHooverChains(settings.kt, self.dof, settings.chain_time) if bool(chained.any()) else None
        )
        self.set_timestep(settings.timestep)

    def set_timestep(self, timestep: Tensor) -> None:
        """Change the time step of every system `[n_systems]`, torch-sim time."""
        state, settings = self.state, self.settings
        self.timestep, index = timestep, state.system_idx
        decay = torch.exp(-settings.friction * timestep)
        masses = state.masses[:, None]
        self._kick_factor = (timestep / 2)[index, None]
        self._drift_factor = self._kick_factor / masses
        self._decay = decay[index, None]
        self._amplitude = ((1 - decay.square()) * settings.kt)[index, None].mul(masses).sqrt()
        cell_decay = torch.exp(-settings.cell_friction * timestep)
        variance = (1 - cell_decay.square()) * settings.kt / settings.cell_mass
        self._cell_decay, self._cell_amplitude = cell_decay[:, None, None], variance.sqrt()[:, None, None]

    def draw_momenta(self, systems: Sequence[int]) -> None:
        """Give systems momenta of the Maxwell distribution, total momentum zero, and stop their cells."""
        state, settings = self.state, self.settings
        for i in systems:
            atoms = state.system_idx == i
            masses = state.masses[atoms, None]
            momenta = (masses * settings.kt[i]).sqrt() * self.noise.initial(i).to(state.momenta)
            drift = momenta.sum(0) / masses.sum()
            state.momenta[atoms] = momenta - drift * masses if len(masses) > 1 else momenta
            state.strain_rate[i] = 0.0

    def compute_forces(self) -> None:
        """Compute forces, energies and, if the force field is asked for them, stresses."""
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
            self._kick_cells_and_chains()
        if self.flexible:
            rate = self.state.strain_rate
            shrink = -(rate + (_trace(rate) / self.dof)[:, None, None] * self._eye)
            root = self._per_atom(_exp(shrink * (self.timestep / 4)[:, None, None]))
            momenta = _apply(root, self.state.momenta).addcmul_(self.state.forces, self._kick_factor)
            self.state.momenta.copy_(_apply(root, momenta))
        else:
            self.state.momenta.addcmul_(self.state.forces, self._kick_factor)
        if not outer_first:
            self._kick_cells_and_chains()

    def _kick_cells_and_chains(self) -> None:
        """Take half a step of the velocities of cells and chains; they act on different systems."""
        state, settings = self.state, self.settings
        if self.flexible:
            kinetic = self.kinetic_tensor()
            volume = torch.linalg.det(state.cell).abs()
            hydrostatic = _trace(kinetic) / self.dof - volume * settings.pressure
            force = kinetic - volume[:, None, None] * state.stress
            force += hydrostatic[:, None, None] * self._eye
            factor = self.timestep / 2 / settings.cell_mass
            state.strain_rate.add_(self._project(force) * factor[:, None, None])
        if self.chains:
            scale = self.chains.half_step(state, self.timestep, self.kinetic())
            state.momenta.mul_(scale[state.system_idx, None])

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
        flat = torch.bmm(self.settings.projection, matrices.reshape(-1, 9, 1))
        return flat.view(-1, 3, 3)

    def _per_atom(self, matrices: Tensor) -> Tensor:
        return matrices[self.state.system_idx]

    def kinetic(self) -> Tensor:
        """Return the kinetic energies of the atoms `[n_systems]`, eV."""
        state = self.state
        energy = 0.5 * state.momenta.square().sum(-1) / state.masses
        return torch.zeros_like(state.energy).index_add_(0, state.system_idx, energy)

    def kinetic_tensor(self) -> Tensor:
        """Return Σ p⊗p/m `[n_systems, 3, 3]`, eV."""
        state = self.state
        outer = state.momenta[:, :, None] * state.momenta[:, None, :] / state.masses[:, None, None]
        return torch.zeros_like(state.stress).index_add_(0, state.system_idx, outer)

    def temperature_ratio(self) -> Tensor:
        """Return kinetic over set temperature `[n_systems]`."""
        return 2.0 * self.kinetic() / (self.dof.clamp(min=1.0) * self.settings.kt)

    def conserved(self) -> Tensor:
        """Return what the equations of motion conserve without Langevin noise `[n_systems]`, eV.

        U + K for NVE, U + K + P V + ½ W tr(g²) for NPH, U + K and the energy of the chain for Nosé-Hoover.
        """
        state, settings = self.state, self.settings
        moving = settings.projection.abs().sum((1, 2)) > 0
        cell = settings.pressure * torch.linalg.det(state.cell).abs()
        cell += 0.5 * settings.cell_mass * state.strain_rate.square().sum((1, 2))
        total = state.energy + self.kinetic() + torch.where(moving, cell, torch.zeros_like(cell))
        return total + self.chains.energy(state) if self.chains else total


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _exp(matrices: Tensor) -> Tensor:
    """Return the exponential of matrices of norm far below one: to fourth order, exact in float64."""
    square = matrices @ matrices
    eye = torch.diag_embed(torch.ones_like(matrices[..., 0]))
    return eye + matrices + square / 2 + matrices @ square / 6 + square @ square / 24


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return matrix times vector for every atom, summed by elements: no result depends on its neighbours."""
    return (matrices * vectors[:, None, :]).sum(-1)
