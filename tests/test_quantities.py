import math
import pickle

import pytest

from mlip_refine.errors import InputError, StatisticsError, nearest
from mlip_refine.quantities import GPA, HBAR, KB, Measured, Target


def test_constants_against_codata():
    assert pytest.approx(8.617333e-5, rel=1e-6) == KB
    assert pytest.approx(1 / 160.21766, rel=1e-6) == GPA
    assert pytest.approx(0.658211957, rel=1e-7) == HBAR


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (-8.9123, 0.2311, "-8.91(23) K"),
        (1154.7, 12.34, "1155(12) K"),
        (1154.7, 346.0, "1150(350) K"),
        (1.0, 0.0999, "1.00(10) K"),
        (1.5, 1.26, "1.5(1.3) K"),
        (1.5, 0.0, "1.5(0) K"),
        (math.nan, 1.0, "nan ± 1 K"),
        (30.0, math.nan, "30(?) K"),
    ],
)
def test_a_measured_value_shows_its_error(value, se, text):
    assert str(Measured(value, se, "K")) == text


def test_independent_errors_combine():
    total = Measured(1.0, 0.3, "K") + Measured(2.0, 0.4, "K")
    assert (total.value, total.se) == (3.0, pytest.approx(0.5))
    difference = Measured(1.0, 0.3, "K") - Measured(2.0, 0.4, "K")
    assert (difference.value, difference.se) == (-1.0, pytest.approx(0.5))
    assert Measured(2.0, 0.5, "eV").scaled(-1e3, "meV") == Measured(-2000.0, 500.0, "meV")
    assert -Measured(2.0, 0.5, "eV") == Measured(-2.0, 0.5, "eV")


def test_different_units_do_not_combine():
    with pytest.raises(InputError, match="K and eV"):
        Measured(1.0, 0.1, "K") + Measured(1.0, 0.1, "eV")


def test_a_target_measures_deviation_in_its_uncertainty():
    target = Target(0.0, 0.5, "meV/atom", temperature=1154.7, pressure=0.0, source="experiment")
    assert target.deviation(Measured(2.0, 0.25, "meV/atom")) == Measured(4.0, 0.5, "sigma")
    with pytest.raises(InputError, match="differ in unit"):
        target.deviation(Measured(2.0, 0.25, "eV"))


@pytest.mark.parametrize(
    ("value", "uncertainty"), [(0.0, 0.0), (0.0, -1.0), (0.0, math.inf), (math.nan, 1.0)]
)
def test_a_bare_float_is_no_target(value, uncertainty):
    with pytest.raises(InputError):
        Target(value, uncertainty, "K")


def test_input_error_puts_its_parts_in_order():
    error = InputError(
        "the key is unknown", where="a.yaml:3", found="'x'", expected="y or z", fix="Did you mean 'y'?"
    )
    assert str(error) == "a.yaml:3: the key is unknown; found 'x', expected y or z. Did you mean 'y'?"
    assert str(InputError("too short")) == "too short"
    assert str(InputError("bad", found="\x1b[31m red\u202e")) == "bad; found \\x1b[31m red\\u202e"
    assert error.exit_code == 2
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_statistics_error_says_what_would_do():
    assert str(StatisticsError("too few", needed="200 frames")) == "too few; needed: 200 frames"


def test_nearest_ignores_case_and_gives_up_on_the_unlike():
    assert nearest("GPA", ["GPa", "kbar"]) == "GPa"
    assert nearest("tempreature", ["temperature", "pressure"]) == "temperature"
    assert nearest("xyz", ["temperature"]) is None


def test_input_error_keeps_a_place_that_was_filled_in_later_when_it_is_pickled():
    error = InputError("the key is unknown")
    error.where = "a.yaml:3"
    again = pickle.loads(pickle.dumps(error))
    assert (again.where, str(again)) == ("a.yaml:3", "a.yaml:3: the key is unknown")
