"""Losses by name: built in, from other packages, and refused."""

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from textwrap import dedent

import pytest
from ase import Atoms

from mlip_refine.config import Section, load_config
from mlip_refine.errors import InputError
from mlip_refine.losses import BatchLoss, LossResult, Replay, Setting, loss_specs, options
from mlip_refine.losses.ensemble import observable_options
from mlip_refine.losses.registry import loss_types

SETTING = Setting(crystal=lambda _: Atoms(), cell_moves=lambda _: True, resolve=Path)


class TemperatureDrop(BatchLoss):
    """A loss of another package."""

    class Options(Section):
        """Its options."""

        depth: float = 1.0

    def __init__(self, name: str, weight: float, options: Options) -> None:
        super().__init__(name, weight)
        self.depth = options.depth

    def evaluate(self, outputs, labels) -> LossResult:
        return LossResult(outputs["energy"].sum())


class NoOptions(BatchLoss):
    """A loss that forgot its options."""

    def evaluate(self, outputs, labels) -> LossResult:
        return LossResult(outputs["energy"].sum())


@pytest.fixture
def installed(monkeypatch):
    """Pretend that another package registers losses, all in this module unless it says otherwise."""

    def install(**targets: str) -> None:
        points = [EntryPoint(name, value, "mlip_refine.losses") for name, value in targets.items()]
        module = sys.modules[loss_types.__module__]
        monkeypatch.setattr(module, "entry_points", lambda group: points)

    monkeypatch.setattr("collections.TemperatureDrop", TemperatureDrop, raising=False)
    monkeypatch.setattr("collections.NoOptions", NoOptions, raising=False)
    return install


def _losses(tmp_path, text: str) -> list:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\npotential: {model: m}\nlosses:\n" + dedent(text))
    return [spec.bind(SETTING) for spec in loss_specs(load_config(path).losses)]


def test_built_in_losses_with_their_options(tmp_path):
    losses = _losses(
        tmp_path,
        """\
        - type: replay
          weight: 2
          forces_weight: 7
        - {type: replay, name: again}
        """,
    )
    assert [(loss.name, loss.weight) for loss in losses] == [("replay", 2.0), ("again", 1.0)]
    assert isinstance(losses[0], Replay)
    assert losses[0].weights["forces"] == 7.0


def test_an_unknown_type_names_line_and_nearest(tmp_path):
    with pytest.raises(InputError) as caught:
        _losses(tmp_path, "- type: replay\n- type: free_energy_diference\n")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'run.yaml'}:5: unknown loss 'free_energy_diference'")
    assert "expected one of angular_distribution, " in message
    assert ", free_energy_difference, " in message
    assert message.endswith("Did you mean 'free_energy_difference'?")


def test_an_unknown_option_names_line_and_nearest(tmp_path):
    with pytest.raises(InputError) as caught:
        _losses(tmp_path, "- type: replay\n  force_weight: 3\n")
    assert str(caught.value).startswith(f"{tmp_path / 'run.yaml'}:5: ")
    assert "Did you mean 'forces_weight'?" in str(caught.value)


def test_two_losses_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="both 'replay'"):
        _losses(tmp_path, "- type: replay\n- type: replay\n")


def test_a_loss_of_another_package(tmp_path, installed):
    installed(temperature_drop="collections:TemperatureDrop")
    assert loss_types()["temperature_drop"].loss_class is TemperatureDrop
    (loss,) = _losses(tmp_path, "- {type: temperature_drop, depth: 4.5}\n")
    assert isinstance(loss, TemperatureDrop)
    assert loss.depth == 4.5
    with pytest.raises(InputError, match="Did you mean 'depth'"):
        _losses(tmp_path, "- {type: temperature_drop, dept: 4.5}\n")


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("gone", "no_such_package_at_all:Loss", "loss 'gone' cannot be imported; found No module named"),
        ("missing", "collections:NoSuchLoss", "loss 'missing' cannot be imported"),
        ("no_loss", "collections:OrderedDict", "'no_loss' is not a loss class with Options"),
        ("function", "textwrap:dedent", "'function' is not a loss class with Options"),
        ("bare", "collections:NoOptions", "'bare' is not a loss class with Options"),
        ("replay", "collections:TemperatureDrop", "two losses are called 'replay'"),
    ],
)
def test_broken_registrations_are_refused(installed, name, target, message):
    installed(**{name: target})
    with pytest.raises(InputError, match=message) as caught:
        loss_types()
    assert str(caught.value).startswith(target)


def test_names_that_configs_use_stay():
    """New ones need no line here: see the next test."""
    assert set(loss_types()) >= {
        *("angular_distribution", "bulk_modulus", "cell_angles", "density", "elastic_constants", "enthalpy"),
        *("enthalpy_difference", "free_energy_difference", "heat_capacity", "lattice", "linear_expansion"),
        *("phonon_frequencies", "phonon_hvp"),
        *("pressure", "radial_distribution", "replay", "stress", "structure_factor", "thermal_expansion"),
        *("volume", "volume_difference"),
    }


def test_every_class_of_options_is_a_loss_of_its_name():
    """`BulkModulusOptions` is `bulk_modulus`; classes that others build on are no losses."""
    classes = [
        found
        for module in (options, observable_options)
        for found in vars(module).values()
        if isinstance(found, type) and found.__module__ == module.__name__ and "Options" in found.__name__
    ]
    final = [each for each in classes if not any(each in other.__mro__[1:] for other in classes)]
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", c.__name__.removesuffix("Options")).lower() for c in final]
    assert dict(zip(names, final, strict=True)) == {n: loss.options for n, loss in loss_types().items()}
    assert len(names) == len(set(names))


def test_options_of_all_losses_are_read_without_torch():
    code = "import mlip_refine.losses.registry, sys; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
