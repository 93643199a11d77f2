"""Reference data: labelled frames, the replay buffer, and the structures that phases start from."""

from mlip_refine.data.extxyz import Frame, read_frames
from mlip_refine.data.replay import ReplayBuffer
from mlip_refine.data.structures import build_phase, load_structure

__all__ = ["Frame", "ReplayBuffer", "build_phase", "load_structure", "read_frames"]
