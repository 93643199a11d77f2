"""Bad input ends the command line with one clear message and exit code 2; nothing is written."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mlip_refine import cli
from mlip_refine.config import load_config
from mlip_refine.training.trainer import write_checkpoint
from mlip_refine.workflows.run_folder import open_run_folder

ASSET = Path(cli.__file__).parent / "assets" / "titanium-compact.model"


@pytest.fixture(scope="module")
def template(tmp_path_factory, tiny_in) -> Path:
    """The files of a run that would work."""
    folder = tmp_path_factory.mktemp("template")
    tiny_in(folder)
    return folder


@dataclass
class Project:
    """A folder with a config and what it names."""

    folder: Path
    data: Callable[..., dict[str, Any]]
    run: Callable[..., str]

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    def write(self, **changes: Any) -> None:
        self.config.write_text(json.dumps(self.data(self.folder, **changes), indent=1))

    def edit_frames(self, old: str, new: str, count: int = -1) -> None:
        path = self.folder / "frames.extxyz"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, count))

    def contents(self) -> dict[str, bytes | None]:
        paths = sorted(self.folder.rglob("*"))
        return {str(p.relative_to(self.folder)): p.read_bytes() if p.is_file() else None for p in paths}

    def refusal(self, *arguments: str, command: str = "finetune") -> str:
        """Run; check that it is refused without effect; return the message, the folder as `~`."""
        before = self.contents()
        message = self.run(command, str(self.config), *arguments)
        assert self.contents() == before
        return message.replace(str(self.folder), "~")


@pytest.fixture
def project(template, tmp_path, tiny_data, monkeypatch, capsys) -> Project:
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mlip-refine", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        assert end.value.code == 2, printed.err
        assert printed.out == ""
        # Before it may stand a warning that the made-up labels do not fit the model.
        warning, _, message = printed.err.rpartition("mlip-refine: ")
        assert message
        assert not warning or warning.startswith("warning: labels do not fit")
        assert "Traceback" not in printed.err
        return message.strip()

    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    made = Project(tmp_path, tiny_data, run)
    made.write()
    return made


def test_misspelt_energy_key(project):
    project.edit_frames("REF_energy", "REF_enrgy")
    message = project.refusal()
    start = (
        "frames.extxyz, frames 0, 1, 2 and 2 more of 5: no energy under the key 'REF_energy'; found keys REF_"
    )
    assert message.startswith(start)
    assert "Did you mean energy_key: REF_enrgy?" in message


def test_misspelt_stress_key_in_the_config(project):
    message = project.refusal("replay.stress_key=strain")
    assert message.startswith("frames.extxyz, all 5 frames: no stress under the key 'strain'")
    assert "REF_stress" in message


@pytest.mark.parametrize(
    ("frame", "message"),
    [(0, "energy 'REF_energy' is not finite"), (3, "forces 'REF_forces' of atom 1 are not finite")],
)
def test_nan_in_a_frame(project, frame, message):
    path = project.folder / "frames.extxyz"
    lines = path.read_text().splitlines()
    if frame == 0:
        lines[1] = re.sub(r"REF_energy=\S+", "REF_energy=nan", lines[1])
    else:
        lines[4 * frame + 3] = " ".join([*lines[4 * frame + 3].split()[:-1], "nan"])
    path.write_text("\n".join(lines) + "\n")
    assert project.refusal().startswith(f"frames.extxyz, frame {frame}: {message}")


def test_element_of_a_frame_that_the_model_does_not_know(project):
    project.edit_frames("\nTi ", "\nFe ", 1)
    message = project.refusal()
    assert message == ("frames.extxyz, frame 0: elements that the model does not know; found Fe, expected Ti")


def test_element_of_a_phase_that_the_model_does_not_know(project):
    message = project.refusal("phases.bcc.element=Fe")
    assert "the model does not know every element" in message
    assert "26" in message
    assert "22" in message


def test_frames_cut_in_the_middle(project):
    path = project.folder / "frames.extxyz"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    assert project.refusal().startswith("frames.extxyz, frame 4: cannot be read as extended XYZ")


def test_no_such_frames(project):
    assert project.refusal("replay.valid=absent.extxyz").startswith("~/absent.extxyz: no such file")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_model(project, share):
    content = ASSET.read_bytes()
    (project.folder / "cut.model").write_bytes(content[: int(share * len(content))])
    message = project.refusal("potential.model=cut.model")
    assert message.startswith("~/cut.model: ")
    assert len(message) < 500


@pytest.mark.parametrize("kind", ["text", "module", "tensors"])
def test_not_a_mace_model(project, kind):
    path = project.folder / "other.model"
    if kind == "text":
        path.write_text("H 0 0 0\n")
    else:
        torch.save(torch.nn.Linear(2, 2) if kind == "module" else {"w": torch.zeros(2)}, path)
    message = project.refusal("potential.model=other.model")
    assert message.startswith("~/other.model: ")
    assert len(message) < 500


class _Payload:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_malicious_model(project, tmp_path_factory):
    proof = tmp_path_factory.mktemp("outside") / "proof"
    torch.save({"model": _Payload(str(proof))}, project.folder / "evil.model")
    message = project.refusal("potential.model=evil.model")
    assert message.startswith("~/evil.model: refused to load")
    assert "posix.mkdir" in message
    assert "--trust-pickle" in message
    assert not proof.exists()


def test_misspelt_model(project):
    assert "Did you mean 'titanium-compact'?" in project.refusal("potential.model=titanium-compct")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2\n\nTi 0 0 0\nTi 0 0 2.9\n", "pbc [False, False, False]"),
        ('2\nLattice="3 0 0 0 3 0 0 0 9" pbc="T T F"\nTi 0 0 0\nTi 0 0 2.9\n', "pbc [True, True, False]"),
    ],
)
def test_phase_without_a_periodic_cell(project, text, found):
    (project.folder / "slab.xyz").write_text(text)
    project.write(phases={"bcc": None})
    data = project.data(project.folder)
    data["phases"]["bcc"] = {"file": "slab.xyz"}
    project.config.write_text(json.dumps(data, indent=1))
    message = project.refusal()
    assert message.startswith("~/slab.xyz: not a structure that is periodic in three dimensions")
    assert found in message


def test_phases_of_different_size(project):
    message = project.refusal("phases.bcc.n_atoms=54")
    assert "found 16 atoms of hcp-1150K-0GPa, 54 of bcc-1150K-0GPa" in message


def test_size_that_no_supercell_has(project):
    assert "expected one of 2, 16, 54, 128" in project.refusal("phases.bcc.n_atoms=20")


def _line(project: Project, text: str) -> int:
    lines = project.config.read_text().splitlines()
    return next(i for i, line in enumerate(lines, start=1) if text in line)


def test_zero_replicas(project):
    project.write(sampling={"replicas": 0})
    message = project.refusal()
    assert message.startswith(f"~/run.yaml:{_line(project, 'replicas')}: ")
    assert "found 0" in message


def test_zero_replicas_on_the_command_line(project):
    message = project.refusal("evaluation.replicas=0")
    assert "evaluation.replicas=0" in message


def test_negative_temperature(project):
    losses = project.data(project.folder)["losses"]
    losses[0]["temperature"] = "-1150 K"
    project.write(losses=losses)
    message = project.refusal()
    assert message.startswith(f"~/run.yaml:{_line(project, '-1150')}: ")
    assert "temperature" in message
    assert "-1150" in message


def test_misspelt_key(project):
    project.write(training={"learning_rat": 1e-3})
    message = project.refusal()
    assert message.startswith(f"~/run.yaml:{_line(project, 'learning_rat"')}: unknown key 'learning_rat'")
    assert "Did you mean 'learning_rate'?" in message


def test_misspelt_loss(project):
    losses = project.data(project.folder)["losses"]
    losses[1]["type"] = "reply"
    project.write(losses=losses)
    message = project.refusal()
    assert message.startswith(f"~/run.yaml:{_line(project, 'reply')}: unknown loss 'reply'")
    assert message.endswith("Did you mean 'replay'?")


def test_misspelt_phase(project):
    losses = project.data(project.folder)["losses"]
    losses[0]["to"] = "bbc"
    project.write(losses=losses)
    message = project.refusal()
    assert "names the phase 'bbc'" in message
    assert message.endswith("Did you mean 'bcc'?")


def test_no_such_config(project):
    project.config.unlink()
    assert project.refusal().startswith("~/run.yaml: ")


def test_no_gpu(project, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device is available" in project.refusal("device=cuda")


def test_unknown_head(project):
    assert "the model has no head 'r2scan'" in project.refusal("potential.head=r2scan")


def test_pattern_that_freezes_nothing(project):
    assert "matches no parameter" in project.refusal("potential.freeze=[raedouts.*]")


def test_free_energy_of_another_model(project):
    path = project.folder / "initial" / "low.json"
    path.write_text(re.sub(r'"model_hash": "\w{8}', '"model_hash": "00000000', path.read_text()))
    message = project.refusal()
    assert message.startswith("~/initial/low.json: ")
    assert "model hash differs; found 00000000" in message
    assert "mlip-refine free-energy" in message


def test_no_free_energy_file(project):
    (project.folder / "initial" / "low.json").unlink()
    assert project.refusal().startswith("~/initial/low.json: the free-energy file cannot be read")


def test_unwritable_output_folder(project):
    """Below a regular file, which stops the superuser too."""
    (project.folder / "file").write_text("not a folder")
    message = project.refusal(f"output.folder={project.folder}/file/runs")
    assert message.startswith("~/file/runs/tiny: the run folder cannot be written")
    assert message.endswith("Set output.folder.")


def test_existing_run_folder(project):
    open_run_folder(load_config(project.config), resume=False)
    (project.folder / "runs" / "tiny" / "tiny.model").write_text("precious")
    message = project.refusal()
    assert message.startswith("~/runs/tiny: the run folder exists.")
    assert "--resume" in message


def test_resuming_with_another_config(project):
    open_run_folder(load_config(project.config), resume=False)
    message = project.refusal("--resume", "training.learning_rate=0.5")
    assert message.startswith("~/runs/tiny/config.yaml: the run folder belongs to another config")
    assert "differences in training" in message


def test_resuming_from_a_damaged_checkpoint(project, capsys, monkeypatch):
    folder = open_run_folder(load_config(project.config), resume=False)
    path = write_checkpoint(folder / "checkpoints", 1, {})
    path.write_bytes(path.read_bytes()[:100])
    before = project.contents()
    monkeypatch.setattr(sys, "argv", ["mlip-refine", "finetune", str(project.config), "--resume"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert "step-0001.pt: the checkpoint cannot be read" in message
    # Only the log says that there was a try.
    after = project.contents()
    assert b"the checkpoint cannot be read" in after.pop(
        "runs/tiny/log.txt", b"the checkpoint cannot be read"
    )
    assert after == before
