"""Phonon fine-tuning: columns of the Hessian, or other products with it, beside those of a reference."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlip_refine.crystals.phonons.hessian import summed
from mlip_refine.data.phonons.force_constants import Fit
from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.errors import InputError
from mlip_refine.losses.options import PhononHVPOptions
from mlip_refine.losses.phonons.base import BatchResult, Gradients, PhononLoss, mean_over
from mlip_refine.losses.phonons.probes import (
    Probe,
    ThermalSpread,
    displaced_probes,
    drawn_probes,
    mass_scale,
    most_probes,
    normalised,
    reference_size,
    thermal_probes,
)
from mlip_refine.potential import Graphs, Potential, Work

type Product = Callable[..., Tensor]
"""Products of Hessians with directions `[n_atoms, 3]`, eV/Å², from a potential and a batch."""


class _Part(NamedTuple):
    """What a chunk adds.

    Attributes:
        sums: Weighted: error, squares of the differences, squares of the reference `[n, 3]`.
        gradients: Gradients of the errors in the parameters.
    """

    sums: Tensor
    gradients: Gradients


class PhononHVP(PhononLoss):
    """Mean over materials of the mean error of the components of (H_θ - Φ) v, v unit vectors; unit eV/Å².

    With `displacements` it is [F_θ(r + u) - F_θ(r) - F_DFT(u)]/|u|, straight from the forces of the
    reference (Koker et al. have one-hot v; what else is here comes from the same Hessian). With `forces`,
    F_θ(r) is not subtracted: that is fine-tuning on forces, for comparison.

    In steps of energies and forces of the same batch an exact step costs 2.2(1), `central` and
    `displacements` 1.8(1) (four cells, 144 atoms in all, of `titanium-compact` on one core, timed in turn).
    Single precision costs 8e-7 of products and 2e-6 of gradients, and 5e-5 of central differences at 0.005 Å,
    which are themselves off by 1e-4 at 0.01 Å.

    A chunk holds at least one cell, so the largest sets the least memory of an update. One exact step (value
    and gradients, one direction) of a cell of 300 atoms of titanium takes on the CPU:

    | model                          | edges  | float32  | float64  |
    |--------------------------------|--------|----------|----------|
    | `titanium-compact`             | 6,000  | 0.26 GiB | 0.53 GiB |
    | `medium_mace`, 64x0e           | 16,800 | 1.8 GiB  | 3.1 GiB  |
    | `medium_mace`, 64x0e + 64x1o   | 16,800 | 3.9 GiB  | 7.3 GiB  |

    in proportion to the edges (VmHWM beyond VmRSS before it, each in a fresh process with one thread, after
    an update of a cell of two atoms).
    """

    Options = PhononHVPOptions
    options: PhononHVPOptions

    def _use(self, references: Iterable[PhononReference]) -> None:
        super()._use(references)
        self._sizes: dict[int, float] = {}
        self._spreads: dict[int, ThermalSpread] = {}

    def require(self, reference: PhononReference) -> None:
        """Refuse a material without force constants, or without displacements.

        Raises:
            InputError: With what it lacks.
        """
        if not self.options.of_displacements:
            super().require(reference)
        elif not reference.displacements:
            raise InputError(f"{reference.name} has no forces of displaced cells", fix="Use backend: hvp.")

    @staticmethod
    def fit_of(options: PhononHVPOptions) -> Fit:
        """Return whether materials need force constants: displacements can do without."""
        return "possible" if options.of_displacements else True

    def skin(self, reference: PhononReference) -> float:
        """How much nearer two atoms of a material may come when they are displaced, Å."""
        if self.options.of_displacements:
            return 2 * max(float(d.displacement.norm(dim=1).max()) for d in reference.displacements)
        return 2 * 3**0.5 * self.options.step if self.options.backend == "central" else 0.0

    def directions(self, reference: PhononReference) -> int:
        """How many directions of a material are evaluated in an update, at most: some may be drawn twice."""
        options = self.options
        if options.of_displacements:
            return min(options.probes, len(reference.displacements))
        return most_probes(reference, options.probe or "one_hot", options.probes)

    def batch(self, potential: Potential, materials: Sequence[int]) -> BatchResult:
        """The mean loss of some of the materials, their probes drawn by seed and number of the update."""
        groups = [normalised(self.drawn(number), 1 / len(materials)) for number in materials]
        probes = [probe for group in groups for probe in group]
        pairs = zip(materials, groups, strict=True)
        structures = [self.structure(potential, number) for number, group in pairs for _ in group]
        trained = list(potential.trainable_parameters().values()) if torch.is_grad_enabled() else []
        if self.options.backend == "hvp":
            work = Work.HESSIAN_GRADIENT if trained else Work.HESSIAN
        elif not trained:
            work = Work.FORCES
        else:
            one_end = self.options.backend == "forces"
            work = Work.FORCES_GRADIENT if one_end else Work.DIFFERENCE_GRADIENT
        evaluate = partial(self._part, potential, trained, probes)
        parts = list(potential.in_chunks(work, structures, evaluate))
        sums = torch.cat([part.sums for part in parts])
        gradients: Gradients = [None] * len(trained)
        for part in parts:
            gradients = summed(gradients, part.gradients)
        of_materials = torch.stack([mine.sum(0) for mine in sums.split([len(group) for group in groups])])
        errors = 100 * (of_materials[:, 1] / of_materials[:, 2].clamp(min=1e-20)).sqrt()
        value = mean_over((len(materials) * of_materials[:, 0]).tolist(), "")
        measured = {"relative error": mean_over(errors.tolist(), "%")}
        return BatchResult(sums[:, 0].sum(), value.se, gradients, measured)

    def drawn(self, number: int) -> list[Probe]:
        """The directions of a material at this update."""
        reference, options = self.references[number], self.options
        random = np.random.default_rng([options.seed, self.step, number])
        scale = mass_scale(reference, mass_weighted=options.mass_weighted)
        if options.of_displacements:
            probes = displaced_probes(reference, options.probes, scale, random)
        elif options.probe == "thermal":
            spread = self._spread(number, scale)
            probes = thermal_probes(reference, spread, options.probes, scale, options.step, random)
        else:
            kind = options.probe or "one_hot"
            probes = drawn_probes(reference, kind, options.probes, scale, options.step, random)
        if not options.relative:
            return probes
        if number not in self._sizes:
            thermal = options.probe == "thermal"
            size = self._spread(number, scale).size if thermal else reference_size(reference, scale)
            self._sizes[number] = size
        return [replace(probe, size=self._sizes[number]) for probe in probes]

    def _spread(self, number: int, scale: Tensor) -> ThermalSpread:
        if number not in self._spreads:
            self._spreads[number] = ThermalSpread.of(self.references[number], scale)
        return self._spreads[number]

    def _part(
        self,
        potential: Potential,
        trained: Sequence[Tensor],
        probes: Sequence[Probe],
        where: slice,
        graphs: Graphs,
    ) -> _Part:
        mine, real = probes[where], graphs.positions
        product = _PRODUCTS[self.options.backend](potential, graphs, mine, create_graph=bool(trained))
        scale = torch.cat([p.scale / p.size for p in mine]).to(real)
        wanted = scale * torch.cat([p.product for p in mine]).to(real)
        residual = scale * product - wanted
        components = (self.deviation(residual), residual.square(), wanted.square())
        weights = torch.tensor([p.weight for p in mine], dtype=torch.float64).to(real)
        # Of every graph, the mean over its components.
        totals = (real.new_zeros(graphs.n_graphs).index_add(0, graphs.batch, x.sum(1)) for x in components)
        sums = torch.stack([weights * (total / (3 * graphs.ptr.diff())) for total in totals], dim=1)
        gradients: Gradients = []
        if trained:
            gradients = torch.autograd.grad(sums[:, 0].sum(), trained, allow_unused=True)
        return _Part(sums.detach().double(), gradients)


def exact(potential: Potential, graphs: Graphs, probes: Sequence[Probe], *, create_graph: bool) -> Tensor:
    """Products by exact second derivatives."""
    v = torch.cat([p.direction for p in probes])
    return potential.hessian_product(graphs, v, create_graph=create_graph).positions


def central(potential: Potential, graphs: Graphs, probes: Sequence[Probe], *, create_graph: bool) -> Tensor:
    """Products from forces of cells displaced both ways."""
    u, length = _displacements(graphs, probes)
    ends = (_forces(potential, graphs.displaced(way * u), create_graph) for way in (-1, 1))
    before, behind = ends
    return (before - behind) / (2 * length)


def displaced(potential: Potential, graphs: Graphs, probes: Sequence[Probe], *, create_graph: bool) -> Tensor:
    """What displacements change in the forces, per length."""
    u, length = _displacements(graphs, probes)
    change = _forces(potential, graphs.displaced(u), create_graph) - _forces(potential, graphs, create_graph)
    return -change / length


def displaced_forces(
    potential: Potential, graphs: Graphs, probes: Sequence[Probe], *, create_graph: bool
) -> Tensor:
    """Forces of displaced cells, per length: with what there is at rest."""
    u, length = _displacements(graphs, probes)
    return -_forces(potential, graphs.displaced(u), create_graph) / length


def _displacements(graphs: Graphs, probes: Sequence[Probe]) -> tuple[Tensor, Tensor]:
    """Of all atoms `[n_atoms, 3]`, and the lengths of directions `[n_atoms, 1]`, Å."""
    u = torch.cat([p.length * p.direction for p in probes])
    lengths = torch.tensor([p.length for p in probes], dtype=torch.float64).to(graphs.positions)
    return u.to(graphs.positions), lengths[graphs.batch, None]


def _forces(potential: Potential, graphs: Graphs, create_graph: bool) -> Tensor:
    return potential.evaluate(graphs, ("forces",), create_graph=create_graph)["forces"]


_PRODUCTS: dict[str, Product] = {
    "hvp": exact,
    "central": central,
    "displacements": displaced,
    "forces": displaced_forces,
}
