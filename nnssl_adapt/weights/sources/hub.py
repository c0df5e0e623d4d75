"""The Hugging Face hub. With ``download.py`` the only code of the package that touches the network.

huggingface_hub does the downloading, so that its cache, its ``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and
``HF_TOKEN`` mean what they mean elsewhere; here its many errors become our four. ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``
are also honoured when they are set after its import.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl_adapt.errors import SourceAccessDenied, SourceError, SourceNotFound, SourceUnavailable
from nnssl_adapt.files import explain_write_errors

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

# huggingface_hub brings an HTTP client: it is imported where a repository is requested, not by all that read weights.

_TRANSPORT_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "h11", "hf_xet"}
"""Whose exceptions mean that the connection failed; huggingface_hub changed its HTTP client twice."""

_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def endpoint() -> str | None:
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def offline() -> bool:
    values = (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE"))
    return any((value or "").upper() in ("1", "ON", "YES", "TRUE") for value in values)


class Missing(Exception):
    """The repository has no such file (the hub says so)."""


class NotCached(Exception):
    """The file is not in the cache, and the hub was not asked or did not answer."""


@dataclass
class Hub:
    """One repository at one revision, and the cache that its files are kept in."""

    repo_id: str
    revision: str | None
    cache_dir: str | Path | None
    local_files_only: bool
    why_unreachable: str = ""

    def __post_init__(self) -> None:
        if offline():
            self.local_files_only = True
            self.why_unreachable = "may not be asked (HF_HUB_OFFLINE is set)"
        elif self.local_files_only and not self.why_unreachable:
            self.why_unreachable = "may not be asked (local_files_only)"
        elif not self.why_unreachable:
            self.why_unreachable = "does not answer"

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    @property
    def address(self) -> str:
        return endpoint() or "https://huggingface.co"

    def fetch(self, filename: str) -> Path:
        """Path of one file in the cache. Raises Missing or NotCached, or one of our SourceErrors."""
        from huggingface_hub import hf_hub_download

        with self._our_errors(filename):
            path = hf_hub_download(
                self.repo_id,
                filename,
                revision=self.revision,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                endpoint=endpoint(),
            )
        return Path(path)

    def list_files(self) -> list[str]:
        """Names of all files in the repository; without the network, of those in the cache.

        Raises NotCached when there are none there, or one of our SourceErrors.
        """
        from huggingface_hub import HfApi, snapshot_download

        with self._our_errors("the list of files"):
            if not self.local_files_only:
                return sorted(HfApi(endpoint=endpoint()).list_repo_files(self.repo_id, revision=self.revision))
            snapshot = Path(
                snapshot_download(self.repo_id, revision=self.revision, cache_dir=self.cache_dir, local_files_only=True)
            )
        return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())

    def branches(self) -> list[str]:
        """Names of branches and tags; without the network, of those in the cache. Empty when they can't be known."""
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_CACHE

        if self.local_files_only:
            folder = Path(self.cache_dir or HF_HUB_CACHE) / f"models--{self.repo_id.replace('/', '--')}" / "refs"
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        try:
            with self._our_errors("the list of branches"):
                refs = HfApi(endpoint=endpoint()).list_repo_refs(self.repo_id)
        except (Missing, NotCached, SourceUnavailable):
            return []
        return [ref.name for ref in [*refs.branches, *refs.tags]]

    def unavailable(self, filename: str) -> SourceUnavailable:
        """The error for a file that is not cached and can't be downloaded."""
        return SourceUnavailable(
            f"{filename} of {self} is not in the Hugging Face cache, and {self.address} {self.why_unreachable}: "
            f"run 'nnssl-adapt fetch {self} --to FOLDER' where there is internet and set nnssl_pretrained_models=FOLDER "
            "here, share the cache (HF_HOME), or give a local path"
        )

    @contextmanager
    def _our_errors(self, filename: str) -> Iterator[None]:
        from huggingface_hub import errors
        from huggingface_hub.constants import HF_HUB_CACHE

        try:
            yield
        except errors.LocalEntryNotFoundError as error:
            _reraise_access_problem(error, self)
            raise NotCached(filename) from error
        except (
            errors.HFValidationError,
            errors.GatedRepoError,
            errors.RepositoryNotFoundError,
            errors.RevisionNotFoundError,
        ) as error:
            raise _repository_error(error, self) from error
        except errors.EntryNotFoundError as error:
            raise Missing(filename) from error
        except errors.HfHubHTTPError as error:
            raise _http_error(error, filename, self) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK_TROUBLE:
                with explain_write_errors(Path(self.cache_dir or HF_HUB_CACHE)):
                    raise
            if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _TRANSPORT_PACKAGES:
                raise _broken_transfer(error, filename, self) from error
            raise


def _reraise_access_problem(error: Exception, hub: Hub) -> None:
    """huggingface_hub reports a refusal as "not in the cache", with the refusal as its cause."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(cause, (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        raise _repository_error(cause, hub) from error
    if isinstance(cause, errors.HfHubHTTPError) and _status(cause) in (401, 403):
        raise _http_error(cause, "", hub) from error


def _repository_error(error: Exception, hub: Hub) -> SourceError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return SourceAccessDenied(
            f"{hub.repo_id} is gated: accept its terms at {hub.address}/{hub.repo_id} and log in with "
            "'hf auth login' (or set HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceNotFound(f"{hub.repo_id} has no revision {hub.revision!r} (branch, tag or commit)")
    if isinstance(error, errors.HFValidationError):
        return SourceNotFound(f"{hub.repo_id!r} is not a valid Hugging Face id: {error}")
    return SourceNotFound(
        f"no repository {hub.repo_id} at {hub.address}, and no such path here; "
        "if it is private, log in with 'hf auth login' (or set HF_TOKEN)"
    )


def _status(error: HfHubHTTPError) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _http_error(error: HfHubHTTPError, filename: str, hub: Hub) -> SourceError:
    status = _status(error)
    if status in (401, 403):
        return SourceAccessDenied(
            f"{hub.repo_id} may not be read with this account (HTTP {status}): ask for access at "
            f"{hub.address}/{hub.repo_id} and log in with 'hf auth login' (or set HF_TOKEN)"
        )
    return SourceUnavailable(f"{hub.address} answered HTTP {status} for {filename} of {hub}: try again later")


def _broken_transfer(error: Exception, filename: str, hub: Hub) -> SourceUnavailable:
    reason = " ".join(str(error).split()) or type(error).__name__
    return SourceUnavailable(
        f"the download of {filename} of {hub} broke off ({reason}); nothing partial is kept as whole: "
        "run the same command again"
    )


def commit_of(path: Path) -> str | None:
    """The commit hash in the cache's layout, ``snapshots/<commit>/<file>``."""
    parts = path.parts
    index = len(parts) - 1 - parts[::-1].index("snapshots") if "snapshots" in parts else None
    return parts[index + 1] if index is not None and index + 1 < len(parts) else None
