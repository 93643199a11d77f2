"""`mlip-refine finetune`: correct a potential, and evaluate it afresh."""

from typing import TYPE_CHECKING

from mlip_refine.config import Config
from mlip_refine.errors import InputError
from mlip_refine.losses.registry import loss_specs
from mlip_refine.workflows.base import Workflow

if TYPE_CHECKING:
    from mlip_refine.workflows.finetune.run import FinetuneResult, Prepared

LAYOUT = """{folder}
├── config.yaml       the config with every default
├── log.jsonl         one line per update
├── checkpoints/      what --resume starts from
├── frames/           sampled frames (HDF5)
├── {name}.model        the refined MACE checkpoint
├── {name}.safetensors  the same without pickle, with {name}.json
├── summary.json      what changed, with errors
├── provenance.json   versions, seed, device and hashes
├── log.txt           what was printed, warnings and errors
└── *.png             figures"""


def check_losses(config: Config) -> None:
    """Check that a config has losses, with valid options.

    Raises:
        InputError: If there are none, or for an unknown loss or a wrong option.
    """
    if not loss_specs(config.losses):
        raise InputError("there is nothing to do: the config has no losses", where=config.where("losses"))


finetune: "Workflow[Prepared, FinetuneResult]" = Workflow(
    name="finetune",
    help="Correct a potential and measure what changed.",
    example="mlip-refine finetune configs/quickstart.yaml training.steps=20 --resume",
    layout=LAYOUT,
    check="mlip_refine.workflows.finetune:check_losses",
    prepare="mlip_refine.workflows.finetune.run:prepare",
    run="mlip_refine.workflows.finetune.run:run",
    show="mlip_refine.workflows.finetune.tables:print_result",
    figures="mlip_refine.workflows.finetune.figures:write_figures",
    reporter="mlip_refine.workflows.finetune.steps:StepPrinter",
)
