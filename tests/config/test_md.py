"""The section `md`: one value or several, and no key without an effect."""

import pytest

from mlip_refine.config import config_from_dict, dump_config, load_config
from mlip_refine.errors import InputError


def config(**md):
    return config_from_dict({"name": "x", "potential": {"model": "titanium-compact"}, "md": md})


def test_a_single_value_is_a_list_of_one():
    md = config(temperature="300 K").md
    assert (md.temperature, md.pressure, md.phases) == ((300.0,), (0.0,), None)
    md = config(temperature=[300, "27 °C"], pressure=["50 kbar"], ensemble="npt", phases="hcp").md
    assert (md.temperature, md.pressure, md.phases) == ((300.0, pytest.approx(300.15)), (5.0,), ("hcp",))


def test_a_dump_reads_back_equal(tmp_path):
    whole = config(temperature=[300, "1155.5 K"], pressure=[0, 5], ensemble="nph", cell="triclinic")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(whole))
    assert "- 1155.5 K\n" in path.read_text()
    assert load_config(path) == whole


@pytest.mark.parametrize(
    ("md", "message"),
    [
        ({}, "missing key 'temperature' in section 'md'"),
        ({"temperature": []}, "expected one value or a list of at least one"),
        ({"temperature": [300, -1]}, "md.temperature[1] cannot be used; found -1"),
        (
            {"temperature": [300, "300 K"]},
            "expected values that differ",
        ),
        ({"temperature": 300, "timestep": 2}, "'timestep' belongs to section 'sampling'."),
        ({"temperature": 300, "identity": "site"}, "Did you mean 'sites'?"),
        ({"temperature": 300, "pressure": 5}, "expected no key 'pressure': nvt keeps the volume"),
        ({"temperature": 300, "cell": "isotropic"}, "expected no key 'cell': nvt keeps the cell"),
        ({"temperature": 300, "ensemble": "npt", "cell": "fixed"}, "With a fixed one it is ensemble nvt."),
        (
            {"temperature": 300, "ensemble": "npt", "thermostat": "nose_hoover"},
            "with nvt, not with npt.",
        ),
        (
            {"temperature": 300, "duration": "50 fs"},
            "found '50 fs', expected at least one interval",
        ),
        (
            {"temperature": 300, "segment": "50 fs"},
            "md.segment cannot be used; found '50 fs'",
        ),
    ],
)
def test_what_cannot_be_is_refused(md, message):
    with pytest.raises(InputError) as error:
        config(**md)
    assert message in str(error.value)


@pytest.mark.parametrize("freedom", ["isotropic", "hexagonal", "anisotropic", "triclinic", "fixed"])
def test_cells_of_phases_have_all_freedoms(freedom):
    phase = {"prototype": "hcp", "element": "Ti", "n_atoms": 54, "cell_freedom": freedom}
    data = {"name": "x", "potential": {"model": "titanium-compact"}, "phases": {"hcp": phase}}
    assert config_from_dict(data).phases["hcp"].cell_freedom == freedom
