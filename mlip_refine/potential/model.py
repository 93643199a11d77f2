"""A MACE potential: load, evaluate, differentiate, freeze, save."""

import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mlip_refine.errors import InputError, nearest
from mlip_refine.potential.acceleration.choose import Acceleration, Accelerator, Experience, accelerator
from mlip_refine.potential.acceleration.kernels import install_kernels, remove_kernels
from mlip_refine.potential.batching import Chunker, Systems, Work
from mlip_refine.potential.checkpoints.archive import module_hash, save_model, save_safetensors
from mlip_refine.potential.checkpoints.model_files import resolve_model
from mlip_refine.potential.checkpoints.unpickle import load_module
from mlip_refine.potential.curvature import Curvature, Second
from mlip_refine.potential.graphs import GraphBuilder, Graphs, Structure
from mlip_refine.potential.neighbours import MULTIPLE

PROBES = ("energy", "forces", "stress", "born")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def resolve_device(device: str) -> torch.device:
    """Turn `auto | cpu | cuda | cuda:N` into a device.

    Raises:
        InputError: If a GPU is asked for and none is there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("no CUDA device is available", found=f"device: {device}", expected="auto or cpu")
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(
            "there is no such CUDA device", found=f"device: {device}", expected=f"one of {count}"
        )
    return found


class Potential:
    """A MACE model with everything that refining needs.

    All outputs are differentiable in `trainable_parameters()`. The stored module is evaluated through
    exact faster kernels where they apply; what is saved is the plain MACE module.

    Attributes:
        module: The MACE module.
        head: Name of the head that is evaluated.
        graphs: Builder of structures and batches for this model.
        chunker: Knows how many systems fit at a time.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        head: str | None = None,
        default_dtype: str = "float64",
        device: str = "cpu",
        freeze: Sequence[str] = (),
    ) -> None:
        """Take over a MACE module: move it, thaw its parameters, choose its head.

        Args:
            module: `mace.modules.MACE` or a subclass.
            head: Head of a multi-head model; `None` takes the only one or the one called "default".
            default_dtype: `float32` or `float64`.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            freeze: Glob patterns of parameter names that are not trained.

        Raises:
            InputError: For an unknown head or a pattern that matches nothing.
        """
        self.module = module.to(device=resolve_device(device), dtype=DTYPES[default_dtype]).eval()
        self.heads = [str(h) for h in getattr(module, "heads", None) or ["Default"]]
        self.head = _choose_head(head, self.heads)
        self.graphs = GraphBuilder(
            atomic_numbers=tuple(int(z) for z in module.atomic_numbers),  # type: ignore[union-attr]
            cutoff=float(module.r_max),  # type: ignore[arg-type]
            dtype=DTYPES[default_dtype],
            device=next(module.parameters()).device,
            edge_multiple=MULTIPLE if resolve_device(device).type == "cpu" else 1,
        )
        self.chunker = Chunker(self.graphs.device)
        _thaw(self.module, freeze)
        install_kernels(self.module)
        self._accelerator: Accelerator | None = None
        self._experience = Experience()

    @classmethod
    def load(
        cls,
        model: str,
        *,
        base: Path | None = None,
        head: str | None = None,
        default_dtype: str = "float64",
        device: str = "cpu",
        freeze: Sequence[str] = (),
        trust_pickle: bool = False,
    ) -> Self:
        """Load an embedded name, a path, or a MACE foundation name (see `resolve_model`)."""
        module = load_module(resolve_model(model, base or Path.cwd()), trust_pickle=trust_pickle)
        return cls(module, head=head, default_dtype=default_dtype, device=device, freeze=freeze)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.graphs.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the model's parameters."""
        return self.graphs.dtype

    @property
    def hash(self) -> str:
        """SHA-256 of the tensors and the architecture, independent of device and pickling."""
        return module_hash(self.module)

    @property
    def way(self) -> str:
        """How forces were found last: `none` for plainly, `compile` or `cueq` (see `frozen_copy`)."""
        return self._accelerator.last if self._accelerator else "none"

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name and tensor of every parameter that training may change."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def parameters(self) -> dict[str, Tensor]:
        """Copies of all parameters, by name."""
        return {name: p.detach().clone() for name, p in self.module.named_parameters()}

    def set_parameters(self, values: Mapping[str, Tensor]) -> None:
        """Write parameter values in place, by name."""
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if name in values:
                    parameter.copy_(values[name])

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold other parameter values while the block runs."""
        own = self.parameters()
        self.set_parameters(values)
        try:
            yield
        finally:
            self.set_parameters(own)

    def evaluate(
        self, graphs: Graphs, probes: Iterable[str] = ("energy",), *, create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Evaluate a batch in one forward pass.

        Args:
            graphs: The batch.
            probes: Any of `energy` `[n_graphs]` eV, `forces` `[n_atoms, 3]` eV/Å, `stress`
                `[n_graphs, 3, 3]` eV/Å³, tensile positive, and `born` `[n_graphs, 6, 6]` eV/Å³ (see
                `Curvature.born`).
            create_graph: Keep forces, stress and Born term differentiable in the parameters.

        Returns:
            A tensor per probe. Energies are differentiable whenever gradients are enabled.
        """
        wanted = set(probes)
        if "born" in wanted:
            found = self._with_born(graphs, create_graph=create_graph)
        elif wanted & {"forces", "stress"}:
            found = self._with_slope(graphs, stress="stress" in wanted, create_graph=create_graph)
        else:
            with _same_from_the_first_call(self):
                found = {"energy": self._energy(graphs, graphs.vectors.detach())}
        return {name: found[name] for name in PROBES if name in wanted}

    def curvature(self, graphs: Graphs) -> Curvature:
        """Energy and slope of a batch, ready for second derivatives along any number of directions.

        Vectors with a graph of their own (`deformed`) keep it.
        """
        leaf = graphs.vectors.is_leaf
        vectors = graphs.vectors.detach().requires_grad_() if leaf else graphs.vectors
        with torch.enable_grad(), _same_from_the_first_call(self):
            energy, slope = self._eager(graphs, vectors, create_graph=True)
        return Curvature(graphs, vectors, energy, slope)

    def second(
        self,
        graphs: Graphs,
        displacements: Tensor | None = None,
        strains: Tensor | None = None,
        *,
        create_graph: bool = False,
    ) -> Second:
        """Second derivatives of the energy times one direction per graph (see `Curvature.along`).

        For several directions of one batch, `curvature` saves the forward pass.
        """
        return self.curvature(graphs).along(displacements, strains, create_graph=create_graph)

    def _with_slope(self, graphs: Graphs, *, stress: bool, create_graph: bool) -> dict[str, Tensor]:
        vectors = graphs.vectors.detach().requires_grad_()
        with torch.enable_grad(), _same_from_the_first_call(self):
            energy, slope = self._energy_and_slope(graphs, vectors, create_graph=create_graph)
            found = {"energy": energy, "forces": graphs.forces(slope)}
            return found | ({"stress": graphs.stress(vectors, slope)} if stress else {})

    def _with_born(self, graphs: Graphs, *, create_graph: bool) -> dict[str, Tensor]:
        curvature = self.curvature(graphs)
        slope = curvature.slope if create_graph else curvature.slope.detach()
        with torch.set_grad_enabled(create_graph):
            return {
                "energy": curvature.energy,
                "forces": graphs.forces(slope),
                "stress": graphs.stress(curvature.vectors, slope),
                "born": curvature.born(create_graph=create_graph),
            }

    def _energy(self, graphs: Graphs, vectors: Tensor) -> Tensor:
        inputs = graphs.mace_input(vectors, self.heads.index(self.head))
        energy: Tensor = self.module(inputs, compute_force=False)["energy"]
        return energy

    def _energy_and_slope(
        self, graphs: Graphs, vectors: Tensor, *, create_graph: bool
    ) -> tuple[Tensor, Tensor]:
        if self._accelerator and not create_graph:
            return self._accelerator(graphs, vectors)
        return self._eager(graphs, vectors, create_graph=create_graph)

    def _eager(self, graphs: Graphs, vectors: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        energy = self._energy(graphs, vectors)
        return energy, _slope(energy, vectors, create_graph=create_graph)

    def evaluate_chunked(self, graphs: Graphs, probes: Iterable[str]) -> dict[str, Tensor]:
        """Evaluate a batch of any size in parts that suit the device, without a graph in the parameters.

        The edges must be sorted by receiver.

        Raises:
            MlipRefineError: If memory runs out for a single system.
        """
        wanted, systems = tuple(probes), Systems.of_graphs(graphs)
        work = _work_of(wanted)

        def detached(part: slice) -> dict[str, Tensor]:
            chunk = graphs if part == slice(0, systems.count) else graphs.part(part, systems.offsets)
            with torch.no_grad():
                return {name: value.detach() for name, value in self.evaluate(chunk, wanted).items()}

        parts = list(self.chunker.run(work, systems, detached))
        return parts[0] if len(parts) == 1 else {n: torch.cat([part[n] for part in parts]) for n in wanted}

    def energies(self, structures: Sequence[Structure]) -> Tensor:
        """Energies of many structures in chunks, without a graph: `[n]`, eV, float64, on the CPU.

        Raises:
            MlipRefineError: If memory runs out for a single system.
        """

        def energy(_: slice, graphs: Graphs) -> Tensor:
            with torch.no_grad():
                return self.evaluate(graphs)["energy"].double().cpu()

        return torch.cat([torch.zeros(0).double(), *self.in_chunks(Work.ENERGY, structures, energy)])

    def in_chunks[T](
        self, work: Work, structures: Sequence[Structure], evaluate: Callable[[slice, Graphs], T]
    ) -> Iterator[T]:
        """Do work on many structures, as many at a time as are fast and fit.

        Args:
            work: Its kind.
            structures: Structures.
            evaluate: Does it for one chunk: which of the structures, and their batch. It may be called again
                for a part of a chunk for which memory ran out (`Chunker.run`).

        Yields:
            The result of every chunk, in order.

        Raises:
            MlipRefineError: If memory runs out for a single system.
        """
        systems = Systems.of_structures(structures)
        yield from self.chunker.run(
            work, systems, lambda part: evaluate(part, self.graphs.collate(structures[part]))
        )

    def chunks(self, structures: Sequence[Structure], work: Work = Work.FORCES) -> list[slice]:
        """Slices of the list that are fast, and fit as far as is known, on this device."""
        return self.chunker.plan(work, Systems.of_structures(structures))

    def frozen_copy(self, default_dtype: str | None = None, accelerate: Acceleration = "none") -> "Potential":
        """An independent copy without gradients in its parameters: what sampling gets.

        Args:
            default_dtype: `float32` or `float64`; `None` keeps that of the original.
            accelerate: How forces are found (see `mlip_refine.potential.acceleration.choose`).
        """
        name = default_dtype or str(self.dtype).removeprefix("torch.")
        module = copy.deepcopy(self.module)
        remove_kernels(module)
        frozen = Potential(module, head=self.head, default_dtype=name, device=str(self.device))
        frozen.module.requires_grad_(requires_grad=False)
        frozen._experience = self._experience
        number = self.heads.index(self.head)
        frozen._accelerator = accelerator(frozen._eager, frozen.module, number, accelerate, self._experience)
        return frozen

    def save(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write `NAME.model` (plain MACE) and `NAME.safetensors` with `NAME.json`, atomically."""
        module = copy.deepcopy(self.module).to("cpu")
        remove_kernels(module)
        module.requires_grad_(requires_grad=True)
        model_path = folder / f"{name}.model"
        save_model(module, model_path)
        return model_path, save_safetensors(
            module, folder / name, {"head": self.head, "model_hash": self.hash}
        )


def _work_of(probes: Iterable[str]) -> Work:
    if "born" in probes:
        return Work.BORN
    return Work.FORCES if {"forces", "stress"} & set(probes) else Work.ENERGY


def _slope(energy: Tensor, vectors: Tensor, *, create_graph: bool) -> Tensor:
    """Derivative of the energies in the edge vectors `[n_edges, 3]`, eV/Å; 0 without edges."""
    if not energy.requires_grad:
        return torch.zeros_like(vectors)
    (slope,) = torch.autograd.grad(
        energy.sum(), vectors, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return slope


@contextmanager
def _same_from_the_first_call(potential: Potential) -> Iterator[None]:
    """Keep TorchScript from changing its own code after the first calls, and with it the last bits.

    Only on the CPU: sums on a GPU have no fixed order anyway, and what it fuses there is worth having.
    """
    with torch.jit.optimized_execution(potential.device.type != "cpu"):  # type: ignore[attr-defined]
        yield


def _choose_head(head: str | None, heads: list[str]) -> str:
    if head is None:
        return next((h for h in heads if h.lower() == "default"), heads[0])
    if head not in heads:
        word = nearest(head, heads)
        raise InputError(
            f"the model has no head {head!r}",
            expected=f"one of {heads}",
            fix=f"did you mean {word!r}?" if word else None,
        )
    return head


def _thaw(module: torch.nn.Module, freeze: Sequence[str]) -> None:
    names = [name for name, _ in module.named_parameters()]
    for pattern in freeze:
        if not fnmatch.filter(names, pattern):
            word = nearest(pattern, names)
            raise InputError(
                f"potential.freeze: {pattern!r} matches no parameter",
                fix=f"did you mean {word!r}?" if word else None,
            )
    for name, parameter in module.named_parameters():
        fixed = any(fnmatch.fnmatch(name, pattern) for pattern in freeze)
        parameter.requires_grad_(not fixed and parameter.is_floating_point())
