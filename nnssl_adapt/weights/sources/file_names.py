"""Names of the files that weights come in, and what can be told from a name alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

SIDECAR_NAME = "adaptation_plan.json"
"""The adaptation plan that nnssl writes beside a checkpoint."""

MODEL_FILES = ("plans.json", "dataset.json")
"""What makes the folder around fold_* a trained nnU-Net model."""

WEIGHT_NAMES = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")
"""What nnssl and nnU-Net call their checkpoints, the one to prefer first."""

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
"""Of two files with one stem, the suffix that comes first is taken."""

ARCHIVE_SUFFIX = ".zip"

PREFERRED_NAMES = (*WEIGHT_NAMES, "checkpoint_final.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Chosen:
    """Names below one root, with ``/`` between folders.

    Attributes:
        weights: the weight files, several where folds are averaged; or one zip that has them.
        sidecar: the adaptation plan beside them, or None.
        model_folder: the folder with plans.json and dataset.json, ``""`` if that is the root, or None.
        fold: which fold of a trained model, ``mean`` for several, or None.
    """

    weights: tuple[str, ...]
    sidecar: str | None = None
    model_folder: str | None = None
    fold: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every file that is needed, the small ones first."""
        model = () if self.model_folder is None else tuple(join(self.model_folder, name) for name in MODEL_FILES)
        return (*((self.sidecar,) if self.sidecar else ()), *model, *self.weights)

    @property
    def is_archive(self) -> bool:
        return self.weights[0].lower().endswith(ARCHIVE_SUFFIX)


def is_clutter(name: str) -> bool:
    """Hidden files, and what macOS adds to zips (``__MACOSX/._checkpoint_final.pth``)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def is_weight_name(name: str) -> bool:
    return name.lower().endswith(WEIGHT_SUFFIXES)


def join(folder: str, name: str) -> str:
    """Both with ``/`` between them; either may be empty."""
    return "/".join(part for part in (folder, name) if part)


def pick(names: Sequence[str]) -> str | None:
    """The weight file to take among those of one folder; None if there is none, or no reason to prefer one."""
    for name in PREFERRED_NAMES:
        if name in names:
            return name
    candidates = [name for name in names if is_weight_name(name)]
    if len({name.rpartition(".")[0] for name in candidates}) == 1:  # the same weights in several formats
        return min(candidates, key=lambda name: WEIGHT_SUFFIXES.index(PurePosixPath(name).suffix.lower()))
    return None


def listing(names: Sequence[str]) -> str:
    """Some of the names, for a message."""
    shown = ", ".join(names[:12]) or "nothing"
    return f"{shown}, … ({len(names)} files)" if len(names) > 12 else shown


def sidecar_beside(name: str, names: Sequence[str]) -> str | None:
    sidecar = join(name.rpartition("/")[0], SIDECAR_NAME)
    return sidecar if sidecar in names else None
