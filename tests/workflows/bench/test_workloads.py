"""What a bench runs."""

import pytest
import torch
from ase.build import bulk

from mlip_refine.errors import InputError
from mlip_refine.potential import Potential
from mlip_refine.workflows.bench.workloads import configured, medium_mace, parse_size, repeated, titanium
from mlip_refine.workflows.from_config import load_potential

SMALL = "2x0e"


def test_sizes_are_systems_times_atoms():
    assert parse_size("4x54") == (4, 54)
    assert parse_size(" 8 × 128 ") == (8, 128)


@pytest.mark.parametrize("size", ["54", "4x", "x54", "4x54x2", "0x54", "-1x54", "4.5x54"])
def test_other_sizes_are_refused(size):
    with pytest.raises(InputError, match="such as 4x54"):
        parse_size(size)


def test_titanium_is_half_hcp_and_half_bcc():
    workload = titanium(5, 16)
    assert {p.name: p.replicas for p in workload.points} == {"hcp": 3, "bcc": 2}
    assert workload.n_atoms == 80
    assert [len(a) for a in workload.crystals] == [16] * 5
    assert [p.name for p in titanium(1, 16).points] == ["hcp"]
    with pytest.raises(InputError, match="nearest is 54"):
        titanium(1, 50)


def test_an_ensemble_holds_for_every_point():
    workload = titanium(2, 16).under("npt")
    assert workload.label == "2 x 16, NPT"
    assert {(p.ensemble, p.cell_freedom) for p in workload.points} == {("npt", "isotropic")}


def test_repeated_takes_the_points_in_turn():
    workload = repeated(titanium(2, 16), 5)
    assert [p.replicas for p in workload.points] == [3, 2]
    assert workload.label == "5 x 16"
    assert [p.name for p in repeated(titanium(2, 16), 1).points] == ["hcp"]


def test_a_config_gives_the_points_of_its_losses_and_its_integrator(tiny):
    config = tiny()
    workload = configured(config, load_potential(config))
    assert [(p.name, p.replicas, p.temperature) for p in workload.points] == [
        ("bcc-1150K-0GPa", 2, 1150.0),
        ("hcp-1150K-0GPa", 2, 1150.0),
    ]
    assert workload.settings.timestep == 4.0
    assert workload.label == "4 systems, 64 atoms"
    assert workload.settings.guards.max_displacement > 1e3


def test_nothing_is_stopped_while_it_is_timed():
    guards = titanium(2, 16).settings.guards
    assert guards.max_displacement > 1e3
    assert guards.max_temperature_ratio > 1e3


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    first = Potential.from_module(medium_mace([22], hidden_irreps=SMALL), default_dtype="float32")
    following = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(following, torch.rand(1))
    assert (
        first.hash
        == Potential.from_module(medium_mace([22], hidden_irreps=SMALL), default_dtype="float32").hash
    )
    other = Potential.from_module(medium_mace([22], hidden_irreps=SMALL, seed=1), default_dtype="float32")
    assert first.hash != other.hash


def test_random_weights_are_saved_and_loaded_like_any_others(tmp_path):
    made = Potential.from_module(medium_mace([22, 14], hidden_irreps=SMALL), default_dtype="float32")
    file, _ = made.save(tmp_path, "random")
    assert Potential.load(str(file), default_dtype="float32").hash == made.hash


def test_forces_of_random_weights_are_there_but_small():
    potential = Potential.from_module(medium_mace([22], hidden_irreps=SMALL), default_dtype="float32")
    atoms = bulk("Ti", "bcc", a=3.25, cubic=True).repeat((2, 2, 2))
    atoms.rattle(0.1, seed=0)
    graphs = potential.graphs.collate([potential.graphs.from_atoms(atoms)])
    forces = potential.evaluate(graphs, ("forces",))["forces"].abs()
    assert 1e-9 < float(forces.max()) < 0.1
