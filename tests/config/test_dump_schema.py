import json
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from mlip_refine.config import Config, config_schema, dump_config, load_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

RICH = {
    "name": "rich",
    "seed": 7,
    "potential": {"model": "a.model", "freeze": ["*.linear*"], "head": "PBE"},
    "phases": {
        "alpha": {"prototype": "hcp", "element": "Ti", "n_atoms": 54, "a": 2.93, "c": "0.465 nm"},
        "other": {"file": "x.vasp", "supercell": [2, 2, 3], "cell_freedom": "fixed"},
    },
    "losses": [{"type": "x", "temperature": "900 K", "nested": {"yes": [1, 2.5, None, True, "1e3", "no"]}}],
    "sampling": {"timestep": 1 / 3, "interval": "0.123456789 ps", "friction": 1e-5},
    "training": {"learning_rate": 1e-5, "clip_gradient": None},
    "replay": {"train": ["a.xyz", "b.xyz"], "valid": "c.xyz"},
}


@pytest.mark.parametrize(
    "config", [Config.model_validate(RICH), load_config(QUICKSTART)], ids=["rich", "quickstart"]
)
def test_a_dumped_config_reads_back_equal_from_any_folder(tmp_path, config):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert again.resolve("data") == config.resolve("data")
    assert dump_config(again) == dump_config(config)


def test_a_dumped_config_shows_units_and_defaults():
    text = dump_config(Config.model_validate(RICH))
    assert "a: 2.93 Å\n" in text
    assert "production: 20 ps\n" in text
    assert "tolerance: 0.3 meV/atom\n" in text
    assert "ema_decay: 0.9\n" in text


def test_every_key_is_described_and_quantities_name_their_unit():
    schema = config_schema()
    for section in [schema, *schema["$defs"].values()]:
        for key, field in section["properties"].items():
            assert "description" in field or "$ref" in field, key
            unit = field.get("x-unit") or next(
                (o["x-unit"] for o in field.get("anyOf", []) if "x-unit" in o), None
            )
            if unit:
                assert unit.removeprefix("/") in field["description"], key


class Inner(BaseModel):
    """Part of the options."""

    depth: int


class Options(BaseModel):
    """What a loss asks for."""

    phase: str = Field(description="Name of a phase.")
    inner: Inner


def test_the_schema_holds_the_losses():
    schema = config_schema({"one": Options.model_json_schema(), "two": {"type": "object", "properties": {}}})
    json.dumps(schema)
    one, two = schema["properties"]["losses"]["items"]["oneOf"]
    assert one["properties"]["type"]["const"] == "one"
    assert set(one["properties"]) == {"type", "name", "weight", "phase", "inner"}
    assert one["required"] == ["type", "phase", "inner"]
    assert one["properties"]["inner"] == {"$ref": "#/$defs/one.Inner"}
    assert "depth" in schema["$defs"]["one.Inner"]["properties"]
    assert two["properties"]["type"]["const"] == "two"


def test_quantities_accept_numbers_and_texts_in_the_schema():
    properties = config_schema()["$defs"]["Sampling"]["properties"]
    interval, timestep = properties["interval"], properties["timestep"]
    assert [option["type"] for option in interval["anyOf"]] == ["number", "string"]
    assert interval["anyOf"][0]["exclusiveMinimum"] == 0
    assert interval["default"] == 100.0
    number_or_text, automatic = timestep["anyOf"]
    assert number_or_text["anyOf"] == interval["anyOf"]
    assert automatic == {"type": "null"}
    assert timestep["default"] is None
