"""The replay buffer: frames of the old training set, dealt out in batches so that nothing is forgotten."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from mlip_refine.errors import InputError


class ReplayState(TypedDict):
    """What is needed to go on dealing: plain numbers that any format can hold."""

    seed: int
    epoch: int
    position: int
    n_frames: int
    batch_size: int


class ReplayBuffer[T]:
    """Frames in batches, every frame once per epoch, in an order that seed and epoch settle.

    The order of an epoch depends on nothing but seed and epoch, so a resumed run deals the same batches.
    Batches run on across epochs: none is shorter than the others.

    Attributes:
        frames: The frames, in whatever form the caller trains on.
        batch_size: Frames per batch; at most the number of frames.

    Raises:
        InputError: There are no frames, or the batch size is not positive.
    """

    def __init__(
        self, frames: Sequence[T], batch_size: int, seed: int = 0, max_frames: int | None = None
    ) -> None:
        """Take the frames, or `max_frames` of them drawn once with the seed."""
        if not frames:
            raise InputError("the replay buffer has no frames", where="replay.train")
        if batch_size < 1:
            raise InputError("must be positive", where="replay.batch_size", found=batch_size)
        if max_frames is not None and max_frames < 1:
            raise InputError("must be positive", where="replay.max_frames", found=max_frames)
        self.frames = _subset(frames, max_frames, seed)
        self.batch_size = min(batch_size, len(self.frames))
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._shuffled(0)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.frames)

    def next_indices(self) -> list[int]:
        """Return the indices of the next batch and move on."""
        taken: list[int] = []
        while len(taken) < self.batch_size:
            wanted = self.batch_size - len(taken)
            part = self._order[self._position : self._position + wanted]
            taken += part
            self._position += len(part)
            if self._position == len(self.frames):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffled(self._epoch)
        return taken

    def next_batch(self) -> list[T]:
        """Return the next batch and move on."""
        return [self.frames[i] for i in self.next_indices()]

    def state_dict(self) -> ReplayState:
        """Return where the dealing stands."""
        return ReplayState(
            seed=self._seed,
            epoch=self._epoch,
            position=self._position,
            n_frames=len(self.frames),
            batch_size=self.batch_size,
        )

    def load_state_dict(self, state: ReplayState) -> None:
        """Go on where another buffer over the same frames stood.

        Raises:
            InputError: The state belongs to a buffer of another seed or size.
        """
        given = (state["seed"], state["n_frames"], state["batch_size"])
        own = (self._seed, len(self.frames), self.batch_size)
        if given != own:
            what = "seed, frames and batch size"
            raise InputError("state of another replay buffer", found=f"{what} {given}", expected=f"{own}")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffled(self._epoch)

    def _shuffled(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(len(self.frames)).tolist()
        return order


def _subset[T](frames: Sequence[T], max_frames: int | None, seed: int) -> tuple[T, ...]:
    if max_frames is None or max_frames >= len(frames):
        return tuple(frames)
    chosen = np.random.default_rng([seed, len(frames)]).permutation(len(frames))[:max_frames]
    return tuple(frames[i] for i in sorted(chosen.tolist()))
