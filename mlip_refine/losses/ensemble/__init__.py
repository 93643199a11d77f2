"""Losses on reweighted averages of frames: observables, curves and differences between phases."""
