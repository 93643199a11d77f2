"""Checkpoints come back as they were, or are refused; nothing in them runs."""

import os
import pickle

import numpy as np
import pytest
import torch

from mlip_refine.errors import InputError, StorageError
from mlip_refine.training.trainer import read_latest, write_checkpoint

CONTENT = {
    "model": {"w": torch.arange(6, dtype=torch.float64).reshape(2, 3)},
    "replay": {"seed": 3, "epoch": 1, "position": 7},
    "ensembles": [{"stage": "initial", "shift": [0.1, 0.2]}],
    "converged": False,
}


def test_round_trip(tmp_path):
    path = write_checkpoint(tmp_path / "checkpoints", 7, CONTENT)
    assert path.name == "step-0007.pt"
    back = read_latest(tmp_path / "checkpoints")
    assert back is not None
    assert torch.equal(back["model"]["w"], CONTENT["model"]["w"])
    assert back["model"]["w"].dtype == torch.float64
    assert (back["step"], back["replay"], back["ensembles"]) == (7, CONTENT["replay"], CONTENT["ensembles"])


def test_no_checkpoint_yet(tmp_path):
    assert read_latest(tmp_path) is None
    assert read_latest(tmp_path / "absent") is None


def test_old_ones_go_and_the_newest_is_read(tmp_path):
    for step in (8, 9, 10, 11):
        write_checkpoint(tmp_path, step, CONTENT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0010.pt", "step-0011.pt"]
    assert read_latest(tmp_path)["step"] == 11


def test_order_beyond_four_digits(tmp_path):
    for step in (9998, 9999, 10000):
        write_checkpoint(tmp_path, step, CONTENT)
    assert read_latest(tmp_path)["step"] == 10000
    assert not (tmp_path / "step-9998.pt").exists()


def test_a_half_written_checkpoint_is_not_read(tmp_path):
    write_checkpoint(tmp_path, 1, CONTENT)
    (tmp_path / ".step-0002.pt.partial").write_bytes(b"half")
    assert read_latest(tmp_path)["step"] == 1


@pytest.mark.parametrize("size", [0, 100, 700])
def test_a_truncated_file_is_refused(tmp_path, size):
    path = write_checkpoint(tmp_path, 3, CONTENT)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="the checkpoint cannot be read") as caught:
        read_latest(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert "remove the folder checkpoints and log.jsonl" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else", None])
def test_the_one_before_takes_the_place_of_a_damaged_one(tmp_path, content, capsys):
    """Whatever is wrong with the newest: it is named, and so is the one that the run goes on from."""
    write_checkpoint(tmp_path, 3, CONTENT)
    newest = write_checkpoint(tmp_path, 4, CONTENT)
    newest.write_bytes(newest.read_bytes()[:900] if content is None else content)
    assert read_latest(tmp_path)["step"] == 3
    printed = "".join(capsys.readouterr().err.split("\n"))
    assert printed.startswith(f"{newest}: the checkpoint cannot be read")
    assert printed.endswith("going on from step-0003.pt")


def test_changed_bits_are_noticed(tmp_path):
    """What is read is what was written, or it is refused."""
    path = write_checkpoint(tmp_path, 3, CONTENT)
    content, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    whole = read_latest(tmp_path)
    for position in random.integers(len(content), size=300):
        changed = bytearray(content)
        changed[position] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(changed))
        try:
            found = read_latest(tmp_path)
        except InputError:
            refused += 1
        else:
            assert str(found) == str(whole)
    assert refused > 0


def test_no_room_leaves_the_one_before(tmp_path, file_size_limit):
    """The message has path, reason and sizes; nothing unfinished stays behind."""
    first = write_checkpoint(tmp_path, 3, CONTENT)
    with file_size_limit(1000), pytest.raises(StorageError) as caught:
        write_checkpoint(tmp_path, 4, CONTENT)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'step-0004.pt'}: cannot be written (File too large; needs ")
    assert "free" in message
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == [first]
    assert read_latest(tmp_path)["step"] == 3


@pytest.mark.parametrize(
    "content", [b"not a checkpoint\n", pickle.dumps({"step": 3}), b"\x80\x02\x86.", bytes(4096)]
)
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "step-0003.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"step-0003\.pt"):
        read_latest(tmp_path)


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3)])
def test_another_torch_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "step-0003.pt")
    with pytest.raises(InputError, match="this is not a checkpoint of a run"):
        read_latest(tmp_path)


class _Payload:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_malicious_file_is_refused_and_does_not_run(tmp_path):
    proof = tmp_path / "proof"
    torch.save(CONTENT | {"extra": _Payload(str(proof))}, tmp_path / "step-0003.pt")
    with pytest.raises(InputError, match="the checkpoint cannot be read"):
        read_latest(tmp_path)
    assert not proof.exists()
