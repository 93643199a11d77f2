import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from mlip_refine.config import (
    EnergyPerAtom,
    Length,
    Pressure,
    Rate,
    Temperature,
    Time,
    TimeOrZero,
)
from mlip_refine.config.units import ENERGY_PER_ATOM, LENGTH, PRESSURE, RATE, TEMPERATURE, TIME


@pytest.mark.parametrize(
    ("dimension", "text", "stored"),
    [
        (TEMPERATURE, 300, 300.0),
        (TEMPERATURE, "1154.7 K", 1154.7),
        (TEMPERATURE, "26.85 °C", 300.0),
        (PRESSURE, "5 GPa", 5.0),
        (PRESSURE, "50kbar", 5.0),
        (PRESSURE, "-1e4 bar", -1.0),
        (PRESSURE, "−2 GPa", -2.0),
        (PRESSURE, "101325 Pa", 1.01325e-4),
        (TIME, "2 fs", 2.0),
        (TIME, "0.1 ps", 100.0),
        (TIME, "1e-3 ns", 1000.0),
        (TIME, " 2 ", 2.0),
        (LENGTH, "2.93 Å", 2.93),
        (LENGTH, "2.93 \u212b", 2.93),
        (LENGTH, "2.93A", 2.93),
        (LENGTH, ".293 nm", 2.93),
        (LENGTH, "1 bohr", 0.529177),
        (ENERGY_PER_ATOM, "0.3 meV/atom", 0.3),
        (ENERGY_PER_ATOM, "2eV / atom", 2000.0),
        (ENERGY_PER_ATOM, "1 kJ/mol", 10.364270),
        (ENERGY_PER_ATOM, "96.485332 kJ/mol/atom", 1000.0),
        (RATE, "5 /ps", 5.0),
        (RATE, "5 1/ps", 5.0),
        (RATE, "1/ps", 1.0),
        (RATE, "5 ps^-1", 5.0),
        (RATE, "5 ps⁻¹", 5.0),
        (RATE, "0.005 /fs", 5.0),
    ],
)
def test_quantities_are_stored_in_one_unit(dimension, text, stored):
    assert dimension.parse(text) == pytest.approx(stored, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Temperature, "-5 K"),
        (Temperature, 0),
        (Temperature, "-300 °C"),
        (Time, "0 fs"),
        (TimeOrZero, -1.0),
        (Length, True),
        (Length, None),
        (Rate, [5]),
        (Rate, "5 ps"),
        (Pressure, float("nan")),
        (Pressure, float("inf")),
        (Pressure, "five GPa"),
        (Pressure, "5 K"),
        (Pressure, ""),
        (EnergyPerAtom, "1 eV"),
        (Time, "1 2 fs"),
    ],
)
def test_what_is_no_such_quantity_is_refused(kind, value):
    with pytest.raises(ValidationError, match="expected a"):
        TypeAdapter(kind).validate_python(value)


def test_a_wrong_unit_is_answered_with_the_nearest_and_all():
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Pressure).validate_python("5 GPA")
    context = caught.value.errors()[0]["ctx"]
    assert "GPa, MPa, kbar, bar, Pa" in context["expected"]
    assert context["fix"] == "Did you mean 'GPa'?"


@pytest.mark.parametrize(
    ("dimension", "value", "text"),
    [
        (TIME, 2.0, "2 fs"),
        (TIME, 20000.0, "20 ps"),
        (TIME, 1234.567891, "1234.567891 fs"),
        (RATE, 5.0, "5 /ps"),
    ],
)
def test_quantities_are_written_with_a_readable_unit(dimension, value, text):
    assert dimension.write(value) == text


@pytest.mark.parametrize("dimension", [TEMPERATURE, PRESSURE, TIME, LENGTH, ENERGY_PER_ATOM, RATE])
@pytest.mark.parametrize("value", [1 / 3, 1e-2, 1000.0, 2000.0 / 3, 9876.54321])
def test_written_quantities_read_back_exactly(dimension, value):
    assert dimension.parse(dimension.write(value)) == value


@pytest.mark.parametrize(
    ("dimension", "text", "message"),
    [
        (TEMPERATURE, "1e300 K", r"a temperature of at most 1e\+06 K"),
        (LENGTH, "-1e300", "a length above 0 Å"),
        (LENGTH, "1e5 nm", "a length of at most 100000 Å"),
        (PRESSURE, "-1e300 GPa", r"a pressure of at most 10000 GPa"),
        (TIME, 1e300, r"a time of at most 1e\+12 fs"),
    ],
)
def test_a_slip_of_the_pen_is_refused(dimension, text, message):
    with pytest.raises(PydanticCustomError, match=message):
        dimension.parse(text)
