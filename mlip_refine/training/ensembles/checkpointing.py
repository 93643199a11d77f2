"""Ensembles in a checkpoint: where their frames lie, and the numbers that the frames alone do not tell."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from mlip_refine.errors import InputError
from mlip_refine.losses import EnsembleSource
from mlip_refine.potential import Potential
from mlip_refine.quantities import Measured
from mlip_refine.training.ensembles.ensemble import Draw, Ensemble
from mlip_refine.training.ensembles.sampler import EnsembleSampler

type Stage = tuple[str, EnsembleSource]


def saved_ensembles(ensembles: Mapping[EnsembleSource, Ensemble]) -> dict[str, Any]:
    """What a checkpoint keeps of ensembles; the frames stay in the store."""
    by_name = {s.name: s for s in ensembles}
    return {
        "references": {d.stage: dict(d.reference) for e in ensembles.values() for d in e.draws},
        "ensembles": [
            {
                "source": _as_dict(source),
                "draws": [{"stage": d.stage, "source": _as_dict(by_name[d.point.name])} for d in e.draws],
                "energies": e.energies,
                "shift": [e.shift.value, e.shift.se],
                "pull": e.shift_influence,
                "whole": e.frames_per_draw,
            }
            for source, e in ensembles.items()
        ],
    }


def restored_ensembles(
    sampler: EnsembleSampler, potential: Potential, saved: Mapping[str, Any]
) -> dict[EnsembleSource, Ensemble]:
    """Ensembles of a checkpoint, with the frames from the store, bit for bit as they were.

    Raises:
        InputError: If frames are gone.
    """
    wanted: dict[str, set[EnsembleSource]] = {}
    for entry in saved["ensembles"]:
        for draw in entry["draws"]:
            wanted.setdefault(draw["stage"], set()).add(EnsembleSource(**draw["source"]))
    found: dict[Stage, Draw] = {}
    for stage, sources in wanted.items():
        drawn = sampler.stored(potential, sorted(sources), stage, saved["references"][stage])
        if drawn is None:
            raise InputError(
                f"the frames of the stage {stage!r} are gone",
                where=str(sampler.store.folder),
                fix="bring the folder back, or start again under another name",
            )
        found |= {(stage, s): d for s, d in drawn.items()}
    return {EnsembleSource(**e["source"]): _ensemble(sampler, e, found) for e in saved["ensembles"]}


def _ensemble(sampler: EnsembleSampler, entry: Mapping[str, Any], found: Mapping[Stage, Draw]) -> Ensemble:
    energies: Tensor = entry["energies"]
    draws = tuple(found[d["stage"], EnsembleSource(**d["source"])] for d in entry["draws"])
    own = torch.split(energies, [len(d) for d in draws], dim=1)
    value, se = entry["shift"]
    return Ensemble(
        point=sampler.points[EnsembleSource(**entry["source"])],
        draws=tuple(replace(d, energy=own[k][k]) for k, d in enumerate(draws)),
        energies=energies,
        shift=Measured(value, se, "eV"),
        shift_influence=entry["pull"],
        frames_per_draw=entry["whole"],
    )


def _as_dict(source: EnsembleSource) -> dict[str, Any]:
    return asdict(source)
