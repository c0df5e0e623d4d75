"""nnU-Net's own flags and environment variables, for those whose fingers know them.

Every option of nnunetv2's commands that have a counterpart here is an alias, changes nothing (which is said), or is refused
with the reason. A test compares with the installed nnunetv2.
"""

from __future__ import annotations

import argparse
import logging
import os

from nnssl_adapt.cli.parser import Needless, Only, Refused

logger = logging.getLogger(__name__)

_ALWAYS_VERIFIED = "every dataset is verified before it is preprocessed"
_DEFAULT_CLASS = "only nnU-Net's default is known here"


def add_predict_words(parser: argparse.ArgumentParser) -> None:
    """``nnUNetv2_predict`` and ``nnUNetv2_predict_from_modelfolder``."""
    group = parser.add_argument_group("nnU-Net's words for the same")
    group.add_argument(
        "-chk",
        dest="checkpoint",
        type=_checkpoint,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="checkpoint_final.pth or checkpoint_best.pth: as --checkpoint",
    )
    group.add_argument(
        "-num_parts", type=int, metavar="N", help="with -part_id, counted from 0: as --part, counted from 1"
    )
    group.add_argument("-part_id", type=int, metavar="I", help="see -num_parts")
    group.add_argument("-npp", dest="preprocessing_processes", type=int, metavar="N", help="as -np")
    group.add_argument("-nps", dest="export_processes", type=int, metavar="N", help="as -np; the larger of both counts")
    group.add_argument(
        "-prev_stage_predictions",
        dest="previous",
        metavar="FOLDER",
        help="for a cascade: segmentations by its first network (default: made here, by the model folder beside this one)",
    )
    _needless(parser, "--not_on_device", "sums of tiles are kept where there is room for them")


def _checkpoint(text: str) -> str:
    known = {f"checkpoint_{name}.pth": name for name in ("final", "best")}
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text}: expected {' or '.join(known)}")
    return known[text]


def part_of(arguments: argparse.Namespace) -> str | None:
    """``I/N`` of ``--part``, or of nnU-Net's ``-num_parts`` and ``-part_id``. Raises ConfigurationError."""
    from nnssl_adapt.errors import ConfigurationError

    parts, number = arguments.num_parts, arguments.part_id
    if parts is None and number is None:
        return None if arguments.part is None else str(arguments.part)
    if arguments.part is not None:
        raise ConfigurationError("--part and -num_parts say the same: give one of them")
    parts, number = parts or 1, number or 0
    if not 0 <= number < parts:
        raise ConfigurationError(f"-num_parts {parts} -part_id {number}: parts are counted from 0 to {parts - 1}")
    return f"{number + 1}/{parts}"


def processes_of(arguments: argparse.Namespace) -> int | None:
    """``-np``, or the larger one of nnU-Net's ``-npp`` and ``-nps`` (or ``nnUNet_npp`` and ``nnUNet_nps``)."""
    if arguments.workers is not None:
        return int(arguments.workers)
    given = [n for n in (arguments.preprocessing_processes, arguments.export_processes) if n is not None]
    given = given or [n for n in (whole_number("nnUNet_npp"), whole_number("nnUNet_nps")) if n is not None]
    return max(given, default=None)


def add_preprocess_words(parser: argparse.ArgumentParser) -> None:
    """``nnUNetv2_extract_fingerprint``, ``_plan_experiment``, ``_preprocess`` and ``_plan_and_preprocess``."""
    words = parser.add_argument_group("nnU-Net's words for the same")
    words.add_argument("--no_pbar", action="store_true", help="no progress bars")
    words.add_argument("-npfp", dest="fingerprint_processes", type=int, metavar="N", help="as -np")
    _only(parser, "-fpe", "DatasetFingerprintExtractor", _DEFAULT_CLASS)
    _only(parser, "-preprocessor_name", "DefaultPreprocessor", _DEFAULT_CLASS)
    _needless(parser, "--verify_dataset_integrity", _ALWAYS_VERIFIED)
    _needless(parser, "--clean", "the fingerprint is made again whenever the images have changed")
    _refuse(parser, "--no_pp", "nnssl-adapt preprocess --dry-run shows the plan without preprocessing")
    _refuse(
        parser,
        "-overwrite_target_spacing",
        "-am fixed -os Z Y X chooses the spacing, in the images' own order of axes (nnU-Net's flag has the plan's)",
    )
    _refuse(parser, "-plans_name", "-pl names the nnU-Net plans to start from, --plans_name the plan that is made")


def add_evaluate_words(parser: argparse.ArgumentParser) -> None:
    """``nnUNetv2_evaluate_folder`` and ``nnUNetv2_evaluate_simple``."""
    parser.add_argument(
        "folders", nargs="*", metavar="REFERENCES PREDICTIONS", help="as nnUNetv2_evaluate_folder, instead of -g and -p"
    )
    _needless(parser, "-pfile", "the file ending and the labels are in dataset.json", nargs=1)
    _refuse(parser, "-l", "the labels are those of dataset.json (-djfile)")
    _refuse(parser, "-il", "the ignore label is that of dataset.json (-djfile), where it is called 'ignore'")


def folders_of(arguments: argparse.Namespace) -> tuple[str, str]:
    """The folders of segmentations and of references, by flags or as nnU-Net has them. Raises ConfigurationError."""
    from nnssl_adapt.errors import ConfigurationError

    given, predictions, references = arguments.folders, arguments.predictions, arguments.references
    if given and (predictions is not None or references is not None):
        raise ConfigurationError(f"got {' '.join(given)} as well as -p or -g: use one way or the other")
    if given and len(given) != 2:
        raise ConfigurationError(f"expected the folders REFERENCES PREDICTIONS, got: {' '.join(given)}")
    if given:
        references, predictions = given
    missing = [flag for flag, value in (("-p", predictions), ("-g", references)) if value is None]
    if missing:
        raise ConfigurationError(f"missing {' and '.join(missing)}: -p SEGMENTATIONS -g REFERENCES")
    return str(predictions), str(references)


def add_find_best_words(parser: argparse.ArgumentParser) -> None:
    """``nnUNetv2_find_best_configuration``."""
    parser.add_argument("positional", nargs="?", metavar="DATASET", help="as nnU-Net has it, instead of -d")
    _needless(parser, "--no_overwrite", "results are computed again, so that they are those of the present predictions")


def dataset_of(arguments: argparse.Namespace) -> str:
    """The dataset, by ``-d`` or as nnU-Net has it. Raises ConfigurationError."""
    from nnssl_adapt.errors import ConfigurationError

    given = [name for name in (arguments.dataset, arguments.positional) if name is not None]
    if len(given) != 1:
        raise ConfigurationError("name the dataset once: -d DATASET" if given else "missing -d DATASET")
    return str(given[0])


def add_postprocess_words(parser: argparse.ArgumentParser) -> None:
    """``nnUNetv2_determine_postprocessing`` and ``nnUNetv2_apply_postprocessing``."""
    parser.add_argument(
        "--remove_postprocessed", action="store_true", help="with -g: don't keep the processed segmentations"
    )
    _needless(parser, "-plans_json", "the file ending and the labels are in dataset.json", nargs=1)


def add_package_words(parser: argparse.ArgumentParser) -> None:
    """``nnUNetv2_export_model_to_zip``."""
    for flag in ("-d", "-c", "-tr", "-p"):
        _refuse(parser, flag, "the model is named by its folder: nnssl-adapt package MODEL -o FOLDER")
    _refuse(parser, "-chk", "a package has checkpoint_final.pth")
    _refuse(parser, "--not_strict", "-f names the folds that are packed")
    _refuse(
        parser, "--exp_cv_preds", "predictions of training images are not published; copy fold_*/validation yourself"
    )


def add_convert_words(parser: argparse.ArgumentParser) -> None:
    """``nnUNetv2_convert_MSD_dataset``."""
    _refuse(parser, "-i", "the folder is given without a flag: nnssl-adapt convert msd FOLDER")
    _refuse(parser, "-overwrite_id", "-d gives the dataset's id")


def say_ignored_variables() -> None:
    """Say once what is set for nnU-Net's training and has no meaning here."""
    folder = os.environ.get("nnUNet_extTrainer")
    if folder:
        logger.info(
            "nnUNet_extTrainer=%s is not used: trainers are recipes here (--recipe FILE), no classes to import", folder
        )


def whole_number(variable: str) -> int | None:
    """A number of processes in an environment variable; None where it is not set. Raises ConfigurationError."""
    from nnssl_adapt.errors import ConfigurationError

    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(f"{variable}={text}: expected a number of processes, at least 1")
    return int(text)


def _refuse(parser: argparse.ArgumentParser, flag: str, reason: str) -> None:
    parser.add_argument(flag, action=Refused, dest=f"refused{flag}", reason=reason)


def _needless(parser: argparse.ArgumentParser, flag: str, reason: str, nargs: int = 0) -> None:
    parser.add_argument(flag, action=Needless, dest=f"needless{flag}", reason=reason, nargs=nargs)


def _only(parser: argparse.ArgumentParser, flag: str, known: str, reason: str) -> None:
    parser.add_argument(flag, action=Only, dest=f"only{flag}", known=known, reason=reason)
