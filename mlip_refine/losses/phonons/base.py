"""What losses on phonons share: their materials, the batch of an update, the precision, and the gradient.

A batch depends on nothing but the seed and the number of the update, so a resumed run sees the same ones. Its
gradient is complete before the loss is handed out, chunk by chunk, in the memory of one chunk: at least that
of one direction of the largest cell.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlip_refine.crystals.phonons.hessian import require_hessian
from mlip_refine.data.phonons.budget import Batch, Epochs, dealt
from mlip_refine.data.phonons.checks import functional_warnings
from mlip_refine.data.phonons.collections import read_phonon_set
from mlip_refine.data.phonons.force_constants import Fit
from mlip_refine.data.phonons.reader import PhononSettings
from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.data.phonons.splits import check_parts
from mlip_refine.errors import InputError
from mlip_refine.losses.base import LossResult, PotentialLoss
from mlip_refine.losses.options import PhononOptions
from mlip_refine.potential import Potential, Structure
from mlip_refine.potential.neighbours import MULTIPLE
from mlip_refine.progress import console
from mlip_refine.quantities import Measured

type Gradients = Sequence[Tensor | None]

type Deviation = Callable[[Tensor], Tensor]
"""What a difference costs, component by component."""


@dataclass(frozen=True)
class BatchResult:
    """The loss of a batch, without a graph.

    Attributes:
        value: `[]`.
        error: Standard error of the value from the spread over the materials, not a number for one.
        gradients: In the trainable parameters, in their order; empty where gradients are off.
        diagnostics: Measured quantities behind it.
    """

    value: Tensor
    error: float
    gradients: Gradients
    diagnostics: Mapping[str, Measured]

    def times(self, weight: float) -> "BatchResult":
        """The loss and its gradients scaled; what was measured stays."""
        scaled = [None if gradient is None else weight * gradient for gradient in self.gradients]
        return BatchResult(weight * self.value, weight * self.error, scaled, self.diagnostics)


class PhononLoss(PotentialLoss):
    """Base of losses on phonons of a set of materials, some of them at every update.

    The loss is the mean over the materials of an update. With an `edge_budget` updates have different numbers
    of them: the mean is weighted by their number over its mean in the epoch, so that values and gradients,
    averaged over the updates of an epoch, are the mean over all materials, and none counts more for the
    company that it is in (see `Epochs`).
    """

    def __init__(self, name: str, weight: float, options: PhononOptions) -> None:
        """Keep the options; `prepare_files` or `use` give the materials."""
        super().__init__(name, weight)
        self.options = options
        self.references: tuple[PhononReference, ...] = ()
        self.step = 0
        self._structures: dict[int, Structure] = {}
        self._epochs: Epochs | None = None
        self._double: Potential | None = None
        self._checked = False
        self._validation: PhononLoss | None = None

    def prepare_files(self, resolve: Callable[[str], Path]) -> None:
        """Read the phonon calculations, and those for validation.

        Raises:
            InputError: One is refused, or a material comes twice.
        """
        paths = [resolve(path) for path in self.options.data]
        found = self._read(paths, self.options.split)
        self.use(found)
        self.warn_of_functionals(base=self.options.functional)
        if self.options.validation is not None:
            kept = self._read(paths, self.options.validation)
            self._warn_of_leaks(found, kept)
            self.validate_on(kept)

    def warn_of_functionals(self, **others: str | None) -> None:
        """Tell which functionals are mixed with those of the materials; see `functional_warnings`."""
        for warning in functional_warnings(self.references, **others):
            console.print(f"loss {self.name}: {warning}", markup=False, soft_wrap=True)

    def _warn_of_leaks(self, trained: Sequence[PhononReference], kept: Sequence[PhononReference]) -> None:
        """Tell what the validation part shares with what is trained on, and the 103 compounds in it."""
        try:
            check_parts({"train": trained, str(self.options.validation): kept})
        except InputError as error:
            console.print(f"loss {self.name}: {error}", markup=False, soft_wrap=True)

    def _read(self, paths: Iterable[Path], split: str | None) -> list[PhononReference]:
        options, found = self.options, dict[str, PhononReference]()
        for path in paths:
            for reference in read_phonon_set(
                path,
                split=split,
                lowest_frequency=options.lowest_frequency,
                settings=PhononSettings(fit=self.fit),
                skip_refused=options.skip_refused,
            ):
                if reference.name in found:
                    raise InputError("a material comes twice", where=str(path), found=reference.name)
                found[reference.name] = reference
        return list(found.values())

    def use(self, references: Iterable[PhononReference]) -> None:
        """Train on these materials.

        Raises:
            InputError: There are none, or one lacks what the loss needs.
        """
        self.references = tuple(references)
        self._structures, self._epochs, self._checked = {}, None, False
        if not self.references:
            raise InputError(f"loss {self.name!r} has no materials", expected="phonon calculations")
        for reference in self.references:
            self.require(reference)

    def validate_on(self, references: Iterable[PhononReference]) -> None:
        """Measure the loss of these materials as `validate_every` says.

        Raises:
            InputError: As of `use`.
        """
        self._validation = type(self)(self.name, 0.0, self.options.for_validation())
        self._validation.use(references)
        self._checked = False

    def require(self, reference: PhononReference) -> None:
        """Refuse a material that lacks what the loss needs.

        Raises:
            InputError: With what it lacks.
        """
        reference.columns(0, 0)

    def at(self, step: int) -> None:
        """Know the number of the update, which tells the batch."""
        self.step = step

    def evaluate(self, potential: Potential) -> LossResult:
        """The loss of the batch of this update, with its derivatives in the parameters.

        Raises:
            InputError: The model does not know an element.
            MlipRefineError: Second derivatives of the model are wrong, or memory runs out for one system.
        """
        self.prepare_potential(potential)
        model = self._model(potential)
        chosen = self.chosen(potential)
        result = self.batch(model, chosen.members).times(chosen.weight)
        value = result.value
        if torch.is_grad_enabled():
            parameters = potential.trainable_parameters().values()
            value = with_gradients(value, parameters, result.gradients)
        measured = {**result.diagnostics, **self._validated(potential)}
        return LossResult(value, {self.name: float(result.value)}, measured)

    def _validated(self, potential: Potential) -> dict[str, Measured]:
        """What the loss is on the validation part, at the updates that are for it."""
        if self._validation is None or self.step % self.options.validate_every:
            return {}
        return _of_validation(self._validation.measure_all(potential))

    def measure_all(self, potential: Potential) -> dict[str, Measured]:
        """The mean over all materials, and what is behind it, without derivatives.

        Raises:
            InputError: The model does not know an element.
            MlipRefineError: Second derivatives of the model are wrong, or memory runs out for one system.
        """
        self.prepare_potential(potential)
        with torch.no_grad():
            result = self.batch(self._model(potential), range(len(self.references)))
        return {"loss": Measured(float(result.value), result.error, ""), **result.diagnostics}

    def delivered(self, potential: Potential) -> dict[str, Measured]:
        """The validation part with the potential that the run ends with."""
        return {} if self._validation is None else _of_validation(self._validation.measure_all(potential))

    def measure(self, potential: Potential) -> LossResult:
        """The loss of the batch of this update, without derivatives."""
        with torch.no_grad():
            return self.evaluate(potential)

    @property
    def deviation(self) -> Deviation:
        """The error of single components that the options choose."""
        if self.options.error == "huber":
            return lambda r: torch.nn.functional.huber_loss(
                r, torch.zeros_like(r), reduction="none", delta=self.options.huber_delta
            )
        return torch.abs if self.options.error == "l1" else torch.square

    @property
    def fit(self) -> Fit:
        """Whether materials need force constants: fitted where no file has them."""
        return True

    @abstractmethod
    def batch(self, potential: Potential, materials: Sequence[int]) -> BatchResult:
        """The mean loss of some of the materials, by their numbers."""

    @abstractmethod
    def directions(self, reference: PhononReference) -> int:
        """How many directions of a material are evaluated in an update, at most."""

    def chosen(self, potential: Potential) -> Batch:
        """The materials of this update, and what their mean counts."""
        options, n = self.options, len(self.references)
        if options.edge_budget is None:
            return dealt(n, options.batch_size, options.seed, self.step)
        if self._epochs is None:
            costs = [self.edges(potential, number) for number in range(n)]
            self._epochs = Epochs(costs, options.edge_budget, options.seed)
        return self._epochs.batch(self.step)

    def edges(self, potential: Potential, number: int) -> int:
        """Edges of a material in an update, each as often as there are directions.

        They are rounded up as on the CPU: batches are the same on every device.
        """
        fours = -(-self.structure(potential, number).n_edges // MULTIPLE)
        return MULTIPLE * fours * self.directions(self.references[number])

    def prepare_potential(self, potential: Potential) -> None:
        """Refuse a potential that the loss cannot train: by its elements, or by its second derivatives.

        Raises:
            InputError: It does not know an element.
            MlipRefineError: Its second derivatives are wrong.
        """
        if self._checked:
            return
        if self._validation is not None:
            self._validation.prepare_potential(potential)
        self._require_elements(potential)
        smallest = min(range(len(self.references)), key=lambda i: self.references[i].n_atoms)
        require_hessian(self._model(potential), self.structure(potential, smallest))
        self._checked = True

    def _require_elements(self, potential: Potential) -> None:
        """Refuse materials with elements that the model does not know, or leave them out as asked."""
        known = set(potential.graphs.atomic_numbers)
        strange = [r.name for r in self.references if not known.issuperset(r.supercell.numbers.tolist())]
        if strange and self.options.skip_refused:
            names = ", ".join(strange)
            console.print(f"loss {self.name}: left out {names}, with elements that the model does not know")
            self.use(r for r in self.references if r.name not in strange)
        for reference in self.references:
            potential.graphs.species(reference.supercell.numbers)

    def structure(self, potential: Potential, number: int) -> Structure:
        """The supercell of a material with its neighbours, which are found once."""
        if number not in self._structures:
            reference = self.references[number]
            reach = potential.graphs.cutoff + self.skin(reference)
            builder = replace(potential.graphs, cutoff=reach)
            self._structures[number] = builder.from_atoms(reference.supercell)
        return self._structures[number]

    def skin(self, reference: PhononReference) -> float:  # noqa: ARG002
        """How much nearer two atoms of a material may come when they are displaced, Å."""
        return 0.0

    def _model(self, potential: Potential) -> Potential:
        """The potential in the precision of the loss: itself, or a copy that follows it."""
        if self.options.precision == "model" or potential.dtype == torch.float64:
            return potential
        if self._double is None:
            self._double = potential.frozen_copy("float64")
        self._double.set_parameters(potential.parameters())
        trained = potential.trainable_parameters()
        for name, parameter in self._double.module.named_parameters():
            parameter.requires_grad_(name in trained)
        return self._double


def _of_validation(measured: Mapping[str, Measured]) -> dict[str, Measured]:
    return {f"validation, {name}": value for name, value in measured.items()}


def with_gradients(value: Tensor, parameters: Iterable[Tensor], gradients: Gradients) -> Tensor:
    """A scalar whose derivatives in the parameters are known already.

    Args:
        value: `[]`.
        parameters: What it is differentiable in.
        gradients: `None` where it does not depend on one.
    """
    changes = [
        (g.to(p) * (p - p.detach())).sum()
        for p, g in zip(parameters, gradients, strict=True)
        if g is not None
    ]
    return torch.stack([value, *(change.to(value) for change in changes)]).sum()


def mean_over(values: Sequence[float], unit: str) -> Measured:
    """Mean over the materials of a batch, its standard error from their spread: unknown of one."""
    spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return Measured(float(np.mean(values)), float(spread), unit)
