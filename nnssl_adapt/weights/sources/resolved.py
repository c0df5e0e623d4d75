"""What a source turns out to be: files on this machine, and where they are from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnssl_adapt.weights.sources.file_names import Chosen


@dataclass(frozen=True)
class Origin:
    """What a set of weights is, not where it happens to lie.

    Attributes:
        source: as the user typed it.
        kind: ``file``, ``folder``, ``model_folder``, ``zip``, ``url`` or ``huggingface``.
        repo_id: ``owner/name`` on the hub, else None.
        revision: the commit hash that was downloaded, else None. Copies made by ``nnssl-adapt fetch`` remember both.
        filename: the weight file's name.
        sha256: of the weight file's bytes; of the joined digests where several folds are averaged.
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
    """

    weights: Path
    sidecar: Path | None
    origin: Origin
    model_folder: Path | None = None
    other_folds: tuple[Path, ...] = ()
    archive: Path | None = None


def assemble(text: str, kind: str, root: Path, chosen: Chosen, digest: Callable[[Path], str]) -> ResolvedSource:
    """The chosen files below ``root``, every one checked by ``digest``."""
    digests = {name: digest(root / name) for name in chosen.names}
    of_weights = [digests[name] for name in chosen.weights]
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
    )
