"""What every verb shares: how it is declared, and what happens when it is called.

A verb with a run folder is a `Workflow`, any other a `Command`. Both are declared in a module that imports no
torch and are listed in `WORKFLOWS` and `COMMANDS` of `mlip_refine.workflows`; the command line and the Python
API are made from these declarations.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

import typer
from rich.console import Console

from mlip_refine.config import Config, dump_config
from mlip_refine.errors import MlipRefineError
from mlip_refine.files import room_named, write_json
from mlip_refine.workflows.run_folder import FILE_WIDTH, locked_run_folder, logged, packages

if TYPE_CHECKING:
    from mlip_refine.sampling import FrameStore
    from mlip_refine.workflows.plan import PlanRecord

TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Load a model file that may run code: only files you trust.")
]
"""An option of the command line for verbs that load a model."""

PROVENANCE_FORMAT = "mlip_refine provenance 1"

FRAMES = "frames"
"""Folder of the sampled frames in a run folder, which `output.keep_frames: false` removes."""

UNFINISHED = "unfinished"
"""Folder of a long calculation that is under way, in a run folder; it is removed at the end."""


class Origin(Protocol):
    """What the numbers of a run come from: a `Potential`, or what is known of one without loading it."""

    @property
    def hash(self) -> str:
        """Hash of the model."""

    @property
    def head(self) -> str:
        """Head of the model."""

    @property
    def device(self) -> object:
        """Where was computed."""


class Prepared(Protocol):
    """Checked input of a workflow."""

    @property
    def potential(self) -> Origin:
        """The potential that the workflow starts from."""


class Result(Protocol):
    """Result of a workflow."""

    def to_json(self) -> Any:
        """Return the main result as plain data, as `--json` prints it."""

    def files(self) -> Mapping[str, Any]:
        """Return the JSON files of the result: plain data by file name."""


@dataclass(frozen=True)
class Run:
    """A run of a workflow in its folder.

    Attributes:
        folder: The run folder.
        seed: Random seed of the run.
        report: Called with every report of progress that the workflow makes.
    """

    folder: Path
    seed: int
    report: Callable[[Any], None] = field(default=lambda _: None)

    @property
    def store(self) -> "FrameStore":
        """Store of the sampled frames, in the folder `frames`."""
        from mlip_refine.sampling import FrameStore  # noqa: PLC0415 - declarations of verbs import no torch

        return FrameStore(self.folder / FRAMES, {"seed": self.seed, "packages": packages()})


@dataclass(frozen=True)
class Workflow[P: Prepared, R: Result]:
    """A verb that works in a run folder; calling it runs it.

    The functions are dotted names, `package.module:function`, which are imported when they are needed.

    Attributes:
        name: Name on the command line.
        help: What it does, in one line.
        example: A call, shown by `--help`.
        layout: Annotated tree of the run folder; `{folder}` and `{name}` are filled in.
        prepare: `(Config) -> P`: checks all input and writes nothing.
        run: `(P, Run) -> R`: computes the result; files beside those of `R.files()` are written here.
        show: `(Console, R) -> None`: prints the tables of a result.
        figures: `(Path) -> object`: draws the figures of a finished run folder; None where there are none.
        check: `(Config) -> None`: the part of the checks that needs no torch.
        plan: `(P) -> Plan`: what a run samples, for a dry run; None where there is none.
        reporter: `(Console) -> Callable`: what prints the reports of progress; None without reports.
        section: Section of the config that this verb alone reads, if there is one.
        resumable: Keys of the config that may differ when a run is resumed, beside those of every workflow.
        growing: Keys that may become larger, but not smaller, when a run is resumed.
    """

    name: str
    help: str
    example: str
    layout: str
    prepare: str
    run: str
    show: str
    figures: str | None = None
    check: str | None = None
    plan: str | None = None
    reporter: str | None = None
    section: str | None = None
    resumable: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()

    def __call__(
        self,
        config: Config,
        *,
        resume: bool = False,
        report: Callable[[Any], None] | None = None,
        opened: Callable[[Path], None] | None = None,
        console: Console | None = None,
    ) -> R:
        """Check the input, open the run folder, compute, and write the results.

        Args:
            config: Everything that the run needs to know.
            resume: Go on with the run of the run folder, if there is one.
            report: Called with every report of progress.
            opened: Called with the run folder, once the input has been checked.
            console: Where to print what the command line prints: layout, progress and tables. Nothing is
                printed without one.

        Raises:
            InputError: For bad input; nothing has been overwritten.
            MlipRefineError: If the run cannot be finished.
        """
        return execute(self, config, resume=resume, report=report, opened=opened, console=console)

    def dry_run(self, config: Config) -> "PlanRecord":
        """Check the input, time a few steps, and return what a run would take; nothing is written.

        Args:
            config: Everything that the run needs to know.

        Raises:
            InputError: For bad input.
            MlipRefineError: If the verb has no dry run.
        """
        from mlip_refine.workflows.plan import estimate  # noqa: PLC0415 - declarations of verbs import no torch

        if self.plan is None:
            raise MlipRefineError(f"{self.name} has no dry run")
        self.check_config(config)
        prepared = resolve_name(self.prepare)(config)
        return estimate(self.name, resolve_name(self.plan)(prepared))

    def check_config(self, config: Config) -> None:
        """Check what needs no torch.

        Raises:
            InputError: For bad input.
        """
        if self.check is not None:
            resolve_name(self.check)(config)

    def load(self) -> None:
        """Import everything that the workflow needs."""
        for name in (self.prepare, self.run, self.show, self.reporter, self.plan):
            if name is not None:
                resolve_name(name)


@dataclass(frozen=True)
class CommandResult:
    """What a command has found out.

    Attributes:
        data: Plain data, as `--json` prints it.
        show: `(Console) -> None`: prints it for people; not called with `--json` or `--quiet`.
    """

    data: Any
    show: Callable[[Console], None]


@dataclass(frozen=True)
class Command:
    """A verb without a run folder; the command line adds `--json`, `--quiet` and `--verbose`.

    Attributes:
        name: Name on the command line.
        help: What it does, in one line.
        example: A call, shown by `--help`.
        function: What the command does; its annotated arguments, as for typer, are those of the command line.
        own_json: Whether the function has a `--json` of its own.
    """

    name: str
    help: str
    example: str
    function: Callable[..., CommandResult]
    own_json: bool = False


def execute[P: Prepared, R: Result](
    workflow: Workflow[P, R],
    config: Config,
    *,
    resume: bool = False,
    report: Callable[[Any], None] | None = None,
    opened: Callable[[Path], None] | None = None,
    console: Console | None = None,
) -> R:
    """Run a workflow; see `Workflow.__call__`."""
    workflow.check_config(config)
    prepared = cast("P", resolve_name(workflow.prepare)(config))
    provenance = _provenance(workflow, config, prepared.potential)
    folder = locked_run_folder(
        config,
        resume=resume,
        section=workflow.section,
        resumable=workflow.resumable,
        growing=workflow.growing,
    )
    with (
        room_named(config.run_folder),
        folder as path,
        logged(path, f"{workflow.name} of {config.name}") as log,
    ):
        consoles = [log] if console is None else [console, log]
        for each in consoles:
            each.print(workflow.layout.format(folder=path, name=config.name), soft_wrap=True, markup=False)
        if opened is not None:
            opened(path)
        reporters = [resolve_name(workflow.reporter)(each) for each in consoles] if workflow.reporter else []
        reporters += [] if report is None else [report]

        def tell_all(progress: object) -> None:
            for reporter in reporters:
                reporter(progress)

        result = cast("R", resolve_name(workflow.run)(prepared, Run(path, config.seed, tell_all)))
        for name, data in result.files().items():
            write_json(path / name, data)
        write_json(path / "provenance.json", provenance)
        if config.output.figures and workflow.figures is not None:
            resolve_name(workflow.figures)(path)
        if not config.output.keep_frames:
            shutil.rmtree(path / FRAMES, ignore_errors=True)
        for each in consoles:
            resolve_name(workflow.show)(each, result)
    return result


def _provenance(workflow: Workflow[Any, Any], config: Config, potential: Origin) -> dict[str, Any]:
    """Return where the numbers of a run come from; where it writes and reads does not count."""
    counted = config.model_copy(update={"output": type(config.output)(), "base": Path("/")})
    return {
        "format": PROVENANCE_FORMAT,
        "workflow": workflow.name,
        "name": config.name,
        "seed": config.seed,
        "device": str(potential.device),
        "model_hash": potential.hash,
        "head": potential.head,
        "config_hash": hashlib.sha256(dump_config(counted).encode()).hexdigest(),
        "packages": packages(),
    }


def terminal(*, stderr: bool = False) -> Console:
    """Return a console for the terminal; tables that go to a file are not cut to the width of one."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else FILE_WIDTH)


def print_json(data: Any) -> None:
    """Write plain data to standard output as JSON."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
