"""The replay loss is MACE's stress loss, and every weight has an effect."""

import pytest
import torch
from mace.modules.loss import WeightedEnergyForcesStressLoss
from mace.tools.torch_geometric import Batch, Data

from mlip_refine.errors import InputError
from mlip_refine.losses.options import ReplayOptions
from mlip_refine.losses.replay import MACE_WEIGHTS, SIZE, Replay

SIZES = (2, 3, 1)
NAMES = ("energy", "forces", "stress")
F64 = torch.float64


def _random(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    real = {"generator": generator, "dtype": F64}
    shapes = {"energy": (3,), "forces": (sum(SIZES), 3), "stress": (3, 3, 3)}
    return {name: torch.randn(*shape, **real) for name, shape in shapes.items()}


def _labels(**given: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Labels that all frames have and that count alike, unless given otherwise."""
    extra = {"n_atoms": SIZES} | {f"has_{name}": (1, 1, 1) for name in NAMES}
    extra |= {f"{name}_weight": (1, 1, 1) for name in NAMES}
    return _random(1) | {name: torch.tensor(x, dtype=F64) for name, x in (extra | given).items()}


def _replay(**weights: float) -> Replay:
    options = {f"{name}_weight": float(weight) for name, weight in weights.items()}
    return Replay("replay", 1.0, ReplayOptions(**options))


def _mace_batch(labels: dict[str, torch.Tensor]) -> Batch:
    graphs, start = [], 0
    for i, n in enumerate(SIZES):
        graphs.append(
            Data(
                num_nodes=n,
                weight=torch.ones((), dtype=F64),
                **{f"{name}_weight": labels[f"{name}_weight"][i] for name in NAMES},
                energy=labels["energy"][i],
                forces=labels["forces"][start : start + n],
                stress=labels["stress"][i : i + 1],
            )
        )
        start += n
    return Batch.from_data_list(graphs)


@pytest.mark.parametrize(
    "weights", [{}, {"energy_weight": (0.5, 0, 2), "forces_weight": (3, 1, 0), "stress_weight": (0, 0, 7)}]
)
def test_equals_the_loss_of_mace(weights):
    outputs, labels = _random(0), _labels(**weights)
    mace_loss = WeightedEnergyForcesStressLoss(energy_weight=3.0, forces_weight=70.0, stress_weight=20.0)
    theirs = mace_loss(ref=_mace_batch(labels), pred=outputs)
    result = _replay(energy=3, forces=70, stress=20).evaluate(outputs, labels)
    assert float(result.value) == pytest.approx(float(theirs), rel=1e-12)
    assert sum(result.components.values()) == pytest.approx(float(theirs), rel=1e-12)
    assert list(result.components) == ["replay.energy", "replay.forces", "replay.stress"]


def test_by_hand():
    outputs, labels = _random(0), _labels()
    value = 0.0
    for i, n in enumerate(SIZES):
        value += 3.0 / 3 * float((outputs["energy"][i] - labels["energy"][i]) / n) ** 2
        value += 20.0 / 27 * float(((outputs["stress"][i] - labels["stress"][i]) ** 2).sum())
    value += 70.0 / 18 * float(((outputs["forces"] - labels["forces"]) ** 2).sum())
    assert float(_replay(energy=3, forces=70, stress=20).evaluate(outputs, labels).value) == pytest.approx(
        value
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_changes_its_gradient_and_no_other(name):
    def gradients(**weights: float) -> dict[str, torch.Tensor]:
        outputs = {k: v.requires_grad_() for k, v in _random(0).items()}
        _replay(**weights).evaluate(outputs, _labels()).value.backward()
        return {k: v.grad for k, v in outputs.items()}

    base = {"energy": 1.0, "forces": 2.0, "stress": 3.0}
    before, after = gradients(**base), gradients(**(base | {name: 10 * base[name]}))
    for other, gradient in before.items():
        assert float(gradient.abs().max()) > 0
        factor = 10.0 if other == name else 1.0
        assert torch.allclose(after[other], factor * gradient, rtol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_frame_without_a_label_does_not_count_in_its_mean(name):
    """The others weigh as in a batch without that frame."""
    outputs, labels = _random(0), _labels(**{f"has_{name}": (1, 0, 1)})
    squares = (outputs[name] - labels[name]).square()
    if name == "energy":
        expected = squares[0] / 4 / 2 + squares[2] / 2
    elif name == "forces":
        expected = (squares[:2].sum() + squares[5:].sum()) / 9
    else:
        expected = squares[[0, 2]].mean()
    loss = _replay(**(dict.fromkeys(NAMES, 0) | {name: 2}))
    assert float(loss.evaluate(outputs, labels).value) == pytest.approx(2 * float(expected))
    none = _labels(**{f"has_{name}": (0, 0, 0)})
    assert float(loss.evaluate(outputs, none).value) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_one_quantity_alone_asks_for_nothing_else(name):
    loss = _replay(**({"energy": 0, "forces": 0, "stress": 0} | {name: 1}))
    assert loss.probes == {name}
    result = loss.evaluate({name: _random(0)[name]}, _labels())
    assert list(result.components) == [f"replay.{name}"]
    assert float(result.value) > 0


def test_all_weights_zero_is_refused():
    with pytest.raises(InputError, match="all weights of loss 'replay' are zero"):
        _replay(energy=0, forces=0, stress=0)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        _replay(forces=-1)


def test_weights_that_are_not_given_follow_from_errors():
    """Each such part starts at the same size; what is given stays."""
    errors = {"energy": 0.004, "forces": 0.05, "stress": 0.002}
    free = Replay("replay", 1.0, ReplayOptions())
    assert free.weights == MACE_WEIGHTS
    for name, weight in free.scaled_to(errors).weights.items():
        assert weight * errors[name] ** 2 == pytest.approx(SIZE, rel=0.05)
    given = Replay("replay", 3.0, ReplayOptions(energy_weight=7, stress_weight=0)).scaled_to(errors)
    assert given.weights["energy"] == 7
    assert given.weights["forces"] * errors["forces"] ** 2 == pytest.approx(SIZE, rel=0.05)
    assert given.probes == {"energy", "forces"}
    assert (given.name, given.weight) == ("replay", 3.0)
    # Without labels there is nothing to weigh.
    assert free.scaled_to({"energy": 0.004}).weights["forces"] == MACE_WEIGHTS["forces"]
