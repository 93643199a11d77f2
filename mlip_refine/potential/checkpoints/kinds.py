"""Kinds of models that MACE knows and that are not refined here, with the way out of each.

A kind is recognised by the full names of its classes: those that a file asks for, or those of a live module.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mlip_refine.errors import InputError


class UnsupportedModelError(InputError):
    """A model of a kind that is not refined here, whether its file is trusted or not."""


@dataclass(frozen=True)
class Kind:
    """A kind of model that is not refined here.

    Attributes:
        names: Starts of the full names of classes that only models of this kind hold.
        what: What such a model is, and why it is not refined.
        fix: What to do instead.
    """

    names: tuple[str, ...]
    what: str
    fix: str


_ANOTHER = "Start from a MACE without it, such as medium-mpa-0 or mh-1 (see `mlip-refine guide models`)."

KINDS = (
    Kind(
        ("mace.modules.extensions.PolarMACE", "mace.modules.field_blocks.", "graph_longrange."),
        "a Polar MACE, whose long-range electrostatics this package does not evaluate",
        _ANOTHER,
    ),
    Kind(
        ("mace.modules.extensions.MACELES", "les."),
        "a MACE with latent Ewald summation (LES), whose long-range part this package does not evaluate",
        _ANOTHER,
    ),
    Kind(
        ("mace.modules.models.AtomicDipolesMACE", "mace.modules.models.DipoleMACE"),
        "a dipole model, which predicts no energies: there are no forces and no free energy to refine",
        "Start from a model of energies.",
    ),
    Kind(
        ("mace.modules.models.AtomicDielectricMACE",),
        "a model of dipoles and polarisabilities, which predicts no energies: there is nothing to refine",
        "Start from a model of energies.",
    ),
    Kind(
        ("mace.modules.models.EnergyDipolesMACE",),
        "a model of energies and dipoles, of which this package can keep only the energies",
        "Start from a model of energies alone (`mace_run_train --model MACE`).",
    ),
    Kind(
        ("mace.modules.models.Magnetic", "mace.modules.magnetic", "mace.modules.extensions.Magnetic"),
        "a magnetic MACE, which reads a magnetic moment of every atom: phases and frames have none here",
        _ANOTHER,
    ),
    Kind(
        ("mace.modules.models.BOTNet", "mace.modules.models.ScaleShiftBOTNet"),
        "a BOTNet, which MACE itself no longer builds",
        _ANOTHER,
    ),
    Kind(
        ("mace.modules.embeddings.",),
        "a model that reads the charge and the spin of every structure (embedding_specs, as OMOL does): "
        "phases and frames have none here",
        "Start from a model without them: the head omol of mh-1 was trained on the same data.",
    ),
    Kind(
        ("mace.modules.lora.",),
        "a model with LoRA layers that are not merged into its weights yet",
        'Merge them with mace-torch 0.3.16 or later: python -c "import torch; from mace.modules.lora import '
        "merge_lora_weights as merge; torch.save(merge(torch.load('IN.model', weights_only=False)), "
        "'OUT.model')\"",
    ),
    Kind(
        ("cuequivariance", "mace.tools.cg_cueq_tools."),
        "a model converted to cuEquivariance, whose layers are laid out for that library",
        "Convert it back: mace_cueq_to_e3nn IN.model --output_model OUT.model. Speed is chosen with "
        "sampling.accelerate, not in the file.",
    ),
    Kind(
        ("openequivariance",),
        "a model converted to OpenEquivariance, whose layers are laid out for that library",
        "Convert it back: python -m mace.cli.convert_oeq_e3nn IN.model --output_model OUT.model",
    ),
    Kind(
        ("torch._dynamo.", "torch._inductor."),
        "a model that torch.compile has wrapped",
        "Save the module that was compiled (model._orig_mod).",
    ),
)


def unsupported(name: str, where: str | None = None) -> UnsupportedModelError | None:
    """Return the error for a class of a kind that is not refined here; None for any other.

    Args:
        name: Full name of the class.
        where: Name of the model in the message.
    """
    for kind in KINDS:
        if name.startswith(kind.names):
            return UnsupportedModelError(f"this is {kind.what}", where=where, found=name, fix=kind.fix)
    return None


_READ_ELEMENTS_OF_PAIRS = (
    "RealAgnosticAttResidualInteractionBlock",
    "RealAgnosticResidualNonLinearInteractionBlock",
)
"""Interactions whose radial network also reads both atoms: it does not vanish where the radial basis does."""


def require_supported(module: torch.nn.Module, where: str | None = None) -> None:
    """Refuse a live model that cannot be refined; modules that are no MACE pass.

    Args:
        module: The model.
        where: Name of the model in the message.

    Raises:
        UnsupportedModelError: It is of one of `KINDS`, or its energy jumps at the cutoff.
    """
    for part in module.modules():
        refusal = unsupported(f"{type(part).__module__}.{type(part).__qualname__}", where)
        if refusal is not None:
            raise refusal
    radial: Any = getattr(module, "radial_embedding", None)
    for block in getattr(module, "interactions", ()):
        if type(block).__name__ in _READ_ELEMENTS_OF_PAIRS and getattr(radial, "apply_cutoff", True):
            raise UnsupportedModelError(
                "the energy of this model jumps where a neighbour crosses the cutoff, so that its forces are "
                "not the slope of its energy: dynamics and free energies would be wrong",
                where=where,
                found=f"{type(block).__name__} with apply_cutoff: True",
                fix="Train it with `mace_run_train --apply_cutoff False`: its messages then vanish there.",
            )
