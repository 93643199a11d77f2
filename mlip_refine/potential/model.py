"""A MACE potential: load, evaluate, differentiate, freeze, save."""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import torch
from ase import Atoms
from numpy.typing import NDArray
from torch import Tensor

from mlip_refine.errors import InputError, nearest
from mlip_refine.potential.acceleration.choose import Acceleration, Accelerator, Experience, accelerator
from mlip_refine.potential.acceleration.kernels import copy_module, install_kernels, without_kernels
from mlip_refine.potential.atoms import AtomsResult, in_periodic_cell
from mlip_refine.potential.batching import Chunker, Footprint, Systems, Work
from mlip_refine.potential.checkpoints.archive import module_hash, save_model, save_safetensors
from mlip_refine.potential.checkpoints.kinds import require_supported
from mlip_refine.potential.checkpoints.unpickle import load_module
from mlip_refine.potential.curvature import Curvature, GeometryDerivatives
from mlip_refine.potential.graphs import GraphBuilder, Graphs, Structure
from mlip_refine.potential.model_files import resolve_model
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
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            "no such device", where="device", found=device, expected="auto, cpu, cuda or cuda:N"
        ) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(
            "there is no such CUDA device", found=f"device: {device}", expected=f"one of {count}"
        )
    return found


class Potential:
    """A MACE model with everything that refining needs.

    All outputs are differentiable in `trainable_parameters()`. The module is evaluated through exact faster
    kernels where they apply; the files that `save` writes hold the plain MACE module.

    Attributes:
        module: MACE module, in evaluation mode, with exact kernels installed.
        heads: Names of the heads of the module.
        head: Name of the head that is evaluated.
        graphs: Builder of structures and batches for this model.
        chunker: Chooser of how many systems are evaluated at a time.
    """

    def __init__(
        self, module: torch.nn.Module, heads: Sequence[str], head: str, graphs: GraphBuilder
    ) -> None:
        """Keep a prepared module and what describes it; `from_module` and `load` prepare one."""
        self.module, self.heads, self.head, self.graphs = module, list(heads), head, graphs
        self.chunker = Chunker(graphs.device, footprint=Footprint.of(module, graphs.dtype))
        self._accelerator: Accelerator | None = None
        self._experience = Experience()

    @classmethod
    def from_module(
        cls,
        module: torch.nn.Module,
        *,
        copy: bool = True,
        head: str | None = None,
        default_dtype: str = "float64",
        device: str = "cpu",
        freeze: Sequence[str] = (),
    ) -> Self:
        """Prepare a MACE module: move it, thaw its parameters, choose its head, install exact kernels.

        Args:
            module: `mace.modules.MACE` or a subclass.
            copy: Whether to prepare a copy; if not, the module itself is changed and kept.
            head: Head of a model with several; `None` takes the only one or the one called "default".
            default_dtype: `float32` or `float64`.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            freeze: Glob patterns of names of parameters that are not trained.

        Raises:
            InputError: For an unknown head, several heads none of which is chosen or called "default", a kind
                of model that is not refined, an unknown precision or device, a pattern that matches nothing.
        """
        require_supported(module)
        if default_dtype not in DTYPES:
            expected = " or ".join(DTYPES)
            raise InputError(
                "unknown precision", where="default_dtype", found=default_dtype, expected=expected
            )
        where, dtype = resolve_device(device), DTYPES[default_dtype]
        heads = [str(h) for h in getattr(module, "heads", None) or ["Default"]]
        if head is None and len(heads) > 1 and "default" not in (h.lower() for h in heads):
            raise InputError(
                "the model has several heads, and none of them is called default",
                where="head",
                expected=f"one of {', '.join(heads)}",
                fix="Name the head that targets and frames belong to; the others share most of its weights.",
            )
        if head is None:
            head = next((h for h in heads if h.lower() == "default"), heads[0])
        elif head not in heads:
            word = nearest(head, heads)
            raise InputError(
                f"the model has no head {head!r}",
                where="head",
                expected=f"one of {', '.join(heads)}",
                fix=f"did you mean {word!r}?" if word else None,
            )
        module = (copy_module(module) if copy else module).to(device=where, dtype=dtype).eval()
        graphs = GraphBuilder(
            atomic_numbers=tuple(int(z) for z in module.atomic_numbers),  # type: ignore[union-attr]
            cutoff=float(module.r_max),  # type: ignore[arg-type]
            dtype=dtype,
            device=next(module.parameters()).device,
            edge_multiple=MULTIPLE if where.type == "cpu" else 1,
        )
        names = [name for name, _ in module.named_parameters()]
        for pattern in freeze:
            if not fnmatch.filter(names, pattern):
                word = nearest(pattern, names)
                raise InputError(
                    f"{pattern!r} matches no parameter",
                    where="freeze",
                    fix=f"did you mean {word!r}?" if word else None,
                )
        for name, parameter in module.named_parameters():
            fixed = any(fnmatch.fnmatch(name, pattern) for pattern in freeze)
            parameter.requires_grad_(not fixed and parameter.is_floating_point())
        install_kernels(module)
        return cls(module, heads, head, graphs)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        base: Path | None = None,
        head: str | None = None,
        default_dtype: str = "float64",
        device: str = "cpu",
        freeze: Sequence[str] = (),
        trust_pickle: bool = False,
    ) -> Self:
        """Load an embedded model, a file, or a MACE foundation model.

        Args:
            model: Embedded name, path, or name of a foundation model (see `resolve_model`).
            base: Folder that relative paths start from; the current one by default.
            head: Head of a multi-head model (see `from_module`).
            default_dtype: `float32` or `float64`.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            freeze: Glob patterns of names of parameters that are not trained.
            trust_pickle: Whether the file may run any code (see `load_module`).

        Raises:
            InputError: If there is no such model, it cannot be loaded safely, or `from_module` refuses it.
        """
        path = resolve_model(str(model), base or Path.cwd())
        module = load_module(path, trust_pickle=trust_pickle)
        return cls.from_module(
            module, copy=False, head=head, default_dtype=default_dtype, device=device, freeze=freeze
        )

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
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
    def backend(self) -> str:
        """Backend of the last evaluation: `compile`, `cueq`, or `none` for the plain module."""
        return self._accelerator.last if self._accelerator else "none"

    def with_head(self, head: str) -> "Potential":
        """Return the same parameters, evaluated through another head of the model."""
        return Potential(self.module, self.heads, head, self.graphs)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that training may change, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def parameters(self) -> dict[str, Tensor]:
        """Return copies of all parameters, by name."""
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
            curvature = self.curvature(graphs)
            slope = curvature.slope if create_graph else curvature.slope.detach()
            with torch.set_grad_enabled(create_graph):
                found = {
                    "energy": curvature.energy,
                    "forces": graphs.forces(slope),
                    "stress": graphs.stress(curvature.vectors, slope),
                    "born": curvature.born(create_graph=create_graph),
                }
        elif wanted & {"forces", "stress"}:
            vectors = graphs.vectors.detach().requires_grad_()
            with torch.enable_grad(), self._fixed_torchscript():
                if self._accelerator and not create_graph:
                    energy, slope = self._accelerator(graphs, vectors)
                else:
                    energy, slope = self._eager(graphs, vectors, create_graph=create_graph)
                found = {"energy": energy, "forces": graphs.forces(slope)}
                if "stress" in wanted:
                    found["stress"] = graphs.stress(vectors, slope)
        else:
            with self._fixed_torchscript():
                found = {"energy": self._energy(graphs, graphs.vectors.detach())}
        return {name: found[name] for name in PROBES if name in wanted}

    def curvature(self, graphs: Graphs) -> Curvature:
        """Return energy and slope of a batch, ready for second derivatives along any number of directions.

        Vectors with a graph of their own (`deformed`) keep it.
        """
        leaf = graphs.vectors.is_leaf
        vectors = graphs.vectors.detach().requires_grad_() if leaf else graphs.vectors
        with torch.enable_grad(), self._fixed_torchscript():
            energy, slope = self._eager(graphs, vectors, create_graph=True)
        return Curvature(graphs, vectors, energy, slope)

    def hessian_product(
        self,
        graphs: Graphs,
        displacements: Tensor | None = None,
        strains: Tensor | None = None,
        *,
        create_graph: bool = False,
    ) -> GeometryDerivatives:
        """Return the second derivatives of the energy times one direction per graph (see `Curvature.along`).

        For several directions of one batch, `curvature` saves the forward pass.
        """
        return self.curvature(graphs).along(displacements, strains, create_graph=create_graph)

    def _energy(self, graphs: Graphs, vectors: Tensor) -> Tensor:
        inputs = graphs.mace_input(vectors, self.heads.index(self.head))
        default = torch.get_default_dtype()
        try:
            # MACE makes masks of heads in the default precision, whatever the model has.
            torch.set_default_dtype(self.dtype)
            energy: Tensor = self.module(inputs, compute_force=False)["energy"]
        finally:
            torch.set_default_dtype(default)
        return energy

    def _eager(self, graphs: Graphs, vectors: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """Return energies and their derivative in the edge vectors `[n_edges, 3]`, eV/Å; 0 without edges."""
        energy = self._energy(graphs, vectors)
        if not energy.requires_grad:
            return energy, torch.zeros_like(vectors)
        (slope,) = torch.autograd.grad(
            energy.sum(), vectors, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return energy, slope

    @contextmanager
    def _fixed_torchscript(self) -> Iterator[None]:
        """Keep TorchScript from changing its own code after the first calls, and with it the last bits.

        Only on the CPU: sums on a GPU have no fixed order anyway, and what it fuses there is worth having.
        """
        with torch.jit.optimized_execution(self.device.type != "cpu"):  # type: ignore[attr-defined]
            yield

    def evaluate_chunked(self, graphs: Graphs, probes: Iterable[str]) -> dict[str, Tensor]:
        """Evaluate a batch of any size in parts that suit the device, without a graph in the parameters.

        The edges must be sorted by receiver.

        Raises:
            MlipRefineError: If memory runs out for a single system.
        """
        wanted, systems = tuple(probes), Systems.of_graphs(graphs)
        work = Work.BORN if "born" in wanted else Work.FORCES
        if set(wanted) <= {"energy"}:
            work = Work.ENERGY

        def detached(part: slice) -> dict[str, Tensor]:
            chunk = graphs if part == slice(0, systems.count) else graphs.part(part, systems.offsets)
            with torch.no_grad():
                return {name: value.detach() for name, value in self.evaluate(chunk, wanted).items()}

        parts = list(self.chunker.run(work, systems, detached))
        return parts[0] if len(parts) == 1 else {n: torch.cat([part[n] for part in parts]) for n in wanted}

    def energies(self, structures: Sequence[Structure]) -> Tensor:
        """Return energies of many structures, in chunks and without a graph: `[n]`, eV, float64, on the CPU.

        Raises:
            MlipRefineError: If memory runs out for a single system.
        """

        def energy(_: slice, graphs: Graphs) -> Tensor:
            with torch.no_grad():
                return self.evaluate(graphs)["energy"].double().cpu()

        return torch.cat([torch.zeros(0).double(), *self.in_chunks(Work.ENERGY, structures, energy)])

    def evaluate_atoms(self, atoms: Atoms | Sequence[Atoms]) -> AtomsResult:
        """Return energies (eV), forces (eV/Å) and stresses (eV/Å³) of ASE's `Atoms`, many at a time.

        A slab or molecule is evaluated in a cell that is wide enough, and has no stress.

        Args:
            atoms: Configurations of any sizes, or one, which counts as a list of one.

        Raises:
            InputError: If positions or cells are not finite, or the model does not know an element; with the
                number of the configuration.
            MlipRefineError: If memory runs out for a single configuration.
        """
        given = [atoms] if isinstance(atoms, Atoms) else list(atoms)
        structures = []
        for number, one in enumerate(given):
            where = f"configuration {number} ({one.symbols.get_chemical_formula()})"
            if not (np.isfinite(one.positions).all() and np.isfinite(one.cell.array).all()):
                raise InputError("positions or cell are not finite", where=where)
            try:
                structures.append(self.graphs.from_atoms(in_periodic_cell(one, self.graphs.cutoff)))
            except InputError as error:
                error.where = where
                raise

        def evaluated(_: slice, graphs: Graphs) -> list[NDArray[np.float64]]:
            with torch.no_grad():
                found = self.evaluate(graphs, ("energy", "forces", "stress"))
            return [found[name].detach().double().cpu().numpy() for name in ("energy", "forces", "stress")]

        empty = [np.zeros(0), np.zeros((0, 3)), np.zeros((0, 3, 3))]
        chunks = [empty, *self.in_chunks(Work.FORCES, structures, evaluated)]
        energy, forces, stress = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
        stress[[not one.pbc.all() for one in given]] = np.nan
        ends = np.cumsum([len(one) for one in given])[:-1]
        return AtomsResult(energy, tuple(np.split(forces, ends)) if given else (), stress)

    def in_chunks[T](
        self, work: Work, structures: Sequence[Structure], evaluate: Callable[[slice, Graphs], T]
    ) -> Iterator[T]:
        """Evaluate many structures, as many at a time as are fast and fit.

        Args:
            work: Kind of the evaluation.
            structures: Structures.
            evaluate: Evaluation of one chunk, called with the slice of the structures and their batch; it may
                be called again for a part of a chunk for which memory ran out (`Chunker.run`).

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
        """Return slices of the list that are fast, and fit as far as is known, on this device."""
        return self.chunker.plan(work, Systems.of_structures(structures))

    def frozen_copy(self, default_dtype: str | None = None, accelerate: Acceleration = "none") -> "Potential":
        """Return an independent copy without gradients in its parameters: what sampling gets.

        Args:
            default_dtype: `float32` or `float64`; `None` keeps that of the original.
            accelerate: Backend of forces (see `mlip_refine.potential.acceleration.choose`).
        """
        name = default_dtype or str(self.dtype).removeprefix("torch.")
        frozen = Potential.from_module(
            without_kernels(self.module),
            copy=False,
            head=self.head,
            default_dtype=name,
            device=str(self.device),
        )
        frozen.module.requires_grad_(requires_grad=False)
        frozen._experience = self._experience
        number = self.heads.index(self.head)
        frozen._accelerator = accelerator(frozen._eager, frozen.module, number, accelerate, self._experience)
        return frozen

    def save(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write `NAME.model` (plain MACE) and `NAME.safetensors` with `NAME.json`, atomically."""
        module = without_kernels(self.module).to("cpu").requires_grad_(requires_grad=True)
        model_path = folder / f"{name}.model"
        save_model(module, model_path)
        return model_path, save_safetensors(
            module, folder / name, {"head": self.head, "model_hash": self.hash}
        )
