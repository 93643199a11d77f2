"""Sets of phonon calculations: a folder of them, or an index that names them and says what they are for."""

import csv
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mlip_refine.data.phonons.cache import cache_key, default_cache, store, stored
from mlip_refine.data.phonons.calculations import is_calculation
from mlip_refine.data.phonons.checks import check_unique, some_of
from mlip_refine.data.phonons.reader import PhononSettings, calculation_name, read_phonon_orders
from mlip_refine.data.phonons.reference import PhononMetadata, PhononReference
from mlip_refine.data.phonons.splits import KAPPA, PARTS, SplitRule, in_kappa103, split_phonons
from mlip_refine.errors import InputError, nearest
from mlip_refine.files import user_path
from mlip_refine.progress import console, progress

INDEX = "index.csv"
# Columns of an index, in lower case.
_NAMES = ("name", "material", "mpid", "material_id")
_SPLITS = ("split", "pft_split")
_FREQUENCIES = ("lowest_frequency", "wmin_thz")
_SPELLINGS = {"valid": "val", "validation": "val"}
_THIRD = "-fc3"
"""How names of third-order references end."""

type LeaveOut = Callable[[str, InputError], None]
"""Called with the name of a calculation that is left out, and why."""


@dataclass(frozen=True)
class _Entry:
    path: Path
    name: str
    split: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def _tell(name: str, error: InputError) -> None:
    console.print(f"left out {name}: {error}", markup=False, soft_wrap=True)


def read_phonon_set(
    path: Path | str,
    *,
    split: str | None = None,
    rule: SplitRule | None = None,
    lowest_frequency: float | None = None,
    settings: PhononSettings | None = None,
    metadata: Mapping[str, Any] | None = None,
    names: Collection[str] | None = None,
    skip_refused: bool | LeaveOut = False,
    cache: Path | bool = True,
) -> list[PhononReference]:
    """Read many calculations, or one.

    An index is a CSV file with a column `file`; it may have `name` (or `mpid`), `split` (or `pft_split`),
    `lowest_frequency` (or `wmin_THz`), and text fields of `PhononMetadata` such as `functional`. Case and
    spaces of its header do not matter. A folder is
    read by its `index.csv`, or else with all archives, YAML files and folders of calculations in it.

    Args:
        path: An index, a folder of calculations, or one calculation.
        split: `train`, `val`, `test`: that part by the index, or by `rule` where it has none, in either case
            without the 103 compounds of the benchmark of thermal conductivity; `kappa103`: these; None: all.
        rule: Rule that divides a set without a split of its own.
        lowest_frequency: Leave out materials whose lowest frequency in the index, THz (negative for
            imaginary), is below this.
        settings: How calculations are read.
        metadata: What neither files nor index say, by the fields of `PhononMetadata`.
        names: Names of the wanted references; of an index no others are read. None takes all.
        skip_refused: Leave out calculations that cannot be read or fail a check, and say which; or what is
            called with their names and why.
        cache: Folder that keeps what was read for the next time; True takes the user's, False none.

    Returns:
        The references, in the order of the index, or of their names; none where it has none of `names`.

    Raises:
        InputError: Calculations are refused, with all their names; two have one name; the index is not one;
            or nothing is left.
    """
    path = user_path(path)
    given = metadata or {}
    chosen = settings or PhononSettings()
    _check_part(split)
    entries = _entries(path, lowest_frequency)
    divided = any(entry.split is not None for entry in entries)
    if divided and split in PARTS:
        entries = [entry for entry in entries if entry.split == split]
    kept_in = default_cache() if cache is True else cache or None
    # A rule divides the whole set: which part a material is in depends on the others.
    if names is not None and (divided or split not in PARTS):
        wanted = {*names, *(name.removesuffix(_THIRD) for name in names)}
        entries = [entry for entry in entries if entry.name in wanted]
    leave_out = _tell if skip_refused is True else skip_refused or None
    found = _read(entries, chosen, given, kept_in, str(path), leave_out)
    if split is None:
        kept = found
    elif split == KAPPA:
        kept = [reference for reference in found if in_kappa103(reference)]
    elif divided:
        kept = [reference for reference in found if not in_kappa103(reference)]
    else:
        parts = split_phonons(found, rule or SplitRule())
        kept = [reference for reference, part in zip(found, parts, strict=True) if part == split]
    if names is not None:
        return [reference for reference in kept if reference.name in names]
    if not kept:
        benchmark = sum(map(in_kappa103, found))
        raise InputError(
            "no phonon calculations are left",
            where=str(path),
            found=f"split {split}, {len(found)} read, {benchmark} of them of the benchmark {KAPPA}",
            fix="Say what is what in a column split of the index; no split takes all." if found else None,
        )
    return kept


def calculation_names(path: Path | str) -> list[str]:
    """Return the names of the calculations of a set, without reading any.

    Raises:
        InputError: There are none, or the index is not one.
    """
    return [entry.name for entry in _entries(Path(path), None)]


def second_order(references: Sequence[PhononReference]) -> list[PhononReference]:
    """One reference per calculation: without those of phono3py's third-order displacements.

    These are of the same material, in a supercell of their own.
    """
    first = {(reference.name, reference.metadata.material) for reference in references}

    def is_third(reference: PhononReference) -> bool:
        name = reference.name
        return name.endswith(_THIRD) and (name.removesuffix(_THIRD), reference.metadata.material) in first

    return [reference for reference in references if not is_third(reference)]


def _check_part(split: str | None, where: str | None = None) -> None:
    known = (*PARTS, KAPPA)
    if split is not None and split not in known:
        word = nearest(split, known)
        fix = f"Did you mean {word!r}?" if word else None
        raise InputError("no such part", where=where, found=split, expected=", ".join(known), fix=fix)


def _read(
    entries: Sequence[_Entry],
    settings: PhononSettings,
    given: Mapping[str, Any],
    cache: Path | None,
    where: str,
    leave_out: LeaveOut | None,
) -> list[PhononReference]:
    """Read calculations, from the cache where it has them; leave out what is refused, or raise it."""
    references: list[PhononReference] = []
    places: list[str] = []
    refused: list[tuple[str, InputError]] = []
    with progress("reading phonon calculations", len(entries)) as tick:
        for done, entry in enumerate(entries, 1):
            metadata = {**given, **entry.metadata}
            try:
                here = cache is not None and entry.path.exists()
                key = cache_key(entry.path, entry.name, settings, metadata) if here else ""
                found = stored(cache, key) if cache and key else None
                if found is None:
                    found = read_phonon_orders(
                        entry.path, name=entry.name, settings=settings, metadata=metadata
                    )
                    if cache and key:
                        store(cache, key, found)
            except InputError as error:
                refused.append((entry.name, error))
                found = ()
            references += found
            places += [str(entry.path)] * len(found)
            tick(done)
    check_unique(references, places)
    if leave_out is not None:
        for name, reason in refused:
            leave_out(name, reason)
    elif len(refused) == 1:
        raise refused[0][1]
    elif refused:
        reasons = "; ".join(f"{name}: {reason.problem}" for name, reason in refused)
        raise InputError(
            f"{len(refused)} of {len(entries)} phonon calculations are refused",
            where=where,
            found=reasons,
            fix="Take them out of the set, or leave out what is refused with skip_refused.",
        )
    noted: dict[str, list[str]] = {}
    for reference in references:
        for note in reference.metadata.notes:
            noted.setdefault(note, []).append(reference.name)
    for note, names in noted.items():
        console.print(f"{some_of(names)}: {note}", markup=False, soft_wrap=True)
    return references


def _entries(path: Path, lowest_frequency: float | None) -> list[_Entry]:
    index = path / INDEX if path.is_dir() else path
    if index.suffix == ".csv" and index.is_file():
        return _of_index(index, lowest_frequency)
    if lowest_frequency is not None:
        raise InputError(
            "lowest_frequency needs an index", where=str(path), expected=f"a folder with {INDEX}"
        )
    if not path.is_dir() or is_calculation(path):
        return [_Entry(path, calculation_name(path))]
    found = [child for child in sorted(path.iterdir()) if is_calculation(child)]
    if not found:
        expected = f"{INDEX}, archives, YAML files or folders of phonopy"
        raise InputError("no phonon calculations", where=str(path), expected=expected)
    return [_Entry(child, calculation_name(child)) for child in found]


def _of_index(index: Path, lowest_frequency: float | None) -> list[_Entry]:
    columns, rows = _table(index)
    if "file" not in columns:
        raise InputError("the index has no column 'file'", where=str(index), found=", ".join(columns))
    naming, splitting, frequency = (
        next((name for name in names if name in columns), names[0])
        for names in (_NAMES, _SPLITS, _FREQUENCIES)
    )
    if lowest_frequency is not None and frequency not in columns:
        raise InputError("the index has no lowest frequencies", where=str(index), expected=_FREQUENCIES[0])
    known = {f.name for f in fields(PhononMetadata)} - {
        "checks",
        "notes",
        "nac",
        "cutoff",
        "space_group",
        "formula",
    }
    kept = []
    for line, row in rows:
        where = f"{index}:{line}"
        if lowest_frequency is not None:
            try:
                lowest = float(row[frequency])
            except ValueError as error:
                raise InputError(
                    "not a frequency", where=where, found=repr(row[frequency]), expected="THz"
                ) from error
            # Not a number is left out, too.
            if not lowest >= lowest_frequency:
                continue
        if not row["file"]:
            raise InputError("a row without a file", where=where)
        path = index.parent / user_path(row["file"])
        said = row.get(splitting, "").lower()
        split = _SPELLINGS.get(said, said) or None
        _check_part(split, where)
        metadata = {key: row[key] for key in columns if key in known and row[key]}
        name = row.get(naming) or calculation_name(path)
        if not name.isprintable():
            raise InputError("a name with control characters", where=where, found=ascii(name))
        kept.append(_Entry(path, name, split, metadata))
    return kept


def _table(index: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Columns in lower case, and rows with their lines; what a row lacks is empty."""
    try:
        # Spreadsheets mark the encoding at the start of the file.
        with index.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            columns = [name.strip().lower() for name in next(reader, [])]
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"the index is no CSV in UTF-8 ({error})", where=str(index)) from error
    return columns, [(n, dict(zip_longest(columns, row[: len(columns)], fillvalue=""))) for n, row in lines]
