"""Large models with random weights: repeatable, loadable, and calm enough for dynamics."""

import torch
from ase.build import bulk

from mlip_refine.potential import Potential
from mlip_refine.workflows.bench.random_model import medium_mace

SMALL = "2x0e"


def test_weights_depend_on_the_seed_alone():
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


def test_it_is_saved_and_loaded_like_any_other(tmp_path):
    made = Potential.from_module(medium_mace([22, 14], hidden_irreps=SMALL), default_dtype="float32")
    file, _ = made.save(tmp_path, "random")
    assert Potential.load(str(file), default_dtype="float32").hash == made.hash


def test_forces_are_there_but_small():
    potential = Potential.from_module(medium_mace([22], hidden_irreps=SMALL), default_dtype="float32")
    atoms = bulk("Ti", "bcc", a=3.25, cubic=True).repeat((2, 2, 2))
    atoms.rattle(0.1, seed=0)
    graphs = potential.graphs.collate([potential.graphs.from_atoms(atoms)])
    forces = potential.evaluate(graphs, ("forces",))["forces"].abs()
    assert 1e-9 < float(forces.max()) < 0.1
