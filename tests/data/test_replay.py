"""Every frame once per epoch, in an order that seed and epoch settle, and resumable at any point."""

import json
from collections import Counter

import numpy as np
import pytest

from mlip_refine.data import Frame, ReplayBuffer
from mlip_refine.errors import InputError


def _frames(n: int) -> list[Frame]:
    cell, zeros = np.eye(3), np.zeros((1, 3))
    return [Frame(np.array([22]), zeros, cell, (True,) * 3, float(i), zeros, zeros) for i in range(n)]


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (3, 8), (5, 1)])
def test_every_frame_once_per_epoch(n, batch):
    buffer = ReplayBuffer(_frames(n), batch, seed=4)
    epochs = 6
    drawn = [i for _ in range(epochs * n // buffer.batch_size) for i in buffer.next_indices()]
    for epoch in range(len(drawn) // n):
        assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert all(len(buffer.next_batch()) == min(n, batch) for _ in range(5))


def test_epochs_and_seeds_differ_and_a_seed_repeats():
    def order(seed: int) -> list[list[int]]:
        buffer = ReplayBuffer(_frames(20), 20, seed=seed)
        return [buffer.next_indices() for _ in range(2)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1)[0] != order(1)[1]


def test_resumed_buffer_deals_the_same_batches():
    buffer = ReplayBuffer(_frames(11), 4, seed=7)
    for _ in range(5):
        buffer.next_indices()
    state = json.loads(json.dumps(buffer.state_dict()))
    expected = [buffer.next_indices() for _ in range(9)]
    resumed = ReplayBuffer(_frames(11), 4, seed=7)
    resumed.load_state_dict(state)
    assert [resumed.next_indices() for _ in range(9)] == expected


def test_state_of_another_buffer_is_refused():
    state = ReplayBuffer(_frames(11), 4, seed=7).state_dict()
    for other in (ReplayBuffer(_frames(12), 4, seed=7), ReplayBuffer(_frames(11), 4, seed=8)):
        with pytest.raises(InputError, match="state of another replay buffer"):
            other.load_state_dict(state)


def test_largest_number_of_frames_is_a_fixed_draw():
    energies = [
        {f.energy for f in ReplayBuffer(_frames(50), 4, seed=s, max_frames=10).frames} for s in (1, 1, 2)
    ]
    assert len(energies[0]) == 10
    assert energies[0] == energies[1] != energies[2]
    assert Counter(len(e) for e in energies) == {10: 3}


@pytest.mark.parametrize(
    ("n", "batch", "most", "where"),
    [(0, 4, None, "replay.train"), (5, 0, None, "replay.batch_size"), (5, 1, 0, "replay.max_frames")],
)
def test_impossible_buffers_are_refused(n, batch, most, where):
    with pytest.raises(InputError, match=where):
        ReplayBuffer(_frames(n), batch, max_frames=most)
