"""`mlip-refine free-energy`: free-energy differences between phases."""

from mlip_refine.workflows.adapted import Adapted

free_energy = Adapted(
    name="free-energy",
    help="Compute the free-energy differences of the phases, without changing the potential.",
    example="mlip-refine free-energy configs/quickstart.yaml --resume",
    layout="",
    function="mlip_refine.workflows.free_energy.run:free_energies",
    show="mlip_refine.workflows.adapted:print_free_energies",
)
