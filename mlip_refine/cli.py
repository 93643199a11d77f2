"""The command line: the same words as the Python API."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mlip_refine.config import Config, config_schema, load_config
from mlip_refine.errors import MlipRefineError
from mlip_refine.losses.registry import loss_types

app = typer.Typer(
    name="mlip-refine",
    help="Correct pretrained MACE potentials with experiments and free energies, and keep what they know.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# Tables that go to a file are not cut to the width of a terminal.
FILE_WIDTH = 160
out = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)

# What typer makes of Ctrl-C.
INTERRUPTED = 130

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as training.steps=5.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run of the run folder, if any.")]
BenchConfig = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="Time what this config samples, not titanium.")
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Load a model file that may run code: only files you trust.")
]


def _config(path: Path, overrides: list[str] | None, *, trust_pickle: bool) -> Config:
    extra = ["potential.trust_pickle=true"] if trust_pickle else []
    return load_config(path, [*(overrides or []), *extra])


@app.command()
def finetune(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    resume: Resume = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Correct a potential and measure what changed."""
    settings = _config(config, overrides, trust_pickle=trust_pickle)
    # Imported here, so that the other commands and a refused config do not wait for mace.
    from mlip_refine.workflows.finetune.run import finetune as run  # noqa: PLC0415
    from mlip_refine.workflows.finetune.steps import StepPrinter  # noqa: PLC0415
    from mlip_refine.workflows.finetune.tables import print_summary  # noqa: PLC0415
    from mlip_refine.workflows.run_folder import LAYOUT  # noqa: PLC0415

    def show_layout(folder: Path) -> None:
        out.print(LAYOUT.format(folder=folder, name=settings.name), soft_wrap=True)

    result = run(settings, resume=resume, report=StepPrinter(out), opened=show_layout)
    print_summary(out, result.folder)


@app.command("free-energy")
def free_energy(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    resume: Resume = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Compute the free-energy differences of the phases, without changing the potential."""
    settings = _config(config, overrides, trust_pickle=trust_pickle)
    from mlip_refine.workflows.free_energy.run import free_energies  # noqa: PLC0415

    for name, result in free_energies(settings, resume=resume).items():
        out.print(
            f"{name}: G({result.to.phase}) - G({result.from_.phase}) = {result.delta_g} at "
            f"{result.temperature_K:g} K, {result.pressure_GPa:g} GPa, N = {result.n_atoms}"
        )
    out.print(f"written to {settings.run_folder}")


@app.command()
def md(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    resume: Resume = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Run molecular dynamics of the phases, and average with errors."""
    settings = _config(config, overrides, trust_pickle=trust_pickle)
    from mlip_refine.workflows.md.dynamics_records import read_dynamics  # noqa: PLC0415
    from mlip_refine.workflows.md.dynamics_tables import print_dynamics  # noqa: PLC0415
    from mlip_refine.workflows.md.run import LAYOUT  # noqa: PLC0415
    from mlip_refine.workflows.md.run import md as run  # noqa: PLC0415
    from mlip_refine.workflows.md.tables import print_md  # noqa: PLC0415

    def show_layout(folder: Path) -> None:
        out.print(LAYOUT.format(folder=folder), soft_wrap=True)

    result = run(settings, resume=resume, opened=show_layout)
    if settings.md is not None and settings.md.dynamics is not None:
        print_dynamics(out, read_dynamics(result.folder))
    print_md(out, result)


@app.command()
def elastic(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    resume: Resume = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Find the elastic constants, moduli and stability of the phases, at rest and at temperatures."""
    settings = _config(config, overrides, trust_pickle=trust_pickle)
    from mlip_refine.workflows.elastic.run import LAYOUT  # noqa: PLC0415
    from mlip_refine.workflows.elastic.run import elastic as run  # noqa: PLC0415
    from mlip_refine.workflows.elastic.tables import print_elastic  # noqa: PLC0415
    from mlip_refine.workflows.elastic.thermal_records import print_thermal_elastic  # noqa: PLC0415

    def show_layout(folder: Path) -> None:
        out.print(LAYOUT.format(folder=folder), soft_wrap=True)

    result = run(settings, resume=resume, opened=show_layout)
    print_elastic(out, result)
    print_thermal_elastic(out, result.thermal)


@app.command()
def phonons(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    resume: Resume = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Find the phonons of the phases, or of materials beside reference calculations."""
    settings = _config(config, overrides, trust_pickle=trust_pickle)
    from mlip_refine.workflows.phonons.run import LAYOUT  # noqa: PLC0415
    from mlip_refine.workflows.phonons.run import phonons as run  # noqa: PLC0415
    from mlip_refine.workflows.phonons.tables import print_phonons  # noqa: PLC0415

    def show_layout(folder: Path) -> None:
        out.print(LAYOUT.format(folder=folder), soft_wrap=True)

    result = run(settings, resume=resume, opened=show_layout)
    print_phonons(out, result)


@app.command()
def bench(  # noqa: PLR0913 - the options of a command
    config: BenchConfig = None,
    *,
    model: Annotated[
        str | None, typer.Option(help="Embedded name, path or foundation model (titanium-compact).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N (auto).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64 (float32).")] = None,
    sizes: Annotated[str, typer.Option(help="Systems x atoms of each (4x54,8x128).")] = "",
    accelerate: Annotated[str, typer.Option(help="Of none, compile, cueq, auto: such as none,cueq.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half a minute, larger errors.")] = False,
    medium: Annotated[bool, typer.Option("--medium", help="On a CPU too: a large model.")] = False,
    trust_pickle: TrustPickle = False,
) -> None:
    """Time the engine and the streamed gradient on this machine, beside the bare model and ASE."""
    settings = None if config is None else _config(config, None, trust_pickle=trust_pickle)
    from mlip_refine.files import write_json  # noqa: PLC0415
    from mlip_refine.workflows.bench import bench as run  # noqa: PLC0415
    from mlip_refine.workflows.bench.tables import print_bench  # noqa: PLC0415

    result = run(
        settings,
        model=model,
        device=device,
        dtype=dtype,
        sizes=_words(sizes),
        accelerate=_words(accelerate),
        quick=quick,
        medium=medium,
        trust_pickle=trust_pickle,
    )
    print_bench(out, result)
    if json_file is not None:
        write_json(json_file, result.as_json())
        out.print(f"written to {json_file}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@app.command()
def schema() -> None:
    """Print the JSON schema of a config."""
    schemas = {name: loss.options.model_json_schema(by_alias=True) for name, loss in loss_types().items()}
    sys.stdout.write(json.dumps(config_schema(schemas), indent=2, ensure_ascii=False) + "\n")


@app.command()
def losses() -> None:
    """List the losses and their options."""
    for name, loss in sorted(loss_types().items()):
        out.print(f"[bold]{name}[/bold]: {loss.description}")
        for field, info in loss.options.model_fields.items():
            default = "required" if info.is_required() else f"default {info.default}"
            out.print(f"  {info.alias or field}: {info.description} ({default})", markup=False)


def main() -> None:
    """Run the command line; errors on purpose end it with one message and their exit code."""
    # Deprecations inside torch, e3nn and mace are no news to who runs a command.
    for category in (FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|e3nn|mace|ast)(\.|$)")
    try:
        app()
    except MlipRefineError as error:
        message = f"mlip-refine: {error}"
        Console(stderr=True, highlight=False).print(message, style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            sys.stderr.write("mlip-refine: interrupted; go on with --resume\n")
        raise
