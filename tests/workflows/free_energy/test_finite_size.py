"""Conventions of differences, and the finite-size term of liquids against gases with exact free energies."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from mlip_refine import testing
from mlip_refine.config import Config, config_from_dict
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.losses import FreeEnergyDifference, loss_specs
from mlip_refine.quantities import GPA, KB, Measured
from mlip_refine.workflows.free_energy.finite_size import (
    compressibility_limit,
    convention_of,
    liquid_size_term,
    require_comparable,
)
from mlip_refine.workflows.free_energy.records import CELLS, LIMIT, size_in_words
from mlip_refine.workflows.from_config import state_points

EXACT = Measured(1.0, 0.0, "")


def _log_factorial(n: int) -> float:
    return math.lgamma(n + 1)


@pytest.mark.parametrize("n", [8, 54, 128, 1000])
def test_an_ideal_gas_has_the_term_of_the_factorial(n: int) -> None:
    """F/kT = ln N! - N ln(V/Λ³), f∞/kT = ln ρΛ³ - 1: what is left is 1/(12N), Stirling's next term."""
    density = 0.03
    difference = _log_factorial(n) - n * math.log(n / density) - n * (math.log(density) - 1)
    left = difference - liquid_size_term(n, EXACT).value
    assert left == pytest.approx(1 / (12 * n), rel=0.01)


@pytest.mark.parametrize("packed", [0.2, 0.7, 0.95])
def test_hard_rods_have_the_term_of_their_compressibility(packed: float) -> None:
    """Tonks's gas on a ring: Z = L (L - Nσ)^(N-1)/N!, S₀ = (1 - ρσ)², for N = 100 to 1/(12N)."""
    n, free = 100, 1 - packed
    length = n / packed  # in rods
    cell = _log_factorial(n) - math.log(length) - (n - 1) * math.log(length * free)
    infinite = n * (math.log(packed / free) - 1)
    found = liquid_size_term(n, Measured(free**2, 0.0, "")).value
    assert cell - infinite - found == pytest.approx(1 / (12 * n), rel=0.01)


def test_an_ideal_mixture_has_a_factorial_for_every_species() -> None:
    counts = (30, 90)
    volume, total = 1000.0, sum(counts)
    cell = sum(_log_factorial(n) - n * math.log(volume) for n in counts)
    infinite = sum(n * (math.log(n / volume) - 1) for n in counts)
    found = liquid_size_term(counts, EXACT).value
    assert cell - infinite - found == pytest.approx(sum(1 / (12 * n) for n in counts), rel=0.01)
    assert found > liquid_size_term(total, EXACT).value + 1


def test_the_error_of_the_term_is_that_of_the_logarithm() -> None:
    low, high = (liquid_size_term(128, Measured(s0, 0.0, "")).value for s0 in (0.0156, 0.0174))
    found = liquid_size_term(128, Measured(0.0165, 0.0009, ""))
    assert found.se == pytest.approx((high - low) / 2, rel=1e-2)
    assert found.value == pytest.approx(0.5 * math.log(2 * math.pi * 128 * 0.0165))


def test_the_compressibility_limit_of_an_ideal_gas_is_one() -> None:
    """K_T = ρkT. Its relative error is that of K_T."""
    density, temperature = 0.05, 1941.0
    modulus = density * KB * temperature / GPA
    found = compressibility_limit(density, temperature, Measured(modulus, 0.02 * modulus, "GPa"))
    assert (found.value, found.se) == (pytest.approx(1.0), pytest.approx(0.02))


@pytest.mark.parametrize(("value", "se"), [(-0.01, 0.001), (0.01, 0.02), (0.01, math.nan)])
def test_a_compressibility_that_is_not_known_is_refused(value: float, se: float) -> None:
    with pytest.raises(StatisticsError, match="compressibility of the liquid is not known"):
        liquid_size_term(100, Measured(value, se, ""))


def _setting(**phases: dict[str, Any]) -> tuple[FreeEnergyDifference, dict[Any, Any]]:
    node = {"type": "free_energy_difference", "from": "hcp", "to": "bcc", "temperature": 1000}
    data = {"name": "pair", "potential": {"model": "m"}, "phases": phases, "losses": [node]}
    config: Config = config_from_dict(data)
    (spec,) = loss_specs(config.losses)
    loss = FreeEnergyDifference("pair", 1.0, spec.options)
    return loss, state_points(config, loss.sources, testing.IdealGas([22, 40], 0.1), 1)


def _phase(prototype: str, n_atoms: int, element: str = "Ti") -> dict[str, Any]:
    a = 2.93 if prototype == "hcp" else 3.25
    return {"prototype": prototype, "element": element, "n_atoms": n_atoms, "a": a}


EQUAL = {"hcp": _phase("hcp", 54), "bcc": _phase("bcc", 54)}
UNEQUAL = {"hcp": _phase("hcp", 54), "bcc": _phase("bcc", 16)}


def test_a_liquid_wants_the_limit_unless_cells_are_asked_for() -> None:
    loss, points = _setting(**EQUAL)
    molten = {s: replace(p, identity="liquid") if s.phase == "bcc" else p for s, p in points.items()}
    assert convention_of(loss, points, None) == CELLS
    assert convention_of(loss, molten, None) == LIMIT
    for asked, convention in (("cells", CELLS), ("limit", LIMIT)):
        for own in (points, molten):
            assert convention_of(loss, own, asked) == convention  # type: ignore[arg-type]


@pytest.mark.parametrize("finite_size", [None, "cells"])
def test_cells_of_different_size_are_compared_in_the_limit_only(finite_size: Any) -> None:
    loss, points = _setting(**UNEQUAL)
    with pytest.raises(InputError, match="cells of different size") as caught:
        require_comparable(loss, points, finite_size)
    assert re.search(r"54 atoms of hcp-\S+, 16 of bcc-", str(caught.value))
    assert "finite_size: limit" in str(caught.value)
    require_comparable(loss, points, "limit")


@pytest.mark.parametrize("finite_size", [None, "limit"])
def test_phases_of_different_composition_are_never_compared(finite_size: Any) -> None:
    loss, points = _setting(hcp=_phase("hcp", 54), bcc=_phase("bcc", 54, "Zr"))
    with pytest.raises(InputError, match=r"different composition; found Ti of hcp-\S+, Zr of bcc-"):
        require_comparable(loss, points, finite_size)


def test_results_say_what_they_are_of() -> None:
    assert size_in_words(CELLS, 54, 54) == "N = 54"
    assert size_in_words(LIMIT, 54, 54) == "N → ∞ (from 54)"
    assert size_in_words(LIMIT, 54, 128) == "N → ∞ (from 54 and 128)"
