"""What losses on phonons share: their materials, the batch of an update, the precision, and the gradient.

A batch depends on nothing but the seed and the number of the update, so a resumed run sees the same ones. Its
gradient is complete before the loss is handed out, chunk by chunk, in the memory of one chunk: at least that
of one direction of the largest cell.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from mlip_refine.crystals.phonons.hessian import require_hessian
from mlip_refine.data.batches import Batch, BudgetedBatches, dealt
from mlip_refine.data.phonons.checks import functional_warnings
from mlip_refine.data.phonons.collections import read_phonon_set
from mlip_refine.data.phonons.force_constants import Fit
from mlip_refine.data.phonons.reader import PhononSettings
from mlip_refine.data.phonons.reference import PhononReference
from mlip_refine.data.phonons.splits import check_parts
from mlip_refine.errors import InputError
from mlip_refine.losses.base import LossResult, PotentialLoss, Setting, Validation
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
    company that it is in (see `BudgetedBatches`).
    """

    def __init__(
        self,
        name: str,
        weight: float,
        options: PhononOptions,
        references: Iterable[PhononReference],
        held_out: Iterable[PhononReference] | None = None,
    ) -> None:
        """Create the loss.

        Args:
            name: Name in results.
            weight: Factor in the total.
            options: Options of the config.
            references: Materials that are trained on.
            held_out: Materials of the validation part, if there is one.

        Raises:
            InputError: There are no materials, or one lacks what the loss needs.
        """
        super().__init__(name, weight)
        self.options, self.step = options, 0
        self._double: Potential | None = None
        self._use(references)
        self._held_out = None
        if held_out is not None:
            self._held_out = type(self)(name, 0.0, options.for_validation(), held_out)
            self.validation = Validation(options.validate_every, self._held_out.measure_all)

    @classmethod
    def bind(cls, name: str, weight: float, options: PhononOptions, setting: Setting) -> Self:
        """Return the loss of a run: read the phonon calculations, and those for validation.

        Raises:
            InputError: A calculation is refused, a material comes twice, or the potential does not know an
                element.
            MlipRefineError: Second derivatives of the potential are wrong.
        """
        paths = [setting.resolve(path) for path in options.data]
        references = cls._read(paths, options, options.split)
        held_out = None
        if options.validation is not None:
            held_out = cls._read(paths, options, options.validation)
        loss = cls(name, weight, options, references, held_out)
        loss.warn_of_functionals(base=options.functional)
        if held_out is not None:
            # The loss goes on: the index says so, or materials are told apart by their names alone.
            try:
                check_parts({"train": references, str(options.validation): held_out})
            except InputError as error:
                console.print(f"loss {name}: {error}", markup=False, soft_wrap=True)
        if setting.replay_functional is not None:
            loss.warn_of_functionals(replay=setting.replay_functional)
        if setting.potential is not None:
            loss.require_potential(setting.potential)
        return loss

    @classmethod
    def _read(cls, paths: Iterable[Path], options: PhononOptions, split: str | None) -> list[PhononReference]:
        """Read the materials of one part of the data."""
        found = dict[str, PhononReference]()
        for path in paths:
            for reference in read_phonon_set(
                path,
                split=split,
                lowest_frequency=options.lowest_frequency,
                settings=PhononSettings(fit=cls.fit_of(options)),
                skip_refused=options.skip_refused,
            ):
                if reference.name in found:
                    raise InputError("a material comes twice", where=str(path), found=reference.name)
                found[reference.name] = reference
        return list(found.values())

    def _use(self, references: Iterable[PhononReference]) -> None:
        """Take these materials, and forget what was known of others."""
        self.references = tuple(references)
        self._structures: dict[int, Structure] = {}
        self._epochs: BudgetedBatches | None = None
        self._checked = False
        if not self.references:
            raise InputError(f"loss {self.name!r} has no materials", expected="phonon calculations")
        for reference in self.references:
            self.require(reference)

    def warn_of_functionals(self, **others: str | None) -> None:
        """Tell which functionals are mixed with those of the materials; see `functional_warnings`."""
        for warning in functional_warnings(self.references, **others):
            console.print(f"loss {self.name}: {warning}", markup=False, soft_wrap=True)

    def require(self, reference: PhononReference) -> None:
        """Refuse a material that lacks what the loss needs.

        Raises:
            InputError: With what it lacks.
        """
        reference.columns(0, 0)

    @property
    def crystals_at_rest(self) -> tuple[Atoms, ...]:
        """Supercells of the materials."""
        return tuple(reference.supercell for reference in self.references)

    def at(self, step: int) -> None:
        """Set the number of the update, which selects the batch."""
        self.step = step

    def evaluate(self, potential: Potential) -> LossResult:
        """The loss of the batch of this update, with its derivatives in the parameters.

        Raises:
            InputError: The model does not know an element.
            MlipRefineError: Second derivatives of the model are wrong, or memory runs out for one system.
        """
        self.require_potential(potential)
        model = self._model(potential)
        chosen = self.chosen(potential)
        result = self.batch(model, chosen.members).times(chosen.weight)
        value = result.value
        if torch.is_grad_enabled():
            parameters = potential.trainable_parameters().values()
            value = with_gradients(value, parameters, result.gradients)
        return LossResult(value, {self.name: float(result.value)}, result.diagnostics)

    def measure_all(self, potential: Potential) -> dict[str, Measured]:
        """The mean over all materials, and what is behind it, without derivatives.

        Raises:
            InputError: The model does not know an element.
            MlipRefineError: Second derivatives of the model are wrong, or memory runs out for one system.
        """
        self.require_potential(potential)
        with torch.no_grad():
            result = self.batch(self._model(potential), range(len(self.references)))
        return {"loss": Measured(float(result.value), result.error, ""), **result.diagnostics}

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

    @staticmethod
    def fit_of(options: Any) -> Fit:  # noqa: ARG004 - others need them
        """Return whether materials need force constants, which are fitted where no file has them."""
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
            self._epochs = BudgetedBatches(costs, options.edge_budget, options.seed)
        return self._epochs.batch(self.step)

    def edges(self, potential: Potential, number: int) -> int:
        """Edges of a material in an update, each as often as there are directions.

        They are rounded up as on the CPU: batches are the same on every device.
        """
        fours = -(-self.structure(potential, number).n_edges // MULTIPLE)
        return MULTIPLE * fours * self.directions(self.references[number])

    def require_potential(self, potential: Potential) -> None:
        """Refuse a potential that the loss cannot train: by its elements, or by its second derivatives.

        Materials with elements that it does not know are left out where the options say so.

        Raises:
            InputError: It does not know an element.
            MlipRefineError: Its second derivatives are wrong.
        """
        if self._checked:
            return
        if self._held_out is not None:
            self._held_out.require_potential(potential)
        known = set(potential.graphs.atomic_numbers)
        strange = [r.name for r in self.references if not known.issuperset(r.supercell.numbers.tolist())]
        if strange and self.options.skip_refused:
            names = ", ".join(strange)
            console.print(f"loss {self.name}: left out {names}, with elements that the model does not know")
            self._use(r for r in self.references if r.name not in strange)
        for reference in self.references:
            potential.graphs.species(reference.supercell.numbers)
        smallest = min(range(len(self.references)), key=lambda i: self.references[i].n_atoms)
        require_hessian(self._model(potential), self.structure(potential, smallest))
        self._checked = True

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
