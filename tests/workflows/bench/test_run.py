"""Every row of a bench measures what it says."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from mlip_refine.errors import InputError, MlipRefineError
from mlip_refine.potential import Potential, model
from mlip_refine.potential.acceleration.choose import Accelerator
from mlip_refine.sampling import MolecularDynamics
from mlip_refine.workflows.bench import run as workflow
from mlip_refine.workflows.bench.engine import current_graphs, engine_against_ase, engine_against_model
from mlip_refine.workflows.bench.gradient import (
    Process,
    held_by,
    measure,
    memory_of_frames,
    peak_memory,
    rattled_ensemble,
    streamed_against_floor,
    streamed_gradient,
)
from mlip_refine.workflows.bench.records import Outcome, Topic
from mlip_refine.workflows.bench.run import Job, bench, planned, this_machine
from mlip_refine.workflows.bench.workloads import QUICK, Subject, medium_mace, titanium

TINY = replace(QUICK, rounds=2, duration=0.0, block=0.0, steps=2, equilibration=2, cells=(2, 16), frames=4)


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    potential = Potential.load("titanium-compact", default_dtype="float32")
    file, _ = potential.save(tmp_path_factory.mktemp("bench"), "potential")
    return Subject("titanium-compact", potential, file)


def _is_sound(outcome: Outcome, unit: str) -> bool:
    readings = (outcome.ours, outcome.reference, outcome.ratio)
    return all(r.value > 0 and (r.se or 0.0) >= 0 for r in readings) and outcome.ours.unit == unit


@pytest.mark.parametrize("ensemble", ["nvt", "npt"])
def test_the_bare_model_is_given_the_frame_of_the_engine(subject, ensemble):
    """Its forces are those that the engine has."""
    workload, frozen = titanium(2, 16).under(ensemble), subject.frozen()
    dynamics = MolecularDynamics.prepare(frozen, workload.points, workload.settings, 1)
    dynamics.advance(3)
    graphs = current_graphs(frozen, workload, dynamics)
    forces = frozen.evaluate_chunked(graphs, ("forces",))["forces"]
    assert float(forces.norm()) > 1.0
    assert torch.allclose(forces, dynamics.state.forces, atol=2e-4)
    assert bool((graphs.edge_index[1].diff() >= 0).all())


def test_engine_against_model(subject):
    outcome = engine_against_model(subject, titanium(2, 16).under("npt"), TINY)
    assert _is_sound(outcome, "atom·steps/s")
    assert outcome.details["edges"] > 32
    assert outcome.ratio.value == pytest.approx(outcome.reference.value / outcome.ours.value, rel=0.5)


def test_engine_against_ase_leaves_the_default_dtype(subject):
    before = torch.get_default_dtype()
    outcome = engine_against_ase(subject, titanium(2, 16).under("nvt"), TINY)
    assert _is_sound(outcome, "atom·steps/s")
    assert torch.get_default_dtype() == before


def test_the_streamed_gradient_is_that_of_the_mean_energy(subject):
    potential = subject.potential
    ensemble = rattled_ensemble(potential, titanium(1, 16).points[0], 4)
    streamed = streamed_gradient(potential, ensemble)
    mean = potential.evaluate(potential.graphs.collate(ensemble.structures))["energy"].mean()
    named = potential.trainable_parameters()
    for name, exact in zip(named, torch.autograd.grad(mean, list(named.values())), strict=True):
        assert torch.allclose(streamed[name], exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max())), name


def test_streamed_against_floor(subject):
    assert _is_sound(streamed_against_floor(subject, titanium(1, 16), TINY), "frames/s")


def test_peak_memory_is_no_less_than_what_is_held_and_no_more_than_the_systems_count():
    held = torch.ones(2**24)
    peak = peak_memory(torch.device("cpu"))
    counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert held.numel() * 4 < peak <= 1.001 * counted


@pytest.mark.slow
def test_memory_is_that_of_fresh_processes(subject):
    """`getrusage` would give them the peak of this process, which holds 2 GiB more than they need."""
    held = torch.ones(2**29)
    outcome = memory_of_frames(subject, titanium(1, 16), replace(TINY, memory_frames=(4, 400)))
    here = peak_memory(torch.device("cpu")) / 2**20
    assert held.numel() * 4 / 2**20 == 2048
    assert 100 < outcome.reference.value < here - 1024
    assert 0.95 < outcome.ratio.value < 1.5
    assert outcome.details["loaded_MiB"] < outcome.reference.value
    assert outcome.details["frames_MiB"] == pytest.approx(0.22, rel=0.3)


def test_what_structures_share_counts_once(subject):
    """Frames of a crystal share a table of pairs; every frame has 16 positions and a cell of its own."""
    ensemble = rattled_ensemble(subject.potential, titanium(1, 16).points[0], 20)
    few, many = (held_by(ensemble.structures[:n]) for n in (1, 20))
    table = ensemble.structures[0]
    shared = sum(t.numel() * t.element_size() for t in (table.pairs, table.shifts, table.species))
    own = sum(t.numel() * t.element_size() for t in (table.positions, table.cell, table.chosen))
    assert all(s.pairs is table.pairs for s in ensemble.structures)
    assert many == pytest.approx(shared + 20 * own, rel=0.05)
    assert many < 20 * few


def test_what_a_process_measures(subject):
    atoms = titanium(1, 16).points[0].atoms
    job = Process(
        str(subject.file),
        subject.potential.head,
        "cpu",
        "float32",
        1,
        3,
        atoms.numbers.tolist(),
        atoms.positions.tolist(),
        atoms.cell.array.tolist(),
        1155.0,
    )
    found = measure(job)
    assert found["peak"] >= found["loaded"] > found["frames"] > 3 * 16 * 3 * 8


@pytest.mark.slow
def test_a_process_that_fails_is_told(subject):
    lost = replace(subject, file=subject.file.with_name("nothing.model"))
    with pytest.raises(MlipRefineError, match=r"3 frames failed: .*no such model file"):
        memory_of_frames(lost, titanium(1, 16), replace(TINY, memory_frames=(3, 4)))


def _raising(error: Exception):
    def run() -> Outcome:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("tried to allocate"), "out of memory"),
        (InputError("cuequivariance is not installed"), "cuequivariance is not installed"),
    ],
)
def test_a_row_that_cannot_be_measured_says_why(error, reason):
    row = Job(Topic.ENGINE, "m", "4 x 54, NVT", _raising(error), "cueq").result()
    assert (row.failure, row.outcome, row.met) == (reason, None, None)
    assert (row.topic, row.model, row.workload, row.accelerate) == (Topic.ENGINE, "m", "4 x 54, NVT", "cueq")


def test_a_row_names_what_really_ran(subject, monkeypatch):
    """One row is accelerated after the calls that do not count; in the other this fails, and it goes on."""

    def accelerator(eager, module, head, how, experience):
        backends = {"compile": lambda: eager, "cueq": _raising(ImportError("no module"))}
        return Accelerator(eager, {how: backends[how]}, torch.float32, experience)

    monkeypatch.setattr(model, "accelerator", accelerator)
    for how, ran in (("compile", "compile"), ("cueq", "none")):
        run = partial(engine_against_model, subject, titanium(1, 16).under("nvt"), TINY, how)
        row = Job(Topic.ENGINE, "m", "w", run, how).result()
        assert (row.accelerate, row.outcome.ran) == (how, ran)


def test_a_row_that_breaks_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        Job(Topic.ENGINE, "m", "w", _raising(ZeroDivisionError())).result()


def test_the_rows_of_a_bench(subject, monkeypatch):
    small = partial(medium_mace, hidden_irreps="1x0e+1x1o")
    monkeypatch.setattr(workflow, "medium_mace", small)
    effort = replace(TINY, sizes=((2, 16), (1, 54)))
    jobs = planned(subject, None, ("none", "compile"), effort, medium=True)
    engine = ["2 x 16, NVT", "2 x 16, NPT", "1 x 54, NVT", "1 x 54, NPT"]
    assert [j.workload for j in jobs if j.topic == Topic.ENGINE][:8] == engine * 2
    assert [j.topic for j in jobs[8:11]] == [Topic.ASE, Topic.GRADIENT, Topic.MEMORY]
    assert [(j.model, j.workload, j.accelerate) for j in jobs[11:]] == [
        ("medium, random weights", f"{n} x 16, NVT", mode) for mode in ("none", "compile") for n in (1, 4)
    ]
    assert len(planned(subject, None, ("none",), effort, medium=False)) == 7


def test_a_config_gives_one_batch_and_its_cells(subject, tiny):
    jobs = planned(subject, tiny(), ("none",), TINY, medium=False)
    engine = ["4 systems, 64 atoms, NVT", "4 systems, 64 atoms, NPT"]
    assert [j.workload for j in jobs[:3]] == [*engine, "2 x 16, NVT"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerate": ["compil"]}, "Did you mean 'compile'"),
        ({"sizes": ["4-54"]}, "such as 4x54"),
        ({"model": "titanium-compct"}, "Did you mean 'titanium-compact'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        bench(quick=True, **options)


def test_a_config_and_options_are_refused_together(tiny):
    with pytest.raises(InputError, match="a config and device, sizes"):
        bench(tiny(), device="cpu", sizes=["4x54"])


def test_the_machine_is_described():
    machine = this_machine(torch.device("cpu"), "float32")
    assert machine.processor
    assert machine.device == "cpu"
    assert machine.threads >= 1
    assert machine.cores >= 1
    assert machine.torch == torch.__version__


@pytest.mark.slow
def test_a_whole_bench(tmp_path):
    """From the command line; about a minute and a half on one core."""
    command = [sys.executable, "-W", "ignore", "-m", "mlip_refine", "bench", "--quick", "--sizes", "2x16"]
    file = tmp_path / "bench.json"
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, check=True)
    written = json.loads(file.read_text())
    assert [row["topic"] for row in written["rows"]] == [Topic.ENGINE, *Topic]
    assert all(row["outcome"]["ratio"]["value"] > 0 for row in written["rows"])
    assert "potential: titanium-compact" in done.stdout
    assert "2 x 16, NPT" in done.stdout
