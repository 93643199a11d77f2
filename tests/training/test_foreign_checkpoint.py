"""A checkpoint that others made, which arrives frozen: it loads, takes a replay step, and saves."""

from pathlib import Path

import numpy as np
import torch
from ase.io import read

from mlip_refine.data import read_frames
from mlip_refine.losses import Replay
from mlip_refine.losses.options import ReplayOptions
from mlip_refine.potential import Potential, ase_calculator
from mlip_refine.training.replay import LabelledFrame, labels

GST = Path(__file__).parents[1] / "data" / "gst"


def test_gst_takes_a_replay_step_and_saves(tmp_path: Path) -> None:
    potential = Potential.load(str(GST / "gst_mace_swa.model"), default_dtype="float64")
    before = potential.parameters()
    frames = [
        LabelledFrame.from_frame(potential, f)
        for f in read_frames([GST / "frame.xyz"], "energy", "forces", "stress", elements={32, 51, 52})
    ]
    loss = Replay("replay", 1.0, ReplayOptions())
    graphs = potential.graphs.collate([f.structure for f in frames])
    outputs = potential.evaluate(graphs, loss.probes, create_graph=True)
    loss.evaluate(outputs, labels(frames, potential.device, potential.dtype)).value.backward()
    trainable = potential.trainable_parameters()
    assert len(trainable) == len(before) == 26
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in trainable.values())

    torch.optim.SGD(trainable.values(), lr=1e-4).step()
    assert all(not torch.equal(before[name], p) for name, p in trainable.items())
    model, _ = potential.save(tmp_path, "gst")
    atoms = read(GST / "frame.xyz")
    atoms.calc = ase_calculator(model)
    after = potential.evaluate(graphs, ("energy", "forces"))
    assert abs(atoms.get_potential_energy() - float(after["energy"][0])) < 1e-10
    np.testing.assert_allclose(atoms.get_forces(), after["forces"].detach().numpy(), atol=1e-10)
