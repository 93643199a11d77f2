"""Files that somebody made to do harm, each through the door that it is for; run as a program, it reads them.

    python hostile_files.py FOLDER [PATTERN OF THE NAMES]

A file here is small, or sparse. What it asks for is not: memory, time, another file, or
an end that never comes.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import resource
import socket
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from worker import outcome, say, watch

MEMORY = 4 << 30
"""Address space beyond what the imports took, bytes."""

DOORS = ("config", "table", "frames", "structure", "phonons", "model", "result", "run")
NAMES = dict(
    zip(DOORS, ("c.yaml", "t.csv", "f.xyz", "s.cif", "phonopy.yaml", "m.model", "r.json", "x"), strict=True)
)

type Make = Callable[[Path], Path | None]
HOSTILE: dict[str, tuple[str, Make]] = {}
"""By name: the door, and what makes the file in a folder and returns its path."""


def hostile(door: str, name: str) -> Callable[[Make], Make]:
    """Put what makes a file into the table."""

    def put(make: Make) -> Make:
        HOSTILE[f"{door}: {name}"] = (door, make)
        return make

    return put


def text(door: str, name: str, file: str, content: str | Callable[[], str | bytes] | bytes) -> None:
    """A file with a content."""

    @hostile(door, name)
    def make(folder: Path) -> Path:
        made = content() if callable(content) else content
        (folder / file).write_bytes(made if isinstance(made, bytes) else made.encode())
        return folder / file


def special(door: str) -> None:
    """What is no file, in the place of one."""
    file = NAMES[door]

    @hostile(door, "pipe")
    def pipe(folder: Path) -> Path:
        os.mkfifo(folder / file)
        return folder / file

    @hostile(door, "device")
    def device(folder: Path) -> Path:
        (folder / file).symlink_to("/dev/zero")
        return folder / file

    @hostile(door, "socket")
    def listening(folder: Path) -> Path:
        # The path of a socket is short, whatever the folder is.
        short = Path(tempfile.mkdtemp(dir="/tmp")) / "s"
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(short))
        (folder / file).symlink_to(short)
        return folder / file

    @hostile(door, "link to itself")
    def loop(folder: Path) -> Path:
        (folder / file).symlink_to(folder / file)
        return folder / file

    @hostile(door, "long name")
    def long(folder: Path) -> Path:
        return folder / ("x" * 300 + file)

    @hostile(door, "NUL in the name")
    def nul(folder: Path) -> Path:
        return folder / f"a\0{file}"

    @hostile(door, "folder")
    def directory(folder: Path) -> Path:
        (folder / file).mkdir()
        return folder / file


for each in DOORS[:-1]:
    special(each)

HEAD = "name: x\npotential: {model: titanium-compact}\n"
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
text("config", "deep lists", "c.yaml", HEAD + "seed: " + "[" * 50_000)
text("config", "deep sections", "c.yaml", "\n".join(" " * i + "a:" for i in range(3000)))
text("config", "laughs", "c.yaml", LAUGHS + HEAD)
text(
    "config",
    "merges",
    "c.yaml",
    HEAD + "a: &a {b: 1}\n" + "".join(f"c{i}: &c{i} {{<<: [*a, *a]}}\n" for i in range(99)),
)
text("config", "anchor in itself", "c.yaml", HEAD + "seed: &s [*s]\n")
text("config", "5,000 digits", "c.yaml", HEAD + "seed: " + "9" * 5000 + "\n")
text("config", "no integer", "c.yaml", HEAD + "seed: !!int abc\n")
text("config", "no number", "c.yaml", HEAD + "seed: !!float 1_e\n")
text("config", "10 MB", "c.yaml", lambda: HEAD + "".join(f"k{i}: [1, 2, 3]\n" for i in range(600_000)))
text("config", "long word", "c.yaml", HEAD + "k" * 90_000 + ": 1\n")
text("config", "another encoding", "c.yaml", HEAD.encode("utf-16"))
text("config", "NULs", "c.yaml", HEAD.encode() + bytes(1000))
text("config", "phase of 10^11 atoms", "c.yaml", HEAD + "md: {temperature: 300, replicas: 100000000000}\n")
text("config", "home of nobody", "c.yaml", HEAD + "base: ~nobody-of-this-name/x\nphases: 7\n")

text("table", "long field", "t.csv", "# title: x\na,b\n" + "1" * 200_000 + ",2\n")
text("table", "open quote", "t.csv", '# title: x\na,b\n"' + "1,2\n" * 50_000)
text(
    "table",
    "million columns",
    "t.csv",
    lambda: "# title: x\n" + ",".join(f"c{i}" for i in range(300_000)) + "\n",
)
text("table", "columns without end", "t.csv", lambda: "# column: a | K | exact\n" * 200_000)


@hostile("table", "8 GB of nothing")
def sparse_table(folder: Path) -> Path:
    """Sparse: it takes no room on the disk."""
    os.truncate(os.open(folder / "t.csv", os.O_CREAT | os.O_RDWR), 8 << 30)
    return folder / "t.csv"


FRAME = '1\nLattice="4 0 0 0 4 0 0 0 4" Properties=species:S:1:pos:R:3 pbc="T T T"\nTi 0 0 0\n'
text("frames", "10^9 atoms", "f.xyz", FRAME.replace("1\n", "1000000000\n", 1))
text("frames", "-1 atoms", "f.xyz", FRAME.replace("1\n", "-1\n", 1))
text("frames", "atoms of 5,000 digits", "f.xyz", FRAME.replace("1\n", "9" * 5000 + "\n", 1))
text("frames", "10^9 columns", "f.xyz", FRAME.replace("pos:R:3", "pos:R:1000000000"))
text("frames", "5,000 digits of columns", "f.xyz", FRAME.replace("pos:R:3", "pos:R:" + "9" * 5000))
text("frames", "long line", "f.xyz", lambda: "1\n" + "a" * (100 << 20))
text("frames", "long line, packed", "f.xyz.gz", lambda: gzip.compress(b"1\n" + b"a" * (200 << 20), 1))
text("frames", "bomb", "f.xyz.gz", lambda: gzip.compress(FRAME.encode() * 2_000_000, 1))
text("frames", "values without end", "f.xyz", FRAME.replace("pbc", "x=[" + "[1," * 3000 + " pbc"))
text("frames", "open quote", "f.xyz", FRAME.replace('"4 0', '"' * 9999 + "4 0"))
text("frames", "cut archive", "f.xyz.gz", gzip.compress(FRAME.encode())[:-9])
text("frames", "trajectory that is none", "f.traj", b"- of UlmASE-Trajectory" + b"\xff" * 64)


@hostile("frames", "HDF5 of 10^13 numbers")
def huge_hdf5(folder: Path) -> Path:
    """A chunked dataset that has no chunks."""
    with h5py.File(folder / "f.h5", "w") as file:
        group = file.create_group("config_batch_0/config_0")
        group.create_group("properties")
        for name in ("atomic_numbers", "positions", "cell", "pbc"):
            group.create_dataset(name, shape=(10**13,), chunks=(1000,), dtype="f8")
    return folder / "f.h5"


POSCAR = "Ti\n1.0\n3 0 0\n0 3 0\n0 0 3\nTi\n1\nDirect\n0 0 0\n"
text("structure", "10^9 atoms", "POSCAR", POSCAR.replace("\n1\nDirect", "\n1000000000\nDirect"))
text("structure", "lattice of 10^300", "POSCAR", POSCAR.replace("1.0", "1e300"))
text("structure", "extended XYZ of 10^9 atoms", "s.extxyz", FRAME.replace("1\n", "1000000000\n", 1))
text("structure", "gzip bomb", "POSCAR.gz", lambda: gzip.compress(bytes(300 << 20), 1))
text("structure", "XZ bomb", "POSCAR.xz", lambda: lzma.compress(bytes(200 << 20), preset=0))
text("structure", "bzip2 bomb", "POSCAR.bz2", lambda: bz2.compress(bytes(100 << 20), 1))
text("structure", "deep JSON", "s.json", "[" * 100_000)
text(
    "structure",
    "array of 10^12",
    "s.json",
    json.dumps({"1": {"positions": {"__ndarray__": [[10**12, 3], "float64", []]}}}),
)
text(
    "structure",
    "cube of 10^9 points",
    "s.cube",
    "a\nb\n1 0 0 0\n" + "1000000000 1 0 0\n" * 3 + "22 0 0 0 0\n",
)
text("structure", "CIF without end", "s.cif", lambda: "data_x\nloop_\n" + "_a\n" * 100_000)

DIMENSION = (
    "unit_cell:\n  lattice: [[3, 0, 0], [0, 3, 0], [0, 0, 3]]\n"
    "  points: [{symbol: Ti, coordinates: [0, 0, 0]}]\n"
)
text("phonons", "deep lists", "phonopy.yaml", "a: " + "[" * 100_000)
text("phonons", "laughs", "phonopy.yaml", LAUGHS + DIMENSION)
text(
    "phonons",
    "supercell of 10^18",
    "phonopy.yaml",
    DIMENSION + "supercell_matrix: [[1000000,0,0],[0,1000000,0],[0,0,1000000]]\n",
)
text("phonons", "code", "phonopy.yaml", DIMENSION + "x: !!python/object/apply:os.system [touch canary]\n")
text("phonons", "XZ bomb", "phonopy.yaml.xz", lambda: lzma.compress(b"a" * (200 << 20), preset=0))
text("phonons", "gzip bomb", "phonopy.yaml.gz", lambda: gzip.compress(b"a" * (200 << 20), 1))


def tar(folder: Path, **members: tarfile.TarInfo | bytes) -> Path:
    """An archive with members: contents, or entries that have none."""
    with tarfile.open(folder / "a.tar.xz", "w:xz", preset=0) as archive:
        for name, member in members.items():
            entry = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(member, bytes):
                entry.size = len(member)
            entry.name = entry.name or name
            archive.addfile(entry, io.BytesIO(member) if isinstance(member, bytes) else None)
    return folder / "a.tar.xz"


@hostile("phonons", "bomb in an archive")
def archive_bomb(folder: Path) -> Path:
    """A member of known name."""
    return tar(folder, **{"phonopy.yaml": b"a" * (200 << 20)})


@hostile("phonons", "archive that leads out")
def archive_out(folder: Path) -> Path:
    """A path with dots, and a link to a file outside."""
    link = tarfile.TarInfo("phonopy.yaml")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return tar(folder, **{"../../../escaped.yaml": b"x", "phonopy.yaml": link})


@hostile("phonons", "pipe in an archive")
def archive_pipe(folder: Path) -> Path:
    """Its name is that of a file."""
    pipe = tarfile.TarInfo("phonopy.yaml")
    pipe.type = tarfile.FIFOTYPE
    return tar(folder, **{"phonopy.yaml": pipe})


@hostile("phonons", "100,000 members")
def archive_crowd(folder: Path) -> Path:
    """None of them of any use."""
    return tar(folder, **{f"f{i}": b"" for i in range(100_000)})


def phonon_folder(name: str, **files: str) -> None:
    """A folder of files of phonopy."""

    @hostile("phonons", name)
    def make(folder: Path) -> Path:
        for file, content in {"POSCAR-unitcell": POSCAR, "phonopy.conf": "DIM = 1 1 1\n", **files}.items():
            (folder / file).write_text(content)
        return folder


phonon_folder("10^9 displacements", FORCE_SETS="1\n1000000000\n")
phonon_folder("10^9 constants", FORCE_CONSTANTS="1000000000 1000000000\n")
phonon_folder("DIM of 10^6", **{"phonopy.conf": "DIM = 1000000 1000000 1000000\n"})
phonon_folder("DIM of 1/0", **{"phonopy.conf": "DIM = 1/0 1 1\n"})
phonon_folder("DIM of 5,000 digits", **{"phonopy.conf": f"DIM = {'9' * 5000} 1 1\n"})

text("model", "empty", "m.model", "")
text("model", "text", "m.model", "model\n" * 1000)
text("result", "deep", "r.json", "[" * 100_000)
text("result", "5,000 digits", "r.json", '{"format": ' + "9" * 5000 + "}")
text("result", "not a number", "r.json", "NaN")


@hostile("run", "zip bomb for a checkpoint")
def zip_bomb(folder: Path) -> Path:
    """A gigabyte in a megabyte."""
    with zipfile.ZipFile(folder / "step-0001.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 30))
    return folder


@hostile("run", "pipe for a checkpoint")
def pipe_checkpoint(folder: Path) -> Path:
    """Nobody writes to it."""
    os.mkfifo(folder / "step-0001.pt")
    return folder


@hostile("run", "frames of 10^13 numbers")
def huge_frames(folder: Path) -> Path:
    """A chunked dataset that has no chunks."""
    with h5py.File(folder / "test.0000.h5", "w") as file:
        file.attrs.update({"format": "mlip_refine frames 5", "provenance": "{}", "key": "x"})
        file.create_dataset("snapshot/x", shape=(10**13,), chunks=(1000,), dtype="f8")
    return folder


@hostile("run", "pipe for frames")
def pipe_frames(folder: Path) -> Path:
    """Nobody writes to it."""
    os.mkfifo(folder / "test.0000.h5")
    return folder


@hostile("run", "log that is none")
def strange_log(folder: Path) -> Path:
    """Deep, of many digits, and of NULs."""
    lines = [b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", bytes(100), b"NaN", b"\xff\xfe"]
    (folder / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def doors() -> dict[str, Callable[[Path], Any]]:
    """What reads a path, by door."""
    from mlip_refine.config import load_config
    from mlip_refine.data.frames import read_frames
    from mlip_refine.data.phonons.reader import read_phonons
    from mlip_refine.data.structures import load_structure
    from mlip_refine.data.tables import read_table
    from mlip_refine.potential import Potential
    from mlip_refine.sampling.store import FrameStore
    from mlip_refine.training.trainer import read_latest
    from mlip_refine.workflows.finetune.records import read_log
    from mlip_refine.workflows.free_energy.records import FreeEnergyResult

    def run(folder: Path) -> None:
        if read_latest(folder) is None and FrameStore(folder, {}).read("test", 0, {}, None) is None:
            read_log(folder)

    reads = (load_config, read_table, read_frames, load_structure, read_phonons)
    return dict(zip(DOORS, (*reads, Potential.load, FreeEnergyResult.read, run), strict=True))


def main(folder: Path, part: str = "") -> None:
    """Make every file whose name a pattern finds, read it, and say what came of it and how long that took."""
    warnings.simplefilter("ignore")
    readers = doors()
    # Once without limits, so that every library is loaded.
    for door, (file, content) in {"structure": ("POSCAR", POSCAR), "frames": ("f.xyz", FRAME)}.items():
        (folder / file).write_text(content)
        with suppress(Exception):
            readers[door](folder / file)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    made = []
    chosen = {name: what for name, what in HOSTILE.items() if re.search(part, name)}
    for k, (name, (door, make)) in enumerate(chosen.items()):
        own = folder / f"{k}"
        own.mkdir()
        made.append((name, door, make(own)))
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    os.chdir(folder)
    os.environ["TMPDIR"] = os.environ["XDG_CACHE_HOME"] = tempfile.tempdir = str(folder)
    sys.addaudithook(watch)
    for name, door, path in made:
        say(name=name)
        started = time.process_time()
        # The folder that may be written to is the one around that of the file.
        watched = folder / "x" / "y"
        came = outcome(lambda _, door=door, path=path: readers[door](path), folder / watched.parent.name)
        say(name=name, came=came, seconds=round(time.process_time() - started, 2))


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(Path(sys.argv[1]), *sys.argv[2:])
