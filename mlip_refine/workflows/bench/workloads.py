"""What a bench runs, and for how long: a potential with titanium crystals, or with the phases of a config.

Where only the size of a model counts, the potential may be a large MACE with random weights.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from ase import Atoms

from mlip_refine.config import Config
from mlip_refine.data import build_phase
from mlip_refine.errors import InputError
from mlip_refine.losses import EnsembleLoss, loss_specs
from mlip_refine.potential import Acceleration, Potential
from mlip_refine.potential.checkpoints.architecture import Architecture, build_module
from mlip_refine.sampling import MDSettings, StatePoint
from mlip_refine.sampling.state_points import Ensemble
from mlip_refine.workflows.from_config import bind_losses, md_settings

TEMPERATURE = 1155.0
"""Temperature of titanium crystals, K: that of the hcp-bcc transition."""

# The same work in every block: no system is stopped, whatever it does. The guards still look.
_NEVER = 1e6

# Random forces stay far below those of a real crystal, so that dynamics do not blow up.
_RANDOM_SCALE = 0.01


@dataclass(frozen=True)
class Subject:
    """A potential in all the forms that a bench needs.

    Attributes:
        name: Name in tables.
        potential: The potential as training has it.
        file: File of the potential for ASE: a plain MACE.
    """

    name: str
    potential: Potential
    file: Path

    @property
    def dtype(self) -> str:
        """Name of the floating type."""
        return dtype_name(self.potential)

    def frozen(self, accelerate: Acceleration = "none") -> Potential:
        """Return the copy of the potential that sampling gets."""
        return self.potential.frozen_copy(accelerate=accelerate)


def dtype_name(potential: Potential) -> str:
    """Return the precision of a potential, `float32` or `float64`."""
    return str(potential.dtype).removeprefix("torch.")


def medium_mace(
    atomic_numbers: Sequence[int],
    *,
    hidden_irreps: str = "128x0e+128x1o",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> torch.nn.Module:
    """Build a MACE with random weights, by default of the size of the foundation model `medium` of MACE-MP.

    Two layers, l_max 3, correlation 3, cutoff 6 Å, radial MLP 64-64-64 (Batatia et al. 2024, MACE-MP-0). It
    predicts nothing.

    Args:
        atomic_numbers: Elements; the foundation models have 89, which costs memory but hardly time.
        hidden_irreps: Features of every atom.
        dtype: Floating type of the weights.
        seed: Seed of the weights; the random state of the process is left as it was.
    """
    architecture = Architecture(
        model="ScaleShiftMACE",
        r_max=6.0,
        num_bessel=10,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_first="RealAgnosticResidualInteractionBlock",
        interaction="RealAgnosticResidualInteractionBlock",
        num_interactions=2,
        hidden_irreps=hidden_irreps,
        edge_irreps=None,
        mlp_irreps="16x0e",
        gate="silu",
        readout="NonLinearReadoutBlock",
        correlation=[3, 3],
        avg_num_neighbors=50.0,
        atomic_numbers=sorted(atomic_numbers),
        heads=["Default"],
        radial_type="bessel",
        radial_mlp=[64, 64, 64],
        distance_transform="None",
        pair_repulsion=False,
        apply_cutoff=True,
        use_reduced_cg=False,
        use_so3=False,
        use_edge_irreps_first=False,
        use_agnostic_product=False,
        use_last_readout_only=False,
        keep_last_layer_irreps=False,
        energies_shape=[1, len(atomic_numbers)],
        scale_shape=[],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_module(architecture, dtype)
    torch.nn.init.constant_(module.scale_shift.scale, _RANDOM_SCALE)  # type: ignore[union-attr, arg-type]
    return module


@dataclass(frozen=True)
class Effort:
    """How much is timed.

    Attributes:
        sizes: Systems and atoms per system of the engine's workloads.
        rounds: Least number of pairs of blocks.
        most_rounds: Largest number of pairs of blocks.
        duration: Time after which a row ends once it has `rounds` pairs, s.
        block: Least duration of a block, s.
        steps: Least steps of the engine in a block: several neighbour lists must fall into it.
        equilibration: Steps before anything is timed.
        cells: Systems of the comparison with ASE, and atoms of each.
        frames: Number of frames of the gradient.
        memory_frames: Numbers of frames of the two processes whose memory is compared.
    """

    sizes: tuple[tuple[int, int], ...]
    rounds: int
    most_rounds: int
    duration: float
    block: float
    steps: int
    equilibration: int
    cells: tuple[int, int]
    frames: int
    memory_frames: tuple[int, int]


FULL = Effort(
    sizes=((4, 54), (8, 128)),
    rounds=6,
    most_rounds=24,
    duration=12.0,
    block=0.3,
    steps=16,
    equilibration=40,
    cells=(16, 54),
    frames=100,
    memory_frames=(200, 2000),
)
QUICK = Effort(
    sizes=((4, 54),),
    rounds=3,
    most_rounds=12,
    duration=1.5,
    block=0.1,
    steps=6,
    equilibration=10,
    cells=(4, 54),
    frames=30,
    memory_frames=(50, 200),
)


@dataclass(frozen=True)
class Workload:
    """Systems that step together.

    Attributes:
        label: Name in tables, such as `4 x 54`.
        points: State points of the systems.
        settings: Settings of the integrator.
    """

    label: str
    points: tuple[StatePoint, ...]
    settings: MDSettings

    @property
    def n_atoms(self) -> int:
        """Atoms of all systems."""
        return sum(p.replicas * len(p.atoms) for p in self.points)

    @property
    def crystals(self) -> list[Atoms]:
        """The crystal of every system, in the engine's order."""
        return [p.atoms for p in self.points for _ in range(p.replicas)]

    def under(self, ensemble: Ensemble) -> "Workload":
        """The same systems in NVT or isotropic NPT."""
        points = tuple(replace(p, ensemble=ensemble, cell_freedom="isotropic") for p in self.points)
        return replace(self, label=f"{self.label}, {ensemble.upper()}", points=points)


def parse_size(size: str) -> tuple[int, int]:
    """Read systems and atoms per system from `4x54`.

    Raises:
        InputError: If it is something else.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", size)
    if match is None or "0" in match.groups():
        raise InputError("not a size", found=repr(size), expected="systems x atoms per system, such as 4x54")
    return int(match[1]), int(match[2])


def titanium(n_systems: int, n_atoms: int, temperature: float = TEMPERATURE) -> Workload:
    """Crystals of hot titanium: half of the systems hcp, half bcc.

    Raises:
        InputError: For a number of atoms that the crystals cannot have.
    """
    crystals = {
        "hcp": build_phase("hcp", "Ti", n_atoms, 2.93, 4.65),
        "bcc": build_phase("bcc", "Ti", n_atoms, 3.25),
    }
    replicas = {"hcp": n_systems - n_systems // 2, "bcc": n_systems // 2}
    points = [StatePoint(n, crystals[n], temperature, replicas=r) for n, r in replicas.items() if r]
    return Workload(f"{n_systems} x {n_atoms}", tuple(points), _unguarded(MDSettings()))


def configured(config: Config, potential: Potential) -> Workload:
    """The state points that the losses of a config sample, with its replicas and its integrator.

    Raises:
        InputError: If the losses sample nothing, or for a phase or element that is not there.
    """
    losses, known = bind_losses(config, loss_specs(config.losses), potential, trained=False)
    sources = sorted({s for loss in losses if isinstance(loss, EnsembleLoss) for s in loss.sources})
    if not sources:
        raise InputError(
            "no loss of the config samples an ensemble, so there is nothing to time",
            where=config.where("losses"),
            fix="Leave the config out to time titanium crystals.",
        )
    points = tuple(known[source] for source in sources)
    n_atoms = sum(p.replicas * len(p.atoms) for p in points)
    label = f"{sum(p.replicas for p in points)} systems, {n_atoms} atoms"
    return Workload(label, points, _unguarded(md_settings(config)))


def repeated(workload: Workload, n_systems: int) -> Workload:
    """As many systems of a workload's points as wanted, one point after the other."""
    points, n_points = workload.points, len(workload.points)
    counts = [len(range(i, n_systems, n_points)) for i in range(n_points)]
    chosen = [replace(p, replicas=n) for p, n in zip(points, counts, strict=True) if n]
    sizes = sorted({len(p.atoms) for p in chosen})
    label = f"{n_systems} x {' and '.join(map(str, sizes))}"
    return replace(workload, label=label, points=tuple(chosen))


def _unguarded(settings: MDSettings) -> MDSettings:
    guards = replace(settings.guards, max_temperature_ratio=_NEVER, max_displacement=_NEVER)
    return replace(settings, guards=guards)
