"""The Gibbs energy of one phase over temperature and pressure: a ladder, and anchors that fix its constant.

In the thermodynamic limit the term of the finite cell is subtracted everywhere, in kT of the cell:

    crystal  δ_N(T) = δ_N(T_a) + (3/2) ln(T/T_a): vibrations have 3N - 3 frequencies, and the centre of mass
             a volume that does not grow with the temperature
    liquid   ½ ln(2πN S₀), S₀ = N var(V)/⟨V⟩²

Enthalpy and volume are derivatives of that Gibbs energy, H = ∂(βG)/∂β and V = ∂G/∂P, so that they agree with
it in every term.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from mlip_refine.quantities import KB, MEV, Measured
from mlip_refine.statistics.boundary import PhaseState
from mlip_refine.statistics.gibbs_ladder import GibbsLadder, LadderState, jackknife_error

TEMPERATURE_STEP = 2e-3
"""Part of T of the central difference of βG."""

VOLUME_STEP = 2e-3
"""Relative change of the volume, by the ladder's own compressibility, of the central difference of G."""


@dataclass(frozen=True)
class Anchor:
    """Absolute Gibbs energy of a phase at one rung.

    Attributes:
        temperature: Temperature, K.
        pressure: Pressure, eV/Å³.
        gibbs: Gibbs energy of the cell, eV.
        size_term: What the cell has beyond the thermodynamic limit, eV of the cell; it counts in the limit
            alone.
    """

    temperature: float
    pressure: float
    gibbs: Measured
    size_term: Measured


@dataclass(frozen=True)
class Closure:
    """Two anchors of a phase, compared through its ladder.

    Attributes:
        first: Temperature, K, and pressure, eV/Å³, of the first anchor.
        second: The same of the second.
        difference: What the second has beyond the first by the anchors, less the same by the ladder,
            meV/atom at the temperature of the second.
    """

    first: tuple[float, float]
    second: tuple[float, float]
    difference: Measured


class AnchoredSurface:
    """A ladder with its constant.

    Attributes:
        ladder: The ladder.
        anchors: The anchors.
    """

    def __init__(
        self, ladder: GibbsLadder, anchors: Sequence[Anchor], *, liquid: bool = False, limit: bool = False
    ) -> None:
        """Anchor a ladder; several anchors count by the inverse squares of their errors.

        Args:
            ladder: Ladder of the phase.
            anchors: Absolute Gibbs energies, at least one.
            liquid: Whether the phase is a liquid: which term of the finite cell it has.
            limit: Whether Gibbs energies are those of the thermodynamic limit, else those of the cell.
        """
        self.ladder, self.anchors, self._liquid, self._limit = ladder, tuple(anchors), liquid, limit
        kt = [KB * a.temperature for a in self.anchors]
        sizes = [a.size_term.value / each for a, each in zip(self.anchors, kt, strict=True)]
        self._crystal_term = sum(
            size - 1.5 * math.log(a.temperature) for size, a in zip(sizes, self.anchors, strict=True)
        ) / len(sizes)
        # Reduced errors; exact anchors count equally.
        self._errors = [
            math.hypot(a.gibbs.se, a.size_term.se if limit else 0.0) / each
            for a, each in zip(self.anchors, kt, strict=True)
        ]
        inverse = [1.0 / max(error, 1e-12) ** 2 for error in self._errors]
        self._weights = [each / sum(inverse) for each in inverse]
        self._constants = [
            a.gibbs.value / each - (size if limit else 0.0) - self._relative(a.temperature, a.pressure)
            for a, each, size in zip(self.anchors, kt, sizes, strict=True)
        ]
        self._constant: Tensor = torch.stack(
            [w * c for w, c in zip(self._weights, self._constants, strict=True)]
        ).sum(0)

    @property
    def anchor_se(self) -> float:
        """Standard error of βG of the cell from the anchors, no unit."""
        return math.hypot(*(w * e for w, e in zip(self._weights, self._errors, strict=True)))

    def at(self, temperature: float, pressure: float, *, errors: bool = True) -> PhaseState:
        """Return the state at a temperature, K, and pressure, eV/Å³.

        Args:
            temperature: Temperature, K.
            pressure: Pressure, eV/Å³.
            errors: Whether all rows of the jackknife are wanted, else the estimates alone.
        """
        ladder, kt, n = self.ladder, KB * temperature, self.ladder.n_atoms
        here = ladder.at(temperature, pressure, errors=errors)
        gibbs = kt * (self._relative_of(here, temperature) + self._shift(errors=errors))
        enthalpy, volume = gibbs, here.volume
        if errors:
            ends = [temperature * (1 + sign * TEMPERATURE_STEP) for sign in (1, -1)]
            hot, cold = (self._relative(t, pressure) + self._shift() for t in ends)
            enthalpy = (hot - cold) / (1 / (KB * ends[0]) - 1 / (KB * ends[1]))
            # dP = K dV/V, K = kT V/var(V)
            step = VOLUME_STEP * kt * float(here.volume[0] / here.variance[0])
            high, low = (self._relative(temperature, pressure + sign * step) for sign in (1, -1))
            volume = kt * (high - low) / (2 * step)
        return PhaseState(
            gibbs=gibbs / (n * MEV),
            enthalpy=enthalpy / (n * MEV),
            volume=volume / n,
            anchor_se=self.anchor_se * kt / (n * MEV),
            n_eff=here.n_eff,
        )

    def closures(self) -> list[Closure]:
        """Compare all pairs of anchors."""
        found = []
        for i, j in combinations(range(len(self.anchors)), 2):
            one, two = self.anchors[i], self.anchors[j]
            rows = self._constants[j] - self._constants[i]
            se = math.hypot(self._errors[i], self._errors[j], jackknife_error(rows))
            reduced = Measured(float(rows[0]), se, "")
            per_atom = KB * two.temperature / (self.ladder.n_atoms * MEV)
            found.append(
                Closure(
                    (one.temperature, one.pressure),
                    (two.temperature, two.pressure),
                    reduced.scaled(per_atom, "meV/atom"),
                )
            )
        return found

    def _shift(self, *, errors: bool = True) -> Tensor:
        """Return the constant of βG `[1 + blocks]`, or its estimate alone `[1]`."""
        return self._constant if errors else self._constant[:1]

    def _relative(self, temperature: float, pressure: float) -> Tensor:
        """Return βG of the ladder in the wanted convention, less a constant `[1 + blocks]`."""
        return self._relative_of(self.ladder.at(temperature, pressure), temperature)

    def _relative_of(self, state: LadderState, temperature: float) -> Tensor:
        """Return βG of the ladder in the wanted convention, less a constant, from its state."""
        if not self._limit:
            return state.reduced_gibbs
        if not self._liquid:
            return state.reduced_gibbs - self._crystal_term - 1.5 * math.log(temperature)
        n = self.ladder.n_atoms
        structure_factor = n * state.variance / state.volume.square()
        return state.reduced_gibbs - 0.5 * torch.log(2 * math.pi * n * structure_factor)
