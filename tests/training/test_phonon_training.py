"""Co-training on phonons and labelled frames: turns, batches, and the same bits after a resume."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from ase.build import bulk

from mlip_refine import testing
from mlip_refine.config import Training, config_from_dict
from mlip_refine.data import ReplayBuffer
from mlip_refine.losses import Replay, loss_specs
from mlip_refine.losses.base import Validation
from mlip_refine.quantities import Measured
from mlip_refine.sampling import Length, MDSettings
from mlip_refine.training.replay import LabelledFrame
from mlip_refine.training.tracker import EnsembleSampler, Policy
from mlip_refine.training.trainer import Trainer

LENGTHS = (5.6, 5.64, 5.68)
SHELLS = {2.95: (2.2, 2.82)}
TRUE_STIFFNESS = 2.5
TURNS = {"schedule": "epochs", "epochs": {"replay": 2, "experiment": 1}}


@pytest.fixture
def make(phonons_of, springs, tmp_path) -> Callable[..., Trainer]:
    """Trainers of rock salt of springs; every call is a new process, as it were."""
    salts = [bulk("NaCl", "rocksalt", a=a) for a in LENGTHS]
    stiff = {2.95: TRUE_STIFFNESS}
    references = [phonons_of(s, (2, 2, 2), lambda a: testing.bond_springs(a, stiff)) for s in salts]

    def trainer(
        folder: Path = tmp_path,
        kinds: tuple[str, ...] = ("hvp",),
        size: Mapping[str, int] = MappingProxyType({"batch_size": 2}),
        **settings: Any,
    ) -> Trainer:
        # Springs have no tension at the lattice constant in the middle alone, and little at the others.
        potential, truth = (springs(salts[1], {2.95: (k, 2.82)}) for k in (2.2, TRUE_STIFFNESS))
        frames = []
        for seed in range(4):
            atoms = salts[1] * (2, 1, 1)
            atoms.rattle(0.05, seed=seed)
            structure = potential.graphs.from_atoms(atoms)
            graphs = potential.graphs.collate([structure])
            found = truth.evaluate(graphs, ("energy", "forces"))
            frames.append(
                LabelledFrame(structure, float(found["energy"].detach()), found["forces"].detach(), None)
            )
        common = {"data": "unused", **size}
        nodes = [
            *({"type": f"phonon_{kind}", "weight": 0.5, **common} for kind in kinds),
            {"type": "replay", "stress_weight": 0.0, "forces_weight": 1.0},
        ]
        specs = loss_specs(
            config_from_dict({"name": "x", "potential": {"model": "m"}, "losses": nodes}).losses
        )
        losses = [s.type.loss_class(s.name, s.weight, s.options, references) for s in specs[:-1]]
        losses.append(Replay(specs[-1].name, specs[-1].weight, specs[-1].options))
        sampler = EnsembleSampler(
            points={},
            settings=MDSettings(),
            length=Length(0.0, 1),
            store=SimpleNamespace(folder=folder),
            seed=0,
            sampling_dtype="float64",
            min_effective=1.0,
            policy=Policy(threshold=0.5),
        )
        options = {"steps": 9, "learning_rate": 0.05, "ema_decay": 0.0} | TURNS | settings
        buffer = ReplayBuffer(frames, 2, 5)
        return Trainer.prepare(potential, losses, Training.model_validate(options), sampler, buffer, folder)

    return trainer


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_turns_of_replay_and_phonons_train_the_springs(make, tmp_path):
    trainer = make(steps=54, final_learning_rate=1e-3)
    seen = []
    hvp = trainer.losses[0]
    batch = hvp.batch
    hvp.batch = lambda potential, chosen: seen.append((hvp.step, *chosen)) or batch(potential, chosen)
    trainer.run()
    lines = _log(tmp_path)
    assert ["phonon_hvp" in line["losses"] for line in lines[:6]] == [False, False, True] * 2
    assert all("replay.forces" in line["losses"] for line in lines if "phonon_hvp" not in line["losses"])
    assert [step for step, *_ in seen] == list(range(18))
    for epoch in range(0, 18, 3):
        dealt = [number for _, *numbers in seen[epoch : epoch + 3] for number in numbers]
        assert sorted(dealt) == [0, 0, 1, 1, 2, 2]
    assert float(trainer.potential.module.stiffness.detach()) == pytest.approx(TRUE_STIFFNESS, abs=0.02)
    error = lines[-1]["diagnostics"]["phonon_hvp"]["relative error"]
    assert error["unit"] == "%"
    assert error["value"] < 0.2 * lines[2]["diagnostics"]["phonon_hvp"]["relative error"]["value"]


# Each of the three cells has 96 edges, once for every direction: phonon_hvp gets two cells, then one.
@pytest.mark.parametrize(
    ("schedule", "size"),
    [("joint", {"batch_size": 2}), ("epochs", {"batch_size": 2}), ("joint", {"edge_budget": 400})],
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(make, tmp_path, schedule, size):
    options = {"steps": 4, "kinds": ("hvp", "frequencies"), "size": size}
    if schedule == "joint":
        options |= {"schedule": "joint", "epochs": None}
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()

    def interrupt(report: Any) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    whole = make(tmp_path / "whole", **options)
    whole.run()
    stopped = make(tmp_path / "stopped", **options)
    stopped.report = interrupt
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = make(tmp_path / "stopped", **options)
    assert resumed.resume()
    resumed.run()
    texts = [(tmp_path / word / "log.jsonl").read_text() for word in ("whole", "stopped")]
    assert texts[0] == texts[1]
    assert torch.equal(whole.potential.module.stiffness, resumed.potential.module.stiffness)


def test_validation_is_measured_at_its_updates_and_logged(make, tmp_path):
    trainer = make(steps=5, schedule="joint", epochs=None)
    loss = trainer.losses[0]
    measured = Measured(0.25, 0.0, "")
    loss.validation = Validation(3, lambda _: {"loss": measured})
    trainer.run()
    found = [line["diagnostics"]["phonon_hvp"].get("validation, loss") for line in _log(tmp_path)]
    assert [value is not None for value in found] == [True, False, False, True, False]
    assert found[0] == {"value": 0.25, "se": 0.0, "unit": ""}
    assert loss.validation.measure(trainer.potential) == {"validation, loss": measured}
