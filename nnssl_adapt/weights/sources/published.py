"""The catalogue of published networks (``published.json``): what each is, where it is, and on which terms it may be used.

Nothing here touches the network. ``.ci/refresh_published.py`` compares the catalogue with what the hub says today.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urldefrag

from nnssl_adapt.errors import SourceNotFound
from nnssl_adapt.text import did_you_mean, dimensions

if TYPE_CHECKING:
    from nnssl_adapt.weights.sources.resolved import Origin

CATALOGUE = "published.json"

_UNKNOWN = "not known here"


@dataclass(frozen=True)
class PublishedModel:
    """One published network.

    Attributes:
        id: the short name that ``-pc`` takes.
        architecture: what it is.
        method: of training.
        page: where to read about it.
        citation: what to cite.
        source: where it can be fetched from, as ``-pc`` takes it; None where no program can.
        get: what to download by hand, where there is no source.
        also: other repositories with the same files.
        also_unverified: whether that is second-hand.
        files: names under which its file is known, for those that have one of their own.
        supervised: whether it was trained to segment.
        data: that it was trained on.
        size: of the file, or number of weights.
        spacing: mm, in the order of ``axes``; None: unknown, or each image's own.
        patch: voxels, in the order of ``axes``.
        normalization: of the intensities, in words.
        axes: of the arrays it was trained on: ``zyx`` as nnU-Net's, ``xyz`` as MONAI's.
        orientation: of those images, in the Spinal Cord Toolbox's convention; None where any will do.
        channels: of the image.
        labels: what it segments: names, or in words.
        licence: as its page states it; None where that was not read.
        commercial: whether the licence allows commercial use; None where that is not known.
        extra: of this package, that it needs.
        agreement: that has to be signed to get it.
        layout: what tells its tensors from others': ``class``, ``arguments``, ``channels``, ``outputs``, ``supervised``.
        note: what to know before using it.
        unverified: facts that are second-hand.
    """

    id: str
    architecture: str
    method: str
    page: str
    citation: str
    source: str | None = None
    get: str = ""
    also: tuple[str, ...] = ()
    also_unverified: bool = False
    files: tuple[str, ...] = ()
    supervised: bool = False
    data: str = ""
    size: str = ""
    spacing: tuple[float, ...] | None = None
    patch: tuple[int, ...] | None = None
    normalization: str = ""
    axes: str = "zyx"
    orientation: str | None = None
    channels: tuple[str, ...] = ()
    labels: str | tuple[str, ...] = ""
    licence: str | None = None
    commercial: bool | None = None
    extra: str | None = None
    agreement: str = ""
    layout: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    unverified: tuple[str, ...] = ()

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> PublishedModel:
        """From an entry of the catalogue. Raises TypeError for a key that no record has."""
        given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in entry.items()}
        return cls(**given)

    @property
    def repo_id(self) -> str | None:
        """``owner/name`` on the hub, where the whole repository is this network."""
        return self.source if self.source and "://" not in self.source else None

    @property
    def terms(self) -> str:
        """Its licence and what that means, in one line."""
        allowed = {True: "commercial use allowed", False: "NOT for commercial use", None: ""}[self.commercial]
        stated = self.licence or "not known here: read its page"
        return f"{stated} ({allowed})" if allowed else stated

    @property
    def command(self) -> str:
        """The command that fine-tunes it; ``DATASET`` stands for the dataset's id."""
        turned = f" --reorient {self.orientation}" if self.orientation else ""
        source = self.id if self.source else "FILE"
        return f"nnssl-adapt finetune -d DATASET -pc {source} -n {self.id.replace('-', '_')}{turned}"

    def __str__(self) -> str:
        """All that is known, a line each; what every network has and is not known here, is said to be so."""
        labels = self.labels if isinstance(self.labels, str) else ", ".join(self.labels)
        rows = {
            "network": self.architecture,
            "size": self.size or _UNKNOWN,
            "trained": f"{self.method}" + (f" on {self.data}" if self.data else ""),
            "channels": ", ".join(self.channels) or _UNKNOWN,
            "labels": labels or (_UNKNOWN if self.supervised else "none: it was not trained to segment"),
            "spacing": f"{dimensions(self.spacing)} mm" if self.spacing else "not known here, or each image's own",
            "patch": f"{dimensions(self.patch)} voxels" if self.patch else _UNKNOWN,
            "intensity": self.normalization or _UNKNOWN,
            "axes": f"{self.axes}, orientation {self.orientation}" if self.orientation else self.axes,
            "licence": self.terms,
            "needs": "; ".join(self.needs),
            "cite": self.citation,
            "page": self.page,
            "also": ", ".join(self.also) + (" (second-hand)" if self.also_unverified else ""),
            "note": self.note,
            "get": f"by hand: {self.get}" if self.get else "",
            "command": self.command,
        }
        lines = [f"  {key:<9} {value}" for key, value in rows.items() if value]
        return "\n".join([self.id, *lines, *(f"  second-hand, not checked: {fact}" for fact in self.unverified)])

    def second_hand(self, origin: Origin) -> tuple[str, ...]:
        """Facts that nobody here saw; also that another repository has the same files, for those that are from it."""
        of_other = self.also_unverified and origin.repo_id in self.also
        same = (f"that {origin.repo_id} holds the same files as {self.source}",) if of_other else ()
        return (*self.unverified, *same)

    @property
    def needs(self) -> tuple[str, ...]:
        """What has to be installed or signed first."""
        extra = (f"pip install 'nnssl-adapt[{self.extra}]'",) if self.extra else ()
        return (*extra, *((self.agreement,) if self.agreement else ()))


@cache
def published_models() -> tuple[PublishedModel, ...]:
    """The catalogue, in its order."""
    text = files(__package__).joinpath(CATALOGUE).read_text(encoding="utf-8")
    return tuple(PublishedModel.of(entry) for entry in json.loads(text)["models"])


KEYS = frozenset(entry.name for entry in fields(PublishedModel))
"""Keys that an entry may have."""


def find_published(name: str) -> PublishedModel | None:
    """The network of this short name, or of the repository ``owner/name``; None where the catalogue has none."""
    wanted = name.casefold()
    return next(
        (model for model in published_models() if wanted == model.id or name in (model.repo_id, *model.also)), None
    )


def known_name(name: str) -> PublishedModel:
    """As :func:`find_published`. Raises SourceNotFound with the closest names for one that is not there."""
    found = find_published(name)
    if found is None:
        close = did_you_mean(name.casefold(), (model.id for model in published_models()))
        raise SourceNotFound(
            f"the catalogue has no network {name!r}{close}: see all with 'nnssl-adapt models --published'",
            next_command="nnssl-adapt models --published",
        )
    return found


def published_at(origin: Origin) -> PublishedModel | None:
    """The published network that weights are, told by where they are from; None where that doesn't tell.

    Its short name, a repository of which it is the only network, the address of its file or zip, however it was typed; else a
    file of a name that only it has.
    """
    models = published_models()
    typed = urldefrag(origin.source).url
    exactly = [model for model in models if typed == model.id or (model.source and typed == model.source)]
    whole = [model for model in models if origin.repo_id and origin.repo_id in (model.repo_id, *model.also)]
    in_it = [model for model in models if origin.repo_id and _repository(model) == origin.repo_id]
    if len(in_it) > 1:
        in_it = [model for model in in_it if str(model.source).endswith(f"/{origin.filename}")]
    named = [model for model in models if origin.filename in model.files]
    return next(iter([*exactly, *whole, *in_it, *named]), None)


def _repository(model: PublishedModel) -> str | None:
    """The repository on the hub that its file lies in, with others'."""
    match = re.match(r"hf://([^/]+/[^/@]+)", model.source or "")
    return match[1] if match else None


def address_of(model: PublishedModel) -> str:
    """Where a network can be fetched from. Raises SourceNotFound, saying what to download, where no program can."""
    if model.source is None:
        raise SourceNotFound(
            f"{model.id} can't be fetched by a program: download {model.get} from {model.page}, and give the path of the file"
        )
    return model.source


def address_of_name(name: str) -> str:
    """Where a network of the catalogue can be fetched from, by its short name; any other source as it is."""
    if Path(name).exists() or (known := find_published(name)) is None:
        return name
    return name if known.source is None or known.repo_id == name else known.source


def fitting_models(
    class_name: str, arguments: Mapping[str, Any], channels: int, outputs: int | None, supervised: bool
) -> list[PublishedModel]:
    """Published networks with a layout like this one's.

    Args:
        class_name: of the network.
        arguments: its arguments, spelled out.
        channels: of the image.
        outputs: of its segmentation layer, None where it has none.
        supervised: whether it was trained to segment.
    """
    have = {"class": class_name, "channels": channels, "outputs": outputs, "supervised": supervised}
    return [model for model in published_models() if model.layout and _fits(model.layout, have, arguments)]


def of_this_layout(model: PublishedModel, fitting: Sequence[PublishedModel]) -> PublishedModel:
    """Of several entries that are files of one repository, the one with a layout that fits; else the one given."""
    return next((other for other in fitting if other.source == model.source is not None), model)


def _fits(layout: Mapping[str, Any], have: Mapping[str, Any], arguments: Mapping[str, Any]) -> bool:
    same = all(have[key] == value for key, value in layout.items() if key != "arguments")
    return same and all(arguments.get(key) == value for key, value in layout.get("arguments", {}).items())
