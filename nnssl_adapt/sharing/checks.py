"""Rules that whoever uses a model later applies, looked at before it is published.

The Spinal Cord Toolbox's were read off its release of 2026; what breaks there is a warning here, since a package may be
meant for nnU-Net alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import read_geometry
from nnssl_adapt.errors import ConfigurationError, NnsslAdaptError
from nnssl_adapt.geometry.orientation import check_code, orientation_code
from nnssl_adapt.inference.model_folder import Fold, ModelFolder
from nnssl_adapt.inference.trainer_class import STOCK_TRAINER, needs_trainer_class, trainer_for_nnunet

_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_LOOKED_AT = 20


def choose_orientation(
    model: ModelFolder, requested: str | None, raw: RawDataset | None
) -> tuple[str | None, list[str]]:
    """Which way images of this model lie (SCT's letters: where axes come from), and what is odd about it.

    From ``requested``, ``image_orientation`` in dataset.json, the plan, or the training images, as far as each is known.
    Returns None when nothing tells. Raises ConfigurationError when what is requested contradicts dataset.json or the plan.
    """
    stated = {
        "dataset.json": model.dataset_json.get("image_orientation"),
        "plans.json": model.plan.provenance.orientation,
    }
    known = {where: check_code(code) for where, code in stated.items() if isinstance(code, str) and code}
    warnings: list[str] = []
    if requested is not None:
        requested = check_code(requested)
        for where, code in known.items():
            if code != requested:
                raise ConfigurationError(
                    f"--orientation {requested}, but {where} of {model.path} says {code}: predictions would be made on images "
                    "that lie the wrong way. Leave the flag out, or fix the file"
                )
    if len(set(known.values())) > 1:
        raise ConfigurationError(
            f"{model.path}: dataset.json says image_orientation {known['dataset.json']}, plans.json {known['plans.json']}"
        )
    found = _of_images(raw)
    chosen = requested or next(iter(known.values()), None)
    if chosen is None and found:
        chosen = found.most_common(1)[0][0]
        warnings.append(f"image_orientation {chosen} was read off the training images: check it (--orientation)")
    if chosen is not None and found and set(found) != {chosen}:
        seen = ", ".join(f"{code} ({count})" for code, count in found.most_common())
        warnings.append(f"training images lie as {seen}, and image_orientation will say {chosen}: is that meant?")
    return chosen, warnings


def _of_images(raw: RawDataset | None) -> Counter[str]:
    found: Counter[str] = Counter()
    for case in raw.cases[:_LOOKED_AT] if raw is not None else ():
        try:
            found[orientation_code(read_geometry(case.images[0], case.reader).direction)] += 1
        except NnsslAdaptError:
            continue  # verify's business
    return found


def sct_warnings(model: ModelFolder, folds: Sequence[Fold], orientation: str | None) -> list[str]:
    """What the Spinal Cord Toolbox would stumble over, each with what to do."""
    found = []
    channels = model.channel_names
    if len(channels) != 1:
        found.append(f"SCT feeds one input channel, this model takes {len(channels)} ({', '.join(channels)})")
    if orientation is None:
        found.append("dataset.json has no image_orientation: SCT would take LPI. Give --orientation")
    if model.file_ending != ".nii.gz":
        found.append(f"SCT hands over .nii.gz files, this model was trained on {model.file_ending}")
    for name in model.labels.class_names:
        if not _LABEL.fullmatch(name):
            found.append(
                f"label {name!r} becomes part of file names in SCT: use letters, digits, _ and - (in dataset.json)"
            )
    trainer = trainer_for_nnunet(model.architecture)
    if needs_trainer_class(model.architecture):
        needs = model.architecture.kind.needs
        also = f", and have {needs[0]}" if needs else ""
        found.append(f"the network needs trainer_class.py (in the package): SCT must be one that loads it{also}")
    elif trainer != STOCK_TRAINER:
        found.append(
            f"the network is built by nnU-Net's {trainer}: SCT's nnU-Net must have it (nnunetv2-neuropoly 2.6 has)"
        )
    if len(folds) > 1:
        # Seen with nnunetv2-neuropoly 2.6.2; only models that the toolbox's own table calls ensembles are averaged rightly.
        found.append(
            f"SCT averages the {len(folds)} folds, {len(folds)} times slower than one, and counts the first one twice, so that "
            "its labels are not quite nnU-Net's: publish one fold (-f 0)"
        )
    return found


def general_warnings(model: ModelFolder, licence: str | None) -> list[str]:
    """What anyone would miss."""
    found = []
    if licence is None:
        found.append("no licence: others may not use the model. Give --licence, for instance CC-BY-4.0")
    if not (model.path / "dataset_fingerprint.json").is_file():
        found.append(f"{model.path} has no dataset_fingerprint.json: the package has none either")
    if not any((model.fold_folder(fold) / "validation" / "summary.json").is_file() for fold in model.folds):
        found.append("no fold was validated (fold_*/validation/summary.json): the card has no results")
    return found


def find_raw(dataset_name: str) -> RawDataset | None:
    """The raw dataset, where it is on this machine and in order."""
    try:
        return RawDataset.open(dataset_name)
    except (NnsslAdaptError, OSError):
        return None


def no_existing_output(path: Path, record_name: str, overwrite: bool) -> None:
    """Raise ConfigurationError unless ``path`` is free, empty, or an earlier package that may be replaced."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir() or not (path / record_name).is_file():
        raise ConfigurationError(f"{path} exists and is no package (no {record_name} in it): choose another folder")
    if not overwrite:
        raise ConfigurationError(f"{path} holds a package already: choose another folder, or add --overwrite")
