"""`transition` on crystals whose boundary is known in closed form."""

import json
import math
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from rich.console import Console
from scipy.integrate import quad
from scipy.optimize import brentq

from mlip_refine.config import config_from_dict
from mlip_refine.errors import InputError, StatisticsError
from mlip_refine.losses import EnsembleSource
from mlip_refine.quantities import GPA, HBAR, KB, MEV, Measured
from mlip_refine.sampling import GuardSettings, Length, MDSettings, StatePoint
from mlip_refine.sampling.references import AMU_A2_FS2
from mlip_refine.statistics.gibbs_ladder import (
    BLOCKS,
    GibbsLadder,
    Rung,
    blocks_of,
    jackknife_error,
)
from mlip_refine.testing import AnalyticPotential, sigma_bound
from mlip_refine.workflows.base import Run
from mlip_refine.workflows.free_energy.cells import CellSettings
from mlip_refine.workflows.free_energy.differences import FreeEnergySettings
from mlip_refine.workflows.free_energy.frenkel_ladd import LadderSettings as WindowSettings
from mlip_refine.workflows.free_energy.from_transition import read_difference
from mlip_refine.workflows.free_energy.liquid_path import LiquidPathSettings
from mlip_refine.workflows.free_energy.records import CELLS
from mlip_refine.workflows.melt import Melting
from mlip_refine.workflows.records import Estimate, write_record
from mlip_refine.workflows.transition import transition
from mlip_refine.workflows.transition.figures import write_figures
from mlip_refine.workflows.transition.ladder import LadderSettings
from mlip_refine.workflows.transition.prepare import Prepared
from mlip_refine.workflows.transition.records import (
    BoxRecord,
    CoexistenceRecord,
    TransitionResult,
    read_transition,
)
from mlip_refine.workflows.transition.run import run
from mlip_refine.workflows.transition.surface import Anchor, AnchoredSurface
from mlip_refine.workflows.transition.tables import print_transition

N = 8
MASS = 40.0
BULK = 0.4
"""Bulk modulus of both crystals, eV/Å³."""


class EinsteinCrystals(AnalyticPotential):
    """Two crystals, told apart by c/a: springs to sites that follow the cell, and an elastic energy of it.

    U = N E + ½ K (V - V₀)²/V₀ + ½ k Σ u², u without the displacement of the centre of mass.
    """

    def __init__(self, sites: np.ndarray) -> None:
        super().__init__([18], 0.1)
        self.sites = torch.from_numpy(sites)
        # Energy (eV/atom), volume per atom (Å³) and spring (eV/Å²) of each.
        self.kinds = {"cube": (0.0, 16.0, 3.0), "brick": (0.045, 15.5, 1.5)}

    def parts(self, graphs):
        cells, x = graphs.cell, graphs.positions.view(-1, N, 3)
        volume = torch.linalg.det(cells)
        brick = cells[:, 2, 2] > 1.2 * cells[:, 0, 0]
        energy, rest, spring = (
            torch.where(brick, *(torch.tensor(self.kinds[kind][i]) for kind in ("brick", "cube"))).double()
            for i in range(3)
        )
        u = x - self.sites @ cells
        u = u - u.mean(1, keepdim=True)
        elastic = N * energy + 0.5 * BULK * (volume - N * rest) ** 2 / (N * rest)
        total = elastic + 0.5 * spring * u.square().sum((1, 2))
        forces = -spring[:, None, None] * u
        virial = spring[:, None, None] * torch.einsum("nai,naj->nij", u, u)
        pressure = BULK * (volume - N * rest) / (N * rest) * volume
        stress = (virial + pressure[:, None, None] * torch.eye(3).double()) / volume[:, None, None]
        return total, forces.reshape(-1, 3), stress

    def gibbs(self, kind: str, t: float, p: float) -> float:
        """Exact G of a cell at its equilibrium volume, centre of mass in V/N, eV/atom."""
        energy, rest, spring = self.kinds[kind]
        kt = KB * t
        omega = math.sqrt(spring / (MASS * AMU_A2_FS2))
        vibrations = 3 * (N - 1) * kt * math.log(HBAR * omega / kt)
        wavelength_cubed = (2 * math.pi * HBAR**2 / (N * MASS * AMU_A2_FS2 * kt)) ** 1.5

        def static(v: float) -> float:
            return N * energy + 0.5 * BULK * (v - N * rest) ** 2 / (N * rest) + p * v

        # The centre of mass moves in V: it weights the volume.
        ends = 0.8 * N * rest, 1.2 * N * rest
        lowest = min(static(v) for v in np.linspace(*ends, 2001))

        def integral(of) -> float:
            return quad(lambda v: of(v) * v * math.exp(-(static(v) - lowest) / kt), *ends, limit=200)[0]

        norm = integral(lambda v: 1.0)
        mean = integral(lambda v: v) / norm
        log_mean = integral(math.log) / norm
        variance = integral(lambda v: (math.log(v) - log_mean) ** 2) / norm
        f = -math.log(norm) + lowest / kt + 0.5 * math.log(variance) + math.log(mean)
        f += 0.5 * math.log(2 * math.pi)
        return (vibrations - kt * math.log(1 / N / wavelength_cubed) + kt * f) / N

    def boundary(self, p: float) -> float:
        return brentq(lambda t: self.gibbs("brick", t, p) - self.gibbs("cube", t, p), 100.0, 2000.0)


def crystal(kind: str, sites: np.ndarray, volume: float) -> Atoms:
    shape = np.array([1.0, 1.0, 1.5 if kind == "brick" else 1.0])
    cell = np.diag(shape * (N * volume / shape.prod()) ** (1 / 3))
    return Atoms([18] * N, positions=sites @ cell, cell=cell, pbc=True, masses=[MASS] * N)


def prepared(temperatures, pressures=(0.0,), **section) -> Prepared:
    sites = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)]) / 2.0
    potential = EinsteinCrystals(sites)
    node = {"from": "cube", "to": "brick", "temperature": list(temperatures), "pressure": list(pressures)}
    config = config_from_dict(
        {
            "name": "x",
            "potential": {"model": "m"},
            "phases": {"cube": {"file": "a"}, "brick": {"file": "b"}},
            "transition": node | section,
        }
    )
    assert config.transition is not None
    crystals = {kind: crystal(kind, sites, volume) for kind, (_, volume, _) in potential.kinds.items()}
    sources = [EnsembleSource(*state) for state in product(crystals, sorted(temperatures), pressures)]
    points = {
        s: StatePoint(
            s.name, crystals[s.phase], s.temperature, s.pressure, "npt", replicas=2, identity="none"
        )
        for s in sources
    }
    md = MDSettings(
        timestep=5.0, friction=10.0, interval=25.0, barostat_time=200.0, guards=GuardSettings(1e6, 1e6)
    )
    length = Length(500.0, 400)
    free_energy = FreeEnergySettings(
        replicas=2,
        cells=CellSettings(md, length, 1),
        md=md,
        ladder=WindowSettings("einstein", 2, Length(500.0, 100), Length(500.0, 150)),
        liquid=LiquidPathSettings(100.0, {}, None, length, length),
        liquid_cells=length,
        timestep=5.0,
        seed=config.seed,
        dtype="float64",
        accelerate="none",
        max_error=None,
        finite_size=None,
        record={},
    )
    nothing = Melting({}, md, config.seed, "float64", "none")
    ladder = LadderSettings(md, length, 11)
    return Prepared("x", config.transition, potential, points, nothing, ladder, free_energy, 10.0, CELLS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Prepared, Path]:
    folder = tmp_path_factory.mktemp("run")
    start = prepared(
        (450.0, 600.0),
        (0.0, 2.0),
        anchor=[{"temperature": 600.0, "pressure": 2.0}, {"temperature": 450.0}],
        report_at=[0.0, 1.0, 2.0],
        max_error=None,
    )
    result = run(start, Run(folder, 11))
    assert result.files()["transition.json"] == json.loads((folder / "transition.json").read_text())
    return start, folder


@pytest.mark.statistical
def test_boundary_is_exact(finished):
    start, folder = finished
    file = read_transition(folder)
    bound = sigma_bound(3, BLOCKS - 1)
    assert [point.pressure_GPa for point in file.boundary] == [0.0, 1.0, 2.0]
    for point in file.boundary:
        found, exact = point.temperature.measured, start.potential.boundary(point.pressure_GPa * GPA)
        assert found is not None, point.temperature.refused
        assert abs(found.value - exact) < bound * found.se
        assert found.se < 60.0
        p = point.pressure_GPa
        ends = [start.potential.boundary((p + d) * GPA) for d in (-0.1, 0.1)]
        assert point.slope is not None
        assert abs(point.slope.value - (ends[1] - ends[0]) / 0.2) < bound * point.slope.se
        assert point.slope.se < 0.3 * abs(point.slope.value)


@pytest.mark.statistical
def test_states_anchors_and_closures_are_exact(finished):
    start, folder = finished
    file = read_transition(folder)
    bound = sigma_bound(8 + 4 + 2, BLOCKS - 1)
    assert len(file.states) == 8
    for state in file.states:
        exact = start.potential.gibbs(state.phase, state.temperature_K, state.pressure_GPa * GPA) / MEV
        assert abs(state.gibbs.value - exact) < bound * state.gibbs.se + 0.05
    assert len(file.closures) == 2
    for closure in file.closures:
        assert abs(closure.difference.value) < bound * closure.difference.se
        assert closure.difference.se < 5.0
    assert {anchor.phase for anchor in file.anchors} == {"cube", "brick"}


@pytest.mark.statistical
def test_losses_find_delta_g_and_cells_at_any_temperature(finished):
    start, folder = finished
    states = [(450.0, 0.0), (523.0, 1.0), (571.0, 2.0)]
    for t, p in states:
        found = read_difference(folder, ("cube", "brick"), t, p)
        exact = [start.potential.gibbs(kind, t, p * GPA) / MEV for kind in ("cube", "brick")]
        bound = sigma_bound(3 * len(states), BLOCKS - 1)
        assert abs(found.delta_g.value - (exact[1] - exact[0])) < bound * found.delta_g.se
        for phase, g in zip((found.from_, found.to), exact, strict=True):
            assert abs(phase.gibbs.value - g) < bound * phase.gibbs.se + 0.05
            _, rest, _ = start.potential.kinds[phase.phase]
            cell = np.array(phase.cell)
            # V₀ (1 - P/K), and the mean of a harmonic cell to the order of kT/(K V) = 1e-3.
            volume = N * rest * (1 - p * GPA / BULK)
            assert abs(np.linalg.det(cell)) == pytest.approx(volume, rel=0.01)
            assert cell[2, 2] / cell[0, 0] == pytest.approx(1.5 if phase.phase == "brick" else 1.0)
            assert (phase.kind, len(phase.numbers)) == ("crystal", N)


def test_boxes_are_drawn_and_printed(finished, tmp_path):
    _, folder = finished
    file = read_transition(folder)
    times = tuple(float(i) for i in range(20))
    box = BoxRecord(
        start_K=500.0,
        n_atoms=2000,
        outcome="coexists",
        temperature=Measured(520.0, 3.0, "K"),
        crystal_share=Measured(0.5, 0.01, ""),
        equilibration_ps=5.0,
        times_ps=times,
        temperatures_K=tuple(520.0 + t for t in times),
        crystal_shares=(0.5,) * 20,
    )
    beyond = Measured(4.0, 5.0, "K")
    found = CoexistenceRecord(
        pressure_GPa=0.0, temperature=Estimate.of(box.temperature), beyond_boundary=beyond, boxes=(box,)
    )
    file = file.model_copy(update={"coexistence": (found,)})
    write_record(tmp_path / "transition.json", file)
    assert read_transition(tmp_path) == file
    assert "coexistence.png" in {path.name for path in write_figures(tmp_path)}
    console = Console(file=StringIO(), width=200)
    print_transition(console, TransitionResult(tmp_path, file))
    text = console.file.getvalue()
    assert "coexistence at 0 GPa: 520.0(3.0) K, 4.0(5.0) K beyond the boundary" in text


def test_run_writes_what_it_says(finished):
    _, folder = finished
    head, *rows = (folder / "boundary.csv").read_text().splitlines()
    assert head.startswith("pressure (GPa),temperature (K),se (K)")
    assert len(rows) == 3
    assert {path.name for path in write_figures(folder)} == {"delta_g.png", "boundary.png"}


@pytest.mark.statistical
def test_a_boundary_outside_the_ladder_is_found_by_extensions(tmp_path):
    start = prepared((300.0, 420.0), max_error=None)
    # Run again, it finds the frames that it has sampled.
    with pytest.raises(StatisticsError, match="there is no boundary: ΔG keeps its sign from 300 K"):
        run(replace(start, section=start.section.model_copy(update={"extensions": 0})), Run(tmp_path, 11))
    result = run(start, Run(tmp_path, 11))
    (point,) = result.file.boundary
    exact = start.potential.boundary(0.0)
    assert 540.0 < exact < 660.0
    found = point.temperature.measured
    assert found is not None
    assert abs(found.value - exact) < sigma_bound(1, BLOCKS - 1) * found.se
    assert sorted({state.temperature_K for state in result.file.states}) == [300.0, 420.0, 540.0, 660.0]


def test_noise_is_refused(finished):
    start, folder = finished
    calls = start.potential.calls
    noisy = replace(start, section=start.section.model_copy(update={"max_error": 0.01}))
    with pytest.raises(StatisticsError, match=r"larger error than transition.max_error"):
        run(noisy, Run(folder, 11))
    assert start.potential.calls == calls


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (None, "no section transition"),
        ({"from": "cube", "to": "brik"}, "Did you mean 'brick'"),
        ({"from": "cube", "to": "fixed"}, "cannot follow the pressure"),
    ],
)
def test_bad_input(section, message):
    phases = {"cube": {"file": "a"}, "brick": {"file": "b"}, "fixed": {"file": "c", "cell_freedom": "fixed"}}
    node = {"name": "x", "potential": {"model": "m"}, "phases": phases}
    if section is not None:
        node["transition"] = section | {"temperature": [300.0, 400.0]}
    with pytest.raises(InputError, match=message):
        transition.check_config(config_from_dict(node))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"temperature": [300.0]}, "at least two temperatures"),
        ({"temperature": [300.0, 300.0]}, "values that differ"),
        ({"to": "cube"}, "two phases that differ"),
        ({"anchor": {"temperature": 350.0}}, "among those of the ladder"),
        ({"anchor": []}, "an anchor or a list"),
        ({"report_at": [3.0]}, "within those of the ladder, 0 to 0 GPa"),
        ({"duration": "10 fs"}, "at least one interval"),
        ({"temperatur": [1.0]}, "temperature"),
    ],
)
def test_wrong_sections_are_refused(section, message):
    node = {"from": "cube", "to": "brick", "temperature": [300.0, 400.0]} | section
    with pytest.raises(InputError, match=message):
        config_from_dict({"name": "x", "potential": {"model": "m"}, "transition": node})


def test_default_anchor():
    config = prepared((500.0, 300.0, 400.0), (2.0, 1.0)).section
    assert [(anchor.temperature, anchor.pressure) for anchor in config.anchors] == [(400.0, 1.0)]


def exact_ladder() -> GibbsLadder:
    """A harmonic cell whose volume fluctuates, drawn exactly: ⟨U⟩ = (3N - 3) kT/2 + that of the volume."""
    rng, n, stiffness, rest = np.random.default_rng(7), 16, 30.0, 16 * 20.0
    rungs = []
    for t in (900.0, 1000.0, 1100.0):
        kt, frames = KB * t, 2000
        # Density exp(-β ½ stiffness (V/V₀ - 1)²), the vibrations independent of it.
        relative = 1 + rng.normal(0, math.sqrt(kt / stiffness), frames)
        energy = 0.5 * stiffness * (relative - 1) ** 2 + kt * rng.gamma(1.5 * (n - 1), size=frames)
        volume = torch.from_numpy(rest * relative)
        rungs.append(Rung(t, 0.0, torch.from_numpy(energy), volume, volume.log()[:, None], blocks_of(frames)))
    return GibbsLadder(rungs, n)


@pytest.mark.statistical
def test_crystal_in_the_limit_has_3n_vibrations():
    ladder, exact = exact_ladder(), Measured(0.0, 0.0, "eV")
    anchor = Anchor(1000.0, 0.0, exact, Measured(0.3, 0.0, "eV"))
    cells, limit = (AnchoredSurface(ladder, [anchor], limit=limit) for limit in (False, True))
    n, kt = ladder.n_atoms, KB * 1100.0
    bound = sigma_bound(1, BLOCKS - 1)
    for surface, count in ((cells, 3 * n - 1.5), (limit, 3 * n)):
        found = surface.at(1100.0, 0.0)
        # With the momenta; a cell lacks the centre of mass, 3/2 kT of potential energy.
        wanted = count * kt / (n * MEV)
        assert abs(float(found.enthalpy[0]) - wanted) < bound * jackknife_error(found.enthalpy) + 0.02
    g_cells, g_limit = (float(s.at(1000.0, 0.0).gibbs[0]) * n * MEV for s in (cells, limit))
    assert g_cells == pytest.approx(0.0, abs=1e-9)
    assert g_limit == pytest.approx(-0.3, abs=1e-9)


@pytest.mark.statistical
def test_liquid_in_the_limit_follows_its_compressibility():
    ladder = exact_ladder()
    anchor = Anchor(1000.0, 0.0, Measured(0.0, 0.0, "eV"), Measured(0.2, 0.0, "eV"))
    liquid = AnchoredSurface(ladder, [anchor], liquid=True, limit=True)
    cells = AnchoredSurface(ladder, [anchor])
    for t in (950.0, 1080.0):
        here, there = (ladder.at(x, 0.0, errors=False) for x in (t, 1000.0))
        ratio = float(here.variance / here.volume**2 / (there.variance / there.volume**2))
        terms = 0.2 / (KB * 1000.0) + 0.5 * math.log(ratio)
        difference = float(cells.at(t, 0.0).gibbs[0] - liquid.at(t, 0.0).gibbs[0])
        assert difference == pytest.approx(terms * KB * t / (ladder.n_atoms * MEV), abs=1e-6)


def test_errors_of_size_terms_and_anchors_add_up():
    ladder = exact_ladder()
    anchor = Anchor(1000.0, 0.0, Measured(0.0, 0.03, "eV"), Measured(0.1, 0.04, "eV"))
    per_atom = 1 / (ladder.n_atoms * MEV)
    assert AnchoredSurface(ladder, [anchor]).at(1000.0, 0.0).anchor_se == pytest.approx(0.03 * per_atom)
    assert AnchoredSurface(ladder, [anchor], limit=True).at(1000.0, 0.0).anchor_se == pytest.approx(
        0.05 * per_atom
    )
    two = AnchoredSurface(ladder, [anchor, Anchor(1100.0, 0.0, Measured(0.1, 0.06, "eV"), anchor.size_term)])
    reduced = 0.03 / (KB * 1000.0), 0.06 / (KB * 1100.0)
    assert two.anchor_se == pytest.approx(1 / math.hypot(*(1 / each for each in reduced)))
