"""Every mistake a user can make has a class here, and every message says what to do about it.

NnsslAdaptError
├── ConfigurationError        a recipe, flag or environment variable is wrong
├── OutputError               a file can't be written (permissions, disk full)
├── SourceError               where weights come from
│   ├── SourceNotFound        no such file, folder, repository or file in it
│   ├── SourceAccessDenied    the repository is gated or private
│   ├── SourceUnavailable     the hub can't be reached (offline, interrupted) and nothing is cached
│   └── DigestMismatch        the file is not the one that was recorded
├── CheckpointError           what a weight file holds
│   ├── UnreadableCheckpoint  truncated, or no checkpoint at all
│   ├── UnsafeCheckpoint      loading it would run code
│   └── AdaptationPlanError   the adaptation plan is missing, incomplete or contradicts the tensors
├── ArchitectureError         a network that can't be built
├── TransferError             weights that don't fit, or would silently stay behind
├── DatasetError              a dataset in nnU-Net format
│   ├── DatasetNotFound
│   ├── DatasetJsonError      dataset.json is missing or wrong
│   └── CaseError             one image or label file is bad
├── PlanError                 a plans file is missing or wrong
├── PreprocessingError        one or more cases could not be preprocessed
├── TrainingError             a training run can't start or go on
│   ├── DeviceUnavailable
│   ├── NothingToResume
│   ├── NonFiniteLoss
│   ├── OtherRankFailed       another of the processes that train together went away
│   └── TrainingStopped       it was asked to stop, has saved, and can be gone on with
├── ModelFolderError          a trained model folder is incomplete or not one
└── PredictionError           one or more images could not be predicted
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class NnsslAdaptError(Exception):
    """Base of all errors that a user can cause and fix.

    The command line prints the message as one line (more only with ``--verbose``) and exits with 1.

    Attributes:
        path: the file or folder that is wrong, if it is one.
        mistakes: each mistake as a sentence of its own, where several are reported together.
        next_command: what to type next, where one command helps.
    """

    def __init__(
        self,
        message: str = "",
        *,
        path: str | Path | None = None,
        mistakes: Iterable[str] = (),
        next_command: str | None = None,
    ) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)
        self.mistakes = tuple(mistakes)
        self.next_command = next_command


class ConfigurationError(NnsslAdaptError):
    """A recipe, flag or environment variable is wrong."""


class OutputError(NnsslAdaptError):
    """A file or folder can't be written."""


class SourceError(NnsslAdaptError):
    """Pre-trained weights can't be fetched."""


class SourceNotFound(SourceError):
    """The file, folder, repository, or file in a repository, does not exist."""


class SourceAccessDenied(SourceError):
    """The repository is gated or private."""


class SourceUnavailable(SourceError):
    """The hub can't be reached, or the transfer broke off, and nothing usable is cached."""


class DigestMismatch(SourceError):
    """The bytes found are not the bytes that were recorded."""


class CheckpointError(NnsslAdaptError):
    """A weight file can't be used."""


class UnreadableCheckpoint(CheckpointError):
    """The file is truncated or is no checkpoint."""


class UnsafeCheckpoint(CheckpointError):
    """The file asks for code to be run while it is loaded."""


class AdaptationPlanError(CheckpointError):
    """The adaptation plan is missing, incomplete, or contradicts the tensors."""


class ArchitectureError(NnsslAdaptError):
    """A network that can't be built from its description."""


class TransferError(NnsslAdaptError):
    """Weights that don't fit, or that would stay behind unnoticed."""


class DatasetError(NnsslAdaptError):
    """A dataset is not in nnU-Net format."""


class DatasetNotFound(DatasetError):
    """No dataset has this id or name."""


class DatasetJsonError(DatasetError):
    """``dataset.json`` is missing or wrong."""


class CaseError(DatasetError):
    """An image or label file is missing, unreadable or inconsistent."""


class PlanError(NnsslAdaptError):
    """A plans file is missing or wrong."""


class PreprocessingError(NnsslAdaptError):
    """One or more cases could not be preprocessed; the others were."""


class TrainingError(NnsslAdaptError):
    """A training run can't start or go on."""


class DeviceUnavailable(TrainingError):
    """The device asked for does not exist on this machine."""


class NothingToResume(TrainingError):
    """``--c`` was given but the run has left no checkpoint."""


class OtherRankFailed(TrainingError):
    """Another of the processes that train together went away, so this one can't go on."""


class NonFiniteLoss(TrainingError):
    """The loss was NaN or infinite too many times in a row."""


class TrainingStopped(TrainingError):
    """A run was asked to stop (by a signal or a time limit), has saved, and goes on with ``--c``.

    The command line exits with 75 (``EX_TEMPFAIL`` of sysexits.h), on which a scheduler can start it again.
    """


class ModelFolderError(NnsslAdaptError):
    """A folder is not a (complete) trained model."""


class PredictionError(NnsslAdaptError):
    """One or more images could not be predicted; the others were."""
