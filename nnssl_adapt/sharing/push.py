"""A trained model to the Hugging Face hub, in one commit: its folder, its card, and its weights as safetensors too.

What is pushed is found again by ``-pc owner/name`` and ``nnssl-adapt install owner/name``.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from nnssl_adapt.errors import ConfigurationError, SourceAccessDenied, SourceError, SourceNotFound, SourceUnavailable
from nnssl_adapt.files import write_json, write_text
from nnssl_adapt.inference.model_folder import Fold, ModelFolder
from nnssl_adapt.inference.published import COUNTED
from nnssl_adapt.sharing.contents import CHECKPOINT, PackagedModel
from nnssl_adapt.sharing.package import CARD, PreparedModel, prepare, zip_of
from nnssl_adapt.sharing.unpack import unpack_model
from nnssl_adapt.weights.checkpoint.weight_file import read_weight_file
from nnssl_adapt.weights.sources.archive import is_archive
from nnssl_adapt.weights.sources.hub import endpoint, offline

logger = logging.getLogger(__name__)

SAFETENSORS = CHECKPOINT.replace(".pth", ".safetensors")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HOUSEKEEPING = (".gitattributes", ".gitignore")
_TRANSPORT = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "h11", "hf_xet"}


@dataclass(frozen=True)
class Pushed:
    """What was uploaded: the repository, the commit, the names of its files, and what to think about."""

    repo_id: str
    commit: str
    files: tuple[str, ...]
    warnings: tuple[str, ...]


def push_model(
    repo_id: str,
    source: str | Path,
    private: bool = False,
    overwrite: bool = False,
    licence: str | None = None,
    orientation: str | None = None,
    folds: Sequence[str | int] | None = None,
    message: str | None = None,
) -> Pushed:
    """Upload a trained model folder or a package; all files come in one commit, or none.

    Args:
        repo_id: ``owner/name``; made if there is none.
        source: model folder, package zip, or the folder of a package.
        private: make the new repository private.
        overwrite: commit over files that are there; those of the old model are removed in the same commit.
        licence: as of :func:`nnssl_adapt.sharing.package.make_package`.
        orientation: as there.
        folds: as there.
        message: of the commit.

    Raises:
        ConfigurationError: no such name for a repository, or another wrong option.
        ModelFolderError, CheckpointError: the model is not complete.
        SourceAccessDenied: not logged in, or not allowed to write there.
        SourceError: the repository holds files already, or the hub refuses them.
        SourceUnavailable: the hub can't be reached.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise ConfigurationError(
            f"{repo_id!r} is no repository's name: expected OWNER/NAME, letters, digits, . _ and -"
        )
    if offline():
        raise SourceUnavailable(f"{repo_id} can't be written while HF_HUB_OFFLINE is set: unset it")
    with tempfile.TemporaryDirectory(prefix="nnssl_adapt-push-") as place:
        work = Path(place)
        model, card = _open(source, work)
        prepared = prepare(model, work, repo_id.partition("/")[2], None, orientation, folds, licence)
        warnings = () if card else prepared.warnings  # a package's were shown when it was made
        for warning in warnings:
            logger.warning("%s", warning)
        files = _files(prepared, card or prepared.card, work)
        with _our_errors(repo_id):
            commit = _commit(repo_id, files, private, overwrite, message or f"Upload {prepared.name}")
    return Pushed(repo_id, commit, tuple(sorted(files)), warnings)


def _open(source: str | Path, work: Path) -> tuple[ModelFolder, str | None]:
    """The model, and the card that a package has already: results are not in the package itself."""
    path = Path(source).expanduser()
    if not path.exists():
        raise SourceNotFound(f"no model folder or package {path}")
    path = zip_of(path) or path
    if path.is_file() and is_archive(path):
        folder = unpack_model(path, work)
        card = folder / CARD
        return ModelFolder.open(folder), card.read_text(encoding="utf-8") if card.is_file() else None
    return ModelFolder.open(path), None


def _files(prepared: PreparedModel, card: str, work: Path) -> dict[str, Path]:
    """Name in the repository → file."""
    contents = prepared.contents
    model = ModelFolder(contents.folder)
    _add_safetensors(contents, prepared.folds)
    if prepared.first_stage is not None:
        _add_safetensors(prepared.first_stage, prepared.folds)
    write_text(work / CARD, card)
    facts: dict[str, object] = {
        "library_name": "nnssl-adapt",
        "model_folder": contents.folder.name,
        "configuration": model.configuration,
        "architecture": model.architecture.class_name,
        "labels": model.labels.class_names,
    }
    write_json(work / COUNTED, facts)
    stages = (contents,) if prepared.first_stage is None else (prepared.first_stage, contents)
    files = {f"{one.folder.name}/{name}": path for one in stages for name, path in one.files.items()}
    return {**files, CARD: work / CARD, COUNTED: work / COUNTED}


def _add_safetensors(contents: PackagedModel, folds: Sequence[Fold]) -> None:
    model = ModelFolder(contents.folder)
    for fold in folds:
        target = contents.folder / f"fold_{fold}" / SAFETENSORS
        about = {"format": "pt", "trainer_name": contents.trainer, "configuration": model.configuration}
        if citations := read_weight_file(target.with_suffix(".pth")).get("citations"):
            about["citations"] = json.dumps(citations)  # metadata are texts
        save_file(_each_once(model.load_weights(fold).network_weights), str(target), metadata=about)


def _each_once(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors hold a tensor under one name only; readers know the others from the network."""
    known: set[tuple[object, ...]] = set()
    once = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if key not in known or tensor.numel() == 0:
            once[name] = tensor.contiguous()
        known.add(key)
    return once


def _commit(repo_id: str, files: dict[str, Path], private: bool, overwrite: bool, message: str) -> str:
    api = HfApi(endpoint=endpoint())
    try:
        there = [name for name in api.list_repo_files(repo_id) if name not in _HOUSEKEEPING]
    except RepositoryNotFoundError:
        there = []
    if there and not overwrite:
        raise SourceError(
            f"{repo_id} holds {len(there)} file(s) already ({', '.join(there[:3])}{', …' if len(there) > 3 else ''}): choose "
            "another name, or commit over them with --overwrite"
        )
    api.create_repo(repo_id, private=private, exist_ok=True)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in sorted(files.items())
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in there if name not in files]
    logger.info("uploading %d files to %s", len(files), repo_id)
    return str(api.create_commit(repo_id, operations, commit_message=message).oid)


@contextmanager
def _our_errors(repo_id: str) -> Iterator[None]:
    """huggingface_hub's many errors as ours. Until the commit nothing is in the repository, which may be there, empty."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        inner = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(inner, HfHubHTTPError):
            raise _refusal(inner, repo_id) from error
        if isinstance(inner, OSError) or type(inner).__module__.partition(".")[0] in _TRANSPORT:
            raise SourceUnavailable(
                f"the upload to {repo_id} broke off ({_in_one_line(inner)}); nothing was committed: run the same command again"
            ) from error
        raise


def _refusal(error: HfHubHTTPError, repo_id: str) -> SourceError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return SourceAccessDenied(
            f"{repo_id} may not be written with this account (HTTP {status}): log in with 'hf auth login' (or set "
            "HF_TOKEN to a token that may write), and check the owner's name"
        )
    if status is not None and 400 <= status < 500:
        reason = _in_one_line(getattr(error, "server_message", None) or error)
        return SourceError(f"the hub refused the files for {repo_id} (HTTP {status}): {reason}")
    return SourceUnavailable(f"the hub answered HTTP {status}; nothing was committed to {repo_id}: try again later")


def _in_one_line(error: object) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
