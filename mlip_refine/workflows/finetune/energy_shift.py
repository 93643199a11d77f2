"""The shift of absolute energies that `training.energy_shift` asks for: refused early, done at the end."""

from collections.abc import Iterable

from mlip_refine.config import Config
from mlip_refine.data import ReplayBuffer
from mlip_refine.errors import InputError
from mlip_refine.potential import Potential
from mlip_refine.potential.energy_shift import Compositions, shift_energies
from mlip_refine.sampling import StatePoint
from mlip_refine.training.replay_batches import LabelledFrame


def require_shift(
    config: Config,
    potential: Potential,
    buffer: ReplayBuffer[LabelledFrame] | None,
    points: Iterable[StatePoint],
) -> None:
    """Refuse a shift that the training frames do not tell, before anything is computed.

    Raises:
        InputError: If there are no frames, or they do not tell the energies of the elements of the phases.
    """
    if config.training.energy_shift == "none":
        return
    where = config.where("training", "energy_shift")
    if buffer is None:
        problem = "training.energy_shift needs labelled frames, but the config has no section replay"
        raise InputError(problem, where=where)
    elements = {int(number) for point in points for number in point.atoms.numbers}
    structures = [frame.structure for frame in buffer.frames]
    Compositions.of(potential, structures).require(elements, where)


def shift_after_training(
    config: Config, potential: Potential, initial: Potential, buffer: ReplayBuffer[LabelledFrame] | None
) -> dict[str, float] | None:
    """Take the drift of absolute energies out of a refined potential, in place.

    Returns:
        What was added to the atomic energies by element, eV; `None` where no shift is wanted.

    Raises:
        MlipRefineError: If memory runs out for a single system.
    """
    if config.training.energy_shift == "none" or buffer is None:
        return None
    return shift_energies(potential, initial, [frame.structure for frame in buffer.frames])
