"""The command line: the verbs of `mlip_refine.workflows`, with the same words as the Python API."""

import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from mlip_refine import progress
from mlip_refine.config import Config, load_config
from mlip_refine.errors import MlipRefineError
from mlip_refine.files import room_named
from mlip_refine.interruption import Interrupted, ended_by_signals
from mlip_refine.workflows import verbs
from mlip_refine.workflows.base import Command, TrustPickle, Workflow, print_json, terminal

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as training.steps=5.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run of the run folder, if any.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and everything else on standard error.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what the run would take here, and write nothing.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show warnings of libraries, and where an error came from.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mlip-refine {version('mlip-refine')}\n")
        raise typer.Exit


@contextmanager
def _spoken(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Let a verb say as much as is asked for, about its errors too."""
    if verbose:
        warnings.simplefilter("default")
    progress.console.quiet = quiet
    try:
        yield
    except MlipRefineError:
        if verbose:
            traceback.print_exc()
        raise


def _function_of_command(command: Command) -> Callable[..., None]:
    """Return the function of typer that runs a command: its own arguments, and those that all verbs have."""

    def run(*, as_json: bool = False, quiet: bool = False, verbose: bool = False, **arguments: Any) -> None:
        with _spoken(quiet=quiet, verbose=verbose):
            result = command.function(**arguments)
        if as_json:
            print_json(result.data)
        elif not quiet:
            result.show(terminal())

    own = inspect.signature(command.function, eval_str=True).parameters.values()
    shared = (
        {"quiet": Quiet, "verbose": Verbose}
        if command.own_json
        else {"as_json": AsJson, "quiet": Quiet, "verbose": Verbose}
    )
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in shared.items()
    ]
    # Typer reads arguments from here.
    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (*own, *added)}
    return run


def _function_of_workflow(workflow: Workflow[Any, Any]) -> Callable[..., None]:
    """Return the function of typer that runs a workflow."""

    def run(
        config: ConfigPath,
        overrides: Overrides = None,
        *,
        resume: Resume = False,
        dry_run: DryRun = False,
        trust_pickle: TrustPickle = False,
        as_json: AsJson = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> None:
        with _spoken(quiet=quiet, verbose=verbose):
            trusted = ["potential.trust_pickle=true"] if trust_pickle else []
            settings = load_config(config, [*(overrides or []), *trusted])
            workflow.check_config(settings)
            with _standard_error_closed(unless=verbose):
                workflow.load()
            if dry_run:
                _print_plan(workflow, settings, as_json=as_json, quiet=quiet)
                return
            result = workflow(settings, resume=resume, console=None if quiet else terminal(stderr=as_json))
        if as_json:
            print_json(result.to_json())

    if workflow.plan is None:
        parameters = inspect.signature(run).parameters.values()
        # Typer reads arguments from here.
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter for parameter in parameters if parameter.name != "dry_run"]
        )
    return run


def _print_plan(workflow: Workflow[Any, Any], config: Config, *, as_json: bool, quiet: bool) -> None:
    """Print what a run would take."""
    from mlip_refine.workflows.plan import print_plan  # noqa: PLC0415 - the command line imports no torch

    plan = workflow.dry_run(config)
    if as_json:
        print_json(plan.as_json())
    elif not quiet:
        print_plan(terminal(), plan)


@contextmanager
def _standard_error_closed(*, unless: bool) -> Iterator[None]:
    """Silence what libraries in C write while they are imported, such as warp about a missing CUDA driver."""
    if unless:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _options(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Correct pretrained MACE potentials with experiments and free energies, and keep what they know."""


def application(declared: Iterable[Workflow[Any, Any] | Command]) -> typer.Typer:
    """Return a command line with these verbs, which have the options of all verbs beside their own."""
    made = typer.Typer(name="mlip-refine", no_args_is_help=True, pretty_exceptions_enable=False)
    made.callback()(_options)
    for verb in declared:
        function = _function_of_command(verb) if isinstance(verb, Command) else _function_of_workflow(verb)
        made.command(verb.name, help=verb.help, epilog=escape(f"Example: {verb.example}"))(function)
    return made


app = application(verbs())


def main() -> None:
    """Run the command line; errors on purpose end it with one message and their exit code."""
    if not sys.warnoptions:
        # Deprecations inside torch, e3nn or ase are no news to who runs a command.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"mlip_refine(\.|$)")
    try:
        with ended_by_signals(), room_named(Path("standard output")):
            app()
    except MlipRefineError as error:
        message = f"mlip-refine: {error}"
        Console(stderr=True, highlight=False).print(message, style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except Interrupted as end:
        sys.stderr.write(f"mlip-refine: {end}\n")
        sys.exit(end.exit_code)
