"""What a config may say about the losses that are not on a single observable.

This module imports no torch: a config is checked, and `mlip-refine schema` and `losses` answer, without it.
The first line of each docstring is what `mlip-refine losses` prints.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mlip_refine.config import (
    Count,
    Dimension,
    EnergyPerAtom,
    Length,
    Paths,
    PositiveEnergyPerAtom,
    PositivePressure,
    Pressure,
    Section,
    Temperature,
    problem,
)
from mlip_refine.config.section import CountOrZero
from mlip_refine.config.sections.elastic import Strain

type ProbeKind = Literal["one_hot", "irreducible", "rademacher", "thermal", "full"]

ALL_DISPLACEMENTS = 10**6
"""Directions of a material in an update, more than there are displacements."""

_VOLUME = Dimension("volume per atom", {"Å³/atom": 1.0, "Å3/atom": 1.0, "nm³/atom": 1e3})


class ReplayOptions(Section):
    """Mean squared errors of energy, forces and stress on labelled frames."""

    energy_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the squared error of the energy per atom, 1/eV²; null: 5 over the mean "
        "square of the error of the initial model, so that an error that grows by 10 % costs as much as a "
        "target that is missed by 1 σ.",
    )
    forces_weight: float | None = Field(
        None, ge=0, description="Weight of the squared error of force components, Å²/eV²; null: likewise."
    )
    stress_weight: float | None = Field(
        None, ge=0, description="Weight of the squared error of stress components, Å⁶/eV²; null: likewise."
    )


class TwoPhaseOptions(Section):
    """Options that all losses on a difference between two phases share."""

    from_: str = Field(alias="from", description="Phase I of the difference II - I.")
    to: str = Field(description="Phase II of the difference II - I.")
    temperature: Temperature = Field(description="Temperature of the target, K.")
    pressure: Pressure = Field(0.0, description="Pressure of the target, GPa.")
    target: float
    uncertainty: float

    @model_validator(mode="after")
    def _two_phases(self) -> Self:
        if self.from_ == self.to:
            raise problem("another phase than that of from", key="to")
        return self


class FreeEnergyDifferenceOptions(TwoPhaseOptions):
    """((ΔG - target)/σ)², ΔG = G_II - G_I of two phases per atom, reweighted (DiffTTC)."""

    target: EnergyPerAtom = Field(0.0, description="Target ΔG, meV/atom; 0 is coexistence.")
    uncertainty: PositiveEnergyPerAtom = Field(0.3, description="Standard error σ of the target, meV/atom.")
    initial: str = Field(
        "compute",
        min_length=1,
        description="ΔG of the initial model: a file of free-energy, a finished run of transition, or "
        "compute.",
    )


class EnthalpyDifferenceOptions(TwoPhaseOptions):
    """((ΔH - target)/σ)², ΔH = H_II - H_I of two phases per atom; at coexistence the latent heat."""

    target: EnergyPerAtom = Field(description="Target ΔH, meV/atom.")
    uncertainty: PositiveEnergyPerAtom = Field(description="Standard error σ of the target, meV/atom.")


class VolumeDifferenceOptions(TwoPhaseOptions):
    """((ΔV - target)/σ)², ΔV = V_II - V_I of two phases per atom, in cells that move."""

    target: Annotated[float, _VOLUME] = Field(description="Target ΔV, Å³/atom.")
    uncertainty: Annotated[float, _VOLUME.bounded(above=0.0)] = Field(
        description="Standard error σ of the target, Å³/atom."
    )


class ElasticTarget(Section):
    """Elastic constants at one temperature."""

    temperature: Temperature = Field(description="Temperature of the targets, K.")
    lattice: Annotated[tuple[Length, ...], Field(strict=False, max_length=2)] = Field(
        (), description="Lattice constants (a) or (a, c) of the cell, Å; empty: those of the phase."
    )
    constants: dict[str, Pressure] = Field(
        min_length=1, description="Target constants by name, in the standard axes, such as C11: 162 GPa."
    )
    uncertainty: PositivePressure = Field(1.0, description="Standard error of each constant, GPa.")


class ElasticConstantsOptions(Section):
    """Mean of ((C - target)/σ)² over elastic constants and temperatures."""

    phase: str = Field(description="A crystal among phases.")
    method: Literal["static", "fluctuation", "deformation"] = Field(
        "fluctuation",
        description="fluctuation: fluctuations of the stress with the Born term, reweighted. deformation: "
        "stress of strained cells, reweighted. static: constants of the relaxed crystal, with a thermal part "
        "from frames.",
    )
    kind: Literal["adiabatic", "isothermal"] = Field(
        "adiabatic", description="Kind of the target constants; ultrasound measures adiabatic ones."
    )
    targets: Annotated[tuple[ElasticTarget, ...], Field(strict=False)] = Field(
        (), description="One entry per temperature."
    )
    table: str | None = Field(
        None,
        description="Instead of targets: an experimental table of the package, such as titanium-hcp-elastic, "
        "or a CSV file with columns temperature, C11, ... and, for the cell, a and c.",
    )
    temperatures: Annotated[tuple[Temperature, ...], Field(strict=False)] = Field(
        (), description="Temperatures that are taken from the table, K."
    )
    uncertainty: PositivePressure | None = Field(
        None, description="Standard error of each constant of the table, GPa; null: that of the table."
    )
    pressure: Pressure | None = Field(
        None, description="Target pressure of the cells, GPa; null: the stress is not matched."
    )
    pressure_uncertainty: PositivePressure = Field(
        0.05, description="Standard error of every component of the stress, GPa."
    )
    thermal: bool = Field(True, description="static: add the thermal part; false: compare at 0 K.")
    every: Count = Field(20, description="static: updates between two draws of frames.")
    smooth: bool = Field(
        True,
        description="static: fit the thermal part by αT + βT² where there are three temperatures or more, "
        "each with one cell.",
    )
    born_every: Count = Field(
        4,
        description="Frames from one with a Born term to the next. It costs nine evaluations, with its "
        "gradient thirty, but fluctuates little: of one frame in 4 most errors are within 10 % of those of "
        "all, of one in 10 some are a third larger.",
    )
    strain: Strain = 0.01

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.method == "deformation" and self.kind == "adiabatic":
            raise problem("kind: isothermal: strained cells at one temperature show these", key="kind")
        if (self.table is None) == (not self.targets) or (self.table is None) != (not self.temperatures):
            raise problem("either targets, or a table with temperatures", key="targets")
        if self.uncertainty is not None and self.table is None:
            raise problem("no uncertainty beside targets: each has its own", key="uncertainty")
        states = [(t.temperature, t.lattice) for t in self.targets] or [(t, ()) for t in self.temperatures]
        if len(set(states)) < len(states):
            raise problem("every temperature once", key="targets" if self.targets else "temperatures")
        return self


class PhononOptions(Section):
    """Options of all losses on phonons."""

    data: Paths = Field(
        description="Phonon calculations of phonopy or phono3py: files, folders, or an index.csv of many."
    )
    split: Literal["train", "val", "test", "kappa103"] | None = Field(
        "train", description="Part that is trained on, by the index or by material; null: all, kappa103 too."
    )
    lowest_frequency: float | None = Field(
        None,
        description="Materials whose lowest frequency in the index is below this, THz, are left out, such as "
        "unstable ones.",
    )
    functional: str | None = Field(
        None,
        description="Functional of the model's training data, such as PBE; phonons of another are warned of.",
    )
    skip_refused: bool = Field(
        False,
        description="Leave out calculations that fail a check, or have elements that the model does not "
        "know, and say which.",
    )
    validation: Literal["train", "val", "test", "kappa103"] | None = Field(
        None, description="Part of the same data whose whole loss is measured now and then; null: none."
    )
    validate_every: Count = Field(50, description="Updates from one validation to the next.")
    batch_size: Count = Field(4, description="Materials in one update.")
    edge_budget: Count | None = Field(
        None,
        description="Edges in one update, counted for every direction; small cells come together, a large "
        "one alone; null: batch_size materials.",
    )
    error: Literal["mse", "huber", "l1"] = Field(
        "mse",
        description="Mean over components of r², of r²/2 that turns linear at huber_delta, or of |r|.",
    )
    huber_delta: float = Field(0.1, gt=0, description="Where huber turns linear, in the unit of the loss.")
    precision: Literal["model", "float64"] = Field(
        "model", description="float64: evaluate in double precision whatever default_dtype is."
    )
    seed: CountOrZero = Field(0, description="Seed of the order of materials and of random probes.")

    @model_validator(mode="after")
    def _other_part(self) -> Self:
        if self.validation is not None and self.validation == self.split:
            raise problem("another part than split", key="validation")
        return self

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.edge_budget is not None and "batch_size" in self.model_fields_set:
            raise problem(
                "no batch_size: edge_budget settles how many materials an update has", key="batch_size"
            )
        return self

    def for_validation(self) -> Self:
        """Return the options of the loss that measures the whole validation part at once."""
        return self.model_copy(update={"split": self.validation, "validation": None})


class PhononFrequenciesOptions(PhononOptions):
    """Mean error of phonon frequencies over materials, wave vectors and modes, THz."""

    mesh: Annotated[tuple[Count, Count, Count], Field(strict=False)] | None = Field(
        None,
        description="Γ-centred mesh of wave vectors; null: those that the supercell holds.",
    )
    floor: float = Field(
        0.1,
        gt=0,
        allow_inf_nan=False,
        description="Frequencies below this, THz, count by their squares, so that zero has a derivative.",
    )


class PhononHVPOptions(PhononOptions):
    """Mean error of products (H - Φ) v of Hessians with directions over materials, eV/Å²."""

    backend: Literal["hvp", "central", "displacements", "forces"] = Field(
        "hvp",
        description="hvp: exact second derivatives. central: central differences of forces. "
        "displacements: forces of the displaced cells of the reference, minus those at rest; needs no force "
        "constants. forces: the model's whole forces there, as in ordinary fine-tuning, beside the same "
        "labels: where the reference is at rest, the model shall be, too.",
    )
    probe: ProbeKind | None = Field(
        None,
        description="one_hot (default): one atom along one axis. irreducible: among the columns that differ "
        "by symmetry. rademacher: all atoms, random signs. thermal: displacements of the harmonic crystal, "
        "large along soft modes. full: all irreducible columns, with weights.",
    )
    probes: Count = Field(1, description="Directions, or displacements, of every material in one update.")
    mass_weighted: bool = Field(
        False, description="Compare dynamical matrices, times the mean mass of the material."
    )
    relative: bool = Field(
        False,
        description="Compare Hessians over the root mean square of a component of Φ v in the reference, so "
        "that soft materials count as much as stiff ones.",
    )
    step: Length = Field(0.01, description="central: largest component of a displacement, Å.")

    @property
    def of_displacements(self) -> bool:
        """Whether directions are the displacements of the reference."""
        return self.backend in ("displacements", "forces")

    def for_validation(self) -> Self:
        """Return the options of the validation loss: whole Hessians, or all displacements."""
        changes = {"probes": ALL_DISPLACEMENTS} if self.of_displacements else {"probe": "full"}
        return super().for_validation().model_copy(update=changes)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.of_displacements and self.probe is not None:
            raise problem("no probe: the displacements are those of the reference", key="probe")
        if self.probe == "full" and "probes" in self.model_fields_set:
            raise problem("no number of probes: full has all irreducible columns", key="probes")
        return self
