"""`mlip-refine free-energy`: free-energy differences between phases."""
