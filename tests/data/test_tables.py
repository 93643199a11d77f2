import math
from pathlib import Path

import numpy as np
import pytest

from mlip_refine.data.tables import experimental_table, read_table
from mlip_refine.errors import InputError

NAMES = (
    "titanium-bcc-lattice",
    "titanium-bcc-phonons",
    "titanium-hcp-elastic",
    "titanium-hcp-lattice",
    "titanium-liquid-adf",
    "titanium-liquid-diffusion",
    "titanium-liquid-rdf",
    "titanium-phase-boundaries",
)

GOOD = """\
# title: Elastic constants
# conditions: adiabatic
# source: A measurement (1964)
# licence: CC0
# note: First.
# note: Second.
# column: temperature | K | exact
# column: C11 | GPa | 2 % stated
# column: a | Å | 0.01 assumed
# column: D | m²/s | unknown
temperature,C11,a,D
100,200,3.0,1e-9

200,180,,2e-9
200,184,3.2,2e-9
"""


@pytest.fixture
def write(tmp_path: Path):
    def table(text: str) -> Path:
        path = tmp_path / "table.csv"
        path.write_text(text, encoding="utf-8")
        return path

    return table


@pytest.mark.parametrize("name", NAMES)
def test_every_table_of_the_package_is_whole(name: str) -> None:
    table = experimental_table(name)
    assert len(table) >= 4
    assert table.source
    assert table.licence in ("MIT", "Apache-2.0")
    for column in table.columns.values():
        assert column.values.shape == column.uncertainties.shape == (len(table),)


def test_no_table_is_forgotten() -> None:
    with pytest.raises(InputError, match="Did you mean 'titanium-hcp-elastic'") as caught:
        experimental_table("titanium-hcp-elastics")
    assert caught.value.expected == ", ".join(NAMES)


def test_elastic_constants_of_titanium() -> None:
    """Fisher and Renken at 298 K, and between 923 and 973 K."""
    table = experimental_table("titanium-hcp-elastic")
    room = {name: table.target(name, 298.0).value for name in ("C11", "C12", "C13", "C33", "C44")}
    assert room == {"C11": 162.4, "C12": 92.0, "C13": 69.0, "C33": 180.7, "C44": 46.7}
    warm = table.target("C33", 948.0)
    assert warm.value == pytest.approx((157.6 + 156.0) / 2)
    assert warm.uncertainty == pytest.approx(1.568)
    assert (warm.unit, warm.temperature) == ("GPa", 948.0)
    assert "adiabatic" in warm.source
    # The lattice at 73 K is an outlier of the source and bridged.
    assert table.target("a", 73.0).value == pytest.approx((2.94404 + 2.946) / 2)


def test_lattices_are_at_temperatures_of_their_phase() -> None:
    """In degrees Celsius bcc titanium would be measured below its range of 1155 K."""
    assert experimental_table("titanium-bcc-lattice").index.values.min() > 1155
    hcp = experimental_table("titanium-hcp-lattice")
    assert hcp.index.values.max() < 1155
    # Three measurements at 9 °C count with their mean.
    assert hcp.target("a", 282.15).value == pytest.approx((2.9440 + 2.9435 + 2.9445) / 3)


def test_phase_boundaries_are_looked_up_by_pressure() -> None:
    found = experimental_table("titanium-phase-boundaries").target("T_hcp_bcc", 2.5, uncertainty=10.0)
    assert found.value == pytest.approx((1094.4 + 1064.3) / 2)
    assert (found.pressure, found.temperature) == (2.5, None)


def test_tables_of_the_liquid() -> None:
    rdf = experimental_table("titanium-liquid-rdf")
    peak = rdf.index.values[np.argmax(rdf["g"].values)]
    assert 2.8 < peak < 2.95
    adf = experimental_table("titanium-liquid-adf")
    assert float(np.trapezoid(adf["density"].values, adf.index.values)) == pytest.approx(0.83, abs=0.01)
    assert experimental_table("titanium-liquid-diffusion").target("D", 2000.0).value == pytest.approx(
        5.3e-9, rel=1e-2
    )


def test_a_table_holds_what_its_file_says(write) -> None:
    table = read_table(write(GOOD))
    assert (table.title, table.conditions, table.licence) == ("Elastic constants", "adiabatic", "CC0")
    assert table.notes == ("First.", "Second.")
    assert table["C11"].values.tolist() == [200, 180, 184]
    assert table["C11"].uncertainties.tolist() == pytest.approx([4.0, 3.6, 3.68])
    assert table["a"].basis == "assumed"
    assert math.isnan(table["a"].values[1])
    assert np.isnan(table["D"].uncertainties).all()


def test_lookup_interpolates_measured_values(write) -> None:
    table = read_table(write(GOOD))
    found = table.target("C11", 150.0)
    assert (found.value, found.uncertainty) == (pytest.approx(191.0), pytest.approx((4.0 + 3.64) / 2))
    assert table.target("a", 150.0).value == pytest.approx(3.1)
    assert table.target("D", 200.0, uncertainty=1e-10).uncertainty == 1e-10


def test_what_was_not_measured_is_refused(write) -> None:
    table = read_table(write(GOOD))
    with pytest.raises(InputError, match=r"not measured there; found temperature 250 K, expected 100 to 200"):
        table.target("C11", 250.0)
    with pytest.raises(InputError, match="uncertainty of D is unknown"):
        table.target("D", 150.0)
    with pytest.raises(InputError, match=r"found C1, expected temperature, C11.* Did you mean 'C11'"):
        table.target("C1", 150.0)
    with pytest.raises(InputError, match="rows do not ascend"):
        experimental_table("titanium-bcc-phonons").target("frequency", 1.5, uncertainty=1.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# licence: CC0\n", "", r"not complete; expected licence"),
        ("# note: First.", "# notes: First.", r":5: .*found notes.*Did you mean 'note'"),
        ("# note: First.", "# title: Again", r":5: the header says it twice; found title"),
        ("# column: a ", "# column: C11 ", r":9: the header says it twice; found C11"),
        ("C11 | GPa | 2 % stated", "C11 | GPa", r":8: a column is not described"),
        ("2 % stated", "2 %", r":8: the uncertainty of C11"),
        ("2 % stated", "-2 % stated", r":8: the uncertainty of C11"),
        ("0.01 assumed", "small assumed", r":9: the uncertainty of a"),
        ("temperature,C11,a,D", "temperature,C12,a,D", r":11: the columns are not those of the header"),
        ("100,200,3.0,1e-9", "100,200,3.0", r":12: a row is not complete; found 3 cells"),
        ("100,200,3.0,1e-9", "100,2OO,3.0,1e-9", r":12, C11: not a number; found '2OO'"),
        ("200,184,3.2", "200,inf,3.2", r":15, C11: not a number"),
        (
            "200,184,3.2",
            ",184,3.2",
            r":15, temperature: the first column has no gaps",
        ),
        (GOOD[GOOD.index("100,") :], "", r"has no rows"),
    ],
)
def test_a_wrong_line_is_named(write, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError, match=message):
        read_table(write(GOOD.replace(old, new)))


@pytest.mark.parametrize(
    ("column", "rows", "state"),
    [
        ("temperature | K", (100, 500), (300.0, 0.0)),
        ("temperature | °C", (-173.15, 226.85), (300.0, 0.0)),
        ("pressure | GPa", (10, 50), (0.0, 30.0)),
        ("pressure | kbar", (100, 500), (0.0, 30.0)),
        ("pressure | MPa", (10_000, 50_000), (0.0, 30.0)),
        ("pressure | bar", (-5e5, 11e5), (0.0, 30.0)),
    ],
)
def test_the_first_column_has_its_unit(write, column: str, rows: tuple[float, float], state) -> None:
    """Half-way between two rows, in whatever unit these are written."""
    name = column.partition(" ")[0]
    lines = f"# column: {column} | exact\n# column: a | Å | 0.01 assumed\n{name},a\n"
    head = GOOD[: GOOD.index("# column")]
    table = read_table(write(f"{head}{lines}{rows[0]},2.9\n{rows[1]},3.1\n"))
    found = table.target("a", table.at(*state))
    assert found.value == pytest.approx(3.0, abs=1e-9)
    assert (found.temperature or 0.0, found.pressure or 0.0) == pytest.approx(state)
    # The ends of the range are in it, whatever a conversion rounds.
    for place in rows:
        there = table.target("a", place)
        assert table.measured("a", table.at(there.temperature or 0.0, there.pressure or 0.0))


@pytest.mark.parametrize(
    ("column", "row", "message"),
    [
        ("temperature | eV", 300, r":5: no temperature; found unit eV, expected K, °C"),
        ("temperature | mK", 300, r":5: no temperature; found unit mK"),
        ("temperature | 1", 300, r":5: no temperature; found unit 1"),
        ("pressure | eV/Å³", 3, r":5: no pressure; found unit eV/Å³, expected GPa, MPa, kbar"),
        ("temperature | K", -5, r":8: no temperature; found -5 K"),
        ("temperature | °C", -300, r":8: no temperature; found -300 °C"),
        ("temperature | K", 1e300, r":8: no temperature; found 1e\+300 K"),
        ("pressure | Pa", 1e200, r":8: no pressure; found 1e\+200 Pa"),
    ],
)
def test_a_state_of_another_kind_is_refused(write, column: str, row: float, message: str) -> None:
    name = column.partition(" ")[0]
    lines = f"# column: {column} | exact\n# column: a | Å | 0.01 assumed\n{name},a\n{row},3\n"
    with pytest.raises(InputError, match=message):
        read_table(write(GOOD[: GOOD.index("# note")] + lines))


def test_a_table_that_is_not_by_a_state_has_no_place_for_one() -> None:
    with pytest.raises(InputError, match="not looked up by a state; found first column r"):
        experimental_table("titanium-liquid-rdf").at(300.0, 0.0)


def test_a_field_beyond_the_limit_of_csv_is_refused(write) -> None:
    with pytest.raises(InputError, match=r"no CSV \(field larger than field limit"):
        read_table(write(GOOD.replace("100,200", "100," + "2" * 140_000)))


def test_names_and_paths_are_read_alike(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(GOOD)
    for read in (read_table, experimental_table):
        assert read("titanium-hcp-elastic").title == experimental_table("titanium-hcp-elastic").title
        assert read(path).title == read(str(path)).title == "Elastic constants"
        with pytest.raises(
            InputError, match=r"no such experimental table.*Did you mean 'titanium-hcp-elastic'"
        ):
            read("titanium-hcp-elastik")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_table("~/table.csv").title == "Elastic constants"


def test_a_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "none.csv")
