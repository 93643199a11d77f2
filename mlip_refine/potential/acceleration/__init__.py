"""Faster evaluation of the same model: exact kernels, compiled graphs, and the choice between them."""

import mlip_refine.potential.quiet_mace  # noqa: F401 - before any module here imports e3nn
