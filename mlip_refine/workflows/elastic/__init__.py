"""`mlip-refine elastic`: elastic constants at rest and at temperatures."""
