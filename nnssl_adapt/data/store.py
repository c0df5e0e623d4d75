"""Folders of preprocessed cases, in nnU-Net's blosc2 format.

A case is three files: ``CASE.b2nd`` (float32 (C, Z, Y, X)), ``CASE_seg.b2nd`` (int16 (1, Z, Y, X)) and ``CASE.pkl`` (its
properties). nnU-Net accepts nothing else directly in the folder, so what we add lies in the subfolder ``.nnssl_adapt``:
``settings.json`` says what the folder is for, and ``cases/CASE.json``, written last, that a case is whole and from which
sources and settings it came. Folders that nnU-Net made have no such records; there a case is whole if its files exist.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from isal import isal_zlib

from nnssl_adapt.data.arrays import compressed, open_array
from nnssl_adapt.data.properties import load_properties
from nnssl_adapt.errors import CaseError, DatasetNotFound
from nnssl_adapt.files import explain_write_errors, make_folder, write_json
from nnssl_adapt.machine.scratch import remove_abandoned, workplace
from nnssl_adapt.text import read_record

if TYPE_CHECKING:  # half a second, and a bare machine has none: loaded where arrays are packed and opened
    import blosc2

logger = logging.getLogger(__name__)

RECORDS_FOLDER = ".nnssl_adapt"


@dataclass(frozen=True)
class PreprocessedCase:
    """One case, ready for a network.

    Attributes:
        data: float32 (C, Z, Y, X), transposed, cropped, normalised, resampled.
        seg: int16 (1, Z, Y, X) on the same grid, -1 outside the image's nonzero region; None if there are no labels.
        properties: nnU-Net's entries: ``spacing`` (mm, original axes), ``sitk_stuff``, ``shape_before_cropping``,
            ``bbox_used_for_cropping``, ``shape_after_cropping_and_before_resampling`` (transposed axes), and with labels
            ``class_locations``: class or region → (N, 4) int64 indices into ``seg``.
    """

    data: np.ndarray
    seg: np.ndarray | None
    properties: dict[str, Any]


@dataclass(frozen=True)
class StoredCase:
    """A case in a store. ``data`` and ``seg`` are blosc2 arrays that read and unpack only what is sliced."""

    identifier: str
    data: blosc2.NDArray
    seg: blosc2.NDArray
    folder: Path

    @cached_property
    def properties(self) -> dict[str, Any]:
        """The case's properties as in :class:`PreprocessedCase`, read on first use.

        Raises CaseError if the file is damaged or would run code.
        """
        properties = load_properties(self.folder / f"{self.identifier}.pkl")
        if "class_locations" not in properties:
            locations = _shared_class_locations(self.folder, self.identifier)
            if locations is not None:
                properties["class_locations"] = locations
        return properties


class CaseStore:
    """Preprocessed cases in one folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"CaseStore({str(self.folder)!r})"

    def __str__(self) -> str:
        return f"{len(self.identifiers)} preprocessed cases in {self.folder}"

    def __len__(self) -> int:
        return len(self.identifiers)

    @property
    def identifiers(self) -> list[str]:
        """The complete cases, sorted. Cases of other settings than the folder's, or half-written ones, don't count."""
        if not self.folder.is_dir():
            return []
        stems = {p.name[: -len(".b2nd")] for p in self.folder.glob("*.b2nd")}
        cases = sorted(stem for stem in stems if not stem.endswith("_seg"))
        digest = self.settings.get("digest")
        return [case for case in cases if self.is_complete(case, digest=digest)]

    @property
    def settings(self) -> dict[str, Any]:
        """What :meth:`begin` noted: the exact settings of this folder; empty where nnU-Net made it."""
        return read_record(self._records / "settings.json")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Note what the folder is for before any case is written; ``settings["digest"]`` tells its cases from others.

        What a killed process left half-written is removed, what others are writing at the moment is not. Raises OutputError
        if the folder can't be written.
        """
        make_folder(self._records / "cases")
        remove_abandoned(self._records / "unfinished")
        if self.settings != json.loads(json.dumps(settings)):
            write_json(self._records / "settings.json", settings)

    def is_complete(
        self,
        identifier: str,
        digest: str | None = None,
        sources: Iterable[Mapping[str, Any]] | None = None,
        read_all: bool = False,
    ) -> bool:
        """Whether a case is whole and, where given, made with these settings from these (unchanged) source files.

        ``sources`` are :func:`describe_source` of its files. With ``read_all`` every byte is compared with its checksum, not
        only the number of bytes. nnU-Net's folders have no records: there all that can be asked is whether the files exist.
        """
        if not self._records.is_dir():
            return digest is None and sources is None and all(path.is_file() for path in self._paths(identifier))
        record = read_record(self._record(identifier))
        if not record or (digest is not None and record.get("digest") != digest):
            return False
        if sources is not None and record.get("sources") != list(sources):
            return False
        sizes, sums = _mapping(record, "outputs"), _mapping(record, "crc32")
        paths = self._paths(identifier)
        if not all(path.is_file() and path.stat().st_size == sizes.get(path.name) for path in paths):
            return False
        return not read_all or all(_checksum(path) == sums.get(path.name) for path in paths)

    def open(self, identifier: str) -> StoredCase:
        """Open a case for reading. Raises CaseError if it is missing, incomplete or damaged."""
        data_path, seg_path, properties_path = self._paths(identifier)
        missing = [path.name for path in (data_path, seg_path, properties_path) if not path.is_file()]
        if missing:
            raise CaseError(
                f"{self.folder} has no whole case {identifier!r} (missing: {', '.join(missing)}): preprocess again"
            )
        return StoredCase(identifier, open_array(data_path), open_array(seg_path), self.folder)

    def write(
        self,
        identifier: str,
        case: PreprocessedCase,
        patch_size: Sequence[int],
        digest: str | None = None,
        sources: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write a case with labels; at no instant does a half-written one count, here or for nnU-Net.

        Args:
            identifier: the case's name.
            case: what to write.
            patch_size: of the training to come (Z, Y, X); files are cut into pieces that suit reading such patches.
            digest: of the settings it was made with; see :meth:`begin`.
            sources: :func:`describe_source` of the files it was made from.

        Raises:
            OutputError: the folder can't be written, or the disk is full.
        """
        if case.seg is None:
            raise ValueError(f"case {identifier} has no labels; only cases with labels are stored")
        data_path, seg_path, properties_path = self._paths(identifier)
        contents = (
            (seg_path, compressed(case.seg.astype(np.int16, copy=False), patch_size)),
            (properties_path, pickle.dumps(case.properties, protocol=4)),
            (data_path, compressed(case.data.astype(np.float32, copy=False), patch_size)),
        )
        with explain_write_errors(self.folder), workplace(self._records / "unfinished") as unfinished:
            for path, content in contents:
                temporary = unfinished / path.name
                with open(temporary, "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            self.remove(identifier)
            # nnU-Net takes a case for there as soon as CASE.b2nd is, so that comes last.
            for path, _ in contents:
                (unfinished / path.name).replace(path)
        record = {
            "digest": digest,
            "sources": list(sources),
            "outputs": {path.name: len(content) for path, content in contents},
            "crc32": {path.name: isal_zlib.crc32(content) for path, content in contents},
            "made_with": _versions(),
        }
        write_json(self._record(identifier), record)

    def digests(self, identifiers: Iterable[str]) -> dict[str, str]:
        """What tells each case's stored voxels and labels from others, without reading them: by the checksums of its record.

        In nnU-Net's folders, which have no records, by the sizes of the files.
        """
        digests = {}
        for case in identifiers:
            data_path, seg_path, _ = self._paths(case)
            sums = _mapping(read_record(self._record(case)), "crc32")
            recorded = [sums[path.name] for path in (data_path, seg_path) if isinstance(sums.get(path.name), int)]
            sizes = [path.stat().st_size for path in (data_path, seg_path) if path.is_file()]
            digests[case] = " ".join(f"{number:08x}" for number in recorded or sizes)
        return digests

    def checksums(self, identifier: str) -> dict[Path, int | None]:
        """The three files of a case (data, labels, properties), each with its CRC-32 where it has a record."""
        sums = _mapping(read_record(self._record(identifier)), "crc32")
        return {path: sums.get(path.name) for path in self._paths(identifier)}

    def remove(self, identifier: str) -> None:
        """Remove a case, whole or not."""
        data_path, seg_path, properties_path = self._paths(identifier)
        with explain_write_errors(self.folder):
            for path in (self._record(identifier), data_path, seg_path, properties_path):
                path.unlink(missing_ok=True)

    def recorded(self) -> list[str]:
        """All cases that have a record, whole or not, of whatever settings."""
        return sorted(p.name[: -len(".json")] for p in (self._records / "cases").glob("*.json") if p.name[0] != ".")

    def require(self, identifiers: Iterable[str]) -> None:
        """Raise DatasetNotFound, naming them, unless all these cases are complete."""
        missing = sorted(set(identifiers) - set(self.identifiers))
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise DatasetNotFound(
                f"{self.folder} lacks {len(missing)} preprocessed case(s): {', '.join(missing[:5])}{more}; run the "
                "preprocessing command again, it does only what is missing"
            )

    @property
    def _records(self) -> Path:
        return self.folder / RECORDS_FOLDER

    def _record(self, identifier: str) -> Path:
        return self._records / "cases" / f"{identifier}.json"

    def _paths(self, identifier: str) -> tuple[Path, Path, Path]:
        return (
            self.folder / f"{identifier}.b2nd",
            self.folder / f"{identifier}_seg.b2nd",
            self.folder / f"{identifier}.pkl",
        )


def _mapping(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An entry of a record; empty where somebody has put something else there."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def describe_source(path: Path) -> dict[str, Any]:
    """What tells a changed source file from an unchanged one: name, bytes, time of last change. Not where it lies."""
    status = path.stat()
    return {"name": path.name, "bytes": status.st_size, "changed_ns": status.st_mtime_ns}


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            value = isal_zlib.crc32(block, value)
    return value


@cache
def _versions() -> dict[str, str]:
    """What decides the voxels of a case, beside its settings."""
    versions = {"numpy": np.__version__}
    for package in ("blosc2", "nnssl-adapt", "scipy", "SimpleITK"):  # by their metadata: a bare machine lacks some
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from its sources
            versions[package] = "not installed"
    return versions


def _shared_class_locations(folder: Path, identifier: str) -> dict[Any, np.ndarray] | None:
    """Class locations of a case from the folder's ``fg_sampling``, where nnU-Net after 2.8 keeps them for all cases.

    Locations are flat indices, one run for each class present in a case (compressed sparse rows: ``indptr`` over cases,
    ``class_id`` and ``count`` over runs, ``base`` where a case's runs start). Classes that are absent get empty arrays.
    """
    shared = folder / "fg_sampling"
    meta = read_record(shared / "meta.json")
    identifiers = meta.get("identifiers")
    if not isinstance(identifiers, list) or identifier not in identifiers:
        return None
    try:
        row = meta["identifiers"].index(identifier)
        keys = [tuple(key) if isinstance(key, list) else int(key) for key in meta["class_keys"]]
        indptr, class_id, count, base, shape = (
            np.load(shared / f"{name}.npy") for name in ("indptr", "class_id", "count", "base", "shape")
        )
        locations: dict[Any, np.ndarray] = {key: np.zeros((0, 4), np.int64) for key in keys}
        flat = open_array(shared / "locations.b2nd")
        start = int(base[row])
        for run in range(int(indptr[row]), int(indptr[row + 1])):
            indices = np.asarray(flat[start : start + int(count[run])]).astype(np.int64)
            locations[keys[class_id[run]]] = np.stack(np.unravel_index(indices, (1, *shape[row])), axis=1)
            start += int(count[run])
    except (OSError, EOFError, ValueError, ArithmeticError, LookupError, TypeError, RuntimeError) as error:
        raise CaseError(f"{shared} is damaged ({type(error).__name__}: {error}): preprocess again") from error
    return locations
