"""Monitoring of running systems: faults, restarts, phase identity and the frames that are recorded."""
