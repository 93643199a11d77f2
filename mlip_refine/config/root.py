"""The whole config: all sections of one YAML file, the small ones among them, and its JSON schema."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from mlip_refine.config.section import Section, Words, safe_word
from mlip_refine.config.sections.elastic import Elastic
from mlip_refine.config.sections.md import MD
from mlip_refine.config.sections.phase_diagram import PhaseDiagram
from mlip_refine.config.sections.phases import Phase
from mlip_refine.config.sections.phonons import Phonons
from mlip_refine.config.sections.sampling import FreeEnergy, Sampling
from mlip_refine.config.sections.training import Evaluation, ReplaySection, Training
from mlip_refine.config.sections.transition import Transition
from mlip_refine.config.units import problem
from mlip_refine.config.yaml.source_map import LocatedNode, Places, loss_head_schema
from mlip_refine.errors import nearest
from mlip_refine.files import user_path


def _device(value: object) -> object:
    if isinstance(value, str):
        kind, colon, number = value.partition(":")
        if not (value in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and number.isdecimal())):
            raise problem("auto, cpu, cuda, or cuda:N with the number of the device")
    return value


def _base(value: object) -> object:
    if isinstance(value, str | Path) and str(value):
        return user_path(value).absolute()
    raise problem("a folder")


def _losses(value: object) -> object:
    """Number the losses that were built in code; those of a file know their lines already."""
    if not isinstance(value, list | tuple):
        return () if value is None else value
    return tuple(
        LocatedNode(node, label=f"losses[{index}]") if type(node) is dict else node
        for index, node in enumerate(value)
    )


def _phases(value: object) -> object:
    return {} if value is None else value


SafeName = Annotated[str, BeforeValidator(safe_word)]


class PotentialSection(Section):
    """The pretrained model that a run starts from."""

    model: str = Field(
        min_length=1,
        description="Embedded name (titanium-compact, titanium-compact-2), path of a checkpoint, or name of "
        "a foundation model.",
    )
    head: str | None = Field(
        None,
        description="Head of a multi-head model; null: the only one, the one called default, or the first.",
    )
    default_dtype: Literal["float32", "float64"] = Field("float64", description="Precision of the model.")
    trust_pickle: bool = Field(
        False, description="Load a checkpoint that may run code while it is read: only for files you trust."
    )
    freeze: Words = Field((), description="Glob patterns of parameter names that stay as they are.")


class Output(Section):
    """What a run writes, and where."""

    folder: str = Field(
        "runs",
        min_length=1,
        description="The run goes to folder/name; a relative folder starts where you are.",
    )
    keep_frames: bool = Field(True, description="Keep the sampled frames (HDF5) when the run has ended.")
    figures: bool = Field(True, description="Draw figures (PNG).")


class Config(Section):
    """All settings of one run."""

    name: SafeName = Field(description="Name of the run and of the files that it writes.")
    seed: int = Field(0, ge=0, le=2**62, description="Seed of all random numbers.")
    device: Annotated[str, BeforeValidator(_device)] = Field(
        "auto", description="Where to compute: auto (GPU if there is one), cpu, cuda, or cuda:N."
    )
    base: Annotated[Path, BeforeValidator(_base, json_schema_input_type=str)] = Field(
        default_factory=Path.cwd,
        description="Folder that relative input paths start from; default: that of the file.",
    )
    potential: PotentialSection = Field(description="The pretrained model.")
    phases: Annotated[dict[SafeName, Phase], BeforeValidator(_phases)] = Field(
        default_factory=dict, description="The crystals and liquids, by name."
    )
    losses: Annotated[tuple[LocatedNode, ...], BeforeValidator(_losses)] = Field(
        (), description="What the run minimises; `mlip-refine losses` lists the types and their options."
    )
    sampling: Sampling = Field(default_factory=Sampling, description="Molecular dynamics.")
    md: MD | None = Field(None, description="What `mlip-refine md` runs.")
    elastic: Elastic = Field(default_factory=Elastic, description="What `mlip-refine elastic` computes.")
    phonons: Phonons = Field(default_factory=Phonons, description="What `mlip-refine phonons` computes.")
    transition: Transition | None = Field(None, description="What `mlip-refine transition` computes.")
    phase_diagram: PhaseDiagram | None = Field(None, description="What `mlip-refine phase-diagram` shows.")
    free_energy: FreeEnergy = Field(default_factory=FreeEnergy, description="Absolute free energies.")
    replay: ReplaySection | None = Field(
        None, description="Labelled frames that keep the model close to what it was trained on."
    )
    training: Training = Field(default_factory=Training, description="The optimiser.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="The verdict after training.")
    output: Output = Field(default_factory=Output, description="The run folder.")
    _places: Places = PrivateAttr(default_factory=Places)

    @property
    def run_folder(self) -> Path:
        """Where the run writes: ``output.folder/name``, from the current folder if relative."""
        return user_path(self.output.folder).absolute() / self.name

    def resolve(self, path: str | Path) -> Path:
        """Return an input path as absolute, relative ones from the folder of the config file."""
        return (self.base / user_path(path)).absolute()

    def where(self, *address: str | int) -> str | None:
        """Return ``file:line`` of a value, such as ``where("potential", "head")``; None in code."""
        return self._places.of_value(address)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash((self.name, self.seed))

    @model_validator(mode="after")
    def _distinct_losses(self) -> Self:
        names: dict[str, int] = {}
        for index, loss in enumerate(self.losses):
            if loss.name in names:
                raise problem(
                    f"a name for every loss: losses {names[loss.name]} and {index} are both {loss.name!r}",
                    "Give each a key 'name'.",
                    key="losses",
                )
            names[loss.name] = index
        return self

    @model_validator(mode="after")
    def _molten_crystals(self) -> Self:
        crystals = [name for name, phase in self.phases.items() if phase.melt is None]
        for name, phase in self.phases.items():
            if phase.melt is not None and phase.melt.from_ not in crystals:
                word = nearest(phase.melt.from_, crystals)
                raise problem(
                    f"a phase that is not molten itself: {', '.join(crystals) or '(there is none)'}",
                    f"Did you mean {word!r}?" if word else "",
                    key=("phases", name, "melt", "from"),
                )
        return self

    def _placed(self, places: Places) -> Self:
        """Store the line of every value, and return the config."""
        self._places = places
        return self

    def __repr_args__(self) -> Any:
        """Show the fields, without the places."""
        return [(name, getattr(self, name)) for name in type(self).model_fields]


def config_schema(loss_schemas: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Assemble the JSON schema of the whole file, for editors and for people.

    Args:
        loss_schemas: JSON schema of the options of every loss type, by type.

    Returns:
        A JSON schema (draft 2020-12) whose ``losses`` accept exactly the given types.
    """
    schema = Config.model_json_schema(by_alias=True)
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    if not loss_schemas:
        return schema
    definitions, head = schema.setdefault("$defs", {}), loss_head_schema()["properties"]
    branches = []
    for kind, options in sorted(loss_schemas.items()):
        # Definitions of the options move to the top of the schema, under names that begin with the type.
        own = _renamed(options, f"{kind}.")
        definitions |= {f"{kind}.{name}": inner for name, inner in own.pop("$defs", {}).items()}
        named = {"type": {"const": kind, "description": "This loss."}}
        branches.append(
            {
                **own,
                "type": "object",
                "properties": {**head, **own.get("properties", {}), **named},
                "required": ["type", *(key for key in own.get("required", []) if key != "type")],
                "additionalProperties": False,
            }
        )
    schema["properties"]["losses"]["items"] = {"oneOf": branches}
    return schema


def _renamed(schema: Any, prefix: str) -> Any:
    """Point references at the definitions' new names."""
    if isinstance(schema, list):
        return [_renamed(item, prefix) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.replace("#/$defs/", f"#/$defs/{prefix}") if key == "$ref" else _renamed(value, prefix)
        for key, value in schema.items()
    }
