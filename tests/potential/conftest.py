"""Small MACE models of every kind that foundation models use, and frames to try them on."""

import inspect
from collections.abc import Callable, Iterator

import mace  # noqa: F401 - before e3nn
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from e3nn import o3
from mace import data, modules
from mace.tools import torch_geometric, utils

from mlip_refine.potential.acceleration.kernels import copy_module

INTERACTIONS = modules.interaction_classes

KINDS: dict[str, dict[str, object]] = {
    "residual": {},
    "all-residual": {"first": "RealAgnosticResidualInteractionBlock", "heads": ["default", "other"]},
    "density": {
        "first": "RealAgnosticDensityInteractionBlock",
        "rest": "RealAgnosticDensityResidualInteractionBlock",
        "heads": ["default", "r2scan"],
        "pair_repulsion": True,
        "distance_transform": "Agnesi",
    },
    "nonlinear": {
        "first": "RealAgnosticResidualNonLinearInteractionBlock",
        "rest": "RealAgnosticResidualNonLinearInteractionBlock",
        "heads": ["default", "b", "c"],
        "readout_cls": modules.NonLinearBiasReadoutBlock,
        "edge_irreps": o3.Irreps("2x0e+2x1o"),
        "apply_cutoff": False,
        "use_reduced_cg": True,
        "use_agnostic_product": True,
        "use_last_readout_only": True,
    },
    "three-layers": {"num_interactions": 3, "correlation": [2, 1, 2], "gate": torch.tanh},
    "scalars": {"hidden_irreps": o3.Irreps("16x0e"), "avg_num_neighbors": np.float64(7.3)},
    "soft-even": {"distance_transform": "Soft", "use_so3": True, "hidden_irreps": o3.Irreps("8x0e+8x1e")},
    "gaussian-attention": {
        "rest": "RealAgnosticAttResidualInteractionBlock",
        "radial_type": "gaussian",
        "apply_cutoff": False,
    },
    "one-layer": {"num_interactions": 1, "first": "RealAgnosticResidualInteractionBlock"},
    "no-gate": {"hidden_irreps": o3.Irreps("8x0e"), "gate": None, "radial_MLP": [16]},
    "plain": {"model": modules.MACE},
    "pseudoscalars": {"hidden_irreps": o3.Irreps("4x0e+4x0o+4x1o+4x1e"), "radial_MLP": [8]},
}

if "keep_last_layer_irreps" in inspect.signature(modules.MACE).parameters:  # from mace 0.3.16 on
    KINDS["keep-last"] = KINDS["nonlinear"] | {"keep_last_layer_irreps": True}

if "use_edge_irreps_first" in inspect.signature(modules.MACE).parameters:  # from mace 0.3.15 on
    KINDS["mh-1"] = KINDS["nonlinear"] | {
        "readout_cls": modules.NonLinearReadoutBlock,
        "use_edge_irreps_first": True,
        "use_last_readout_only": False,
        "pair_repulsion": True,
        "distance_transform": "Agnesi",
    }


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """Keep the default dtype of the process, which MACE's calculator changes."""
    default = torch.get_default_dtype()
    yield
    torch.set_default_dtype(default)


def _build(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    options = dict(KINDS[kind])
    model = options.pop("model", modules.ScaleShiftMACE)
    heads = options.get("heads", ["Default"])
    interactions = {
        "interaction_cls_first": INTERACTIONS[options.pop("first", "RealAgnosticInteractionBlock")],
        "interaction_cls": INTERACTIONS[options.pop("rest", "RealAgnosticResidualInteractionBlock")],
    }
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(3)
    try:
        settings = {
            "r_max": 4.0,
            "num_bessel": 4,
            "num_polynomial_cutoff": 5,
            "max_ell": 2,
            "num_interactions": 2,
            "num_elements": 2,
            "atomic_numbers": [14, 22],
            "correlation": 2,
            "radial_MLP": [8, 8],
            "hidden_irreps": o3.Irreps("16x0e+16x1o"),
            "MLP_irreps": o3.Irreps("4x0e"),
            "avg_num_neighbors": 8.0,
            "gate": torch.nn.functional.silu,
            "atomic_energies": np.array([[-1.0, -2.0]] * len(heads)),
            "atomic_inter_scale": [1.5] * len(heads),
            "atomic_inter_shift": [0.1] * len(heads),
        }
        if model is modules.MACE:
            del settings["atomic_inter_scale"], settings["atomic_inter_shift"]
        return model(**settings | interactions | options).eval()
    finally:
        torch.set_default_dtype(default)


def _frames() -> list[Atoms]:
    rng = np.random.default_rng(5)
    frames = []
    for a in (3.9, 4.3):
        atoms = bulk("Ti", "fcc", a=a, cubic=True)
        atoms.numbers = rng.choice([14, 22], len(atoms))
        atoms.positions += rng.normal(size=atoms.positions.shape, scale=0.1)
        frames.append(atoms)
    return frames


def _batch(module: torch.nn.Module, frames: list[Atoms], head: int = 0) -> dict[str, torch.Tensor]:
    table = utils.AtomicNumberTable([int(z) for z in module.atomic_numbers])
    torch.set_default_dtype(next(module.parameters()).dtype)
    graphs = [
        data.AtomicData.from_config(data.config_from_atoms(f), z_table=table, cutoff=float(module.r_max))
        for f in frames
    ]
    batch = next(iter(torch_geometric.dataloader.DataLoader(graphs, batch_size=len(graphs)))).to_dict()
    return batch | {"head": torch.full((len(frames),), head)}


@pytest.fixture(scope="session")
def build() -> Callable[..., torch.nn.Module]:
    """Return the builder: kind (a key of KINDS) and dtype to a fresh copy of a model."""
    made: dict[tuple[str, torch.dtype], torch.nn.Module] = {}

    def built(kind: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        if (kind, dtype) not in made:
            made[kind, dtype] = _build(kind, dtype)
        return copy_module(made[kind, dtype])

    return built


@pytest.fixture(scope="session")
def frames() -> list[Atoms]:
    """Return two small disordered Si-Ti crystals."""
    return _frames()


@pytest.fixture(scope="session")
def batch() -> Callable[..., dict[str, torch.Tensor]]:
    """Return the function from a model and frames to MACE's input."""
    return _batch


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., dict[str, torch.Tensor]]:
    """Return the function from a model and a head to energy, forces and stress of the frames."""

    def evaluated(module: torch.nn.Module, head: int = 0) -> dict[str, torch.Tensor]:
        frames = _frames()
        if 14 not in module.atomic_numbers:
            for atoms in frames:
                atoms.numbers[:] = 22
        output = module(_batch(module, frames, head), compute_stress=True)
        return {key: output[key].detach() for key in ("energy", "forces", "stress")}

    return evaluated
