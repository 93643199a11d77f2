"""Checkpoint files: finding, reading without running code, and writing MACE models."""
