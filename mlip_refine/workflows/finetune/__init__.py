"""`mlip-refine finetune`: correct a potential, and evaluate it afresh."""

from mlip_refine.workflows.adapted import Adapted

LAYOUT = """{folder}
├── config.yaml       the config with every default
├── log.jsonl         one line per update
├── checkpoints/      what --resume starts from
├── frames/           sampled frames (HDF5)
├── {name}.model        the refined MACE checkpoint
├── {name}.safetensors  the same without pickle, with {name}.json
├── summary.json      what changed, with errors
└── *.png             figures"""

finetune = Adapted(
    name="finetune",
    help="Correct a potential and measure what changed.",
    example="mlip-refine finetune configs/quickstart.yaml training.steps=20 --resume",
    layout=LAYOUT,
    function="mlip_refine.workflows.finetune.run:finetune",
    show="mlip_refine.workflows.adapted:print_finetune",
    reporter="mlip_refine.workflows.finetune.steps:StepPrinter",
)
