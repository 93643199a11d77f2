"""Models in ASE: MACE's own calculator around a model that was loaded safely."""

import contextlib
import io
from pathlib import Path
from typing import Any

from mace.calculators import MACECalculator

from mlip_refine.potential.acceleration.kernels import without_kernels
from mlip_refine.potential.model import Potential


def ase_calculator(
    model: str | Path | Potential,
    *,
    head: str | None = None,
    device: str | None = None,
    default_dtype: str | None = None,
    trust_pickle: bool = False,
    **options: Any,
) -> MACECalculator:
    """Open a model in ASE, with the calculator that users of MACE know.

    For many configurations at once `Potential.evaluate_atoms` is faster.

    Args:
        model: Embedded name, path of a `.model` or `.safetensors` file, name of a foundation model (see
            `resolve_model`), or a potential as it is now; later changes of that do not reach the calculator.
        head: Head of a multi-head model (see `Potential.from_module`); by default that of the potential.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; by default that of the potential, or `cpu`.
        default_dtype: `float32` or `float64`; by default that of the potential, or `float64`. MACE's
            calculator makes it torch's default in the whole process.
        trust_pickle: Whether the file may run any code (see `load_module`).
        options: Further options of `mace.calculators.MACECalculator`, such as `compile_mode`.

    Raises:
        InputError: If there is no such model, head or GPU, or the file cannot be loaded safely.
    """
    if isinstance(model, Potential):
        chosen = Potential.from_module(
            without_kernels(model.module),
            copy=False,
            head=head or model.head,
            default_dtype=default_dtype or str(model.dtype).removeprefix("torch."),
            device=device or str(model.device),
        )
    else:
        chosen = Potential.load(
            model,
            head=head,
            device=device or "cpu",
            default_dtype=default_dtype or "float64",
            trust_pickle=trust_pickle,
        )
    with contextlib.redirect_stdout(io.StringIO()):  # where mace 0.3.14 says which head it takes
        return MACECalculator(
            models=[without_kernels(chosen.module)],
            device=str(chosen.device),
            default_dtype=str(chosen.dtype).removeprefix("torch."),
            head=chosen.head,
            **options,
        )
