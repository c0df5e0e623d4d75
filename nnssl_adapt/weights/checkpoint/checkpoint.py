"""A checkpoint: its tensors, its plan, and where both are from.

Weight files are only data here, whoever wrote them: pickles are read without running code (``weights_only``), and what
needs code is refused. What the plan says is checked against the tensors, which are right where the two disagree.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from torch import Tensor

from nnssl_adapt.text import and_more, dimensions
from nnssl_adapt.weights.checkpoint.adaptation_plan import AdaptationPlan
from nnssl_adapt.weights.checkpoint.find_plan import find_plan
from nnssl_adapt.weights.checkpoint.image_input import for_our_images
from nnssl_adapt.weights.checkpoint.state_dict import LIGHTNING_KEY, state_dict_of
from nnssl_adapt.weights.checkpoint.stems import choose_stem
from nnssl_adapt.weights.checkpoint.weight_file import read_contents
from nnssl_adapt.weights.families.family import SECOND_HAND
from nnssl_adapt.weights.families.registry import in_our_names
from nnssl_adapt.weights.network.architectures import Architecture
from nnssl_adapt.weights.sources.published import PublishedModel, fitting_models, of_this_layout, published_at
from nnssl_adapt.weights.sources.resolve import resolve_source
from nnssl_adapt.weights.sources.resolved import Origin, ResolvedSource, SourceOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Pre-trained weights with everything that is known about them.

    Attributes:
        tensors: name → tensor on the CPU, wrappers' prefixes stripped; treat them as read-only (they may be the file).
        plan: how they were pre-trained, with the keys, patch and channels that the tensors really have.
        origin: where they are from, and their digest.
        trainer_name: nnssl's or nnU-Net's trainer, where the file or its plan says so.
        citations: what to cite, as ``{type, name, apa_citations | bibtex_citations}``.
        notes: what was wrong in the file or its plan, and what was done about it.
        choices: the arguments of :func:`open_checkpoint` (``filename``, ``fold``, ``stem``, ``axes``, ``patch_merging``) that
            were not left at their defaults; opening with them gives these weights again.
        published: the entry of the catalogue that they are, told by where they are from.
        trained_until: day of the last epoch, where nnU-Net's file says it or a log beside it.
    """

    tensors: dict[str, Tensor]
    plan: AdaptationPlan
    origin: Origin
    trainer_name: str | None = None
    citations: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict)
    published: PublishedModel | None = None
    trained_until: date | None = None

    @property
    def architecture(self) -> Architecture:
        return self.plan.architecture

    @property
    def num_parameters(self) -> int:
        """Numbers stored, tensors with several names counted once."""
        return sum({tensor.data_ptr(): tensor.numel() for tensor in self.tensors.values()}.values())

    def __str__(self) -> str:
        plan = self.plan
        unknown = "each image's own" if plan.names_keys else "not known"
        spacing = f"{dimensions(plan.spacing)} mm" if plan.spacing else unknown
        recommended = plan.recommended_patch_size
        patch = f"{dimensions(plan.patch_size)} voxels"
        if recommended and recommended != plan.patch_size:
            patch += f" (recommended {dimensions(recommended)})"
        fold = f", fold {self.origin.fold}" if self.origin.fold else ""
        lines = [
            f"{self.origin}: {self.origin.filename}{fold}, sha256 {self.origin.sha256[:12]}",
            f"  network   {self.architecture}, {_millions(self.num_parameters)} numbers stored",
            f"  trained   by {self.trainer_name or 'an unnamed trainer'}{_purpose(plan)}",
            f"  images    {_channels(plan)}, {', '.join(plan.normalization_schemes)}"
            + (f", orientation {plan.orientation}" if plan.orientation else ""),
            f"  spacing   {spacing}",
            f"  patch     {patch}",
        ]
        lines.append(f"  licence   {self.licence or 'not stated in the file: see where it was published'}")
        lines += [f"  cite      {name}" for name in self.citation_names]
        lines += [f"  note      {note}" for note in self.notes]
        return "\n".join(lines)

    @property
    def licence(self) -> str | None:
        """Under which terms the weights may be used, where their plan says so (``license`` or ``licence``)."""
        stated = self.plan.raw.get("license") or self.plan.raw.get("licence")
        if not stated and self.published is not None and self.published.licence:
            return f"{self.published.terms}, as its page said"
        return str(stated) if stated else None

    def similar_published(self) -> list[PublishedModel]:
        """Entries of the catalogue with a layout like this one: class, sizes, channels and outputs."""
        heads = [t.shape[0] for name, t in self.tensors.items() if _HEAD.search(name) and t.ndim == 5]
        outputs = int(heads[-1]) if heads else None
        kwargs, plan = self.architecture.kwargs, self.plan
        return fitting_models(self.architecture.class_name, kwargs, plan.num_input_channels, outputs, plan.supervised)

    @property
    def citation_names(self) -> tuple[str, ...]:
        """Each citation in one line: its type and name."""
        return tuple(
            ": ".join(str(entry[key]) for key in ("type", "name") if entry.get(key)) or "unnamed"
            for entry in self.citations
        )


_HEAD = re.compile(r"(^|\.)seg_layers\.\d+\.weight$")


def _channels(plan: AdaptationPlan) -> str:
    named = f" ({', '.join(plan.channel_names)})" if plan.channel_names else ""
    return f"{plan.num_input_channels} channel(s){named}"


def _purpose(plan: AdaptationPlan) -> str:
    if not plan.supervised:
        return ""
    shown = and_more(plan.head_names, 8)
    return f" for segmentation (labels: {shown or 'not named in the file'})"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 50_000 else f"{count:,}"


def open_checkpoint(
    source: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    filename: str | None = None,
    fold: str | None = None,
    stem: str | None = None,
    axes: str = "auto",
    patch_merging: str = "auto",
) -> Checkpoint:
    """Open pre-trained weights, self-supervised (nnssl) or of a segmentation network (nnU-Net, MONAI).

    Args:
        source: a ``.pth``, ``.ckpt`` or ``.safetensors`` file, a folder or zip with one, a trained nnU-Net model folder, or
            a repository or address; see :func:`nnssl_adapt.weights.sources.resolve.resolve_source`.
        revision: branch, tag or commit on the hub.
        cache_dir: the hub's cache, if not the usual one.
        local_files_only: never use the network.
        filename: the weight file in a folder, archive or repository, if not one of nnssl's names.
        fold: of a trained nnU-Net model folder: which fold, or ``mean`` for the average of all.
        stem: of a network with one stem a dataset (MultiTalent): which one, or ``mean`` (the default).
        axes: order of the image axes that the kernels were trained on: ``zyx`` (SimpleITK's array order, as nnssl and
            nnU-Net), ``xyz`` (as MONAI; they are exchanged exactly), or ``auto``: ``xyz`` for files without a plan that are
            Lightning's or of a family that is known to be, else ``zyx``.
        patch_merging: of a Swin UNETR of unknown origin: ``old`` if it was trained with MONAI up to 1.4, ``new`` since 1.5. It
            does not show in the tensors and changes what they compute.

    Returns a :class:`Checkpoint`; ``print`` it to see what it is. Nothing in the file is run.

    Raises:
        SourceError: it can't be found or fetched.
        UnreadableCheckpoint: the file is truncated or no checkpoint.
        UnsafeCheckpoint: loading it would run code.
        AdaptationPlanError: no plan in the file or beside it that fits its tensors, and none can be read off them.
        ModelFolderError: the model folder's plans.json or dataset.json can't be read.
        ConfigurationError: ``stem``, ``axes`` or ``patch_merging`` make no sense for these weights; or a package is missing
            that their network is built with.
    """
    options = SourceOptions(revision, cache_dir, local_files_only, filename, fold, stem, axes, patch_merging)
    return read_checkpoint(resolve_source(source, options), options)


def read_checkpoint(resolved: ResolvedSource, options: SourceOptions | None = None) -> Checkpoint:
    """Read weights that are on this machine already.

    Of the options ``stem``, ``axes`` and ``patch_merging`` count. Raises what :func:`open_checkpoint` does.
    """
    options = options or SourceOptions()
    where = str(resolved.weights)
    contents = read_contents(resolved)
    content = contents[resolved.weights]
    state = state_dict_of(contents)
    published = published_at(resolved.origin)
    unseen = [f"{SECOND_HAND}{fact}" for fact in published.second_hand(resolved.origin)] if published else []
    filenames = (resolved.weights.name, *(published.files if published else ()))
    tensors, family, family_notes = in_our_names(state.tensors, where, filenames)
    tensors, stem_notes = choose_stem(tensors, options.stem, where)
    told = {} if options.patch_merging == "auto" else {"patch_merging": options.patch_merging}
    found = find_plan(content, resolved, tensors, family, state.key == LIGHTNING_KEY, told)
    axes, reason = (found.axes, found.axes_reason) if options.axes == "auto" else (options.axes, None)
    tensors, plan, image_notes = for_our_images(tensors, found.plan, axes, reason, where)
    notes = [*state.notes, *family_notes, *stem_notes, *found.notes, *image_notes]
    citations = plan.citations if found.citations is None else found.citations
    notes += [note for note in unseen if note not in notes]
    if published is not None:
        citations = citations or ({"type": "Pretraining", "name": published.id, "apa_citations": [published.citation]},)
    trainer_name = content.get("trainer_name")
    checkpoint = Checkpoint(
        tensors=tensors,
        plan=plan,
        origin=resolved.origin,
        trainer_name=trainer_name if isinstance(trainer_name, str) else plan.trainer_name,
        citations=citations,
        notes=tuple(notes),
        choices=options.choices,
        published=published,
        trained_until=state.trained_until,
    )
    if published is not None:
        checkpoint = replace(checkpoint, published=of_this_layout(published, checkpoint.similar_published()))
    for note in checkpoint.notes:
        logger.warning("%s: %s", resolved.origin, note)
    return checkpoint
