"""Averaged positions of crystals that slip, transform, melt or lose their order, and of ones that do not."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal

from mlip_refine.errors import InputError
from mlip_refine.potential import Potential
from mlip_refine.sampling import Length, MDSettings, StatePoint, sample
from mlip_refine.sampling.monitoring.guards import GuardSettings, nearest_neighbour_distance
from mlip_refine.sampling.monitoring.phase_identity import MIN_SHARE, PhaseIdentity

with_ovito = pytest.mark.skipif(find_spec("ovito") is None, reason="OVITO is not installed")

BCC = bulk("Ti", "bcc", a=3.25, cubic=True) * 3
HCP = bulk("Ti", "hcp", a=2.93, c=4.65) * 3
OMEGA = crystal(
    ("Ti", "Ti"), [(0, 0, 0), (1 / 3, 2 / 3, 0.5)], spacegroup=191, cellpar=[4.58, 4.58, 2.83, 90, 90, 120]
) * (3, 3, 3)
L12 = crystal(("Au", "Cu"), [(0, 0, 0), (0, 0.5, 0.5)], spacegroup=221, cellpar=[3.75] * 3 + [90] * 3) * 2
CRYSTALS = {
    "bcc": BCC,
    "hcp": HCP,
    "fcc": bulk("Al", "fcc", a=4.05, cubic=True) * 2,
    "sc": bulk("Po", "sc", a=3.36) * 3,
    "diamond": bulk("Si", "diamond", a=5.43, cubic=True) * 2,
    "wurtzite": bulk("ZnO", "wurtzite", a=3.25, c=5.2) * 2,
    "rocksalt": bulk("NaCl", "rocksalt", a=5.64, cubic=True) * 2,
    "B2": bulk("NiAl", "cesiumchloride", a=2.88) * 3,
    "L12": L12,
}


@pytest.fixture
def no_ovito(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "ovito.modifiers", None)
    return


def _rattled(atoms: Atoms, fraction: float, seed: int = 1) -> np.ndarray:
    """Positions with Gaussian noise, a fraction of the shortest distance in every direction."""
    shortest = nearest_neighbour_distance(atoms)
    noise = np.random.default_rng(seed).normal(size=(len(atoms), 3))
    return atoms.positions + fraction * shortest * noise


def _judge(judge: PhaseIdentity, atoms: Atoms) -> str | None:
    return judge.departed(atoms.positions, atoms.cell.array)


def _orthorhombic(shuffle: float, a: float, b: float, c: float) -> Atoms:
    """A crystal of (110) planes of bcc, every second one shuffled: 0 is bcc, 1/6 is hcp (Burgers 1934)."""
    scaled = [(0, 0, 0), (0.5, 0.5, 0), (0, 0.5 + shuffle, 0.5), (0.5, shuffle, 0.5)]
    return Atoms("Ti4", scaled_positions=scaled, cell=[a, b, c], pbc=True) * (4, 3, 2)


@with_ovito
@pytest.mark.parametrize("name", CRYSTALS)
def test_a_hot_crystal_stays_its_phase(name: str) -> None:
    atoms = CRYSTALS[name]
    judge = PhaseIdentity(atoms)
    assert judge.method == "structure"
    assert judge.departed(_rattled(atoms, 0.03), atoms.cell.array) is None


@with_ovito
def test_strain_drift_and_wandering_atoms_do_not_matter() -> None:
    judge = PhaseIdentity(BCC)
    strain = np.eye(3) + np.array([[0.02, 0.01, 0], [0.01, -0.02, 0.01], [0, 0.01, 0.01]])
    windings = np.random.default_rng(2).integers(-4, 5, (len(BCC), 3)) @ BCC.cell.array
    positions = _rattled(BCC, 0.03) + windings + [17.3, -40.1, 3.3]
    assert judge.departed(positions @ strain, BCC.cell.array @ strain) is None


@with_ovito
def test_a_slip_to_equivalent_sites_is_not_a_departure() -> None:
    """A (110) plane of atoms glides by 1/2 [1-11], a lattice vector, through a crystal of three planes."""
    plane = np.isclose((BCC.positions @ [1, 1, 0] / 3.25) % 3, 0)
    assert 0 < plane.sum() < len(BCC)
    positions = _rattled(BCC, 0.03)
    positions[plane] += 3.25 / 2 * np.array([1, -1, 1])
    assert PhaseIdentity(BCC).departed(positions, BCC.cell.array) is None


def test_without_ovito_a_slip_is_a_departure(no_ovito: None) -> None:
    judge = PhaseIdentity(BCC)
    assert judge.method == "sites"
    positions = BCC.positions.copy()
    positions[: len(BCC) // 2] += 3.25 / 2
    assert "from their lattice sites" in str(judge.departed(positions, BCC.cell.array))


def test_displacements_are_judged_without_drift_in_the_present_cell(no_ovito: None) -> None:
    atoms = CRYSTALS["B2"]
    judge = PhaseIdentity(atoms, max_displacement=0.1)
    bond = 2.88 * np.sqrt(3) / 2
    direction = np.array([0.6, 0.0, 0.8])
    heavy = atoms.numbers == 28
    masses = atoms.get_masses()
    # Sublattices that part by d move by d m₂/M and d m₁/M from the centre of mass.
    total = masses[heavy][0] + masses[~heavy][0]
    rms = np.sqrt((masses[heavy][0] ** 2 + masses[~heavy][0] ** 2) / 2) / total
    for factor, leaves in ((0.97, False), (1.03, True)):
        positions = (atoms.positions + 9.0) * 1.05
        positions[heavy] += factor * 0.1 * bond / rms * direction
        assert (judge.departed(positions, atoms.cell.array * 1.05) is not None) is leaves


@with_ovito
def test_a_martensitic_transformation_is_a_departure_though_atoms_hardly_move() -> None:
    a = 3.25
    bcc = _orthorhombic(0.0, a, np.sqrt(2) * a, np.sqrt(2) * a)
    hcp = _orthorhombic(1 / 6, 2.93, np.sqrt(3) * 2.93, 4.65)
    judge = PhaseIdentity(bcc)
    assert _judge(judge, bcc) is None
    assert _judge(judge, hcp) == "96 of 96 atoms are no longer bcc (hcp 96)"
    assert _judge(PhaseIdentity(hcp), bcc) == "96 of 96 atoms are no longer hcp (bcc 96)"
    delta = hcp.positions - bcc.get_scaled_positions() @ hcp.cell.array
    moved = np.sqrt(((delta - delta.mean(0)) ** 2).sum(1).mean())
    assert moved < GuardSettings.max_displacement * a * np.sqrt(3) / 2


@with_ovito
def test_bcc_that_turns_omega_has_left() -> None:
    """ω is bcc with two of three (111) planes collapsed into one; every third atom still looks like bcc."""
    crystals = {}
    for height in (1 / 3, 1 / 2):
        scaled = [(0, 0, 0), (1 / 3, 2 / 3, height), (2 / 3, 1 / 3, 1 - height)]
        cell = 3.25 * np.array([[-1, 1, 0], [0, -1, 1], [0.5, 0.5, 0.5]])
        crystals[height] = Atoms("Ti3", scaled_positions=scaled, cell=cell, pbc=True) * (3, 3, 4)
    bcc, omega = crystals.values()
    omega.positions = _rattled(omega, 0.03)
    judge = PhaseIdentity(bcc)
    assert _judge(judge, bcc) is None
    assert "atoms are no longer bcc" in str(_judge(judge, omega))


@with_ovito
def test_the_share_that_keeps_its_label_decides() -> None:
    """A bcc crystal of which a part is replaced by noise leaves at the threshold, and not before."""
    big = bulk("Ti", "bcc", a=3.25, cubic=True) * 4
    noise = np.random.default_rng(3).normal(size=(len(big), 3))
    kept = []
    for width in np.linspace(0, 13, 9):
        positions = big.positions + 0.8 * noise * (big.positions[:, :1] < width)
        reason = PhaseIdentity(big, min_share=1.0).departed(positions, big.cell.array)
        share = 1 - int(reason.split()[0]) / len(big) if reason else 1.0
        kept.append(share)
        assert (PhaseIdentity(big).departed(positions, big.cell.array) is None) == (share >= MIN_SHARE)
    assert kept[0] == 1.0
    assert kept[-1] < 0.1


@with_ovito
@pytest.mark.parametrize("repeat", [1, 2, 3])
@pytest.mark.parametrize("unit", [bulk("Ti", "bcc", a=3.25, cubic=True), bulk("Ti", "hcp", a=2.93, c=4.65)])
def test_small_cells_see_their_periodic_images(unit: Atoms, repeat: int) -> None:
    """A cell narrower than the neighbourhood of an atom is labelled as 27 copies of it are."""
    ideal = unit * repeat
    hot = ideal.copy()
    hot.positions = _rattled(ideal, 0.1)
    small = _counts(PhaseIdentity(ideal, min_share=1.0), hot)
    large = _counts(PhaseIdentity(ideal * 3, min_share=1.0), hot * 3)
    assert large == {label: 27 * n for label, n in small.items()}
    assert small or repeat < 3


def _counts(judge: PhaseIdentity, atoms: Atoms) -> dict[str, int]:
    reason = _judge(judge, atoms) or ""
    return {name: int(n) for name, n in re.findall(r"([a-z ]+) (\d+)[,)]", reason)}


@with_ovito
def test_a_liquid_leaves_when_it_crystallises() -> None:
    liquid = BCC.copy()
    liquid.positions = _rattled(BCC, 0.25)
    judge = PhaseIdentity(liquid, liquid=True)
    assert judge.method == "structure"
    assert _judge(judge, liquid) is None
    assert _judge(judge, BCC) == "54 of 54 atoms have crystallised (bcc 54)"
    assert _judge(PhaseIdentity(BCC, liquid=True), liquid) is None


def test_a_liquid_cannot_be_judged_without_ovito(no_ovito: None) -> None:
    with pytest.raises(InputError, match=r"without OVITO.*mlip-refine\[structure\]"):
        PhaseIdentity(BCC, liquid=True)


@with_ovito
def test_crystals_that_match_no_template_are_judged_by_their_sites() -> None:
    judge = PhaseIdentity(OMEGA)
    assert judge.method == "sites"
    assert judge.departed(OMEGA.positions + 5.0, OMEGA.cell.array) is None
    positions = OMEGA.positions.copy()
    positions[:9] += [0.0, 0.0, 3 * 2.83]
    assert "from their lattice sites" in str(judge.departed(positions, OMEGA.cell.array))


@with_ovito
def test_an_alloy_has_to_keep_its_order() -> None:
    atoms = CRYSTALS["B2"]
    judge = PhaseIdentity(atoms)
    swapped = atoms.copy()
    rng = np.random.default_rng(4)
    swapped.positions = atoms.positions[rng.permutation(len(atoms))]
    assert re.fullmatch(r"\d+ of 54 atoms are no longer B2 bcc \(.*bcc \d+.*\)", str(_judge(judge, swapped)))
    uniform = BCC.copy()
    uniform.positions = BCC.positions[rng.permutation(len(BCC))]
    assert _judge(PhaseIdentity(BCC), uniform) is None


@with_ovito
def test_a_vacancy_does_not_hide_the_phase() -> None:
    atoms = BCC.copy()
    del atoms[20]
    judge = PhaseIdentity(atoms)
    assert judge.method == "structure"
    assert judge.departed(_rattled(atoms, 0.03), atoms.cell.array) is None


@with_ovito
@pytest.mark.parametrize("method", ["structure", "sites"])
def test_positions_that_are_not_finite_have_left(method: str) -> None:
    atoms = BCC if method == "structure" else OMEGA
    judge = PhaseIdentity(atoms)
    assert judge.method == method
    positions = atoms.positions.copy()
    positions[3, 1] = np.nan
    assert judge.departed(positions, atoms.cell.array) == "its positions or cell are not finite"


@pytest.mark.slow
def test_ovito_is_imported_only_when_it_is_wanted() -> None:
    code = "import sys, mlip_refine.sampling; sys.exit('ovito' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.statistical
@with_ovito
@pytest.mark.slow
def test_hot_titanium_stays_and_cold_bcc_transforms() -> None:
    """Positions averaged over 0.2 ps: hcp at 1155 K is hcp; bcc at 300 K, in a free cell, soon is not bcc."""
    points = [
        StatePoint("hcp", HCP, 1155.0, ensemble="npt", cell_freedom="anisotropic", identity="none"),
        StatePoint("bcc", BCC, 300.0, ensemble="npt", cell_freedom="anisotropic", identity="none"),
    ]
    potential = Potential.load("titanium-compact", default_dtype="float32").frozen_copy()
    settings = MDSettings(timestep=4.0, friction=10.0, interval=12.0)
    runs = sample(potential, points, settings, Length(3000.0, 17), seed=1, stage="identity")
    for point, phase, stays in zip(points, ("hcp", "bcc"), (True, False), strict=True):
        positions, cells = (x[0].numpy() for x in (runs[phase].positions, runs[phase].cells))
        cell = cells.mean(0)
        averaged = np.mean(positions @ np.linalg.inv(cells), axis=0) @ cell
        reason = PhaseIdentity(point.atoms).departed(averaged, cell)
        assert (reason is None) is stays
        assert stays or "atoms are no longer bcc" in str(reason)
