"""A MACE of the size of foundation models with random weights: for timing, where only the size counts."""

from collections.abc import Sequence

import torch

from mlip_refine.potential.checkpoints.architecture import Architecture, build_module

# Random forces stay far below those of a real crystal, so that dynamics do not blow up.
_SCALE = 0.01


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
    torch.nn.init.constant_(module.scale_shift.scale, _SCALE)  # type: ignore[union-attr, arg-type]
    return module
