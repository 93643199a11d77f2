"""What needs no potential answers at once: no torch is imported, and no library's warnings are shown."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "mace", "e3nn", "torch_sim", "scipy", "matplotlib", "h5py", "phonopy", "pymatgen")

# The command line in this process, and what it has imported at the end.
PROBE = """
import json, sys
from mlip_refine import cli
sys.argv = ["mlip-refine", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as end:
    code = end.code or 0
modules = sorted({name.split(".")[0] for name in sys.modules})
sys.stderr.write("\\n" + json.dumps({"code": code, "modules": modules}))
"""

CONFIG = {"name": "x", "potential": {"model": "titanium-compact"}}
PHASES = {"hcp": {"prototype": "hcp", "element": "Ti", "n_atoms": 16, "a": 2.93, "c": 4.65}}
BCC = {"bcc": {"prototype": "bcc", "element": "Ti", "n_atoms": 16}}
TRANSITION = {"from": "hcp", "to": "hcp2", "temperature": [300, 400]}
MELT = {"melt": PHASES["hcp"] | {"identity": "liquid"}}


def _probe(*arguments: str) -> tuple[int, str, str, set[str]]:
    """Exit code, standard output, standard error and imported modules of a command."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True
    )
    message, _, found = done.stderr.rpartition("\n")
    probe = json.loads(found)
    return probe["code"], done.stdout, message, set(probe["modules"])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("schema",),
        ("losses",),
        ("losses", "lattice"),
        ("losses", "latice"),
        ("bench", "--help"),
        ("md", "--help"),
        ("finetun",),
    ],
)
def test_what_computes_nothing_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    code, _, _, modules = _probe(*arguments)
    assert code == (2 if arguments[-1] in {"finetun", "latice"} else 0)
    assert not modules & set(HEAVY)


@pytest.mark.parametrize(
    ("verb", "changes", "message"),
    [
        ("finetune", {"sampling": {"replicas": 0}}, "found 0"),
        ("finetune", {"losses": [{"type": "reply"}]}, "unknown loss 'reply'"),
        ("finetune", {"losses": [{"type": "replay", "forces_wait": 1.0}]}, "unknown key 'forces_wait'"),
        ("free-energy", {"losses": [{"type": "replay", "weight": -1.0}]}, "weight"),
        ("md", {}, "no section md"),
        ("transition", {}, "no section transition"),
        ("phase-diagram", {}, "no section phase_diagram"),
        ("transition", {"transition": TRANSITION | {"to": "bbc"}}, "names the phase 'bbc'"),
        ("md", {"md": {"temperature": 300, "phases": ["hpc"]}}, "names the phase 'hpc'"),
        ("elastic", {"elastic": {"presure": 1}}, "unknown key 'presure'"),
        ("elastic", {"elastic": {"phases": "hpc"}}, "Did you mean 'hcp'"),
        ("elastic", {"phases": {}}, "the config has no phases"),
        ("elastic", {"phases": MELT}, "is a liquid: it has no elastic constants"),
        (
            "elastic",
            {"phases": PHASES | BCC, "elastic": {"temperature": 300, "table": "titanium-hcp-elastic"}},
            "belongs to one phase",
        ),
        ("phonons", {"phonons": {"mesh": 3}}, "mesh"),
        ("phonons", {"phonons": {"phases": ["hcp", "bbc"]}}, "names the phase 'bbc'"),
        ("phonons", {"phases": {}}, "no phases, no data"),
        ("phonons", {"phases": MELT}, "is a liquid: it has no phonons"),
    ],
)
def test_a_refused_config_imports_nothing_heavy(
    tmp_path: Path, verb: str, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(CONFIG | {"phases": PHASES} | changes))
    code, printed, error, modules = _probe(verb, str(path))
    assert (code, printed) == (2, "")
    assert message in error
    assert not modules & set(HEAVY)
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("module", ["quantities", "errors", "files", "progress", "losses.registry"])
def test_what_every_room_uses_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import json, sys, mlip_refine.{module}; print(json.dumps([n.split('.')[0] for n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & set(HEAVY)


def _cpu_time(*arguments: str) -> float:
    """CPU seconds of a Python process, the best of three."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_takes_less_than_a_second_of_cpu() -> None:
    """Or forty times what an empty program takes, on a slow machine."""
    limit = max(1.0, 40 * _cpu_time("-c", "pass"))
    assert _cpu_time("-m", "mlip_refine", "--help") < limit
