"""Verbs that open their run folder themselves."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from rich.console import Console

from mlip_refine.config import Config


@dataclass(frozen=True)
class Adapted:
    """A verb that is one function of config and `resume`; it has the words of a `Workflow`."""

    name: str
    help: str
    example: str
    layout: str
    function: str
    show: str
    reporter: str | None = None

    def __call__(
        self,
        config: Config,
        *,
        resume: bool = False,
        report: Callable[[Any], None] | None = None,
        opened: Callable[[Path], None] | None = None,
        console: Console | None = None,
    ) -> Any:
        """Run the function, and print what the command line prints."""

        def open_and_show(folder: Path) -> None:
            if console is not None:
                console.print(self.layout.format(folder=folder, name=config.name), soft_wrap=True)
            if opened is not None:
                opened(folder)

        options: dict[str, Any] = {}
        if self.layout:
            options["opened"] = open_and_show
        if report is not None:
            options["report"] = report
        elif self.reporter is not None and console is not None:
            options["report"] = resolve_name(self.reporter)(console)
        result = resolve_name(self.function)(config, resume=resume, **options)
        if console is not None:
            resolve_name(self.show)(console, result, config)
        return result

    def check_config(self, config: Config) -> None:
        """Check nothing before the function is called."""

    def load(self) -> None:
        """Import everything that the verb needs."""
        resolve_name(self.function)


def print_finetune(console: Console, result: Any, config: Config) -> None:  # noqa: ARG001
    """Print the summary of a run."""
    resolve_name("mlip_refine.workflows.finetune.tables:print_summary")(console, result.folder)


def print_free_energies(console: Console, results: Any, config: Config) -> None:
    """Print every free-energy difference."""
    for name, result in results.items():
        console.print(
            f"{name}: G({result.to.phase}) - G({result.from_.phase}) = {result.delta_g} at "
            f"{result.temperature_K:g} K, {result.pressure_GPa:g} GPa, N = {result.n_atoms}"
        )
    console.print(f"written to {config.run_folder}")
