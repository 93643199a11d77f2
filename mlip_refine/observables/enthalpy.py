"""Enthalpy."""

from torch import Tensor

from mlip_refine.observables.base import Observable, Sample


class Enthalpy(Observable):
    """Enthalpy of the configurations ⟨U + P V⟩/N, eV/atom, P the pressure of the state.

    The kinetic part, 3/2 kT per atom, is the same for all phases and left out. A fixed cell gives the
    enthalpy at P as far as P is its pressure.
    """

    labels = ("enthalpy",)
    unit = "eV/atom"

    def columns(self, sample: Sample) -> Tensor:
        """Enthalpy of every frame `[n, 1]`."""
        return (sample.enthalpy / sample.n_atoms)[:, None]
