"""Targets of observables from experimental tables."""

import numpy as np
import pytest
import torch
from ase.build import bulk

from mlip_refine.data import experimental_table
from mlip_refine.errors import InputError

HCP = bulk("Ti", "hcp", a=2.95, c=4.68) * (2, 2, 2)
BCC = bulk("Ti", "bcc", a=3.3, cubic=True) * (2, 2, 2)

HEADER = """\
# title: made up
# conditions: of a test
# source: this test
# licence: MIT
"""


@pytest.fixture
def table(tmp_path):
    """Write a table from the descriptions of its columns and its rows."""

    def write(columns: list[str], rows: list[list[float]]) -> str:
        names = ",".join(c.split("|")[0].strip() for c in columns)
        lines = [f"# column: {c}" for c in columns]
        body = [",".join(map(str, row)) for row in rows]
        path = tmp_path / "table.csv"
        path.write_text(HEADER + "\n".join([*lines, names, *body]) + "\n")
        return str(path)

    return write


def _wanted(loss):
    return loss.wanted


def test_a_lattice_of_the_package(made):
    wanted = _wanted(made("lattice", HCP, temperature=323, table="titanium-hcp-elastic"))
    assert wanted.labels == ("a", "c")
    assert wanted.values.tolist() == pytest.approx([2.95125, 4.67942])
    assert wanted.uncertainties.tolist() == pytest.approx([2.95125 * 5e-4, 4.67942 * 5e-4])
    one = made("lattice", BCC, temperature="1000 °C", table="titanium-bcc-lattice", uncertainty="0.001 nm")
    assert _wanted(one).uncertainties.tolist() == pytest.approx([0.01])
    assert _wanted(one).values.tolist() == pytest.approx([3.3082])


def test_units_of_a_table_are_those_of_the_loss(made, table):
    """Looked up by pressure and interpolated, its uncertainty too."""
    path = table(["pressure | GPa | exact", "rho | kg/m³ | 1 % stated"], [[0, 4000], [4, 5000]])
    loss = made("density", BCC, table=path, pressure="1 GPa", columns={"density": "rho"})
    assert _wanted(loss).values.tolist() == pytest.approx([4.25])
    assert _wanted(loss).uncertainties.tolist() == pytest.approx([0.0425])
    loss = made("density", BCC, table=path, pressure=1, columns={"density": "rho"}, uncertainty="10 kg/m3")
    assert _wanted(loss).uncertainties.tolist() == pytest.approx([0.01])


@pytest.mark.parametrize(
    ("column", "places", "state"),
    [
        ("temperature | °C | exact", [0, 100], {"temperature": "323.15 K"}),
        ("pressure | kbar | exact", [0, 40], {"pressure": "2 GPa"}),
        ("pressure | MPa | exact", [0, 4000], {"pressure": "2 GPa"}),
    ],
)
def test_the_state_of_a_table_is_looked_up_in_its_unit(made, table, column, places, state):
    path = table([column, "density | kg/m³ | 1 % stated"], [[places[0], 4000], [places[1], 5000]])
    assert _wanted(made("density", BCC, table=path, **state)).values.tolist() == pytest.approx([4.5])


@pytest.mark.parametrize("value", [-1, 0, 1e300])
def test_a_value_that_cannot_be_is_refused(made, table, value):
    path = table(["temperature | K | exact", "a | Å | 0.01 stated"], [[0, value], [2000, value]])
    with pytest.raises(
        InputError, match=r"a is no length; found .* Å, expected a length (above 0|of at most)"
    ):
        made("lattice", BCC, table=path)


def test_a_radial_distribution_of_the_package(made):
    """Bins as wide as its rows on average; those in its range are interpolated."""
    loss = made("radial_distribution", BCC, table="titanium-liquid-rdf", within=[2.3, 10.0])
    given = experimental_table("titanium-liquid-rdf")
    r, g = given.index.values, given["g"].values
    observable, wanted = loss.observable, loss.wanted
    radii = observable.observable.radii
    assert len(radii) == round(r.max() / ((r[-1] - r[0]) / (len(np.unique(r)) - 1)))
    middles = radii[wanted.places].numpy()
    inside = (radii >= 2.3) & (radii <= 10.0)
    assert len(middles) == int(inside.sum()) > 100
    assert wanted.values.numpy() == pytest.approx(np.interp(middles, r, g))
    assert wanted.uncertainties.tolist() == pytest.approx([0.05] * len(middles))
    finer = made("radial_distribution", BCC, table="titanium-liquid-rdf", bins=400, largest=8)
    assert float(finer.observable.observable.radii[-1]) == pytest.approx(8 - 0.01)


def test_a_density_up_to_a_factor_is_normalised(made):
    options = {"distance": 4.0, "variable": "cosine", "table": "titanium-liquid-adf"}
    loss = made("angular_distribution", BCC, **options, uncertainty=0.05)
    observable, wanted = loss.observable, loss.wanted
    width = 2 / len(observable.labels)
    assert float(wanted.values.sum()) * width == pytest.approx(1.0)
    assert wanted.uncertainties.tolist() == pytest.approx([0.05] * len(wanted.labels))
    given = experimental_table("titanium-liquid-adf")
    middles = observable.observable.middles[wanted.places].numpy()
    raw = np.interp(middles, given.index.values, given["density"].values)
    assert np.corrcoef(raw, wanted.values.numpy())[0, 1] == pytest.approx(1.0)
    part = made("angular_distribution", BCC, **options, uncertainty=0.05, within=[-0.5, 0.5]).wanted
    assert torch.isin(part.values, wanted.values).all()
    with pytest.raises(InputError, match="the uncertainty of density is unknown"):
        made("angular_distribution", BCC, **options)


def test_a_structure_factor_with_the_shells_of_its_table(made, table):
    rows = [[q, 1 + 0.1 * q, 0] for q in np.arange(1.0, 3.01, 0.25)]
    path = table(["q | 1/Å | exact", "S | 1 | 0.02 stated", "other | 1 | exact"], rows)
    loss = made("structure_factor", BCC, table=path, column="S")
    observable, wanted = loss.observable, loss.wanted
    q = observable.observable.wave_numbers
    assert q.tolist() == pytest.approx(np.arange(1.125, 3.0, 0.25).tolist())
    assert wanted.values.tolist() == pytest.approx((1 + 0.1 * q).tolist())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lattice", {"table": "titanium-hpc-elastic"}, "Did you mean 'titanium-hcp-elastic'"),
        ("lattice", {"table": "titanium-hcp-elastic", "temperature": 3000}, "not measured there"),
        (
            "lattice",
            {"table": "titanium-hcp-elastic", "columns": {"a": "C11"}},
            "C11 is no length; found unit GPa",
        ),
        (
            "lattice",
            {"table": "titanium-hcp-elastic", "columns": {"aa": "a"}},
            "no 'aa' to take a column for",
        ),
        ("lattice", {"table": "titanium-hcp-elastic", "columns": {"a": "C"}}, "no such column"),
        ("density", {"table": "titanium-hcp-elastic"}, "the table has no column for it"),
        ("density", {"table": "titanium-liquid-rdf"}, "not looked up by a state; found first column r"),
        ("radial_distribution", {"table": "titanium-hcp-elastic"}, "which column of the table is the curve"),
        ("radial_distribution", {"table": "titanium-bcc-lattice"}, "column temperature has another unit"),
        ("radial_distribution", {"table": "titanium-liquid-rdf", "uncertainty": [1, 2]}, "one number beside"),
        ("radial_distribution", {"table": "titanium-liquid-rdf", "largest": 1.5}, "no bin lies where"),
        ("radial_distribution", {"table": "titanium-liquid-rdf", "within": [20, 30]}, "no bin lies where"),
        (
            "angular_distribution",
            {"table": "titanium-liquid-adf", "distance": 4, "uncertainty": 1},
            "column cosine has another unit; found 1, expected °",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(made, kind, options, message):
    with pytest.raises(InputError, match=message):
        made(kind, HCP, **options)


def test_part_of_a_density_cannot_be_normalised(made, table):
    columns = ["cosine | 1 | exact", "density | arbitrary | unknown"]
    path = table(columns, [[-0.5, 1.0], [0.0, 2.0], [0.5, 1.0]])
    with pytest.raises(InputError, match="only if the table covers its range"):
        made("angular_distribution", BCC, distance=4.0, variable="cosine", bins=20, table=path, uncertainty=1)
    one = table(columns, [[0.0, 1.0]])
    with pytest.raises(InputError, match="more than one row"):
        made("angular_distribution", BCC, distance=4.0, variable="cosine", table=one, uncertainty=1)
