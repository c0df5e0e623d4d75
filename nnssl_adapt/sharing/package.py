"""Release packages of trained models: zips that the Spinal Cord Toolbox and nnU-Net install.

Two layouts, because no one zip serves both: the trainer's folder at the root (``sct``: the toolbox and ivadomed's guide),
and ``DatasetNNN_Name/<trainer's folder>`` (``nnunet``: nnUNetv2_install_pretrained_model_from_zip).
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nnssl_adapt.data.pictures import PICTURE_READERS
from nnssl_adapt.errors import ConfigurationError, ModelFolderError, SourceError
from nnssl_adapt.files import explain_write_errors, make_folder, sha256_of, write_text
from nnssl_adapt.inference.first_stage import first_model
from nnssl_adapt.inference.model_folder import Fold, ModelFolder
from nnssl_adapt.inference.trainer_class import STOCK_TRAINER
from nnssl_adapt.machine.device import check_device
from nnssl_adapt.sharing.anonymous import Cleaner
from nnssl_adapt.sharing.card import model_card
from nnssl_adapt.sharing.checks import choose_orientation, find_raw, general_warnings, no_existing_output, sct_warnings
from nnssl_adapt.sharing.contents import PackagedModel, check_weights, folds_to_publish, write_contents
from nnssl_adapt.sharing.naming import read_name, release_tag
from nnssl_adapt.sharing.proof import PackageProof, prove_package
from nnssl_adapt.sharing.unpack import unpack_model
from nnssl_adapt.sharing.zips import write_zip
from nnssl_adapt.weights.sources.digests import Record, whole_folder

logger = logging.getLogger(__name__)

Layout = Literal["sct", "nnunet"]
LAYOUTS: tuple[Layout, ...] = ("sct", "nnunet")

RECORD_NAME = "package.json"
"""In the folder of a package: digests of its files, its name and tag."""

CARD = "README.md"
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class PreparedModel:
    """A model made ready: its files (of a cascade also its first stage's), its card and what to know before it is published."""

    contents: PackagedModel
    first_stage: PackagedModel | None
    card: str
    name: str
    folds: tuple[Fold, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Package:
    """A finished package.

    Attributes:
        folder: with the zips, the card and SHA256SUMS.
        zips: layout → file.
        name, tag: of the release.
        warnings: what to think about before publishing.
        proof: what its segmentation was compared with; None when that was not asked for.
    """

    folder: Path
    zips: dict[Layout, Path]
    name: str
    tag: str
    warnings: tuple[str, ...]
    proof: PackageProof | None


def make_package(
    model_folder: str | Path,
    output: str | Path,
    layout: str = "both",
    date: str | None = None,
    orientation: str | None = None,
    name: str | None = None,
    folds: Sequence[str | int] | None = None,
    licence: str | None = None,
    prove: bool = True,
    images: Sequence[str | Path] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> Package:
    """Make a release package of a trained model folder; all of it appears in ``output`` in one move, or nothing.

    Args:
        model_folder: trained by us or by nnU-Net 2.
        output: a folder that is new, empty, or an earlier package (with ``overwrite``).
        layout: ``sct``, ``nnunet`` or ``both`` (for cascades and pictures, which the toolbox does not run, ``nnunet``).
        date: of the release (``20240915``); default today. The same date gives the same bytes.
        orientation: of the images, for dataset.json's ``image_orientation`` (``RPI``); default as far as known.
        name: of the model, see :mod:`nnssl_adapt.sharing.naming`; default made of the dataset's.
        folds: to put in; default every finished one.
        licence: of the model, for its card.
        prove: unpack the zips again and compare what they predict.
        images: files of one case for that, a channel each.
        device: for that.
        overwrite: replace an earlier package.

    Raises:
        ModelFolderError, PlanError, DatasetJsonError, CheckpointError: the folder is no (complete) model, its files were
            mixed up, or the package fails its proof.
        ConfigurationError: a wrong option, or output that is there already.
        OutputError: it can't be written.
    """
    _check_layout(layout)
    tag = release_tag(date)
    if prove:
        check_device(device)
    target = Path(output).expanduser().absolute()
    no_existing_output(target, RECORD_NAME, overwrite)
    model = ModelFolder.open(model_folder)
    if target == model.path.absolute() or model.path.absolute() in target.parents:
        raise ConfigurationError(f"{target} lies in the model's own folder: choose another -o")
    layouts = _layouts(layout, model)
    with tempfile.TemporaryDirectory(prefix="nnssl_adapt-package-") as work:
        prepared = prepare(model, Path(work), name, tag, orientation, folds, licence, layouts)
        for warning in prepared.warnings:
            logger.warning("%s", warning)
        proof = None
        make_folder(target.parent)
        with whole_folder(target, RECORD_NAME, replace=True) as staging:
            zips = {one: _write_layout(prepared, one, tag, staging, Path(work)) for one in layouts}
            write_text(staging / CARD, prepared.card)
            if prove:
                proof = _prove_zips(model, list(zips.values()), prepared, Path(work), device, images)
            _write_sums(staging)
            digests = {path.name: sha256_of(path) for path in sorted(staging.iterdir())}
            Record(staging / RECORD_NAME, digests, {"name": prepared.name, "tag": tag}).save()
    placed = {one: target / path.name for one, path in zips.items()}
    return Package(target, placed, prepared.name, tag, prepared.warnings, proof)


def prepare(
    model: ModelFolder,
    work: Path,
    name: str | None,
    tag: str | None,
    orientation: str | None,
    folds: Sequence[str | int] | None,
    licence: str | None,
    layouts: Sequence[Layout] = (),
) -> PreparedModel:
    """Check a model and write its publishable files below ``work``; arguments and errors as of :func:`make_package`."""
    licence = licence or model.plan.provenance.licence
    if name is None:
        name = default_name(model.plan.dataset_name)
        notes = [f"called {name} after the dataset: 'nnssl-adapt name' makes a name by the convention, for --name"]
    else:
        notes = [f"name {name}: {note}" for note in read_name(name).notes]
    chosen = folds_to_publish(model, folds)
    check_weights(model, chosen)
    stage = None if model.plan.previous_stage is None else ModelFolder.open(first_model(model))
    if stage is not None:
        check_weights(stage, folds_to_publish(stage, chosen))
    raw = find_raw(model.plan.dataset_name)
    code, warnings = choose_orientation(model, orientation, raw)
    if code is None and "sct" in layouts:
        raise ConfigurationError(
            f"{model.path}: nothing tells how its images lie, and the Spinal Cord Toolbox needs image_orientation: give "
            "--orientation, for instance RPI, or make a package for nnU-Net only (--layout nnunet)"
        )
    if "sct" in layouts:
        warnings += [f"Spinal Cord Toolbox: {text}" for text in sct_warnings(model, chosen, code)]
    cleaner = Cleaner.of_model(model, [case.identifier for case in raw.cases] if raw is not None else ())
    place = make_folder(work / "contents")
    contents = write_contents(model, chosen, place, code, cleaner, licence)
    first = None if stage is None else write_contents(stage, chosen, place, code, cleaner, licence)
    warnings += [f"left out: {text}" for text in contents.dropped]
    card = model_card(model, name, tag, chosen, licence, code, cleaner)
    for packaged in (contents,) if first is None else (contents, first):
        _refuse_leaks(packaged, card, cleaner)
    return PreparedModel(contents, first, card, name, chosen, (*warnings, *general_warnings(model, licence), *notes))


def _refuse_leaks(contents: PackagedModel, card: str, cleaner: Cleaner) -> None:
    """The last look: what no rule took out must not get out."""
    texts = {CARD: card}
    for name, path in contents.files.items():
        if path.suffix in (".json", ".txt", ".py", ".md"):
            texts[name] = path.read_text(encoding="utf-8", errors="replace")
    for name, text in texts.items():
        if leaks := cleaner.leaks_in(text):
            raise ModelFolderError(
                f"{name} of the package would still say {leaks[0]!r}, a folder of this machine or the name of a case: "
                "take it out of the model folder's own file and run the same command again"
            )


def default_name(dataset_name: str) -> str:
    """A name made of a dataset's, for who gave none: ``Dataset041_DeepGrey`` → ``model_seg_deepgrey``."""
    text = re.sub(r"[^A-Za-z0-9]+", "-", re.sub(r"^Dataset\d{3}_", "", dataset_name)).strip("-").lower()
    return f"model_seg_{text or 'unnamed'}"


def zip_of(folder: Path) -> Path | None:
    """The zip in a package's folder (its zips hold the same model), or None for other folders. Raises SourceError without one."""
    if not (folder / RECORD_NAME).is_file():
        return None
    zips = sorted(folder.glob("*.zip"))
    if not zips:
        raise SourceError(f"{folder} is the folder of a package, and has no zip any more")
    return zips[0]


def _check_layout(layout: str) -> None:
    if layout not in (*LAYOUTS, "both"):
        raise ConfigurationError(f"layout {layout!r}: expected sct, nnunet or both")


def _layouts(layout: str, model: ModelFolder) -> tuple[Layout, ...]:
    """The layouts that suit the model. Raises ConfigurationError for ``sct`` where the toolbox can't run it."""
    reason = None
    if model.plan.previous_stage is not None:
        reason = f"{model.configuration} is a cascade, and the Spinal Cord Toolbox runs one network"
    elif model.image_reader in PICTURE_READERS:
        reason = f"the model is for pictures ({model.file_ending}), and the Spinal Cord Toolbox has NIfTI images"
    if reason is not None and layout == "sct":
        raise ConfigurationError(f"{reason}: make a package for nnU-Net (--layout nnunet)")
    if reason is not None and layout == "both":
        logger.info("%s: only the zip for nnU-Net is made", reason)
        return ("nnunet",)
    return tuple(known for known in LAYOUTS if layout in (known, "both"))


def folder_in(contents: PackagedModel, layout: Layout) -> str:
    """Name of the model folder in a zip. The toolbox looks for one that begins with ``nnUNetTrainer``."""
    name = contents.folder.name
    if layout == "nnunet":
        return f"{contents.dataset_name}/{name}"
    return name if name.startswith(STOCK_TRAINER) else f"{STOCK_TRAINER}__{name.partition('__')[2]}"


def _write_layout(prepared: PreparedModel, layout: Layout, tag: str, folder: Path, work: Path) -> Path:
    contents = prepared.contents
    inside = folder_in(contents, layout)
    card = work / CARD
    write_text(card, prepared.card)
    # In nnU-Net's layout the root is everybody's nnUNet_results, where a README would replace another model's.
    place = CARD if layout == "sct" else f"{inside}/{CARD}"
    files = {f"{inside}/{name}": path for name, path in contents.files.items()} | {place: card}
    if prepared.first_stage is not None:
        first = folder_in(prepared.first_stage, layout)
        files |= {f"{first}/{name}": path for name, path in prepared.first_stage.files.items()}
    path = folder / f"{prepared.name}-{tag}{'' if layout == 'sct' else '-nnunet'}.zip"
    write_zip(path, files, tag)
    return path


def _prove_zips(
    model: ModelFolder,
    zips: Sequence[Path],
    prepared: PreparedModel,
    work: Path,
    device: str,
    images: Sequence[str | Path] | None,
) -> PackageProof:
    """Unpack all, predict with the first; the others must hold the same files."""
    first = unpack_model(zips[0], make_folder(work / "unpacked"))
    expected = _digests(first)
    for path in zips[1:]:
        with tempfile.TemporaryDirectory(dir=work) as place:
            found = _digests(unpack_model(path, Path(place)))
        if different := sorted(name for name in expected.keys() | found if expected.get(name) != found.get(name)):
            raise ModelFolderError(f"{path.name} and {zips[0].name} hold different files: {', '.join(different)}")
    files = [Path(image).expanduser() for image in images] if images else None
    proof = prove_package(model, first, prepared.folds, device, files, find_raw(model.plan.dataset_name))
    logger.info("%s: %s", " and ".join(path.name for path in zips), proof)
    return proof


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def _write_sums(folder: Path) -> None:
    """As ``sha256sum -c SHA256SUMS`` reads it."""
    with explain_write_errors(folder):
        lines = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.is_file()]
    write_text(folder / SUMS, "".join(lines))
