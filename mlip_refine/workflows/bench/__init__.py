"""`mlip-refine bench`: the speed and memory of this package on this machine, beside their floors."""

from mlip_refine.workflows.bench.run import bench

__all__ = ["bench"]
