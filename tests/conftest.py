"""One thread for every test, and what tests of all rooms share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def open_guards() -> Callable[..., Any]:
    """Return settings of dynamics whose guards never stop anything."""

    def settings(**options: Any) -> Any:
        from mlip_refine.sampling import GuardSettings, MDSettings

        return MDSettings(guards=GuardSettings(1e6, 1e6), **options)

    return settings


@pytest.fixture(scope="session")
def springs() -> Callable[..., Any]:
    """Return crystals of balls and springs as potentials that train the stiffness."""

    from mlip_refine.potential import Potential
    from mlip_refine.testing import Springs

    def make(atoms: Atoms, shells: dict[float, tuple[float, float]], **options: Any) -> Any:
        return Potential(Springs(tuple({int(z) for z in atoms.numbers}), shells), **options)

    return make


@pytest.fixture(scope="session")
def phonons_of() -> Callable[..., Any]:
    """Return a reference of the supercell of a unit cell, with a Hessian that is given or computed of it."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    from mlip_refine.data.phonons.reference import PhononMetadata, PhononReference
    from mlip_refine.data.phonons.spacegroups import Translations, crystal_symmetry

    def make(
        unit: Atoms,
        multiples: tuple[int, int, int],
        hessian: Callable[[Atoms], Tensor] | None,
        *,
        primitive: Any = None,
        displacements: tuple[Any, ...] = (),
    ) -> Any:
        cell = PhonopyAtoms(numbers=unit.numbers, cell=unit.cell.array, positions=unit.positions)
        phonons = Phonopy(cell, np.diag(multiples), primitive_matrix=primitive, log_level=0)
        built = phonons.supercell
        atoms = Atoms(built.numbers, cell=built.cell, positions=built.positions, pbc=True)
        translations = Translations(
            torch.tensor(phonons.primitive.atomic_permutations).long(),
            torch.tensor(phonons.primitive.p2s_map).long(),
        )
        found = phonons.symmetry
        rotations = np.array(found.symmetry_operations["rotations"])
        permutations = np.array(found.atomic_permutations).astype(np.int64)
        compact = None
        if hessian is not None:
            n = len(atoms)
            blocks = hessian(atoms).view(n, 3, n, 3).permute(0, 2, 1, 3)
            compact = blocks[translations.primitive_atoms].contiguous()
        return PhononReference(
            name=str(unit.symbols),
            supercell=atoms,
            translations=translations,
            symmetry=crystal_symmetry(atoms.cell.array, rotations, permutations, translations),
            primitive_matrix=torch.tensor(np.array(phonons.primitive_matrix)).double(),
            supercell_matrix=torch.tensor(np.diag(multiples)).double(),
            force_constants=compact,
            displacements=displacements,
            metadata=PhononMetadata(str(unit.symbols)),
        )

    return make


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20250117)


@pytest.fixture
def gaussian(generator: torch.Generator) -> Callable[..., Tensor]:
    """Draw standard normal float64 numbers."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw
