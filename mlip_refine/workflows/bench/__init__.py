"""`mlip-refine bench`: the speed and memory of this package on this machine, beside their floors."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mlip_refine.config import load_config
from mlip_refine.files import write_json
from mlip_refine.workflows.base import Command, CommandResult, TrustPickle, print_json, terminal


def run_bench(  # noqa: PLR0913 - the options of a command
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="Time what this config samples, not titanium.")
    ] = None,
    *,
    model: Annotated[
        str | None, typer.Option(help="Embedded name, path or foundation model (titanium-compact).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N (auto).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64 (float32).")] = None,
    sizes: Annotated[str, typer.Option(help="Systems x atoms of each (4x54,8x128).")] = "",
    accelerate: Annotated[str, typer.Option(help="Of none, compile, cueq, auto: such as none,cueq.")] = "",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here; - prints them.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Half a minute, larger errors.")] = False,
    medium: Annotated[bool, typer.Option("--medium", help="On a CPU too: a large model.")] = False,
    trust_pickle: TrustPickle = False,
) -> CommandResult:
    """Time the engine and the streamed gradient on this machine, beside the bare model and ASE."""
    trusted = ["potential.trust_pickle=true"] if trust_pickle else []
    settings = None if config is None else load_config(config, trusted)
    # Imported here: they import torch.
    from mlip_refine.workflows.bench.run import bench  # noqa: PLC0415
    from mlip_refine.workflows.bench.tables import print_bench  # noqa: PLC0415

    result = bench(
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
    data = result.as_json()
    to_stdout = json_file is not None and str(json_file) == "-"
    if to_stdout:
        print_json(data)
    elif json_file is not None:
        write_json(json_file, data)

    def show(console: Console) -> None:
        print_bench(terminal(stderr=True) if to_stdout else console, result)
        if json_file is not None and not to_stdout:
            console.print(f"written to {json_file}")

    return CommandResult(data, show)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


command = Command(
    name="bench",
    help="Time the engine and the streamed gradient on this machine, beside the bare model and ASE.",
    example="mlip-refine bench --quick --sizes 4x54 --json bench.json",
    function=run_bench,
    own_json=True,
)
