"""Faster evaluation of a sampling copy: compiled, or with cuEquivariance, where it is right and pays.

A way is judged on the first batch whose shape has come back a few times, so that one-off evaluations never
wait for a compiler: it must give the energies and forces of the plain copy and, where the choice is free,
take the least time. A way that fails is left for good, with a word about it, and the plain copy goes on.
Copies of one model share what they learned.

On a CPU nothing is chosen unless it is asked for: there the kernels of
`mlip_refine.potential.acceleration.kernels` are faster (four cells of 54 atoms of `titanium-compact`,
float32, one shared core: 0.07 s against 0.10 s for the written-down operations, not compiled).
cuEquivariance 0.13 without its kernels, on a CPU, is within 1e-7 of three kinds of MACE in float64. Speed on
a GPU is measured in every run; none was measured for this file.
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mlip_refine.potential.acceleration.compiled import CompiledGraphs, CompiledModule, EnergyAndSlope
from mlip_refine.potential.acceleration.kernels import install_kernels, remove_kernels
from mlip_refine.potential.graphs import Graphs
from mlip_refine.progress import console

Acceleration = Literal["auto", "none", "compile", "cueq"]

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-7, 1e-6)}
"""Largest difference of energies, eV per atom, and of forces, eV/Å, between a way and the plain copy."""

_ONE_OFFS = 8
"""Calls with a shape before anything is spent on it."""

_ROUNDS, _CALLS = 3, 4
"""Of a timing: its fastest round counts."""

_Shape = tuple[int, int]


@dataclass
class Experience:
    """What was learned about the ways to evaluate a model, and holds for copies with other parameters.

    Attributes:
        compiled: Compiled graphs.
        chosen: Fastest way by dtype, atoms and systems.
        refused: Ways that failed, by dtype.
    """

    compiled: CompiledGraphs = field(default_factory=CompiledGraphs)
    chosen: dict[tuple[torch.dtype, _Shape], str] = field(default_factory=dict)
    refused: set[tuple[torch.dtype, str]] = field(default_factory=set)


class Accelerator:
    """Evaluates a batch in the best way known for its shape (see `EnergyAndSlope`).

    Attributes:
        last: Way of the last call; `none` is the plain copy.
    """

    def __init__(
        self,
        eager: EnergyAndSlope,
        ways: Mapping[str, Callable[[], EnergyAndSlope]],
        dtype: torch.dtype,
        experience: Experience,
    ) -> None:
        """Prepare to choose; nothing is built before it is needed.

        Args:
            eager: The plain copy.
            ways: What makes every other way, by name. If there is only one it need not be the fastest.
            dtype: Floating type of the model.
            experience: Of this model's other copies.
        """
        self._eager, self._makers, self._dtype, self._experience = eager, ways, dtype, experience
        self._made: dict[str, EnergyAndSlope] = {"none": eager}
        self._chosen: dict[_Shape, str] = {}
        self._calls: Counter[_Shape] = Counter()
        self.last = "none"

    def __call__(self, graphs: Graphs, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and derivatives of a batch, without a graph in the parameters."""
        self.last = "none"
        shape = (len(graphs.batch), graphs.n_graphs)
        name = self._chosen.get(shape)
        if name is None:
            self._calls[shape] += 1
            if self._calls[shape] <= _ONE_OFFS or len(vectors) == 0:
                return self._eager(graphs, vectors)
            name = self._chosen[shape] = self._choose(shape, graphs, vectors)
        if name != "none" and not self._is_refused(name) and len(vectors) > 0:
            try:
                found = self._made[name](graphs, vectors)
            except Exception as error:  # noqa: BLE001 - compilers of others may raise anything
                self._refuse(name, _first_line(error))
            else:
                self.last = name
                return found
        return self._eager(graphs, vectors)

    def _choose(self, shape: _Shape, graphs: Graphs, vectors: Tensor) -> str:
        known = self._experience.chosen.get((self._dtype, shape)) if len(self._makers) > 1 else None
        names = [*self._makers] if known is None else [known]
        right = [name for name in names if name != "none" and self._is_right(name, graphs, vectors)]
        if known is not None or len(self._makers) == 1:
            return right[0] if right else "none"
        seconds = {name: self._seconds(name, graphs, vectors) for name in ["none", *right]}
        best = min(seconds, key=lambda name: seconds[name])
        self._experience.chosen[self._dtype, shape] = best
        if best != "none":
            gain = seconds["none"] / seconds[best]
            _say(f"batches of {shape[1]} systems: {best}, {gain:.2f} times as fast as without")
        return best

    def _is_refused(self, name: str) -> bool:
        return (self._dtype, name) in self._experience.refused

    def _refuse(self, name: str, why: str) -> None:
        self._experience.refused.add((self._dtype, name))
        _say(f"goes on without {name}: {why}")

    def _is_right(self, name: str, graphs: Graphs, vectors: Tensor) -> bool:
        """Make a way, evaluate a batch with it, and compare; say why if it fails."""
        if self._is_refused(name):
            return False
        try:
            self._made.setdefault(name, self._makers[name]())
            found = self._made[name](graphs, vectors)
        except Exception as error:  # noqa: BLE001 - compilers of others may raise anything
            self._refuse(name, _first_line(error))
            return False
        differences = _differences(graphs, found, self._eager(graphs, vectors))
        # Not ">", so that what is not a number is refused.
        if all(d <= most for d, most in zip(differences, TOLERANCES[self._dtype], strict=True)):
            return True
        energy, force = differences
        self._refuse(name, f"energies differ by {energy:.1e} eV per atom, forces by {force:.1e} eV/Å")
        return False

    def _seconds(self, name: str, graphs: Graphs, vectors: Tensor) -> float:
        """Time of a call; that it was called before is the warming up."""
        rounds = []
        for _ in range(_ROUNDS):
            start = _now(vectors.device)
            for _ in range(_CALLS):
                self._made[name](graphs, vectors)
            rounds.append((_now(vectors.device) - start) / _CALLS)
        return min(rounds)


def accelerator(
    eager: EnergyAndSlope, module: torch.nn.Module, head: int, how: Acceleration, experience: Experience
) -> Accelerator | None:
    """Prepare to evaluate a frozen module faster.

    Args:
        eager: How it is evaluated as it is.
        module: The module, which is neither changed nor kept.
        head: Number of its head.
        how: `compile` or `cueq`; `none` of them; or `auto`: the fastest on a GPU, none on a CPU.
        experience: Of other copies of the same model.

    Returns:
        What evaluates it, or `None` if it is to be evaluated as it is.
    """
    tensor = next(module.parameters())
    if how == "none" or (how == "auto" and tensor.device.type != "cuda"):
        return None
    makers: dict[str, Callable[[], EnergyAndSlope]] = {
        "compile": lambda: CompiledModule(_plain(module), head, experience.compiled),
        "cueq": lambda: cuequivariant(_plain(module), head),
    }
    if how != "auto":
        makers = {how: makers[how]}
    return Accelerator(eager, makers, tensor.dtype, experience)


def cuequivariant(module: torch.nn.Module, head: int) -> EnergyAndSlope:
    """Convert a plain MACE module to NVIDIA's cuEquivariance.

    Raises:
        ImportError: If it is not installed. The conversion itself may raise anything.
    """
    import cuequivariance_torch  # noqa: F401, PLC0415 - optional
    from mace.cli.convert_e3nn_cueq import run  # noqa: PLC0415 - imports cuequivariance

    device, before = next(module.parameters()).device, torch.get_default_dtype()
    try:
        converted = run(module, device=device.type, return_model=True)
    finally:
        torch.set_default_dtype(before)
    converted = converted.to(device).eval().requires_grad_(requires_grad=False)
    install_kernels(converted)

    def evaluated(graphs: Graphs, vectors: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            variable = vectors.detach().requires_grad_()
            energy = converted(graphs.mace_input(variable, head), compute_force=False)["energy"]
            (slope,) = torch.autograd.grad(energy.sum(), variable)
        return energy.detach(), slope

    return evaluated


def _plain(module: torch.nn.Module) -> torch.nn.Module:
    plain = copy.deepcopy(module)
    remove_kernels(plain)
    return plain


def _differences(
    graphs: Graphs, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Largest differences of energies, eV per atom, and of forces, eV/Å."""
    energies = (found[0] - expected[0]).abs() / graphs.ptr.diff()
    forces = (graphs.forces(found[1]) - graphs.forces(expected[1].detach())).abs()
    return _largest(energies), _largest(forces)


def _largest(values: Tensor) -> float:
    return float(values.detach().max()) if bool(values.isfinite().all()) else math.nan


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _say(what: str) -> None:
    console.print(f"acceleration: {what}", markup=False, soft_wrap=True)
