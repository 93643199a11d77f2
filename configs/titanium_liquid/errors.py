"""Errors of a potential on labelled frames, by kind of frame.

python errors.py MODEL FRAMES...
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from ase.io import read
from mace.calculators import MACECalculator


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("frames", type=Path, nargs="+")
    given = parser.parse_args()
    calculator = MACECalculator(str(given.model), device="cpu", default_dtype="float64")
    energies, forces, stress = (defaultdict(list) for _ in range(3))
    for path in given.frames:
        for frame in read(path, ":"):
            kind = f"{path.stem}, {frame.info.get('config_type', 'all')}"
            frame.calc = calculator
            energies[kind].append((frame.get_potential_energy() - frame.info["REF_energy"]) / len(frame))
            forces[kind].append((frame.get_forces() - frame.arrays["REF_forces"]).ravel())
            found = frame.get_stress(voigt=False)
            stress[kind].append((found - np.reshape(frame.info["REF_stress"], (3, 3))).ravel())
    print("| frames | number | energy, meV/atom | its mean | forces, meV/Å | stress, GPa |")
    print("|---|---|---|---|---|---|")
    for kind, errors in energies.items():
        mean, spread = 1e3 * np.mean(errors), 1e3 * np.abs(errors).mean()
        of_forces = 1e3 * np.abs(np.concatenate(forces[kind])).mean()
        of_stress = 160.2177 * np.abs(np.concatenate(stress[kind])).mean()
        print(f"| {kind} | {len(errors)} | {spread:.1f} | {mean:+.1f} | {of_forces:.0f} | {of_stress:.2f} |")


if __name__ == "__main__":
    main()
