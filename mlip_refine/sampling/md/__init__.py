"""Batched molecular dynamics: the engine, its force field, integrators, thermostats and barostats."""
