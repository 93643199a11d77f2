"""Rows to be measured, and what becomes of those that cannot be."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mlip_refine.errors import MlipRefineError
from mlip_refine.workflows.bench.records import Comparison, Outcome, Topic


@dataclass(frozen=True)
class Job:
    """One row of the table before it is measured.

    Attributes:
        topic: What is measured against what.
        model: Name of the potential.
        workload: Systems and ensemble.
        run: Measures it.
        accelerate: How the potential is accelerated.
    """

    topic: Topic
    model: str
    workload: str
    run: Callable[[], Outcome]
    accelerate: str = "none"

    def result(self) -> Comparison:
        """Measure; a row that needs too much memory, or what is not installed, says so instead."""
        try:
            return self._row(self.run(), "")
        except torch.OutOfMemoryError:
            failure = "out of memory"
        except MlipRefineError as error:
            failure = str(error)
        # Only here has the traceback let go of what the row had allocated.
        gc.collect()
        torch.cuda.empty_cache()
        return self._row(None, failure)

    def _row(self, outcome: Outcome | None, failure: str) -> Comparison:
        return Comparison(self.topic, self.model, self.workload, self.accelerate, outcome, failure)
