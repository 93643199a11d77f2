"""Frenkel-Ladd paths of harmonic crystals against their exact free energies."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.units import _amu, _e, _hbar
from torch import Tensor

from mlip_refine import testing
from mlip_refine.errors import StatisticsError
from mlip_refine.quantities import GPA, HBAR, KB, MEV, Measured
from mlip_refine.sampling import FrameStore, Length, StatePoint
from mlip_refine.sampling.references import AMU_A2_FS2
from mlip_refine.workflows.free_energy.frenkel_ladd import (
    AbsoluteFreeEnergy,
    LadderSettings,
    absolute_free_energies,
)
from mlip_refine.workflows.free_energy.records import CELLS, LIMIT

TEMPERATURE = 700.0
KINDS = ("fcc", "NaCl", "hcp")
FIT, LADDER = Length(800.0, 80), Length(800.0, 90)


def exact_gibbs(atoms: Atoms, force_constants: Tensor, temperature: float, pressure: float) -> float:
    """Classical G of a harmonic crystal from its frequencies, by hand in SI units, eV.

    F = kT Σ ln(ħω/kT) over 3N - 3 modes - kT ln[(V/N)(M kT / 2πħ²)^(3/2)].
    """
    kt, masses = KB * _e * temperature, atoms.get_masses() * _amu
    root = np.repeat(np.sqrt(masses), 3)
    squares = np.linalg.eigvalsh(force_constants.numpy() * _e * 1e20 / np.outer(root, root))[3:]
    vibrations = kt * np.log(_hbar * np.sqrt(squares) / kt).sum()
    volume = atoms.cell.volume * 1e-30 / len(atoms)
    centre = -kt * math.log(volume * (masses.sum() * kt / (2 * math.pi * _hbar**2)) ** 1.5)
    return (vibrations + centre) / _e + pressure * GPA * atoms.cell.volume


def _crystals() -> dict[str, tuple[StatePoint, Any]]:
    found = {}
    for kind, pressure in zip(KINDS, (0.0, 3.0, 5.0), strict=True):
        atoms, reference = testing.harmonic_crystal(kind)
        found[kind] = (StatePoint(kind, atoms, TEMPERATURE, pressure, replicas=4), reference)
    return found


@pytest.fixture(scope="module")
def energies(open_guards: Callable[..., Any]) -> dict[str, dict[str, AbsoluteFreeEnergy]]:
    """One run per kind of reference, all three crystals and all windows in its one batch."""
    crystals = _crystals()
    potential = testing.HarmonicCrystals([r for _, r in crystals.values()], [11, 13, 17, 22])
    settings = open_guards(timestep=4.0, friction=10.0, interval=40.0)
    points = [point for point, _ in crystals.values()]
    return {
        kind: absolute_free_energies(
            potential, points, settings, LadderSettings(kind, windows, FIT, LADDER), seed=21
        )
        for kind, windows in (("einstein", 9), ("harmonic", 2))
    }


@pytest.mark.statistical
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reference", ["einstein", "harmonic"])
def test_free_energies_of_harmonic_crystals_are_exact(energies: Any, reference: str, kind: str) -> None:
    """To an error below 2 meV/atom from an Einstein and 0.5 from a harmonic reference."""
    found, (point, crystal) = energies[reference][kind], _crystals()[kind]
    exact = exact_gibbs(point.atoms, crystal.force_constants, TEMPERATURE, point.pressure)
    assert abs(found.gibbs.value - exact) < testing.sigma_bound() * found.gibbs.se
    assert found.gibbs.se / len(point.atoms) / MEV < {"einstein": 2.0, "harmonic": 0.5}[reference]
    assert found.gibbs.unit == "eV"
    assert found.overlap > 0.03
    assert found.inefficiency >= 1


@pytest.mark.statistical
def test_the_fitted_harmonic_reference_is_nearer_than_the_einstein_crystal(energies: Any) -> None:
    """Free energies from the reference to the crystal, summed over the crystals: about 0.1 and 0.5 eV."""
    distance = {
        name: sum(abs(e[kind].gibbs.value - e[kind].point.pv - e[kind].reference) for kind in KINDS)
        for name, e in energies.items()
    }
    assert distance["harmonic"] < distance["einstein"]


def test_too_few_windows_are_refused(open_guards: Callable[..., Any]) -> None:
    """An Einstein crystal at one end and collective modes at the other do not overlap."""
    atoms = bulk("Al", "fcc", a=4.05, cubic=True) * (3, 3, 3)
    potential = testing.HarmonicCrystals([testing.harmonic_reference(atoms, {3.2: 4.0, 4.2: 0.05})], [13])
    ladder = LadderSettings("einstein", 2, Length(200.0, 20), Length(200.0, 20))
    settings = open_guards(timestep=4.0, friction=10.0, interval=40.0)
    with pytest.raises(StatisticsError, match="Frenkel-Ladd path of fcc"):
        absolute_free_energies(
            potential, [StatePoint("fcc", atoms, TEMPERATURE, replicas=2)], settings, ladder, seed=1
        )


def test_a_finished_calculation_is_read_from_the_store(
    open_guards: Callable[..., Any], tmp_path: Any
) -> None:
    atoms, reference = testing.harmonic_crystal("NaCl")
    potential = testing.HarmonicCrystals([reference], [11, 17])
    points = [replace(StatePoint("NaCl", atoms, TEMPERATURE), replicas=3)]
    settings = open_guards(timestep=4.0, friction=10.0, interval=40.0)
    ladder = LadderSettings("harmonic", 3, Length(80.0, 12, 5), Length(80.0, 12, 5))
    first = absolute_free_energies(
        potential, points, settings, ladder, seed=2, store=FrameStore(tmp_path, {})
    )
    calls = potential.calls
    again = absolute_free_energies(
        potential, points, settings, ladder, seed=2, store=FrameStore(tmp_path, {})
    )
    assert potential.calls == calls
    assert first["NaCl"].gibbs == again["NaCl"].gibbs


def test_references_take_the_symmetry_of_the_crystal() -> None:
    """The exact answer rests on springs that leave nothing but the three translations soft."""
    for point, reference in _crystals().values():
        squares = torch.linalg.eigvalsh(reference.force_constants)
        assert squares[:3].abs().max() < 1e-10
        assert squares[3] > 0.1
        assert squares[3:].unique().numel() > 3, point.name


@pytest.mark.slow
@pytest.mark.statistical
def test_an_anharmonic_crystal_has_the_limit_of_an_independent_program(
    open_guards: Callable[..., Any],
) -> None:
    """Argon as fcc Lennard-Jones crystal, cut and shifted at 2.5 σ, as it melts: T* = 0.8, ρ* = 0.9731.

    A Monte Carlo program with 256 atoms along an Einstein path found -2.9531(8) ε/atom, and -2.9300 in the
    limit, with σ for the thermal wavelength. 108 atoms are 0.05 ε/atom below the limit.
    """
    potential = testing.LennardJonesTS()
    epsilon, sigma, reduced, density = potential.epsilon, potential.sigma, 0.8, 0.9731
    temperature, n_atoms = reduced * epsilon / KB, 108
    atoms = bulk("Ar", "fcc", a=sigma * (4 / density) ** (1 / 3), cubic=True) * (3, 3, 3)
    settings = open_guards(timestep=8.0, friction=6.0, interval=80.0)
    ladder = LadderSettings("harmonic", 5, Length(2000.0, 250), Length(2000.0, 250))
    point = StatePoint("fcc", atoms, temperature, replicas=4)
    found = absolute_free_energies(potential, [point], settings, ladder, seed=31, limit={"fcc"})["fcc"]
    mass = float(atoms.get_masses()[0]) * AMU_A2_FS2
    wavelength = HBAR * math.sqrt(2 * math.pi / (mass * KB * temperature))
    unit, shift = epsilon / MEV, 3 * reduced * math.log(wavelength / sigma)
    cell, limit = (found.per_atom(convention).scaled(1 / unit, "ε/atom") for convention in (CELLS, LIMIT))
    difference = limit - Measured(-2.9300 + shift, 0.0008, "ε/atom")
    assert abs(difference.value) < testing.sigma_bound(dof=9) * difference.se
    assert difference.se < 0.005
    assert cell.value - limit.value == pytest.approx(reduced * -6.993 / n_atoms, abs=0.012)
