"""What a run says: a line per update, a table at the end, and figures, from result files alone."""

from mlip_refine.report.bench import print_bench
from mlip_refine.report.dynamics import print_dynamics, write_dynamics_figures
from mlip_refine.report.dynamics_records import DynamicsResult, read_dynamics
from mlip_refine.report.elastic import print_elastic
from mlip_refine.report.figures import write_figures
from mlip_refine.report.md import print_md, write_md_figures
from mlip_refine.report.phonon_records import PhononResult, read_phonons_json
from mlip_refine.report.phonons import print_phonons, write_phonon_figures
from mlip_refine.report.run_files import Summary, TransitionRecord, Update, read_log, read_summary
from mlip_refine.report.steps import StepPrinter
from mlip_refine.report.summary import print_summary
from mlip_refine.report.thermal_elastic import print_thermal_elastic, read_thermal_elastic

__all__ = [
    "DynamicsResult",
    "PhononResult",
    "StepPrinter",
    "Summary",
    "TransitionRecord",
    "Update",
    "print_bench",
    "print_dynamics",
    "print_elastic",
    "print_md",
    "print_phonons",
    "print_summary",
    "print_thermal_elastic",
    "read_dynamics",
    "read_log",
    "read_phonons_json",
    "read_summary",
    "read_thermal_elastic",
    "write_dynamics_figures",
    "write_figures",
    "write_md_figures",
    "write_phonon_figures",
]
