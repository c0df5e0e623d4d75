"""What a user asks for, and what it turns out to be: files on this machine, and where they are from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.errors import ConfigurationError
from nnssl_adapt.paths import downloads_folder
from nnssl_adapt.weights.sources.listing import Chosen

AXES = ("auto", "zyx", "xyz")
PATCH_MERGINGS = ("auto", "old", "new")


@dataclass(frozen=True)
class SourceOptions:
    """What may be said about weights beside the source itself.

    Attributes:
        revision: branch, tag or commit on the hub (default: its main branch). A commit pins the branch or tag that the source
            names.
        cache_dir: where downloads are kept and zips unpacked, if not in the usual caches.
        local_files_only: never use the network (as does ``HF_HUB_OFFLINE=1``).
        filename: the weight file in a folder, archive or repository, if not one of nnssl's names; or which of several
            trained model folders.
        fold: of a trained model folder: which fold, or ``mean`` for the average of all. Default: the only one, else
            ``all``, else the first.
        stem: of a network with one stem a dataset (MultiTalent): which one, or ``mean`` (the default).
        axes: order of the image axes that the kernels were trained on: ``zyx`` (SimpleITK's array order, as nnssl and
            nnU-Net), ``xyz`` (as MONAI; they are exchanged exactly), or ``auto``: ``xyz`` for files without a plan that are
            Lightning's or of a family that is known to be, else ``zyx``.
        patch_merging: of a Swin UNETR of unknown origin: how it merges patches, ``old`` (MONAI up to 1.4) or ``new``; ``auto``
            for all whose origin tells.

    Raises ConfigurationError for an unknown order of axes or way to merge patches.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    filename: str | None = None
    fold: str | None = None
    stem: str | None = None
    axes: str = "auto"
    patch_merging: str = "auto"

    def __post_init__(self) -> None:
        if self.patch_merging not in PATCH_MERGINGS:
            raise ConfigurationError(
                f"unknown way to merge patches {self.patch_merging!r}: choose one of {', '.join(PATCH_MERGINGS)}"
            )
        if self.axes not in AXES:
            raise ConfigurationError(f"unknown order of axes {self.axes!r}: choose one of {', '.join(AXES)}")

    @property
    def cache(self) -> Path:
        """Where downloads are kept and zips unpacked."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else downloads_folder()

    @property
    def choices(self) -> dict[str, str]:
        """How the weights were chosen and read, where not by default: with these the same weights are opened again."""
        made = {
            "filename": self.filename,
            "fold": self.fold,
            "stem": self.stem,
            "axes": None if self.axes == "auto" else self.axes,
            "patch_merging": None if self.patch_merging == "auto" else self.patch_merging,
        }
        return {key: value for key, value in made.items() if value is not None}


@dataclass(frozen=True)
class Origin:
    """What a set of weights is, not where it happens to lie.

    Attributes:
        source: as the user typed it.
        kind: ``file``, ``folder``, ``model_folder``, ``zip``, ``url`` or ``huggingface``.
        repo_id: ``owner/name`` on the hub, else None.
        revision: the commit hash that was downloaded, else None. Copies made by ``nnssl-adapt fetch`` remember both.
        filename: the weight file's name.
        sha256: of the weight file's bytes; of the joined digests where several files are averaged or put together.
        fold: of a trained model folder: the fold taken (``0``, ``all``, …) or ``mean``; else None.
    """

    source: str
    kind: str
    repo_id: str | None
    revision: str | None
    filename: str
    sha256: str
    fold: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.repo_id is None:
            return self.source
        return f"{self.repo_id}@{self.revision[:12]}" if self.revision else self.repo_id


@dataclass(frozen=True)
class ResolvedSource:
    """Files on this machine.

    Attributes:
        weights: the weight file; of several folds the first.
        sidecar: the adaptation plan beside it, None when there is none.
        origin: what they are.
        model_folder: the trained nnU-Net model folder (plans.json, dataset.json) that the weights lie in, or None.
        other_folds: weight files of further folds, to be averaged with ``weights``.
        archive: the zip that the weights were unpacked from, or None.
        other_shards: of weights that are spread over several files, all but the first, which is ``weights``.
    """

    weights: Path
    sidecar: Path | None
    origin: Origin
    model_folder: Path | None = None
    other_folds: tuple[Path, ...] = ()
    archive: Path | None = None
    other_shards: tuple[Path, ...] = ()


def assemble(text: str, kind: str, root: Path, chosen: Chosen, digest: Callable[[Path], str]) -> ResolvedSource:
    """The chosen files below ``root``, every one checked by ``digest``."""
    digests = {name: digest(root / name) for name in chosen.names}
    of_weights = [digests[name] for name in (*chosen.weights, *chosen.other_shards)]
    joined = of_weights[0] if len(of_weights) == 1 else hashlib.sha256("".join(of_weights).encode()).hexdigest()
    model = None if chosen.model_folder is None else root / chosen.model_folder
    if kind == "folder" and model is not None:
        kind = "model_folder"
    first, *others = (root / name for name in chosen.weights)
    return ResolvedSource(
        weights=first,
        sidecar=root / chosen.sidecar if chosen.sidecar else None,
        origin=Origin(text, kind, None, None, first.name, joined, chosen.fold),
        model_folder=model,
        other_folds=tuple(others),
        other_shards=tuple(root / name for name in chosen.other_shards),
    )
