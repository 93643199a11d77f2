"""`mlip-refine phonons`: phonons of crystals, beside references where there are some."""
