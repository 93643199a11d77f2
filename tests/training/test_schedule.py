"""Schedules: who acts when, what is evaluated, and that a resumed run ends with the same bits.

The potential is a spring at every site, whose ensembles are drawn exactly: the loop, the losses' gradients,
reweighting and checkpoints are the real ones.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mlip_refine.config import Training
from mlip_refine.data import ReplayBuffer
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.losses import EnsembleLoss, EnsembleSource, FreeEnergyDifference, PotentialLoss
from mlip_refine.losses.base import Frames, LossResult
from mlip_refine.losses.options import FreeEnergyDifferenceOptions, ReplayOptions
from mlip_refine.losses.replay import Replay
from mlip_refine.potential import GraphBuilder, Potential
from mlip_refine.potential.batching import Chunker
from mlip_refine.quantities import Measured
from mlip_refine.sampling import Length, MDSettings
from mlip_refine.training.adamw import AdamW
from mlip_refine.training.ensemble import Ensemble
from mlip_refine.training.replay import LabelledFrame, backpropagate_batch
from mlip_refine.training.schedule import Group, Schedule, make_schedule
from mlip_refine.training.streaming import backpropagate, ensemble_losses
from mlip_refine.training.tracker import EnsembleSampler, EnsembleTracker, Policy, stage_seed
from mlip_refine.training.trainer import Trainer

HOT = EnsembleSource("wells", 500.0, 0.0)
WARM = EnsembleSource("wells", 400.0, 0.0)
OTHER = EnsembleSource("others", 500.0, 0.0)
SITES = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 0, 2]], dtype=torch.float64)
TRUE_STIFFNESS = 4.0
FRAMES = 7
BATCH = 3

SCHEDULES = {
    "joint": {},
    "alternate": {"schedule": "alternate"},
    "epochs": {"schedule": "epochs", "epochs": {"replay": 3, "experiment": 2}},
    "sequential": {"schedule": "sequential", "epochs": {"replay": 3}},
}
TURNS = {"joint": "bbbbbb", "alternate": "ererer", "epochs": "rrreer", "sequential": "rrreee"}


class Springs(Potential):
    """U = ½ k Σ|x - site|² with k to be trained; counts the graphs that it evaluates."""

    def __init__(self, sites: Tensor) -> None:
        self.module = torch.nn.Module()
        self.module.stiffness = torch.nn.Parameter(torch.tensor([2.0, 3.0], dtype=torch.float64))
        self.graphs = GraphBuilder((22,), 0.1, torch.float64, torch.device("cpu"))
        self.chunker, self.sites, self.evaluated = Chunker(self.graphs.device), sites, 0

    def evaluate(self, graphs, probes=("energy",), *, create_graph=False):
        self.evaluated += graphs.n_graphs
        x = graphs.positions.view(-1, len(self.sites), 3) - self.sites
        stiffness = self.module.stiffness.mean()
        found = {"energy": 0.5 * stiffness * x.square().sum((1, 2)), "forces": -stiffness * x.flatten(0, 1)}
        return {name: found[name] for name in probes}


@dataclass
class ExactSampler(EnsembleSampler):
    """Draws without dynamics; knows when it was asked for what."""

    wells: type | None = None
    drawn: list[tuple[str, tuple[EnsembleSource, ...]]] = field(default_factory=list)

    def draw(self, potential, sources, stage, share=1.0, start=None):
        self.drawn.append((stage, tuple(sources)))
        self.md_steps += len(sources)
        return self._made(potential, sources, stage, potential.parameters())

    def checksums(self, sources, stage):
        return {}

    def stored(self, potential, sources, stage, reference, checksums):
        with potential.holding(reference):
            return self._made(potential, sources, stage, reference)

    def _made(self, potential, sources, stage, reference):
        made = {}
        for number, source in enumerate(sources):
            exact = self.wells(float(reference["stiffness"].mean()))
            trajectory = exact.trajectory(stage_seed(number, stage), 12, temperature=source.temperature)
            trajectory = replace(trajectory, point=self.points[source])
            made[source] = Ensemble.from_trajectory(potential, trajectory, stage, reference)
        return made


class Spread(EnsembleLoss):
    """((⟨|x - site|²⟩ - target)/0.001)², reweighted."""

    def __init__(self, source: EnsembleSource, target: float = 0.2, tolerance: float = 0.0) -> None:
        super().__init__(f"spread-{source.name}", 1.0)
        self.source, self.target, self.tolerance, self.calls = source, target, tolerance, 0

    @property
    def sources(self):
        return (self.source,)

    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        self.calls += 1
        mine = frames[self.source]
        squares = (mine.positions - SITES).square().sum((1, 2))
        found = (torch.softmax(-mine.work, 0) * squares).sum()
        deviation = Measured(float(found.detach()) - self.target, 0.0, "Å²")
        value = (found - self.target).square() * 1e6
        return LossResult(value, {self.name: float(value.detach())}, {}, deviation, self.tolerance)


class Unresolved(Spread):
    """The same, where errors are too large to tell."""

    def evaluate(self, frames: Mapping[EnsembleSource, Frames]) -> LossResult:
        return replace(super().evaluate(frames), resolved=False)


class Stiffness(PotentialLoss):
    """(k - 2.2)², with frames every two updates of its own that it only looks at."""

    every = 2

    def __init__(self) -> None:
        super().__init__("stiffness", 1.0)
        self.calls, self.followed = 0, 0

    @property
    def sources(self):
        return (WARM,)

    def follow(self, potential, frames) -> None:
        self.followed += 1

    def evaluate(self, potential) -> LossResult:
        self.calls += 1
        value = (potential.module.stiffness.mean() - 2.2).square()
        return LossResult(value, {self.name: float(value.detach())})


class CountedReplay(Replay):
    """The replay loss; counts."""

    calls = 0

    def evaluate(self, outputs, labels) -> LossResult:
        self.calls += 1
        return super().evaluate(outputs, labels)


def _labelled(potential: Springs, seed: int) -> LabelledFrame:
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    structure = potential.graphs.structure(
        SITES + 0.1 * noise, 4.0 * torch.eye(3, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    )
    energy = 0.5 * TRUE_STIFFNESS * 0.01 * float(noise.square().sum())
    return LabelledFrame(structure, energy, -TRUE_STIFFNESS * 0.1 * noise, None)


@pytest.fixture
def make(wells, tmp_path) -> Callable[..., Trainer]:
    """Trainers over the same frames; every call is a new process, as it were."""

    def trainer(losses=None, folder: Path = tmp_path, policy: Policy | None = None, **settings) -> Trainer:
        potential = Springs(SITES)
        point = wells(1.0).trajectory(0, 1).point
        points = {
            s: replace(point, name=s.name, temperature=s.temperature, pressure=0.0)
            for s in (HOT, WARM, OTHER)
        }
        sampler = ExactSampler(
            points=points,
            settings=MDSettings(),
            length=Length(0.0, 12),
            store=SimpleNamespace(folder=folder),
            seed=0,
            sampling_dtype="float64",
            min_effective=1.0,
            policy=policy or Policy(threshold=0.7),
            wells=wells,
        )
        options = {"steps": 6, "learning_rate": 0.02, "ema_decay": 0.5} | settings
        return Trainer.prepare(
            potential=potential,
            losses=losses or [Spread(HOT), Stiffness(), _replay()],
            settings=Training.model_validate(options),
            sampler=sampler,
            replay=ReplayBuffer([_labelled(potential, k) for k in range(FRAMES)], BATCH, 5),
            folder=folder,
        )

    return trainer


def _replay() -> CountedReplay:
    return CountedReplay("replay", 1.0, ReplayOptions(stress_weight=0.0))


def _free_energy() -> FreeEnergyDifference:
    options = FreeEnergyDifferenceOptions.model_validate(
        {"from": "wells", "to": "others", "temperature": 500.0}
    )
    return FreeEnergyDifference("difference", 1.0, options, Measured(0.0, 0.1, "meV/atom"))


def _letters(schedule: Schedule, steps: int) -> str:
    names = {frozenset(Group): "b", frozenset({Group.REPLAY}): "r", frozenset({Group.EXPERIMENT}): "e"}
    return "".join(names[schedule.acting(step)] for step in range(steps))


def _log(trainer: Trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SCHEDULES)
def test_turns(make, name):
    schedule = make(**SCHEDULES[name]).schedule
    assert _letters(schedule, 6) == TURNS[name]
    for group in Group:
        acts = [group in schedule.acting(step) for step in range(40)]
        assert [schedule.acted(group, step) for step in range(41)] == [sum(acts[:n]) for n in range(41)]


@pytest.mark.parametrize(("batches", "updates"), [(1, 3), (2, 2), (3, 1)])
def test_a_pass_deals_every_frame_at_least_once(make, batches, updates):
    trainer = make(schedule="epochs", epochs={"experiment": 1}, replay_batches=batches)
    assert _letters(trainer.schedule, 2 * updates + 2) == 2 * ("r" * updates + "e")
    dealt = {i for _ in range(updates * batches) for i in trainer.replay.next_indices()}
    assert dealt == set(range(FRAMES))


@pytest.mark.parametrize("name", SCHEDULES)
def test_only_what_acts_is_evaluated(make, name):
    trainer = make(**SCHEDULES[name], trust_region=False, patience=99)
    spread, stiffness, replay = trainer.losses
    seen: list[tuple[int, ...]] = []
    before = [0, 0, 0, 0]

    def report(_) -> None:
        now = [spread.calls, stiffness.calls, replay.calls, trainer.potential.evaluated]
        seen.append(tuple(n - b for n, b in zip(now, before, strict=True)))
        before[:] = now

    trainer.report = report
    trainer.run()
    for acting, (spreads, stiffnesses, replays, graphs), line in zip(
        TURNS[name], seen, _log(trainer), strict=True
    ):
        experiment, labelled = acting in "eb", acting in "rb"
        assert (spreads, stiffnesses, replays) == (experiment, experiment, labelled)
        assert ("stiffness" in line["losses"], "replay.energy" in line["losses"]) == (experiment, labelled)
        assert list(line["n_eff"]) == list(line["references"]) == [HOT.name] * experiment
        assert line["gradient_norm"] > 0
        assert (graphs == BATCH) == (acting == "r")
    parts = _log(trainer)[-1]["losses"]
    assert parts["total"] == pytest.approx(sum(v for k, v in parts.items() if k != "total"))


def test_joint_is_one_update_from_the_summed_gradients(make):
    """Bit for bit what the sum of all gradients and one optimiser give."""
    trainer = make(trust_region=False, policy=Policy(threshold=1e-3), steps=4)
    trainer.run()
    again = make()
    potential, settings = again.potential, trainer.settings
    ensembles = again.sampler.initial(potential, [HOT])
    optimiser = AdamW(potential, settings)
    spread, stiffness, replay = again.losses
    for _ in range(settings.steps):
        optimiser.zero_grad()
        structures = ensembles[HOT].structures
        probes = {HOT: {"energy": potential.energies(structures)}}
        _, adjoints = ensemble_losses([spread], ensembles, probes)
        stiffness.evaluate(potential).value.backward()
        backpropagate(potential, structures, adjoints[HOT])
        backpropagate_batch(potential, [replay], again.replay.next_batch(), 1.0)
        optimiser.step()
    assert torch.equal(trainer.potential.module.stiffness, optimiser.averaged()["stiffness"])


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_that_was_stopped_ends_with_the_same_bits(make, tmp_path, name, stop):
    def folder(word: str) -> Path:
        (tmp_path / word).mkdir()
        return tmp_path / word

    def interrupt(report) -> None:
        if report.step == stop:
            raise KeyboardInterrupt

    options = {**SCHEDULES[name], "learning_rate": 0.2, "ema_decay": 0.9, "policy": Policy(threshold=0.97)}
    whole = make(folder=folder("whole"), **options)
    whole.run()
    assert any(line["resampled"] for line in _log(whole))
    stopped = make(folder=folder("stopped"), **options)
    stopped.report = interrupt
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = make(folder=stopped.folder, **options)
    assert resumed.resume()
    resumed.run()
    texts = [(t.folder / "log.jsonl").read_text() for t in (whole, resumed)]
    assert texts[0] == texts[1]
    assert torch.equal(whole.potential.module.stiffness, resumed.potential.module.stiffness)


def test_a_damaged_checkpoint_or_log_does_not_stop_a_run(make, tmp_path, capsys):
    """The one before takes its place; lines that are no updates go: the end is that of a whole run."""
    options = {**SCHEDULES["joint"], "learning_rate": 0.2}
    for name in ("whole", "damaged"):
        (tmp_path / name).mkdir()
    whole = make(folder=tmp_path / "whole", **options)
    whole.run()
    damaged = make(folder=tmp_path / "damaged", **options)
    damaged.run()
    *_, newest = sorted((damaged.folder / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    log = damaged.folder / "log.jsonl"
    log.write_bytes(b"\n\x00\x00\n[1]\n{}\nNaN\n" + log.read_bytes() + b'{"step": 2')
    resumed = make(folder=damaged.folder, **options)
    assert resumed.resume()
    assert resumed.step == whole.step - 1
    resumed.run()
    assert log.read_text() == (whole.folder / "log.jsonl").read_text()
    assert torch.equal(whole.potential.module.stiffness, resumed.potential.module.stiffness)
    printed = " ".join(capsys.readouterr().err.split())
    assert f"going on from step-{whole.step - 1:04d}.pt" in printed
    assert "log.jsonl:2: left out, this is no update of a run" in printed


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_unasked(make):
    trainer = make(**SCHEDULES["joint"])
    trainer.run()
    log = trainer.folder / "log.jsonl"
    before = log.read_bytes()
    shutil.rmtree(trainer.folder / "checkpoints")
    again = make(folder=trainer.folder, **SCHEDULES["joint"])
    with pytest.raises(InputError, match="the checkpoints of the run are gone; found 6 updates in") as caught:
        again.resume()
    assert "remove log.jsonl to train from the initial model again" in str(caught.value)
    assert log.read_bytes() == before
    log.unlink()
    assert not again.resume()


@pytest.mark.parametrize(("name", "end"), [("joint", 2), ("alternate", 3), ("epochs", 5), ("sequential", 5)])
def test_a_run_ends_where_experiments_acted_and_found_their_targets(make, name, end):
    trainer = make([Spread(HOT, tolerance=9.0), _replay()], **SCHEDULES[name], patience=2)
    trainer.run()
    assert (trainer.step, trainer.converged) == (end, True)


def test_frames_that_tell_of_temperature_are_drawn_in_updates_of_experiments(make):
    """Every second of them, although none of their steps can be divided by two."""
    turns = {"schedule": "epochs", "epochs": {"replay": 1, "experiment": 1}}
    trainer = make([Stiffness(), _replay()], **turns, steps=8)
    trainer.run()
    assert [stage for stage, _ in trainer.sampler.drawn] == ["stiffness-0000", "stiffness-0002"]
    assert trainer.losses[0].followed == 2


def test_first_frames_are_drawn_when_they_are_needed(make):
    trainer = make([Spread(HOT), _replay()], **SCHEDULES["sequential"])
    trainer.run()
    lines = _log(trainer)
    assert [line["md_steps"] for line in lines[:4]] == [0, 0, 0, 1]
    assert lines[3]["resampled"] == [HOT.name]
    assert lines[3]["n_eff"][HOT.name] == pytest.approx(1.0)


def test_a_free_energy_needs_frames_of_the_initial_model(make):
    trainer = make([_free_energy(), _replay()], **SCHEDULES["sequential"], learning_rate=1e-3)
    trainer.run()
    assert trainer.sampler.drawn[0] == ("initial", tuple(sorted((HOT, OTHER))))
    assert [line["md_steps"] for line in _log(trainer)] == [2] * 6


def _moved_far(make, loss: EnsembleLoss) -> tuple[EnsembleTracker, Springs]:
    """Ensembles of a model that ten times stiffer springs have replaced since."""
    trainer = make([loss, _replay()])
    trainer.ensembles.begin(trainer.potential, acting=True)
    trainer.potential.set_parameters({"stiffness": torch.tensor([25.0, 25.0])})
    trainer.ensembles.moved()
    return trainer.ensembles, trainer.potential


def test_frames_out_of_reach_are_left_behind_after_a_pause(make):
    """They say nothing, so nothing is joined; the way back to the initial model is lost."""
    ensembles, potential = _moved_far(make, Spread(HOT))
    assert ensembles.follow(potential, 8, paused=True) == [HOT]
    assert [stage for stage, _ in ensembles.sampler.drawn] == ["initial", "step-0008-anew"]
    assert [reference.stage for reference in ensembles.current[HOT].references] == ["step-0008-anew"]
    assert ensembles.n_eff() == {HOT: pytest.approx(1.0)}
    assert math.isnan(ensembles.current[HOT].shift.value)


@pytest.mark.parametrize("paused", [False, True])
def test_a_broken_chain_of_references_stops_a_free_energy(make, paused):
    ensembles, potential = _moved_far(make, _free_energy())
    with pytest.raises(StatisticsError, match="the chain of references of"):
        ensembles.follow(potential, 8, paused=paused)


def test_a_pause_that_leaves_frames_in_reach_joins_new_ones(make):
    trainer = make([Spread(HOT), _replay()])
    ensembles, potential = trainer.ensembles, trainer.potential
    ensembles.begin(potential, acting=True)
    potential.set_parameters({"stiffness": torch.tensor([3.5, 3.5])})
    ensembles.moved()
    assert ensembles.follow(potential, 8, paused=True) == [HOT]
    assert [reference.stage for reference in ensembles.current[HOT].references] == ["initial", "step-0008"]
    assert ensembles.current[HOT].shift.value == 0.0


@pytest.mark.parametrize("name", ["alternate", "epochs", "sequential"])
@pytest.mark.parametrize("kept", [0, 1])
def test_turns_need_losses_of_both_kinds(make, name, kept):
    loss = [Spread(HOT), _replay()][kept]
    with pytest.raises(InputError) as caught:
        make([loss], **SCHEDULES[name])
    lacking = ("labelled frames, such as replay", "experiments")[kept]
    problem = f"the schedule {name} has no turns to take; found no loss of {lacking}"
    assert str(caught.value).startswith(problem)


def test_experiments_that_never_come_to_act_are_refused(make):
    settings = Training.model_validate({**SCHEDULES["sequential"], "steps": 3})
    losses, buffer = make().losses, make().replay
    with pytest.raises(InputError, match="experiments never come to act; found 3 updates"):
        make_schedule(settings, losses, buffer, "run.yaml:3")
    assert make_schedule(settings.model_copy(update={"steps": 4}), losses, buffer).acting(3) == {"experiment"}


@pytest.mark.parametrize(("kind", "steps"), [(Spread, 2), (Unresolved, 4)])
def test_what_is_not_resolved_is_not_met(make, kind, steps):
    """A deviation inside any tolerance stops the run, but not where its error is too large to tell."""
    trainer = make([kind(HOT, tolerance=1e9)], steps=4, patience=2)
    trainer.run()
    assert trainer.step == steps
