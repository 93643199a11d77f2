"""The sections ``training``, ``replay`` and ``evaluation``: the optimiser, its frames, the verdict."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mlip_refine.config.section import Copies, Count, CountOrZero, Paths, Section
from mlip_refine.config.units import PositiveEnergyPerAtom, Time, TimeOrZero, problem

_TURNS: dict[str, tuple[set[str], str]] = {
    "joint": (set(), "none"),
    "alternate": (set(), "none"),
    "epochs": ({"replay", "experiment"}, "such as {replay: pass, experiment: 10}"),
    "sequential": ({"replay"}, "such as {replay: 100}"),
}
"""By schedule: the turns that it has, and how they are given."""

_ADAM = ("learning_rate", "final_learning_rate", "warmup", "weight_decay", "clip_gradient", "ema_decay")
"""Options of AdamW alone."""


def _updates(value: object) -> object:
    if value == "pass" or (type(value) is int and value >= 1):
        return value
    raise problem("a number of at least 1, or pass")


class ScheduleTurns(Section):
    """Lengths of the turns that the schedules epochs and sequential take; replay begins."""

    replay: Annotated[int | Literal["pass"], BeforeValidator(_updates)] = Field(
        "pass", description="Updates in a row from replay; pass: as many as go over the training frames once."
    )
    experiment: Count | None = Field(
        None, description="epochs: updates in a row from experiments, before it is the turn of replay again."
    )


class Training(Section):
    """Updates of the parameters by all losses."""

    steps: Count = Field(40, description="Most updates of the parameters, whatever losses they are from.")
    schedule: Literal["joint", "alternate", "epochs", "sequential"] = Field(
        "joint",
        description="Which losses make an update. joint: all. alternate: experiments and replay by turns. "
        "epochs: some from replay, some from experiments, and so on. sequential: first replay, then "
        "experiments. All updates share the moments of one optimiser.",
    )
    epochs: ScheduleTurns | None = Field(
        None, description="The turns of the schedules epochs and sequential."
    )
    optimiser: Literal["adam", "gauss_newton"] = Field(
        "adam",
        description="adam: AdamW, for many updates that cost little. gauss_newton: steps to where the "
        "linearised targets are met and labelled frames change least; few updates, each with a gradient of "
        "every target and eight of every frame of a replay batch.",
    )
    damping: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="gauss_newton: of the first step; it adapts. Larger is shorter and more careful.",
    )
    learning_rate: float = Field(
        1e-3,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Step size of AdamW: by how much the first updates change every parameter.",
    )
    final_learning_rate: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Step size at the last of all steps, reached along a cosine; null: it stays.",
    )
    warmup: CountOrZero = Field(
        0,
        description="Updates over which the step size grows to learning_rate: the first steps of Adam, as "
        "large along every parameter, throw back a model that is nearly there.",
    )
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Weight decay of AdamW.")
    clip_gradient: float | None = Field(
        10.0, gt=0, allow_inf_nan=False, description="Largest norm of the gradient; null: not clipped."
    )
    trust_region: bool = Field(
        True,
        description="Shorten a step that would leave a state point fewer effective frames than "
        "sampling.n_eff_threshold, and sample anew only where little of the step is left.",
    )
    ema_decay: float = Field(
        0.9, ge=0, lt=1, description="Decay of the running mean of the parameters; 0: off."
    )
    checkpoint_every: Count = Field(1, description="Updates between two checkpoints.")
    tolerance: PositiveEnergyPerAtom = Field(
        0.3, description="Distance from every target below which the run may stop, meV/atom."
    )
    patience: Count = Field(3, description="Updates in a row inside the tolerance that end the run.")
    held_out_growth: float | None = Field(
        0.1,
        gt=0,
        allow_inf_nan=False,
        description="Growth of the errors of energies and forces of replay.valid, as a share of them, beyond "
        "which a run that meets its targets goes on as long as they fall, and which parameters to deliver "
        "must not exceed if there is a choice; null: these errors have no say.",
    )
    replay_batches: Count = Field(1, description="Replay batches in one update.")
    energy_shift: Literal["none", "replay"] = Field(
        "none",
        description="replay: after training, shift the atomic energies E0 so that the mean error of energies "
        "of replay.train is what it was before. Experiments leave absolute energies free.",
    )

    @model_validator(mode="after")
    def _own_options(self) -> Self:
        gauss_newton = self.optimiser == "gauss_newton"
        fields = type(self).model_fields
        for key in _ADAM if gauss_newton else ("damping",):
            # The config of a run folder has the defaults of all.
            if getattr(self, key) == fields[key].default:
                continue
            raise problem(f"nothing: optimiser {self.optimiser} has no {key}", key=key)
        if gauss_newton and self.schedule != "joint":
            raise problem("joint with optimiser: gauss_newton, whose steps weigh all losses", key="schedule")
        return self

    @model_validator(mode="after")
    def _turns(self) -> Self:
        given = {"replay"} if self.epochs else set()
        if self.epochs and self.epochs.experiment:
            given.add("experiment")
        wanted, such = _TURNS[self.schedule]
        if given != wanted:
            raise problem(f"{such} with schedule: {self.schedule}", key="epochs")
        return self


Key = Annotated[str, Field(min_length=1)]


class ReplaySection(Section):
    """Frames with energies, forces and stresses: extended XYZ, ASE's .traj, or HDF5 of MACE."""

    from_: Literal["labels", "model"] = Field(
        "labels",
        alias="from",
        description="labels: frames have labels. model: the initial model labels them, whatever labels they "
        "have, so that it stays what it was there.",
    )
    train: Paths | None = Field(
        None, description="File or files to train on; from: model may do without, see valid."
    )
    valid: Paths | None = Field(
        None,
        description="File or files held out, to measure errors before and after. Without train and valid, "
        "from: model takes the first frames that the run samples, every fifth of them for valid.",
    )
    energy_key: Key | None = Field("REF_energy", description="Key of the energy of a frame, eV; null: none.")
    forces_key: Key | None = Field("REF_forces", description="Key of the forces, eV/Å; null: none.")
    stress_key: Key | None = Field(
        "REF_stress", description="Key of the stress, eV/Å³, tensile positive; null: none."
    )
    virials_key: Key | None = Field(
        "REF_virials",
        description="Key of the virials, eV, which give the stress of frames that have none; null: none.",
    )
    trust_labels: bool = Field(
        False,
        description="Train on labels that do not fit the initial model, as if their unit, sign or zero of "
        "energy were others; they are warned of.",
    )
    functional: str | None = Field(
        None,
        description="Functional of the labels, such as PBE; phonons of another give a warning.",
    )
    max_frames: Count | None = Field(None, description="Read at most this many training frames; null: all.")
    batch_size: Count = Field(16, description="Frames in one batch.")

    @model_validator(mode="after")
    def _files(self) -> Self:
        given = [bool(paths) for paths in (self.train, self.valid)]
        if not all(given) and (self.from_ == "labels" or any(given)):
            raise problem("a file or several", key="valid" if self.train else "train")
        return self


class Evaluation(Section):
    """Fresh sampling after training: the starting and the trained potential, each in its own cell."""

    replicas: Copies = Field(4, description="Independent copies of every system.")
    equilibration: TimeOrZero = Field(
        1000.0, description="Time that is thrown away before frames are stored, fs."
    )
    frames: Count = Field(20, description="Frames that each replica stores.")
    interval: Time = Field(100.0, description="Time between two stored frames, fs.")
    cell_iterations: Count = Field(2, description="Newton steps from the initial cells to the refined ones.")
    seed_offset: Count = Field(
        1000, description="Added to the seed, so that no frame of the training is met again."
    )
