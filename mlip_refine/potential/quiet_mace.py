"""MACE, imported before e3nn and without a word to the user.

e3nn 0.4.4 loads its constants in a way that torch >= 2.6 allows only once mace is imported, so whatever needs
either comes here first. What mace prints about accelerators that are not installed does not belong in the
output of a command; of the warnings, those are filtered that no user of this package can act on: they stay
away when a model is loaded, copied or saved, too.
"""

import contextlib
import io
import warnings
from importlib.metadata import version

import torch

for _category, _message in (
    (FutureWarning, r"`torch\.jit\.\w+` is deprecated"),
    (UserWarning, r"The TorchScript type system doesn't support instance-level annotations"),
    (UserWarning, r"Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected"),
):
    warnings.filterwarnings("ignore", _message, _category)

with contextlib.redirect_stdout(io.StringIO()):
    import mace.modules  # noqa: F401
    from mace.modules.symmetric_contraction import EmptyParam


def _stay_empty(parameter: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:  # noqa: ARG001
    return parameter


# In mace 0.3.14 it takes no argument: torch can then neither freeze nor thaw a model with pseudoscalars.
EmptyParam.requires_grad_ = _stay_empty  # type: ignore[method-assign, assignment]

NEWEST_TESTED = (0, 3, 16)
"""Newest version of mace-torch that the tests are run with."""

_INSTALLED = version("mace-torch")

if tuple(int(part) for part in _INSTALLED.split(".")[:3] if part.isdigit()) > NEWEST_TESTED:
    warnings.warn(
        f"mace-torch {_INSTALLED} is newer than {'.'.join(map(str, NEWEST_TESTED))}, the newest tested "
        "with mlip-refine. A model file that would not be read as it was written is refused.",
        stacklevel=2,
    )
