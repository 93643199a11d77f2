"""Faster evaluation of a sampling copy: compiled, or with cuEquivariance, where it is right and pays.

A backend is judged on the first batch whose shape has come back a few times, so that one-off evaluations
never wait for a compiler: it must give the energies and forces of the plain copy and, where the choice is
free, take the least time. A backend that fails is dropped for good, with a message, and the plain copy goes
on. Copies of one model share what they learned.

On a CPU nothing is chosen unless it is asked for: there the kernels of
`mlip_refine.potential.acceleration.kernels` are faster (four cells of 54 atoms of `titanium-compact`,
float32, one shared core: 0.07 s against 0.10 s for the written-down operations, not compiled).
cuEquivariance 0.13 without its kernels, on a CPU, is within 1e-7 of three kinds of MACE in float64. Speed on
a GPU is measured in every run; none was measured for this file.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mlip_refine.potential.acceleration.compiled import CompiledGraphs, CompiledModule, EnergyAndSlope
from mlip_refine.potential.acceleration.kernels import install_kernels, without_kernels
from mlip_refine.potential.graphs import Graphs
from mlip_refine.progress import console

Acceleration = Literal["auto", "none", "compile", "cueq"]

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-7, 1e-6)}
"""Largest difference of energies, eV per atom, and of forces, eV/Å, between a backend and the plain copy."""

_ONE_OFFS = 8
"""Calls with a shape before anything is spent on it."""

_ROUNDS, _CALLS = 3, 4
"""Rounds of a timing, of which the fastest counts, and calls in each."""

_Shape = tuple[int, int]


@dataclass
class Experience:
    """What was learned about the backends of a model, and holds for copies with other parameters.

    Attributes:
        compiled: Compiled graphs.
        chosen: Fastest backend by dtype and numbers of atoms and systems.
        refused: Backends that failed, with the dtype.
    """

    compiled: CompiledGraphs = field(default_factory=CompiledGraphs)
    chosen: dict[tuple[torch.dtype, _Shape], str] = field(default_factory=dict)
    refused: set[tuple[torch.dtype, str]] = field(default_factory=set)


class Accelerator:
    """Evaluates a batch with the best backend known for its shape (see `EnergyAndSlope`).

    Attributes:
        last: Backend of the last call; `none` is the plain copy.
    """

    def __init__(
        self,
        eager: EnergyAndSlope,
        backends: Mapping[str, Callable[[], EnergyAndSlope]],
        dtype: torch.dtype,
        experience: Experience,
    ) -> None:
        """Keep the backends; none is built before it is needed.

        Args:
            eager: Evaluation by the plain copy.
            backends: Makers of all other backends, by name. If there is only one it need not be the fastest.
            dtype: Floating type of the model.
            experience: What this model's copies have learned.
        """
        self._eager, self._makers, self._dtype, self._experience = eager, backends, dtype, experience
        self._made: dict[str, EnergyAndSlope] = {"none": eager}
        self._chosen: dict[_Shape, str] = {}
        self._calls: Counter[_Shape] = Counter()
        self.last = "none"

    def __call__(self, graphs: Graphs, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies and derivatives of a batch, without a graph in the parameters."""
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
        """Make a backend, evaluate a batch with it, and compare; say why if it fails."""
        if self._is_refused(name):
            return False
        try:
            self._made.setdefault(name, self._makers[name]())
            found = self._made[name](graphs, vectors)
        except Exception as error:  # noqa: BLE001 - compilers of others may raise anything
            self._refuse(name, _first_line(error))
            return False
        expected = self._eager(graphs, vectors)
        energies = (found[0] - expected[0]).abs() / graphs.ptr.diff()
        forces = (graphs.forces(found[1]) - graphs.forces(expected[1].detach())).abs()
        energy, force = (
            float(d.detach().max()) if bool(d.isfinite().all()) else math.nan for d in (energies, forces)
        )
        most_energy, most_force = TOLERANCES[self._dtype]
        # Not ">", so that what is not a number is refused.
        if energy <= most_energy and force <= most_force:
            return True
        self._refuse(name, f"energies differ by {energy:.1e} eV per atom, forces by {force:.1e} eV/Å")
        return False

    def _seconds(self, name: str, graphs: Graphs, vectors: Tensor) -> float:
        """Return the time of a call; `_is_right` has made one before, which warms up."""
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
        eager: Evaluation by the module as it is.
        module: Frozen module, which is neither changed nor kept.
        head: Number of the head.
        how: `compile` or `cueq`; `none`; or `auto`: the fastest on a GPU, none on a CPU.
        experience: What copies of the same model have learned.

    Returns:
        The accelerator, or `None` if the module is to be evaluated as it is.
    """
    tensor = next(module.parameters())
    if how == "none" or (how == "auto" and tensor.device.type != "cuda"):
        return None
    makers: dict[str, Callable[[], EnergyAndSlope]] = {
        "compile": lambda: CompiledModule(without_kernels(module), head, experience.compiled),
        "cueq": lambda: cuequivariant(without_kernels(module), head),
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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _say(message: str) -> None:
    console.print(f"acceleration: {message}", markup=False, soft_wrap=True)
