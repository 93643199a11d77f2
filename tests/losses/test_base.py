"""Sources: everything that is sampled is kept by their names."""

from itertools import combinations

import pytest

from mlip_refine.losses import EnsembleSource

STATES = [
    EnsembleSource("hcp", 300.0, 0.0),
    EnsembleSource("hcp", 300.0, 0.0, strain=(0.0,) * 6),
    EnsembleSource("hcp", 300.0, 0.0, strain=(0.01, 0.0, 0.0, 0.0, 0.0, 0.0)),
    EnsembleSource("hcp", 300.0, 0.0, strain=(0.0, 0.01, 0.0, 0.0, 0.0, 0.0)),
    EnsembleSource("hcp", 300.0, 0.0, lattice=(2.95,)),
    EnsembleSource("hcp", 300.0, 0.0, lattice=(2.95, 4.68)),
    EnsembleSource("hcp", 300.0, 0.0, lattice=(2.9500001, 4.68)),
    EnsembleSource("hcp", 300.0000001, 0.0),
]


@pytest.mark.parametrize(("one", "other"), list(combinations(STATES, 2)))
def test_states_that_differ_have_names_that_differ(one, other):
    """Also the cell of the phase that moves and that is held, and cells that differ in the seventh digit."""
    assert one.name != other.name


def test_a_name_has_no_more_digits_than_it_needs():
    source = EnsembleSource("hcp", 300.0, 2.5, (2.95, 4.68), (0.01, 0.0, 0.0, -0.02, 0.0, 0.0))
    assert source.name == "hcp-300K-2.5GPa-a2.95-c4.68-e1+0.01-e4-0.02"
