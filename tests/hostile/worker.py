"""Reads mutated files through one door of the package, and says after each what came of it.

    python worker.py DOOR SEED FIRST LAST FOLDER

One line of JSON before and one after each file go to standard output, so that whoever started this process
knows which file hung or crashed it. An audit hook notes what no reader may do: start a process, import or run
what a file names, and write outside of FOLDER.
"""

import json
import lzma
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from audit import Watch
from mutations import mutate_bytes, mutate_text

from mlip_refine.errors import MlipRefineError

ROOT = Path(__file__).parents[2]
PHONONS = ROOT / "tests" / "data" / "phonons"
GREEK = ("alpha", "beta", "gamma")
SLOWEST = 60.0
"""Seconds of processor time that a reader may take, whatever else the machine does."""

SLOWEST_WAIT = 600.0
"""Seconds that it may take in all, for one that waits for ever."""

MEMORY = 8 << 30
"""Address space that a reader may take beyond what the imports took, bytes."""

type Files = dict[str, bytes]
type Read = Callable[[Path], object]

watch = Watch()


def configs() -> tuple[list[Files], Read]:
    """Configs of every workflow, as far as they are checked without a model."""
    from mlip_refine.config import dump_config, load_config
    from mlip_refine.workflows import verbs
    from mlip_refine.workflows.base import Workflow

    workflows = [verb for verb in verbs() if isinstance(verb, Workflow)]

    def read(folder: Path) -> None:
        config = load_config(folder / "config.yaml")
        dump_config(config)
        for workflow in workflows:
            with suppress(MlipRefineError):
                workflow.check_config(config)

    paths = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs").glob("titanium_fusion/*.yaml")])
    return [{"config.yaml": path.read_bytes()} for path in paths], read


def tables() -> tuple[list[Files], Read]:
    """Tables of experiments, and losses that take their targets from them."""
    from ase.build import bulk

    from mlip_refine import testing
    from mlip_refine.data.tables import read_table

    assets = ROOT / "mlip_refine" / "assets"
    lattice = assets / "titanium-hcp-lattice.csv"
    files = [{"table.csv": path.read_bytes()} for path in (*sorted(assets.glob("*.csv")), lattice, lattice)]
    crystal = bulk("Ti", "hcp", a=2.95, c=4.68) * (3, 3, 2)

    def read(folder: Path) -> None:
        table = read_table(folder / "table.csv")
        node = {
            "type": "lattice",
            "phase": "hcp",
            "temperature": "1200 K",
            "table": str(folder / "table.csv"),
        }
        if "a" in table.columns:
            testing.loss_of(node, crystal)

    return files, read


def frames() -> tuple[list[Files], Read]:
    """Labelled frames in extended XYZ, and in HDF5 as MACE writes it."""
    import ase.io
    import h5py
    from ase.build import bulk

    from mlip_refine.data.frames import read_frames

    random = np.random.default_rng(0)
    written = []
    for k in range(3):
        atoms = bulk("Ti", "hcp", a=2.95, c=4.68) * (1 + k % 2, 1, 1)
        stress = np.diag(random.normal(size=3) * 0.01).ravel()
        atoms.info.update(REF_energy=-7.8 * len(atoms), REF_stress=stress, head="Default")
        atoms.arrays["REF_forces"] = random.normal(size=(len(atoms), 3))
        written.append(atoms)
    stream = StringIO()
    ase.io.write(stream, written, format="extxyz")
    with h5py.File("train.h5", "w", driver="core", backing_store=False) as file:
        for k, atoms in enumerate(written):
            group = file.create_group(f"config_batch_0/config_{k}")
            values = {"atomic_numbers": atoms.numbers, "positions": atoms.positions, "cell": atoms.cell.array}
            values |= {"pbc": atoms.pbc, "weight": 1.0, "config_type": "Default"}
            values |= {f"property_weights/{name}": 1.0 for name in ("energy", "forces", "stress", "dipole")}
            values |= {"properties/energy": atoms.info["REF_energy"], "properties/dipole": "None"}
            values |= {"properties/forces": atoms.arrays["REF_forces"]}
            for name, value in (values | {"properties/stress": atoms.info["REF_stress"]}).items():
                group[name] = value
        file.flush()
        binary = {"train.h5": file.id.get_file_image()}
    files = [{"train.extxyz": stream.getvalue().encode()}, binary]
    return files, lambda folder: read_frames(next(folder.iterdir()))


def structures() -> tuple[list[Files], Read]:
    """Crystals in the formats that people have."""
    import ase.io
    from ase.build import bulk

    from mlip_refine.data.structures import load_structure

    names = dict.fromkeys(("POSCAR", "a.cif", "a.extxyz", "a.xsf", "a.json", "a.gen", "a.res", "a.traj"))
    names |= dict.fromkeys(("CONTCAR.vasp", "a.pdb", "a.con", "a.struct", "a.xyz.gz"))
    names |= {"geometry.in": "aims", "a.pwi": "espresso-in", "a.cell": "castep-cell", "a.cube": "cube"}
    folder = Path(tempfile.mkdtemp())
    files: list[Files] = []
    for name, kind in names.items():
        options = {"pseudopotentials": {"Ti": "Ti.upf"}} if kind == "espresso-in" else {}
        with suppress(Exception), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            ase.io.write(folder / name, bulk("Ti", "hcp", a=2.95, c=4.68) * (2, 1, 1), format=kind, **options)
            files.append({name: (folder / name).read_bytes()})
    shutil.rmtree(folder)
    lattice = {"matrix": np.diag([3.0, 3.0, 5.0]).tolist()}
    sites = [{"species": [{"element": "Ti", "occu": 1}], "abc": [x, x, x]} for x in (0.0, 0.5)]
    crystal = {
        "@module": "pymatgen.core.structure",
        "@class": "Structure",
        "lattice": lattice,
        "sites": sites,
    }
    files.append({"a.json": json.dumps(crystal, indent=1).encode()})
    # Of other programs: cut off, with occupancies, with elements in the comment alone.
    files.append({"OUTCAR": b" vasp.5.4.4\n POTCAR: PAW_PBE Ti\n ions per type = 2\n"})
    files.append({"aims.out": b" Invoking FHI-aims ...\n | Number of atoms : 2\n | lattice_vector 3 0 0\n"})
    files.append({"orca.out": b" * O   R   C   A *\nTOTAL RUN TIME: 1\n"})
    files.append({"a.log": b" Entering Gaussian System, Link 0=g09\n Standard orientation:\n 1 22 0 0 0\n"})
    files.append({"POSCAR": b"Ti O\n1.0\n4 0 0\n0 4 0\n0 0 4\n1 1\nDirect\n0 0 0\n.5 .5 .5\n"})
    loop = "loop_\n_atom_site_label\n" + "".join(
        f"_atom_site_{x}\n" for x in ("fract_x", "fract_y", "fract_z")
    )
    cell = "".join(f"_cell_length_{x} 4.0\n_cell_angle_{y} 90\n" for x, y in zip("abc", GREEK, strict=True))
    text = f"data_x\n{cell}{loop}_atom_site_occupancy\nTi1 0 0 0 1.0\nO1 0.5 0.5 0.5 1.0\n"
    files += [{"b.cif": text.encode()}] * 2
    return files, lambda folder: load_structure(next(folder.iterdir()))


def phonons() -> tuple[list[Files], Read]:
    """Phonon calculations as phonopy and phono3py write them."""
    import h5py

    from mlip_refine.data.phonons.collections import read_phonon_set
    from mlip_refine.data.phonons.reader import read_phonons

    packed = ("phonopy_params_TiPN3.yaml.xz", "phonopy_params_NaCl-rd.yaml.xz", "mp-149.yaml.xz")
    files: list[Files] = []
    for name in packed:
        content = lzma.decompress((PHONONS / name).read_bytes())
        files.append({name.removesuffix(".xz").replace("mp-149", "phonopy"): content})
    tin = {path.name: path.read_bytes() for path in sorted((PHONONS / "SnO2").iterdir())}
    files += [tin, tin, tin]
    # With the tags of phonopy.conf that count, a cell that names no elements, and an index.
    cell = tin["POSCAR-unitcell"].replace(b"Sn O\n", b"cassiterite\n", 1).replace(b" Sn O\n", b"")
    tags = b"CELL_FILENAME = mine\nATOM_NAME = Sn O\nMASS = 120 120 4*16\nMAGMOM = 1 -1 4*0\nMP = 8 8 8\n"
    conf = tin["phonopy.conf"] + tags.replace(b"4*16", b"16 16 16 16")
    files.append({"mine": cell, "FORCE_SETS": tin["FORCE_SETS"], "phonopy.conf": conf})
    springs = np.kron(np.eye(72) - 1 / 72, np.eye(3)).reshape(72, 3, 72, 3).swapaxes(1, 2)
    with h5py.File("force_constants.hdf5", "w", driver="core", backing_store=False) as file:
        file.create_dataset("force_constants", data=springs, compression="gzip")
        file["p2s_map"] = np.arange(72)
        file["physical_unit"] = np.array([b"eV/angstrom^2"])
        file.flush()
        constants = file.id.get_file_image()
    files.append({"force_constants.hdf5": constants, "phonopy.conf": tin["phonopy.conf"]})
    files[-1]["POSCAR-unitcell"] = tin["POSCAR-unitcell"]
    polar = files[0]["phonopy_params_TiPN3.yaml"]
    files.append({"index.csv": b"file,name,split\npolar.yaml,TiPN3,train\n", "polar.yaml": polar})

    def read(folder: Path) -> None:
        inside = list(folder.iterdir())
        if (folder / "index.csv").exists():
            read_phonon_set(folder, cache=False)
        else:
            read_phonons(inside[0] if len(inside) == 1 else folder)

    return files, read


def initials() -> tuple[list[Files], Read]:
    """Differences of free energies, as the command writes them and losses read them."""
    from mlip_refine.quantities import Measured
    from mlip_refine.workflows.free_energy.records import FreeEnergyResult, PhaseFreeEnergy

    sites, cell = [[0.0] * 3, [0.5] * 3], np.diag([3.0, 3.0, 5.0]).tolist()
    energy = Measured(1.5, 0.1, "meV/atom")
    phase = PhaseFreeEnergy(
        phase="hcp", numbers=[22, 22], scaled_positions=sites, cell=cell, gibbs=energy, overlap=0.3
    )
    result = FreeEnergyResult(
        model_hash="0",
        head="Default",
        temperature_K=300.0,
        pressure_GPa=0.0,
        n_atoms=2,
        delta_g=energy,
        from_=phase,
        to=phase,
        timestep_fs=2.0,
        settings={"windows": 5},
    )
    text = json.dumps(result.as_json(), indent=1)
    return [{"initial.json": text.encode()}], lambda folder: FreeEnergyResult.read(folder / "initial.json")


def models() -> tuple[list[Files], Read]:
    """Models: MACE's pickle, and tensors with a description in JSON."""
    from mlip_refine.potential import Potential
    from mlip_refine.potential.checkpoints.archive import save_safetensors

    path = ROOT / "tests" / "data" / "gst" / "gst_mace_swa.model"
    folder = Path(tempfile.mkdtemp())
    compact = Potential.load("titanium-compact", default_dtype="float32")
    save_safetensors(compact.module, folder / "a")
    pair = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    shutil.rmtree(folder)
    asset = ROOT / "mlip_refine" / "assets" / "titanium-compact.model"
    files = [{"a.model": asset.read_bytes()}, pair, pair, {"a.model": path.read_bytes()}]

    def read(folder: Path) -> None:
        main = [file for file in folder.iterdir() if file.suffix in {".model", ".safetensors"}]
        Potential.load(main[0])

    return files, read


def runs() -> tuple[list[Files], Read]:
    """What a run folder holds: checkpoints, frames, results of a free energy."""
    import torch

    from mlip_refine.sampling import Length, MDSettings, StatePoint, sample
    from mlip_refine.sampling.store import FrameStore
    from mlip_refine.testing import HarmonicCrystals, harmonic_crystal
    from mlip_refine.training.trainer import read_latest, write_checkpoint

    folder = Path(tempfile.mkdtemp())
    content = {"weights": {"a": torch.arange(50.0)}, "random": torch.arange(9), "log": [1.0, "two"]}
    checkpoint = write_checkpoint(folder, 3, content).read_bytes()
    atoms, reference = harmonic_crystal("hcp")
    potential = HarmonicCrystals([reference], atoms.numbers)
    point = StatePoint("hcp", atoms, temperature=300.0, identity="none")
    store = FrameStore(folder / "frames", {})
    sample(potential, [point], MDSettings(), Length(40.0, 10), seed=1, stage="test", store=store)
    stored = store.path("test", 0).read_bytes()
    shutil.rmtree(folder)

    def read(folder: Path) -> None:
        read_latest(folder)
        frames = FrameStore(folder, {})
        if frames.path("test", 0).exists():
            frames.read("test", 0, {point.name: point}, None)

    return [{"step-0003.pt": checkpoint}, {"test.0000.h5": stored}], read


DOORS = {
    door.__name__: door for door in (configs, tables, frames, structures, phonons, initials, models, runs)
}


class _TooSlow(BaseException):
    pass


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what takes longer, as far as Python can."""

    def stop(*_: object) -> None:
        raise _TooSlow

    signal.signal(signal.SIGPROF, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, SLOWEST_WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def faulty(files: Files, random: np.random.Generator) -> tuple[Files, str]:
    """Return files of which one has faults."""
    name = str(random.choice(sorted(files)))
    content = files[name]
    try:
        text = content.decode()
    except UnicodeDecodeError:
        content, what = mutate_bytes(content, random)
    else:
        if random.random() < 0.85:
            text, what = mutate_text(text, random)
            content = text.encode("utf-8", "surrogatepass")
        else:
            content, what = mutate_bytes(content, random)
    return {**files, name: content}, f"{name}: {what}"


def outcome(read: Read, folder: Path) -> str:
    """Read, and say `accepted`, `refused`, or what went wrong."""
    watch.seen.clear()
    watch.folder = folder.parent
    try:
        with limited(SLOWEST), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            read(folder)
        came = "accepted"
    except MlipRefineError as error:
        message = str(error)
        came = "refused" if message.isprintable() or "\n" in message else f"message {message!r}"
    except _TooSlow:
        came = f"slower than {SLOWEST} s"
    except BaseException:  # noqa: BLE001 - every kind of end is an answer
        came = "traceback " + " | ".join(traceback.format_exc().strip().splitlines()[-7:])
    watch.folder = None
    return f"not allowed: {watch.seen}" if watch.seen else came


def main(door: str, seed: int, first: int, last: int, folder: Path) -> None:
    """Read the mutated files from `first` to `last`."""
    warnings.simplefilter("ignore")
    whole, read = DOORS[door]()
    # Whole files are read once, so that every library is loaded before memory is limited.
    for files in whole:
        written(files, folder / "files")
        with suppress(MlipRefineError):
            read(folder / "files")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    os.chdir(folder)
    os.environ["TMPDIR"] = os.environ["XDG_CACHE_HOME"] = tempfile.tempdir = str(folder)
    sys.addaudithook(watch)
    for k in range(first, last):
        random = np.random.default_rng([seed, sorted(DOORS).index(door), k])
        files, what = faulty(whole[k % len(whole)], random)
        written(files, folder / "files")
        say(k=k, what=what)
        say(k=k, came=outcome(read, folder / "files"))


def written(files: Files, folder: Path) -> None:
    """Write files into a folder that has nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def say(**what: object) -> None:
    """Write a line of JSON."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
