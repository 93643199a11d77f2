"""Boxes of crystal and liquid: how they are built, held, judged and joined."""

import math

import numpy as np
import pytest
import torch
from ase.build import bulk

from mlip_refine.data import build_phase
from mlip_refine.errors import InputError
from mlip_refine.quantities import KB, Measured
from mlip_refine.sampling import StatePoint, Trajectory
from mlip_refine.sampling.tethers import Tethers
from mlip_refine.workflows.transition.coexistence import (
    AVERAGED,
    INTERVAL,
    CoexistenceRun,
    box_of,
    combined,
    judged,
    lower_half,
    require_room,
    smallest_block,
    tethers,
    with_room_to_melt,
)

BCC = build_phase("bcc", "Ti", 54, 3.3)


@pytest.mark.parametrize(
    ("crystal", "atoms"),
    [
        (build_phase("bcc", "Ti", 128, 3.3), 2),
        (build_phase("hcp", "Ti", 54, 2.95, 4.68), 2),
        (build_phase("fcc", "Al", 108, 4.05), 4),
        (bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 2, 1), 8),
    ],
)
def test_smallest_block_makes_the_crystal_again(crystal, atoms):
    block = smallest_block(crystal)
    assert len(block) == atoms
    repeats = np.round(crystal.cell.lengths() / block.cell.lengths()).astype(int)
    again = block.repeat(tuple(repeats))
    assert len(again) == len(crystal)
    delta = again.get_scaled_positions()[:, None] - crystal.get_scaled_positions()
    distances = np.linalg.norm((delta - np.round(delta)) @ crystal.cell.array, axis=-1)
    assert distances.min(1).max() < 1e-6
    assert (again.numbers == crystal.numbers[distances.argmin(1)]).all()


def test_box_has_the_cell_that_the_crystal_has_at_temperature():
    box = box_of(BCC, BCC.cell.array * 1.02, 1000)
    assert 800 < len(box) < 1250
    assert box.cell.volume / len(box) == pytest.approx(1.02**3 * BCC.cell.volume / 54)
    lengths = box.cell.lengths()
    assert lengths[0] == pytest.approx(lengths[1])
    assert 3.0 < lengths[2] / lengths[0] < 5.5


def test_a_box_needs_room_for_two_phases():
    require_room(box_of(BCC, BCC.cell.array, 1000), 5.0, None)
    with pytest.raises(
        InputError, match=r"too small for a crystal beside a liquid.*Take about [\d,]+ atoms"
    ) as e:
        require_room(box_of(BCC, BCC.cell.array, 100), 5.0, "run.yaml:12")
    assert "run.yaml:12" in str(e.value)
    needed = int(str(e.value).split("about ")[1].split(" ")[0].replace(",", ""))
    require_room(box_of(BCC, BCC.cell.array, 2 * needed), 5.0, None)


def test_the_half_that_melts_has_room():
    box = box_of(BCC, BCC.cell.array, 300)
    roomy, lower = with_room_to_melt(box), lower_half(box)
    assert roomy.cell.volume == pytest.approx(1.05 * box.cell.volume)
    np.testing.assert_allclose(roomy.positions[lower], box.positions[lower])
    # Neighbours are no closer than in the crystal, across both boundaries too.
    assert roomy.get_all_distances(mic=True)[np.triu_indices(len(box), 1)].min() > 0.999 * 3.3 * math.sqrt(
        0.75
    )
    assert roomy.positions[~lower, 2].max() < roomy.cell.array[2, 2]


def test_tethers_hold_one_half_and_have_its_forces():
    box = box_of(BCC, BCC.cell.array, 300)
    found = tethers(box, lower_half(box), 3000.0)
    held = found.springs > 0
    assert 0.45 < float(held.double().mean()) < 0.55
    assert box.get_scaled_positions()[held.numpy(), 2].max() < 0.5
    amplitude = math.sqrt(3 * KB * 3000.0 / float(found.springs.max()))
    assert amplitude == pytest.approx(0.1 * 3.3 * math.sqrt(3) / 2)
    x = torch.from_numpy(box.positions)[None] + 0.1 * torch.randn(
        1, len(box), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    x.requires_grad_()
    values = found.on(torch.device("cpu"), torch.float64).energy_forces(x, torch.eye(3)[None].double())
    (gradient,) = torch.autograd.grad(values.energy.sum(), x)
    torch.testing.assert_close(values.forces, -gradient)
    assert not found.moves_with_cell
    assert found.key() != Tethers(found.sites, 2 * found.springs).key()


BOX = box_of(BCC, BCC.cell.array, 250)


def box_run(shares: np.ndarray, temperatures: np.ndarray) -> Trajectory:
    """Frames of a box whose lower part, a share of it, sits on the sites of bcc, the others at random."""
    n_frames, sites = len(temperatures), BOX.get_scaled_positions()
    random = np.random.default_rng(1).random(sites.shape)
    # Disorder fills the upper part alone.
    scaled = []
    for share in shares:
        fluid = random * [1.0, 1.0, 1.0 - share] + [0.0, 0.0, share]
        scaled.append(np.where((sites[:, 2] < share - 1e-9)[:, None], sites, fluid))
    cell = torch.from_numpy(BOX.cell.array.copy())
    point = StatePoint("box", BOX, 1900.0, ensemble="nph", identity="none")
    kinetic = torch.from_numpy(temperatures)[None] * KB * point.degrees_of_freedom / 2
    nothing = torch.zeros(1, n_frames, dtype=torch.float64)
    return Trajectory(
        point=point,
        positions=torch.from_numpy(np.array(scaled))[None] @ cell,
        cells=cell.expand(1, n_frames, 3, 3),
        model_energy=nothing,
        bias_energy=nothing,
        stress=torch.zeros(1, n_frames, 3, 3, dtype=torch.float64),
        kinetic_energy=kinetic,
        kept=torch.ones(1, n_frames, dtype=torch.bool),
    )


@pytest.mark.parametrize(
    ("first", "last", "outcome"),
    [
        (0.65, 0.65, "coexists"),
        (0.65, 1.0, "frozen"),
        (0.65, 0.0, "molten"),
        (1.0, 1.0, "unmixed"),
        (0.0, 0.0, "unmixed"),
    ],
)
def test_what_became_of_a_box(first, last, outcome):
    n = 200
    shares = first + (last - first) * np.linspace(0, 2, n).clip(0, 1)
    shares[: 4 * AVERAGED] = first
    found = judged(box_run(shares, np.full(n, 1900.0)), BCC)
    assert found.outcome == outcome
    assert found.n_atoms == len(BOX)
    assert found.start == 1900.0


def test_temperature_is_that_of_the_momenta_after_the_equilibration():
    n = 400
    rng = np.random.default_rng(2)
    temperatures = 1850.0 + 200.0 * np.exp(-np.arange(n) / 20) + rng.normal(0, 20.0, n)
    found = judged(box_run(np.ones(n), temperatures), BCC)
    assert found.equilibration >= 0.2 * n * INTERVAL
    assert abs(found.temperature.value - 1850.0) < 5 * found.temperature.se + 1.0
    assert found.temperature.se < 5.0
    assert len(found.times) == len(found.shares) == n // AVERAGED
    assert found.times[-1] == n * INTERVAL


def test_interrupted_boxes_say_so():
    run = box_run(np.ones(40), np.full(40, 1900.0))
    run.kept[0, 10:] = False
    assert judged(run, BCC).outcome == "stopped"


def box(outcome: str, value: float, se: float = 5.0) -> CoexistenceRun:
    share = Measured(0.5, 0.01, "")
    return CoexistenceRun(1900.0, 2000, outcome, Measured(value, se, "K"), share, 0.0, (), (), ())


def test_boxes_are_joined_by_their_errors():
    found, note = combined(
        [box("coexists", 1900.0, 3.0), box("coexists", 1904.0, 4.0), box("molten", 2100.0)]
    )
    assert found is not None
    assert note == ""
    assert found.value == pytest.approx((1900 / 9 + 1904 / 16) / (1 / 9 + 1 / 16))
    assert found.se == pytest.approx(1 / math.sqrt(1 / 9 + 1 / 16))
    scattered, _ = combined([box("coexists", 1850.0, 3.0), box("coexists", 1950.0, 3.0)])
    assert scattered is not None
    assert scattered.se == pytest.approx(50.0)


def test_boxes_without_both_phases_bound_the_temperature():
    found, note = combined([box("molten", 2000.0), box("frozen", 1800.0), box("drifts", 1900.0)])
    assert found is None
    assert "lies above 1800 K and below 2000 K" in note
    assert "1900 K: molten" in note
