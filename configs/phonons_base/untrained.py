"""A MACE that knows nothing yet but the energies of atoms.

    python untrained.py FOLDER [--hidden 64x0e] [--correlation 2] [--seed 1]

FOLDER has train.extxyz and elements.json as collect.py writes them, and gets untrained.model.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from ase.io import iread
from mace.modules import ScaleShiftMACE, interaction_classes

# After mace, without which it does not load its constants.
from e3nn import o3  # isort: skip
from matscipy.neighbours import neighbour_list

CUTOFF = 5.0
"""Å."""

FRAMES = 3000
"""From which forces and numbers of neighbours are known."""


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", default="64x0e")
    parser.add_argument("--max-ell", type=int, default=2)
    parser.add_argument("--correlation", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    energies = {int(z): e for z, e in json.loads((given.folder / "elements.json").read_text())["E0s"].items()}
    squares, edges, atoms = 0.0, 0, 0
    for frame in islice(iread(given.folder / "train.extxyz"), FRAMES):
        squares += float((frame.arrays["REF_forces"] ** 2).sum()) / 3
        edges += len(neighbour_list("i", frame, CUTOFF))
        atoms += len(frame)
    torch.manual_seed(given.seed)
    block = interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=given.max_ell,
        interaction_cls_first=block,
        interaction_cls=block,
        num_interactions=2,
        num_elements=len(energies),
        hidden_irreps=o3.Irreps(given.hidden),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.array([energies[z] for z in sorted(energies)]),
        avg_num_neighbors=edges / atoms,
        atomic_numbers=sorted(energies),
        correlation=given.correlation,
        radial_type="bessel",
        radial_MLP=[64, 64, 64],
        atomic_inter_scale=float(np.sqrt(squares / atoms)),
        atomic_inter_shift=0.0,
    ).float()
    torch.save(model, given.folder / "untrained.model")
    n = sum(p.numel() for p in model.parameters())
    print(f"{n} parameters, {edges / atoms:.1f} neighbours, forces of {np.sqrt(squares / atoms):.3f} eV/Å")


if __name__ == "__main__":
    main()
