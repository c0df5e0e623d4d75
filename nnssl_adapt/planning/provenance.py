"""What a plan records of how it was made: from which weights, by which rules. The entries ``nnssl_adapt`` of a plans file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nnssl_adapt.errors import ConfigurationError, PlanError
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint
from nnssl_adapt.weights.transfer.settings import TransferSettings

KEY = "nnssl_adapt"
"""Where the record stands in a plans file. nnU-Net ignores it."""


NOT_LOADED = "nothing"
"""Value of ``given`` in the plan of a model that was trained from random weights instead of those the plan was made for."""


def package_version() -> str:
    """Version of the installed nnssl-adapt, or ``unknown`` in a bare source tree."""
    try:
        return version("nnssl-adapt")
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class WeightsRecord:
    """Which pre-trained weights a plan was made for. Plans from elsewhere may leave out any of it.

    The fields are those of :class:`~nnssl_adapt.weights.sources.resolved.Origin`, and ``licence``, under which terms the
    weights may be used.
    """

    source: str | None = None
    kind: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    filename: str | None = None
    sha256: str | None = None
    fold: str | None = None
    licence: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> WeightsRecord:
        """Of an open checkpoint."""
        return cls(**checkpoint.origin.to_dict())

    @classmethod
    def parse(cls, content: Any, where: str | Path) -> WeightsRecord | None:
        """Read what :meth:`to_dict` wrote; None for nothing. Raises PlanError."""
        if not content and (content is None or isinstance(content, Mapping)):
            return None
        entries = _mapping(content, where, "source")
        names = [name for name in cls.__dataclass_fields__ if name in entries]
        return cls(**{name: _text(entries[name], where, f"source.{name}") for name in names})

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        if self.licence is None:
            del content["licence"]
        return content

    def __str__(self) -> str:
        if self.repo_id is None:
            return self.source or "weights without a name"
        return f"{self.repo_id}@{self.revision[:12]}" if self.revision else self.repo_id


@dataclass(frozen=True)
class Provenance:
    """How a plan was made. Every field is None or empty in plans by nnU-Net.

    Attributes:
        version: of this package.
        source: the weights; None in a plan without any.
        source_choices: arguments of ``open_checkpoint`` that chose among what the source holds (``filename``, ``fold``, …).
        transfer: how the weights are fitted to the network.
        trainer_name: of the pre-training.
        orientation: code such as ``RPI`` of the images that the weights were trained on.
        spacing_mode: where the spacing comes from; ``base_plans`` where everything is a kept nnU-Net plan's.
        base_plans: name of the plan that was kept.
        topology: the network that was planned here by nnU-Net's rules instead: ``planned_by``, ``preset``.
        architecture_preset: published name of the network, such as ``ResEncL``.
        preprocessing_digest: SHA-256 of the exact preprocessing settings.
        given: ``training`` where the weights were named by the training's command; :data:`NOT_LOADED` in the plan of a model
            that was trained from random ones.
        fit_gpu: how patch and batch were fitted to a GPU; see :func:`~nnssl_adapt.planning.fit_gpu.fit_plan`.
        licence: of the trained model, in a package of it.
        trained_by: trainer of the model in a package.
        preset: of a plan by nnU-Net's rules that is in memory only.
        more: other entries, kept as they are.
    """

    version: str | None = None
    source: WeightsRecord | None = None
    source_choices: Mapping[str, str] = field(default_factory=dict)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    trainer_name: str | None = None
    orientation: str | None = None
    spacing_mode: str | None = None
    base_plans: str | None = None
    topology: Mapping[str, Any] | None = None
    architecture_preset: str | None = None
    preprocessing_digest: str | None = None
    given: str | None = None
    fit_gpu: Mapping[str, Any] | None = None
    licence: str | None = None
    trained_by: str | None = None
    preset: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, settings: TransferSettings) -> Provenance:
        """Which weights, opened how, fitted how; the planner adds what it decides."""
        return cls(
            version=package_version(),
            source=WeightsRecord.of(checkpoint),
            source_choices=dict(checkpoint.choices),
            transfer=settings,
            trainer_name=checkpoint.trainer_name,
            orientation=checkpoint.plan.orientation,
        )

    @classmethod
    def parse(cls, content: Any, where: str | Path) -> Provenance:
        """Read the entries of a plans file.

        Args:
            content: value of the key ``nnssl_adapt``; None where there is none.
            where: the file, for the message.

        Raises PlanError naming the entry that has the wrong type.
        """
        if content is None:
            return cls()
        entries = dict(_mapping(content, where, ""))
        values: dict[str, Any] = {"source": WeightsRecord.parse(entries.pop("source", None), where)}
        choices = _mapping(entries.pop("source_choices", {}), where, "source_choices")
        values["source_choices"] = {
            name: text
            for name, value in choices.items()
            if (text := _text(value, where, f"source_choices.{name}")) is not None
        }
        try:
            values["transfer"] = TransferSettings.from_dict(entries.pop("transfer", {}))
        except ConfigurationError as error:
            raise PlanError(f"{where}: {KEY}.transfer: {error}", path=_path(where)) from error
        for name in ("topology", "fit_gpu"):
            value = entries.pop(name, None)
            values[name] = None if value is None else dict(_mapping(value, where, name))
        for name in cls.__dataclass_fields__:
            if name in entries and name != "more":
                values[name] = _text(entries.pop(name), where, name)
        return cls(**values, more=entries)

    def to_dict(self) -> dict[str, Any]:
        """The entries as they stand in a plans file, in the order in which they are written."""
        content: dict[str, Any] = {
            "version": self.version,
            "source": None if self.source is None else self.source.to_dict(),
            "source_choices": dict(self.source_choices),
            "transfer": self.transfer.to_dict(),
            "trainer_name": self.trainer_name,
            "orientation": self.orientation,
        }
        if self.spacing_mode is not None:
            content["spacing_mode"] = self.spacing_mode
            if self.base_plans is not None or self.topology is not None:
                content["base_plans"] = self.base_plans
            if self.topology is not None:
                content["topology"] = dict(self.topology)
            content["architecture_preset"] = self.architecture_preset
        for name in ("preprocessing_digest", "fit_gpu", "given", "licence", "trained_by", "preset"):
            if (value := getattr(self, name)) is not None:
                content[name] = value
        return {**content, **self.more}


def _mapping(value: Any, where: str | Path, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(value, where, key, "an object with keys")
    return value


def _text(value: Any, where: str | Path, key: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _wrong(value, where, key, "text or null")
    return value


def _wrong(value: Any, where: str | Path, key: str, expected: str) -> PlanError:
    name = f"{KEY}.{key}" if key else KEY
    return PlanError(f"{where}: {name} is {str(value)[:60]!r}, expected {expected}", path=_path(where))


def _path(where: str | Path) -> Path | None:
    return where if isinstance(where, Path) else None
