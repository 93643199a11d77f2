"""Second derivatives of the energy in the positions, exact, many directions in batches.

Every direction goes with a copy of its structure, so that a batch holds any mixture of structures and
directions. The product of the Hessian with a direction v is ∂(-F·v)/∂x: no finite step to choose.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlip_refine.data.kept_rows import evaluate_rows
from mlip_refine.data.phonons.spacegroups import CrystalSymmetry, Translations
from mlip_refine.errors import MlipRefineError
from mlip_refine.potential import Graphs, Potential, Structure, Work

type Column = tuple[int, int]
"""Atom and axis (0, 1, 2) of a column of the Hessian."""


class _Check(NamedTuple):
    """Tolerances of `require_hessian`.

    Attributes:
        step: Displacement of every atom between two points of a difference, Å.
        difference: Largest relative error of products against differences of forces.
        exact: Largest relative error of symmetry and sum rule, which hold without any differences.
    """

    step: float
    difference: float
    exact: float


_CHECKS = {torch.float32: _Check(5e-3, 2e-2, 1e-3), torch.float64: _Check(1e-3, 1e-6, 1e-9)}
"""Tolerances by precision. `titanium-compact` has 2e-5 and 3e-8, and 1e-8 and 3e-17, with 36 atoms."""

_STENCIL = {2: -1 / 12, 1: 2 / 3, -1: -2 / 3, -2: 1 / 12}
"""Central difference of fourth order."""


def hessian_products(
    potential: Potential, structures: Sequence[Structure], directions: Sequence[Tensor]
) -> list[Tensor]:
    """Compute products of Hessians with directions, without a graph.

    Args:
        potential: Potential in either precision: single precision costs 1e-6 (108 atoms of
            `titanium-compact`).
        structures: Structure of every direction; one structure may come many times.
        directions: Displacements `[n_atoms, 3]`, Å.

    Returns:
        A product for every direction `[n_atoms, 3]`, eV/Å², float64, on the device of the potential.

    Raises:
        MlipRefineError: Memory runs out for a single system.
    """

    def products(part: slice, graphs: Graphs) -> list[Tensor]:
        found = potential.hessian_product(graphs, torch.cat(list(directions[part]))).positions
        return list(found.detach().double().split([len(v) for v in directions[part]]))

    rows = evaluate_rows(potential, Work.HESSIAN, structures, products, "hessian", directions)
    return [row.to(potential.graphs.device) for row in rows]


def hessian_gradients(
    potential: Potential,
    structures: Sequence[Structure],
    directions: Sequence[Tensor],
    adjoints: Sequence[Tensor],
) -> list[Tensor | None]:
    """Differentiate Σ adjoint · (Hessian · direction) in the trainable parameters, in their order.

    Args:
        potential: The potential.
        structures: Structures, as in `hessian_products`.
        directions: Displacements, as in `hessian_products`.
        adjoints: Adjoint of every product `[n_atoms, 3]`.

    Returns:
        Gradient in every parameter, or `None` where the products do not depend on it.

    Raises:
        MlipRefineError: Memory runs out for a single system.
    """
    parameters = list(potential.trainable_parameters().values())

    def gradients(part: slice, graphs: Graphs) -> tuple[Tensor | None, ...]:
        found = potential.hessian_product(
            graphs, torch.cat(list(directions[part])), create_graph=True
        ).positions
        adjoint = torch.cat(list(adjoints[part])).to(found)
        return torch.autograd.grad(found, parameters, adjoint, allow_unused=True)

    total: list[Tensor | None] = [None] * len(parameters)
    for chunk in potential.in_chunks(Work.HESSIAN_GRADIENT, structures, gradients):
        total = summed(total, chunk)
    return total


def summed(total: Sequence[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add gradients one by one; `None` counts as zero."""
    pairs = zip(total, more, strict=True)
    return [b if a is None else a if b is None else a + b for a, b in pairs]


def unit_displacements(n_atoms: int, columns: Sequence[Column]) -> list[Tensor]:
    """Return displacements of one atom along one axis by 1 Å, float64 `[n_atoms, 3]` each."""
    found = torch.zeros(len(columns), n_atoms, 3, dtype=torch.float64)
    for direction, (atom, axis) in zip(found, columns, strict=True):
        direction[atom, axis] = 1.0
    return list(found)


def hessian_columns(potential: Potential, structure: Structure, columns: Sequence[Column]) -> Tensor:
    """Compute columns of the Hessian of one structure, without a graph.

    Args:
        potential: The potential.
        structure: The structure, usually a supercell.
        columns: Atom and axis of each column.

    Returns:
        Columns `[n_columns, n_atoms, 3]`, eV/Å², float64.

    Raises:
        MlipRefineError: Memory runs out for a single system.
    """
    directions = unit_displacements(len(structure.positions), columns)
    return torch.stack(hessian_products(potential, [structure] * len(columns), directions))


def force_constants(
    potential: Potential, structure: Structure, translations: Translations, symmetry: CrystalSymmetry
) -> Tensor:
    """Compute force constants of a supercell from as few columns as its symmetry allows, without a graph.

    Args:
        potential: The potential.
        structure: The supercell at rest.
        translations: Lattice translations of the supercell.
        symmetry: Space group of the supercell, modulo its translations.

    Returns:
        Rows of the atoms of the primitive cell `[n_prim, n_atoms, 3, 3]`, eV/Å², float64, on the CPU.

    Raises:
        MlipRefineError: Memory runs out for a single system.
    """
    columns = symmetry.irreducible(translations)
    values = hessian_columns(potential, structure, [(c.atom, c.axis) for c in columns])
    return symmetry.complete(translations, columns, values.cpu())


def require_hessian(potential: Potential, structure: Structure) -> None:
    """Check second derivatives of the potential with the kernels that it runs with.

    A random product must be the difference of forces, the Hessian must be symmetric, and its product with a
    translation must vanish.

    Args:
        potential: The potential.
        structure: Structure of the check; its atoms are displaced by about 0.01 Å.

    Raises:
        MlipRefineError: The products are wrong, with the error that was found and the one allowed.
    """
    graphs = potential.graphs.collate([structure])
    random = torch.Generator().manual_seed(1)
    v, w = (torch.randn(graphs.positions.shape, generator=random).to(graphs.positions) for _ in range(2))
    curvature = potential.curvature(graphs)
    hv, hw, ht = (curvature.along(d).positions.detach() for d in (v, w, torch.ones_like(v)))
    check = _CHECKS[potential.dtype]
    difference = torch.zeros_like(v)
    for steps, weight in _STENCIL.items():
        moved = graphs.displaced(steps * check.step * v)
        difference -= weight / check.step * potential.evaluate(moved, ("forces",))["forces"].detach()
    asymmetry = ((w * hv).sum() - (v * hw).sum()) / v.norm()
    for what, excess, allowed in (
        ("differences of forces", hv - difference, check.difference),
        ("the symmetry of second derivatives", asymmetry, check.exact),
        ("the sum rule of translations", ht, check.exact),
    ):
        found = float(excess.norm() / hv.norm().clamp(min=1e-12))
        if not found <= allowed:  # also where it is not a number
            raise MlipRefineError(
                f"second derivatives of this model on this device contradict {what}: "
                f"a relative error of {found:.1e}, allowed {allowed:.0e}. Nothing can rest on them"
            )
