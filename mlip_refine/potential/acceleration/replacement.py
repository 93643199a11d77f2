"""Standing in for a part of a MACE module: what every exact replacement has in common."""

from collections.abc import Iterator

import torch


class Replacement(torch.nn.Module):
    """A module that computes what `original` computes; what is saved and hashed is the original.

    Attributes:
        original: The part of MACE that this stands for, with its tensors.
    """

    def __init__(self, original: torch.nn.Module) -> None:
        """Take over a part."""
        super().__init__()
        self.original = original


def replacements(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, Replacement]]:
    """Yield the parent, the name in it and the replacement itself, of each one in a module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Replacement):
                yield parent, name, child
