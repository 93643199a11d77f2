"""Accelerated sampling copies: equal to the plain ones, refused where they are not, shared between copies."""

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor

from mlip_refine.potential import Potential
from mlip_refine.potential.acceleration import choose as under_test
from mlip_refine.potential.acceleration.choose import TOLERANCES, Accelerator, Experience, cuequivariant
from mlip_refine.potential.acceleration.compiled import (
    CompiledGraphs,
    CompiledModule,
    EnergyAndSlope,
    capacity,
)
from mlip_refine.potential.acceleration.kernels import remove_kernels
from mlip_refine.potential.graphs import GraphBuilder, Graphs

ONE_OFFS = under_test._ONE_OFFS
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def _interpreted(traced: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Run what was written down without compiling it."""
    return traced.forward


def _crystals(seed: int, stretch: float = 1.0) -> list[Atoms]:
    rng, frames = np.random.default_rng(seed), []
    for a in (3.9, 4.1):
        atoms = bulk("Ti", "fcc", a=a * stretch, cubic=True)
        atoms.numbers[0] = 14
        atoms.positions += rng.normal(size=atoms.positions.shape, scale=0.1)
        frames.append(atoms)
    return frames


def _batch(potential: Potential, seed: int, stretch: float = 1.0) -> Graphs:
    return potential.graphs.collate([potential.graphs.from_atoms(a) for a in _crystals(seed, stretch)])


def _frozen(build, kind: str, dtype: str = "float64") -> Potential:
    return Potential.from_module(build(kind, DTYPES[dtype]), default_dtype=dtype).frozen_copy()


@pytest.fixture(scope="module")
def traced() -> CompiledGraphs:
    """Return what all tests of one model share, so that it is written down once."""
    return CompiledGraphs(_interpreted)


def _compiled(potential: Potential, graphs: CompiledGraphs) -> CompiledModule:
    module = potential.frozen_copy().module
    remove_kernels(module)
    return CompiledModule(module, potential.heads.index(potential.head), graphs)


def _assert_equal(potential: Potential, backend: EnergyAndSlope, graphs: Graphs, tolerance: float) -> None:
    """Energies, forces and stresses."""
    energy, slope = backend(graphs, graphs.vectors)
    expected = potential.evaluate(graphs, ("energy", "forces", "stress"))
    torch.testing.assert_close(energy, expected["energy"].detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(graphs.forces(slope), expected["forces"], rtol=tolerance, atol=tolerance)
    stress = graphs.stress(graphs.vectors, slope)
    torch.testing.assert_close(stress, expected["stress"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("residual", "float64", 1e-10),
        pytest.param("residual", "float32", 1e-5, marks=pytest.mark.slow),
        *(
            pytest.param(kind, "float64", 1e-10, marks=pytest.mark.slow)
            for kind in ("all-residual", "density", "nonlinear", "three-layers", "scalars")
        ),
    ],
)
def test_a_traced_graph_is_the_model_for_any_number_of_edges(build, kind, dtype, tolerance):
    potential, known = _frozen(build, kind, dtype), CompiledGraphs(_interpreted)
    backend, counts = _compiled(potential, known), set()
    for seed, stretch in enumerate((1.0, 0.97, 1.05)):
        graphs = _batch(potential, seed, stretch)
        counts.add(graphs.edge_index.shape[1])
        _assert_equal(potential, backend, graphs, tolerance)
    assert len(counts) > 1
    assert len(known) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_inductor_gives_the_model(build, dtype, tolerance):
    potential, known = _frozen(build, "scalars", dtype), CompiledGraphs()
    backend = _compiled(potential, known)
    for seed in range(2):
        _assert_equal(potential, backend, _batch(potential, seed), tolerance)
    assert len(known) == 1


def test_copies_with_other_parameters_share_what_was_compiled(build, traced):
    potential = _frozen(build, "scalars")
    graphs = _batch(potential, 0)
    _assert_equal(potential, _compiled(potential, traced), graphs, 1e-10)
    energy = potential.evaluate(graphs)["energy"]
    other = potential.frozen_copy()
    other.set_parameters({name: 1.1 * p for name, p in potential.parameters().items()})
    assert (other.evaluate(graphs)["energy"] - energy).abs().max() > 1e-3
    _assert_equal(other, _compiled(other, traced), graphs, 1e-10)
    assert len(traced) == 1


@pytest.mark.parametrize(("n_edges", "size"), [(0, 64), (1, 64), (58, 64), (59, 128), (1000, 1152)])
def test_edges_are_rounded_up_with_a_tenth_to_spare(n_edges, size):
    assert capacity(n_edges) == size


@pytest.mark.parametrize(("n_edges", "size"), [(900, 1152), (1153, None), (1600, 2304), (2305, None)])
def test_the_smallest_graph_that_fits_and_does_not_waste_is_taken(n_edges, size):
    shape = (8, 2, 0, torch.float64, torch.device("cpu"))
    known = CompiledGraphs(_interpreted, {shape: dict.fromkeys((2304, 1152), _raising)})
    assert known.find(shape, n_edges) == size
    assert known.find((9, *shape[1:]), n_edges) is None


def test_batches_of_too_many_shapes_are_not_compiled(build):
    potential = _frozen(build, "scalars")
    other = (1, 1, 0, torch.float64, torch.device("cpu"))
    known = CompiledGraphs(_interpreted, {other: dict.fromkeys(range(8), _raising)})
    graphs = _batch(potential, 0)
    with pytest.raises(RuntimeError, match="more than 8 shapes"):
        _compiled(potential, known)(graphs, graphs.vectors)


def _raising(*_: object) -> tuple[Tensor, Tensor]:
    raise ValueError("no such kernel\nat line 3")


def _springs(graphs: Graphs, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """A plain copy that costs nothing: half the squares of all vectors."""
    system = graphs.batch[graphs.edge_index[0]]
    energy = torch.zeros_like(graphs.volume).index_add(0, system, 0.5 * vectors.square().sum(1))
    return energy, vectors.detach()


class _Scene:
    """A plain copy and the backends beside it, which count their calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        builder = GraphBuilder((14, 22), 3.5, torch.float64, torch.device("cpu"))
        self.graphs = builder.collate([builder.from_atoms(a) for a in _crystals(0)])
        self.experience, self.calls, self.said = Experience(), [], []
        monkeypatch.setattr(under_test, "_say", self.said.append)

    def backend(self, name: str, energy: float = 0.0, slope: float = 0.0) -> EnergyAndSlope:
        """Return the plain copy with an error."""

        def evaluated(graphs: Graphs, vectors: Tensor) -> tuple[Tensor, Tensor]:
            self.calls.append(name)
            e, s = _springs(graphs, vectors)
            return e + energy, s * (1 + slope)

        return evaluated

    def accelerator(self, **backends: EnergyAndSlope) -> Accelerator:
        makers = {name: lambda backend=backend: backend for name, backend in backends.items()}
        return Accelerator(self.backend("none"), makers, torch.float64, self.experience)

    def run(self, accelerator: Accelerator, calls: int) -> tuple[Tensor, Tensor]:
        for _ in range(calls):
            result = accelerator(self.graphs, self.graphs.vectors)
        return result


@pytest.fixture
def scene(monkeypatch) -> _Scene:
    return _Scene(monkeypatch)


def test_one_offs_stay_as_they_are(scene):
    scene.run(scene.accelerator(other=scene.backend("other")), ONE_OFFS)
    assert set(scene.calls) == {"none"}


def test_a_right_backend_is_taken(scene):
    accelerator = scene.accelerator(other=scene.backend("other"))
    scene.run(accelerator, ONE_OFFS + 1)
    scene.calls.clear()
    scene.run(accelerator, 3)
    assert scene.calls == ["other"] * 3
    assert scene.said == []


@pytest.mark.parametrize(
    ("energy", "slope"), [(8e-6, 0.0), (0.0, 1e-3), (float("nan"), 0.0), (0.0, float("nan"))]
)
def test_a_wrong_backend_is_refused_in_every_copy(scene, energy, slope):
    for _ in range(2):
        accelerator = scene.accelerator(wrong=scene.backend("wrong", energy, slope))
        found = scene.run(accelerator, ONE_OFFS + 3)
        expected = _springs(scene.graphs, scene.graphs.vectors)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert scene.calls.count("wrong") == 1
    assert len(scene.said) == 1
    assert "goes on without wrong: energies differ by" in scene.said[0]


def test_rounding_is_no_reason_to_refuse(scene):
    """Energies of cells of 4 atoms within the tolerance per atom."""
    most = 4 * TOLERANCES[torch.float64][0]
    accelerator = scene.accelerator(near=scene.backend("near", 0.9 * most))
    scene.run(accelerator, ONE_OFFS + 2)
    assert scene.calls[-1] == "near"
    assert scene.said == []


def test_a_backend_that_cannot_be_made_is_left(scene):
    accelerator = Accelerator(scene.backend("none"), {"other": _raising}, torch.float64, scene.experience)
    scene.run(accelerator, ONE_OFFS + 2)
    assert scene.said == ["goes on without other: ValueError: no such kernel"]


def test_a_backend_that_fails_later_is_left(scene):
    backends = [scene.backend("other"), scene.backend("other"), _raising]

    def failing(graphs: Graphs, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return backends.pop(0)(graphs, vectors)

    accelerator = scene.accelerator(other=failing)
    scene.run(accelerator, ONE_OFFS + 1)
    scene.calls.clear()
    scene.run(accelerator, 2)
    assert scene.calls == ["none", "none"]
    assert scene.said == ["goes on without other: ValueError: no such kernel"]


def test_the_fastest_right_backend_is_taken_and_remembered(scene, monkeypatch):
    seconds = {"none": 2.0, "slow": 3.0, "fast": 1.0, "wrong": 0.5}
    monkeypatch.setattr(Accelerator, "_seconds", lambda self, name, graphs, vectors: seconds[name])
    backends = {name: scene.backend(name, slope=float(name == "wrong")) for name in ("wrong", "fast", "slow")}
    scene.run(scene.accelerator(**backends), ONE_OFFS + 2)
    assert scene.calls[-1] == "fast"
    assert "goes on without wrong" in scene.said[0]
    assert scene.said[1:] == ["batches of 2 systems: fast, 2.00 times as fast as without"]
    scene.calls.clear()
    scene.run(scene.accelerator(**backends), ONE_OFFS + 2)
    assert [name for name in scene.calls if name != "none"] == ["fast"] * 3
    assert len(scene.said) == 2


def test_nothing_is_taken_where_the_plain_copy_is_the_fastest(scene, monkeypatch):
    seconds = {"none": 1.0, "slow": 3.0, "slower": 4.0}
    monkeypatch.setattr(Accelerator, "_seconds", lambda self, name, graphs, vectors: seconds[name])
    backends = {name: scene.backend(name) for name in ("slow", "slower")}
    for _ in range(2):
        accelerator = scene.accelerator(**backends)
        scene.run(accelerator, ONE_OFFS + 1)
        scene.calls.clear()
        scene.run(accelerator, 1)
        assert scene.calls == ["none"]
    assert scene.said == []


def test_times_are_taken_of_all_backends(scene):
    accelerator = scene.accelerator(first=scene.backend("first"), second=scene.backend("second"))
    scene.run(accelerator, ONE_OFFS + 1)
    assert min(scene.calls.count(name) for name in ("first", "second", "none")) >= 12


@pytest.mark.parametrize("how", ["none", "auto"])
def test_a_copy_for_the_cpu_is_plain(build, how):
    assert _frozen(build, "scalars").frozen_copy(accelerate=how)._accelerator is None


def test_a_compiled_copy_evaluates_batches(build, traced):
    original = _frozen(build, "scalars")
    original._experience.compiled = traced
    copy, probes = original.frozen_copy(accelerate="compile"), ("energy", "forces", "stress")
    for seed in range(ONE_OFFS + 3):
        graphs = _batch(original, seed)
        found, expected = copy.evaluate_chunked(graphs, probes), original.evaluate(graphs, probes)
        for name in probes:
            torch.testing.assert_close(found[name], expected[name].detach(), rtol=1e-10, atol=1e-10)
    assert len(traced) == 1
    assert original._experience.refused == set()
    assert copy.hash == original.hash


@pytest.mark.skipif(
    importlib.util.find_spec("cuequivariance_torch") is not None, reason="cuEquivariance is installed"
)
def test_a_copy_without_cuequivariance_says_so(build, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(under_test, "_say", said.append)
    copy = _frozen(build, "scalars").frozen_copy(accelerate="cueq")
    graphs = _batch(copy, 0)
    for _ in range(ONE_OFFS + 2):
        copy.evaluate(graphs, ("forces",))
    assert len(said) == 1
    assert "without cueq: ModuleNotFoundError" in said[0]


@pytest.mark.parametrize("kind", ["residual", "density", "scalars"])
def test_cuequivariance_gives_the_model(build, kind):
    pytest.importorskip("cuequivariance_torch")
    potential = _frozen(build, kind)
    module, before = potential.frozen_copy().module, torch.get_default_dtype()
    remove_kernels(module)
    backend = cuequivariant(module, potential.heads.index(potential.head))
    assert torch.get_default_dtype() is before
    _assert_equal(potential, backend, _batch(potential, 0), 1e-7)
