"""Files of models: safe loading, what a model is made of, and saving."""

import mlip_refine.potential.quiet_mace  # noqa: F401 - before any module here imports e3nn
