"""The door to ASE: the calculator that users of MACE know."""

from pathlib import Path
from typing import Any

from mace.calculators import MACECalculator


def ase_calculator(
    model: Path, *, device: str = "cpu", default_dtype: str = "float64", **options: Any
) -> Any:
    """`mace.calculators.MACECalculator` of a `.model` file written by this package."""
    return MACECalculator(model_paths=[str(model)], device=device, default_dtype=default_dtype, **options)
