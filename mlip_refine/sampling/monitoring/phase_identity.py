"""Phase of a running system, from the local structure of its atoms and not from their places.

A crystal that slips to equivalent lattice sites has moved and is the same phase still; a martensitic
transformation moves atoms by less and makes another one. Polyhedral template matching (Larsen 2016) labels
every atom by the shape of its neighbourhood, whatever the orientation and the strain. It bears heat better
than common neighbour analysis: averaged over 0.2 ps, 90 % of the atoms of bcc titanium at 1155 K are bcc, and
not 70 %. It is OVITO's, an optional dependency; without it displacements from the sites have to do.
"""

from collections import Counter
from importlib import import_module
from typing import Literal

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from mlip_refine.errors import InputError
from mlip_refine.sampling.monitoring.guards import GuardSettings, nearest_neighbour_distance

# Largest deviation of a neighbourhood from its template: RMSD over neighbour distance. That of titanium,
# averaged over 0.2 ps at 1005 to 1600 K, is 0.06 to 0.1, and 0.12 for one atom of twenty. With 0.15 four
# atoms of ten in ω-Ti pass for bcc, with 0.20 up to a quarter of those in a liquid for hcp.
MAX_RMSD = 0.13

# Smallest share of atoms that keep their label. Of titanium in averages over 0.2 ps:
#   bcc at 1005 to 1600 K: mean 0.94 (54 and 128 atoms), the same after slips; hcp: 1.00, never below 0.96
#   bcc transformed at 300 K: 0.00 in a free cell, up to 0.26 in a cubic one; bcc turned ω: up to 0.3
#   liquid at 2500 and 4000 K: up to 0.04
# The least of bcc was 0.57 with 128 atoms, and 0.54 with 54 but for three walks towards hcp, down to 0.1,
# which came back within 0.3 to 0.7 ps: only what lasts is a transformation.
MIN_SHARE = 0.4

# Templates of OVITO by the field's names. Graphene is left out: planes of ω would pass for it.
_TEMPLATES = {
    "FCC": "fcc",
    "HCP": "hcp",
    "BCC": "bcc",
    "ICO": "icosahedral",
    "SC": "simple cubic",
    "CUBIC_DIAMOND": "diamond",
    "HEX_DIAMOND": "hexagonal diamond",
}
_ORDERS = {
    "L10": "L1₀",
    "L12_A": "L1₂ (A)",
    "L12_B": "L1₂ (B)",
    "B2": "B2",
    "ZINCBLENDE_WURTZITE": "AB",
}
_OTHER = "other"

Labels = NDArray[np.str_]
Reals = NDArray[np.float64]


class PhaseIdentity:
    """Judges positions averaged over thermal noise by the structure of an ideal crystal.

    An alloy with a chemical order that template matching knows has to keep the order too. If OVITO is
    missing, or most atoms of the ideal crystal match no template, displacements from its sites are judged
    instead, and a slip counts as a departure.
    """

    def __init__(
        self,
        sites: Atoms,
        *,
        liquid: bool = False,
        min_share: float = MIN_SHARE,
        max_displacement: float = GuardSettings.max_displacement,
    ) -> None:
        """Label the ideal crystal.

        Args:
            sites: The ideal crystal, periodic.
            liquid: The phase has no structure, and is left when most atoms have one; `sites` need not be
                a crystal then.
            min_share: Smallest share of atoms that keep their label.
            max_displacement: Without labels, the largest root-mean-square displacement from the sites, as a
                fraction of the nearest-neighbour distance.

        Raises:
            InputError: If a liquid is to be judged without OVITO.
        """
        self._numbers, self._masses = sites.numbers.copy(), sites.get_masses()
        self._scaled_sites = sites.get_scaled_positions(wrap=False)
        self._liquid, self._min_share, self._max_displacement = liquid, min_share, max_displacement
        self._labels: Labels = np.full(len(sites), _OTHER)
        if liquid:
            require_ovito()
        if not liquid and has_ovito():
            self._labels = _labels(sites.positions, sites.cell.array, self._numbers)
        self._labelled = (self._labels != _OTHER) | liquid
        self._bond = 0.0 if self.method == "structure" else nearest_neighbour_distance(sites)

    @property
    def method(self) -> Literal["structure", "sites"]:
        """What is judged: labels of the atoms, or displacements from their sites."""
        return "structure" if np.mean(self._labelled) > 0.5 else "sites"

    def departed(self, positions: Reals, cell: Reals) -> str | None:
        """Return why averaged positions are no longer the phase.

        Args:
            positions: Positions averaged over thermal noise `[n_atoms, 3]`, Å, wrapped or not.
            cell: Cell (rows) `[3, 3]`, Å.

        Returns:
            `None` while it is the phase; else the reason, one line.
        """
        if not (np.isfinite(positions).all() and np.isfinite(cell).all()):
            return "its positions or cell are not finite"
        if self.method == "structure":
            # Atoms that match no template in the ideal crystal (beside a vacancy, say) do not count.
            ideal = self._labels[self._labelled]
            found = _labels(positions, cell, self._numbers)[self._labelled]
            changed = found != ideal
            if 1.0 - changed.mean() >= self._min_share:
                return None
            lost = "have crystallised" if self._liquid else f"are no longer {' or '.join(sorted(set(ideal)))}"
            counts = ", ".join(f"{name} {n}" for name, n in Counter(found[changed].tolist()).most_common())
            return f"{changed.sum()} of {len(ideal)} atoms {lost} ({counts})"
        # The sites follow the cell; the mass-weighted drift of the whole crystal does not count.
        delta = positions - self._scaled_sites @ cell
        delta -= np.average(delta, axis=0, weights=self._masses)
        displacement = float(np.sqrt((delta**2).sum(axis=1).mean())) / self._bond
        if displacement <= self._max_displacement:
            return None
        return f"its atoms are {displacement:.2f} nearest-neighbour distances away from their lattice sites"


def require_ovito() -> None:
    """Refuse to judge liquids where that is not possible.

    Raises:
        InputError: If OVITO is missing.
    """
    if not has_ovito():
        raise InputError(
            "a liquid cannot be told from a crystal without OVITO",
            fix="Install it: pip install 'mlip-refine[structure]'.",
        )


def has_ovito() -> bool:
    """Return whether OVITO can be imported; it is large, so it is imported only when it is needed."""
    try:
        import_module("ovito.modifiers")
    except ImportError:
        return False
    return True


def crystalline_share(positions: Reals, cell: Reals, numbers: NDArray[np.int_]) -> float:
    """Return the share of atoms whose neighbourhood is that of a crystal; this needs OVITO.

    Args:
        positions: Positions averaged over thermal noise `[n_atoms, 3]`, Å, wrapped or not.
        cell: Cell (rows) `[3, 3]`, Å.
        numbers: Atomic numbers `[n_atoms]`.
    """
    return float(np.mean(_labels(positions, cell, numbers) != _OTHER))


def share_like(crystal: Atoms, positions: Reals, cell: Reals, numbers: NDArray[np.int_]) -> float:
    """Return the share of atoms whose neighbourhood is one that an ideal crystal has; this needs OVITO.

    Args:
        crystal: The ideal crystal, periodic.
        positions: Positions averaged over thermal noise `[n_atoms, 3]`, Å, wrapped or not.
        cell: Cell (rows) `[3, 3]`, Å.
        numbers: Atomic numbers `[n_atoms]`.

    Raises:
        InputError: If no template matches the crystal.
    """
    ideal = set(_labels(crystal.positions, crystal.cell.array, crystal.numbers)) - {_OTHER}
    if not ideal:
        raise InputError(
            "the structure of the crystal is not recognised, so it cannot be told from a liquid",
            found=crystal.get_chemical_formula(),
            expected=f"one of {', '.join(_TEMPLATES.values())}",
        )
    return float(np.isin(_labels(positions, cell, numbers), list(ideal)).mean())


def _labels(positions: Reals, cell: Reals, numbers: NDArray[np.int_]) -> Labels:
    """Return the structure of every atom, with its chemical order if it has one `[n_atoms]`.

    Periodic images are neighbours too, so that cells of a single atom are labelled as large ones are.
    """
    matching = import_module("ovito.modifiers").PolyhedralTemplateMatchingModifier
    modifier = matching(rmsd_cutoff=MAX_RMSD, output_ordering=True)
    structures = {int(getattr(matching.Type, key)): name for key, name in _TEMPLATES.items()}
    orders = {int(getattr(matching.OrderingType, key)): name + " " for key, name in _ORDERS.items()}
    for structure in structures:
        modifier.structures[structure].enabled = True
    data = import_module("ovito.data").DataCollection()
    # OVITO's cells have their vectors as columns, and an origin.
    data.create_cell(np.column_stack([np.transpose(cell), np.zeros(3)]), pbc=(True, True, True))
    particles = data.create_particles(count=len(positions))
    particles.create_property("Position", data=positions)
    particles.create_property("Particle Type", data=numbers)
    data.apply(modifier)
    pairs = zip(data.particles["Structure Type"], data.particles["Ordering Type"], strict=True)
    return np.array([orders.get(int(o), "") + structures.get(int(s), _OTHER) for s, o in pairs])
