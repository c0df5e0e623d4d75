"""Postprocessing of segmentations: of a class, or of everything, only the largest connected part is kept.

Whether that helps is decided in cross-validation (:mod:`nnssl_adapt.evaluation.postprocessing`); this is about doing it,
and about the two files that say what to do: ``postprocessing.json``, and nnU-Net's ``postprocessing.pkl``.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from nnssl_adapt.data.dataset import MAX_LISTED
from nnssl_adapt.data.endings import files_with
from nnssl_adapt.data.images import read_geometry, read_labels, reader_for, write_labels
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.errors import CaseError, ConfigurationError, PredictionError, UnsafeCheckpoint
from nnssl_adapt.files import atomic_path, make_folder, write_json
from nnssl_adapt.geometry.cropping import nonzero_box
from nnssl_adapt.machine.workers import over_cases
from nnssl_adapt.text import read_json

_MODULE = "nnunetv2.postprocessing.remove_connected_components"
_FUNCTION = "remove_all_but_largest_component_from_segmentation"

BYTES_PER_VOXEL = 24
"""Of working on a case: labels as stored, their copy, a mask and int32 components."""


@dataclass(frozen=True)
class Postprocessing:
    """What to do with a segmentation, step by step.

    Attributes:
        steps: for each step the label values whose union keeps its largest connected part only. None: nothing is done.
    """

    steps: tuple[tuple[int, ...], ...] = ()

    def apply(self, labels: np.ndarray) -> np.ndarray:
        """Return a processed copy of labels (Z, Y, X)."""
        result: np.ndarray = labels.copy()
        for values in self.steps:
            result = keep_largest_component(result, values)
        return result

    def then(self, values: Sequence[int]) -> Postprocessing:
        """Return these steps with one more."""
        return Postprocessing((*self.steps, tuple(values)))

    def refuse_unknown(self, labels: LabelScheme, where: str | Path) -> None:
        """Raise ConfigurationError, naming the file ``where``, for steps about labels that the model does not have.

        Such steps would change nothing, and come from another model's file.
        """
        unknown = sorted({value for step in self.steps for value in step} - set(labels.foreground_labels))
        if unknown:
            raise ConfigurationError(
                f"{where} is about label {', '.join(str(v) for v in unknown)}, but there are only "
                f"{', '.join(str(v) for v in labels.foreground_labels)}: is it the postprocessing of another model?"
            )

    def __str__(self) -> str:
        if not self.steps:
            return "no postprocessing"
        return "largest component of " + ", then of ".join("+".join(str(v) for v in step) for step in self.steps)

    # -- files -----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """nnU-Net's entries in ``postprocessing.json``."""
        return {
            "postprocessing_fns": [_FUNCTION] * len(self.steps),
            "postprocessing_kwargs": [{"labels_or_regions": list(step)} for step in self.steps],
        }

    def save(self, path: str | Path, results: Mapping[str, Any] | None = None) -> None:
        """Write ``postprocessing.json``, and beside it the ``.pkl`` that ``nnUNetv2_apply_postprocessing`` takes.

        ``results`` are what nnU-Net writes as well, the summaries that the decision rests on.
        """
        path = Path(path)
        write_json(path, {**(results or {}), **self.to_dict()})
        with atomic_path(path.with_suffix(".pkl")) as temporary:
            temporary.write_bytes(self._pickled())

    def _pickled(self) -> bytes:
        """Pickle of ``([function, …], [keyword arguments, …])`` with nnU-Net's function, which need not be installed.

        A pickle holds no function, only the name of one; the module that writes pickles insists on importing it, though.
        So this writes the few operations itself: a list with the name for each step, the arguments, and a tuple of both.
        """
        name = b"c" + _MODULE.encode() + b"\n" + _FUNCTION.encode() + b"\n"
        arguments = pickle.dumps([{"labels_or_regions": list(step)} for step in self.steps], protocol=2)
        return b"\x80\x02](" + name * len(self.steps) + b"e" + arguments[2:-1] + b"\x86."

    @classmethod
    def load(cls, path: str | Path) -> Postprocessing:
        """Read ``postprocessing.json`` or ``postprocessing.pkl``, ours or nnU-Net's; nothing in it is run.

        Raises:
            CaseError: missing, damaged, or it names steps that nnU-Net 2 does not have.
            UnsafeCheckpoint: a pickle that names anything but nnU-Net's function.
        """
        path = Path(path)
        try:
            if path.suffix == ".pkl":
                with open(path, "rb") as stream:
                    functions, arguments = _NamesOnly(stream).load()
            else:
                content = read_json(path, CaseError, "postprocessing.json")
                missing = {"postprocessing_fns", "postprocessing_kwargs"} - set(content)
                if missing:
                    raise ValueError(f"it has no {' and no '.join(sorted(missing))}")
                functions, arguments = content["postprocessing_fns"], content["postprocessing_kwargs"]
            unknown = [str(function) for function in functions if function != _FUNCTION]
            if unknown:
                raise CaseError(f"{path} asks for {', '.join(unknown)}; known is {_FUNCTION}")
            steps = tuple(_values_of(entry, path) for entry in arguments)
            if len(steps) != len(functions):
                raise ValueError(f"{len(functions)} steps, arguments for {len(steps)}")
        except (OSError, EOFError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
            raise CaseError(f"{path} can't be read as postprocessing ({error})") from error
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpoint(f"{path} is not nnU-Net's postprocessing.pkl ({error}); nothing was run") from error
        return cls(steps)


class _NamesOnly(pickle.Unpickler):
    """Unpickler that reads the name of nnU-Net's function as a text, and refuses all others but NumPy's numbers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (_MODULE, _FUNCTION):
            return _FUNCTION
        if (module, name) == ("numpy", "dtype"):  # nnU-Net's label values are NumPy's where they come from regions
            return np.dtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return np.int64(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _values_of(arguments: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """Label values of one step. nnU-Net has a label, a region (tuple), or a list of either; what counts is their union."""
    extra = set(arguments) - {"labels_or_regions", "background_label"}
    if extra or arguments.get("background_label", 0) != 0:
        raise CaseError(f"{path} has arguments that are not supported: {dict(arguments)}")
    return tuple(sorted(set(_flat(arguments["labels_or_regions"]))))


def _flat(entry: Any) -> Iterator[int]:
    if isinstance(entry, (list, tuple)):
        for part in entry:
            yield from _flat(part)
    else:
        yield int(entry)


def keep_largest_component(labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Return a copy of labels (Z, Y, X) without the smaller parts of the union of ``values``.

    Voxels that touch over a face, an edge or a corner belong together; of parts that are equally large all stay (both as
    in nnU-Net). What goes becomes background.
    """
    result: np.ndarray = labels.copy()
    mask = np.isin(labels, values)
    if not mask.any():
        found: np.ndarray = result
        return found
    box = tuple(slice(*extent) for extent in nonzero_box(mask[None]))
    parts, count = ndimage.label(mask[box], structure=np.ones((3,) * mask.ndim, bool))
    if count > 1:
        sizes = np.bincount(parts.reshape(-1))
        keep = sizes == sizes[1:].max()
        keep[0] = True  # what is not of these values
        result[box][~keep[parts]] = 0
    return result


def postprocess_case(source: Path, target: Path, postprocessing: Postprocessing) -> None:
    """Process one label file into another. Raises CaseError, OutputError."""
    labels, geometry = read_labels(source, reader_for([source]))
    write_labels(target, postprocessing.apply(labels[0]), geometry)


def postprocess_folder(
    source: str | Path,
    target: str | Path,
    postprocessing: Postprocessing,
    file_ending: str,
    workers: int = 1,
    progress: bool = False,
) -> list[Path]:
    """Process every segmentation of a folder into another one, with the folder's dataset.json and plans.json.

    Returns:
        The files written.

    Raises:
        ConfigurationError: source and target are the same.
        CaseError: there is nothing in the folder.
        PredictionError: some files are bad (each is named); the others are done.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise CaseError(f"{source}: no such folder")
    if source.resolve() == target.resolve():
        raise ConfigurationError(f"{source} would be overwritten: choose another output folder")
    names = sorted(path.name for path in files_with(source, file_ending).values())
    if not names:
        raise CaseError(f"{source} has no segmentations: expected names like CASE{file_ending}")
    make_folder(target)
    copy_descriptions(description_of(source).parent, target)
    tasks = [(name, (source / name, target / name, postprocessing)) for name in names]
    memory = {name: memory_of(source / name, BYTES_PER_VOXEL) for name in names} if workers > 1 else None
    raise_failures(over_cases(postprocess_case, tasks, workers, "Postprocessing", progress, memory), len(tasks), target)
    return [target / name for name in names]


def copy_descriptions(source: Path, target: Path) -> None:
    """Copy dataset.json and plans.json, as far as they are there, which evaluation and nnU-Net look for."""
    for name in ("dataset.json", "plans.json"):
        if (source / name).is_file():
            with atomic_path(target / name) as temporary:
                temporary.write_bytes((source / name).read_bytes())


def description_of(folder: Path) -> Path:
    """The dataset.json of a folder of segmentations: in it, or in the model folder if it is a fold's validation.

    What is returned need not exist.
    """
    of_model = folder.resolve().parent.parent / "dataset.json"
    own = folder / "dataset.json"
    return of_model if not own.is_file() and folder.name == "validation" and of_model.is_file() else own


def memory_of(image: Path, bytes_per_voxel: int) -> int:
    """Bytes that work on an image takes, by its header; 0 where that can't be read (which is reported later)."""
    try:
        return int(np.prod(read_geometry(image).size)) * bytes_per_voxel
    except CaseError:
        return 0


def raise_failures(outcomes: Iterator[Any], total: int, target: Path) -> None:
    """Wait for all outcomes; raise PredictionError that names every case that failed."""
    failed = sorted(f"{outcome.identifier}: {outcome.complaint}" for outcome in outcomes if outcome.error is not None)
    if failed:
        more = f"\n  … and {len(failed) - MAX_LISTED} more" if len(failed) > MAX_LISTED else ""
        listed = "\n  ".join(failed[:MAX_LISTED])
        raise PredictionError(f"{len(failed)} of {total} cases failed; the others are in {target}:\n  {listed}{more}")


def opened_postprocessing(given: Postprocessing | str | Path | None, labels: LabelScheme) -> Postprocessing:
    """The steps, all of which are about the model's labels."""
    if given is None:
        return Postprocessing()
    steps = given if isinstance(given, Postprocessing) else Postprocessing.load(given)
    steps.refuse_unknown(labels, "the postprocessing" if isinstance(given, Postprocessing) else given)
    return steps
