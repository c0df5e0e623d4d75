"""A pre-trained checkpoint: its tensors, its plan, and where both are from.

Files from strangers are data here: pickles are read without running code (``weights_only``), and what needs code is
refused. What the plan says is checked against the tensors, which are right where the two disagree.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nnssl_adapt.errors import AdaptationPlanError
from nnssl_adapt.weights.adaptation_plan import EMBEDDED_KEY, SIDECAR_NAME, AdaptationPlan
from nnssl_adapt.weights.architectures import Architecture
from nnssl_adapt.weights.layout import Tensors
from nnssl_adapt.weights.reconcile import reconcile
from nnssl_adapt.weights.source import Origin, ResolvedSource, resolve_source
from nnssl_adapt.weights.weight_file import read_weight_file, strip_wrappers, tensors_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Pre-trained weights with everything that is known about them.

    Attributes:
        tensors: name → tensor on the CPU, wrappers' prefixes stripped; treat them as read-only (they may be the file).
        plan: how they were pre-trained, with the keys, patch and channels that the tensors really have.
        origin: where they are from, and their digest.
        trainer_name: nnssl's trainer, where the file or its plan says so.
        citations: what to cite, as ``{type, name, apa_citations | bibtex_citations}``.
        notes: what was wrong in the file or its plan, and what was done about it.
        choices: the arguments of :func:`open_checkpoint` (``filename``, ``fold``, ``stem``, ``axes``) that were not left at
            their defaults; opening with them gives these weights again.
    """

    tensors: dict[str, Tensor]
    plan: AdaptationPlan
    origin: Origin
    trainer_name: str | None = None
    citations: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        return self.plan.architecture

    @property
    def num_parameters(self) -> int:
        """Numbers stored, tensors with several names counted once."""
        return sum({tensor.data_ptr(): tensor.numel() for tensor in self.tensors.values()}.values())

    def __str__(self) -> str:
        plan = self.plan
        spacing = f"{_times(plan.spacing)} mm" if plan.spacing else "each image's own"
        recommended = plan.recommended_patch_size
        patch = f"{_times(plan.patch_size)} voxels"
        if recommended and recommended != plan.patch_size:
            patch += f" (recommended {_times(recommended)})"
        lines = [
            f"{self.origin}: {self.origin.filename}, sha256 {self.origin.sha256[:12]}",
            f"  network   {self.architecture}, {self.num_parameters / 1e6:.1f} M numbers stored",
            f"  trained   by {self.trainer_name or 'an unnamed trainer'}, {plan.num_input_channels} channel(s), "
            f"{', '.join(plan.normalization_schemes)}",
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
        return str(stated) if stated else None

    @property
    def citation_names(self) -> tuple[str, ...]:
        """Each citation in one line: its type and name."""
        return tuple(
            ": ".join(str(entry[key]) for key in ("type", "name") if entry.get(key)) or "unnamed"
            for entry in self.citations
        )


def _times(numbers: tuple[float, ...]) -> str:
    return " × ".join(f"{number:g}" for number in numbers)


def open_checkpoint(
    source: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    filename: str | None = None,
    fold: str | None = None,
    stem: str | None = None,
    axes: str = "auto",
) -> Checkpoint:
    """Open pre-trained weights from a file, a folder or the Hugging Face hub.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, a folder with one, ``owner/name``, ``owner/name@revision`` or
            ``https://huggingface.co/owner/name``; see :func:`nnssl_adapt.weights.source.resolve_source`.
        revision: branch, tag or commit on the hub.
        cache_dir: the hub's cache, if not the usual one.
        local_files_only: never use the network.
        filename: the weight file in a folder, archive or repository, if not one of nnssl's names.
        fold: of a trained nnU-Net model folder: which fold, or ``mean`` for the average of all.
        stem: of a network with one stem a dataset (MultiTalent): which one, or ``mean`` (the default).
        axes: order of the image axes that the kernels were trained on: ``zyx`` (SimpleITK's array order, as nnssl and
            nnU-Net), ``xyz`` (as MONAI; they are exchanged exactly), or ``auto`` to tell by the file.

    Returns a :class:`Checkpoint`; ``print`` it to see what it is. Nothing in the file is run.

    Raises:
        SourceError: it can't be found or fetched.
        UnreadableCheckpoint: the file is truncated or no checkpoint.
        UnsafeCheckpoint: loading it would run code.
        AdaptationPlanError: no adaptation plan in the file or beside it, or none that fits its tensors.
    """
    resolved = resolve_source(source, revision, cache_dir, local_files_only, filename=filename, fold=fold)
    choices = {"filename": filename, "fold": fold, "stem": stem, "axes": None if axes == "auto" else axes}
    checkpoint = read_checkpoint(resolved, stem=stem, axes=axes)
    return replace(checkpoint, choices={key: value for key, value in choices.items() if value is not None})


def read_checkpoint(resolved: ResolvedSource, stem: str | None = None, axes: str = "auto") -> Checkpoint:
    """Open weights that are on this machine already; arguments and errors as of :func:`open_checkpoint`."""
    path = resolved.weights
    content = read_weight_file(path)
    tensors = strip_wrappers(tensors_of(content, path), path)
    plan, notes = _choose_plan(content, resolved, tensors)
    citations, citation_notes = _citations(content.get("citations"), plan)
    trainer_name = content.get("trainer_name")
    checkpoint = Checkpoint(
        tensors=tensors,
        plan=plan,
        origin=resolved.origin,
        trainer_name=trainer_name if isinstance(trainer_name, str) else plan.trainer_name,
        citations=citations,
        notes=tuple(notes + citation_notes),
    )
    for note in checkpoint.notes:
        logger.warning("%s: %s", resolved.origin, note)
    return checkpoint


def _citations(found: Any, plan: AdaptationPlan) -> tuple[tuple[dict[str, Any], ...], list[str]]:
    """The file's own citations, else the plan's; what is not ``{type, name, …}`` is left out and noted."""
    if not found:
        return plan.citations, []
    entries = found if isinstance(found, (list, tuple)) else [found]
    good = tuple(dict(entry) for entry in entries if isinstance(entry, Mapping))
    bad = len(entries) - len(good)
    return good, [f"{bad} of its citations can't be read"] if bad else []


def _choose_plan(
    content: Mapping[str, Any], resolved: ResolvedSource, tensors: Tensors
) -> tuple[AdaptationPlan, list[str]]:
    """The plan that fits the tensors, of the one in the file and the one beside it; equal fits: the one in the file."""
    found: dict[str, AdaptationPlan] = {}
    errors: list[AdaptationPlanError] = []
    embedded, sidecar = content.get(EMBEDDED_KEY), resolved.sidecar
    try:
        if embedded is not None:
            found["in the file"] = AdaptationPlan.parse(embedded, str(resolved.weights))
    except AdaptationPlanError as error:
        errors.append(error)
    try:
        if sidecar is not None:
            found[f"in {SIDECAR_NAME}"] = AdaptationPlan.load(sidecar)
    except AdaptationPlanError as error:
        errors.append(error)
    if not found:
        raise errors[0] if errors else _no_plan(resolved)
    fits: dict[str, tuple[AdaptationPlan, list[str]]] = {}
    for name, candidate in found.items():
        try:
            fits[name] = reconcile(candidate, tensors, f"{resolved.weights}, plan {name}")
        except AdaptationPlanError as error:
            errors.append(error)
    if not fits:
        raise errors[-1]
    where = min(fits, key=lambda name: len(fits[name][1]))
    plan, notes = fits[where]
    notes = [*(str(error) for error in errors), *notes]
    for other in fits.keys() - {where}:
        differing = found[where].differences(found[other])
        if differing:
            better = "fits the tensors better" if len(fits[other][1]) > len(fits[where][1]) else "fits no worse"
            notes.append(
                f"the plans {where} and {other} disagree on {', '.join(differing)}: took that {where}, which {better}"
            )
        plan = plan.model_copy(
            update={
                "citations": plan.citations or found[other].citations,
                "trainer_name": plan.trainer_name or found[other].trainer_name,
            }
        )
    return plan, notes


def _no_plan(resolved: ResolvedSource) -> AdaptationPlanError:
    origin = resolved.origin
    beside = f"{SIDECAR_NAME} in the repository {origin}" if origin.repo_id else resolved.weights.parent / SIDECAR_NAME
    return AdaptationPlanError(
        f"{resolved.weights} has no adaptation plan: looked for '{EMBEDDED_KEY}' in it and for {beside}. "
        f"Copy the {SIDECAR_NAME} that nnssl wrote during pre-training beside it"
    )
