"""Reference data: labelled frames, the replay buffer, experimental tables, and the structures of phases."""

from mlip_refine.data.batches import ReplayBuffer
from mlip_refine.data.frames import Frame, read_frames
from mlip_refine.data.structures import build_phase, load_structure
from mlip_refine.data.tables import Table, experimental_table, find_table, read_table

__all__ = [
    "Frame",
    "ReplayBuffer",
    "Table",
    "build_phase",
    "experimental_table",
    "find_table",
    "load_structure",
    "read_frames",
    "read_table",
]
