"""One thread for every test, and what tests of all rooms share."""

import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

torch.set_num_threads(1)


class _ShiftedGenerator(torch.Generator):
    def manual_seed(self, seed: int) -> torch.Generator:
        # e3nn normalises activations with random numbers of a fixed seed: those belong to the model.
        caller = sys._getframe(1).f_globals["__name__"]
        return super().manual_seed(seed if caller.startswith("e3nn") else seed + SEED_OFFSET)


def _shifted_default_rng(seed: Any = None) -> np.random.Generator:
    if isinstance(seed, int):
        seed += SEED_OFFSET
    elif isinstance(seed, Sequence):
        seed = [seed[0] + SEED_OFFSET, *seed[1:]]
    return _default_rng(seed)


def _shifted_philox(key: np.ndarray) -> np.random.Philox:
    return _philox(key=key + np.array([SEED_OFFSET, 0], dtype=np.uint64))


# Other seeds for statistical tests: MLIP_REFINE_TEST_SEED=1000 pytest -m statistical. The offset is added to
# every seed of a generator, in tests and in the package, the noise of dynamics included.
SEED_OFFSET = int(os.environ.get("MLIP_REFINE_TEST_SEED", "0"))
if SEED_OFFSET:
    _default_rng, _philox = np.random.default_rng, np.random.Philox
    torch.Generator = _ShiftedGenerator
    np.random.default_rng, np.random.Philox = _shifted_default_rng, _shifted_philox


@pytest.fixture(scope="session")
def file_size_limit() -> Callable[[int], AbstractContextManager[None]]:
    """Return a block in which no file can grow beyond a number of bytes: what a full disk does, for tests."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


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
        return Potential.from_module(Springs(tuple({int(z) for z in atoms.numbers}), shells), **options)

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
