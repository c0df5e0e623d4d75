"""What can be known to go wrong before anything is submitted, on a machine without a GPU."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnssl_adapt.cluster.graph import Resources
from nnssl_adapt.data.dataset import RawDataset
from nnssl_adapt.data.images import read_geometry
from nnssl_adapt.data.labels import LabelScheme
from nnssl_adapt.data.splits import load_or_make_splits
from nnssl_adapt.data.verifying.fingerprint import DatasetFingerprint
from nnssl_adapt.errors import ConfigurationError, OutputError
from nnssl_adapt.files import make_folder
from nnssl_adapt.paths import preprocessed_folder, results_folder
from nnssl_adapt.planning.fit_gpu import plan_memory
from nnssl_adapt.planning.make import make_plan
from nnssl_adapt.planning.memory import GIB, StepSettings, gib
from nnssl_adapt.planning.plan import FinetunePlan
from nnssl_adapt.planning.preflight import find_other_orientations
from nnssl_adapt.planning.preprocess_dataset import refuse_to_replace_another
from nnssl_adapt.training.recipe.recipe import Recipe
from nnssl_adapt.training.setup import adapted_plan
from nnssl_adapt.weights.checkpoint.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "apfs")

_MEMORY_OF = {  # GB of the smallest card of that name, as clusters call them
    "t4": 16, "p100": 16, "v100": 16, "a10": 24, "a30": 24, "l4": 24, "rtx3090": 24, "rtx4090": 24, "a5000": 24, "v100s": 32,
    "a40": 48, "a6000": 48, "l40": 48, "l40s": 48, "rtx8000": 48, "a100": 40, "h100": 80, "h200": 141,
}  # fmt: skip


def planned(
    raw: RawDataset, checkpoint: Checkpoint | None, name: str, options: Mapping[str, Any]
) -> tuple[FinetunePlan, bool]:
    """The plan that the jobs will make, and whether it is only preliminary: then its names hold, its numbers need not.

    Without a fingerprint, which takes reading every image, the headers of the images stand in for it. That the weights fit is
    found out in any case. Raises what :func:`make_plan` raises, PlanError if another plan has its name, and ConfigurationError
    for what would copy the whole dataset here.
    """
    options = dict(options)
    code = options.pop("reorient", None)
    if code is not None and find_other_orientations(raw, code):
        raise ConfigurationError(
            "--reorient copies all images: run 'nnssl-adapt reorient' first and submit the dataset that it makes",
            next_command=f"nnssl-adapt reorient -d {raw.name}",
        )
    path = preprocessed_folder() / raw.name / "dataset_fingerprint.json"
    preliminary = not path.is_file()
    fingerprint = _of_headers(raw) if preliminary else DatasetFingerprint.load(path)
    plan = make_plan(raw, checkpoint, name=name, fingerprint=fingerprint, **options)
    if not preliminary:
        refuse_to_replace_another(plan)
    return plan, preliminary


def _of_headers(raw: RawDataset) -> DatasetFingerprint:
    """What headers tell of a dataset; of intensities nothing but that there are some."""
    geometries = [read_geometry(case.images[0], case.reader) for case in raw.cases]
    names = ("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std")
    return DatasetFingerprint(
        spacings=tuple(geometry.spacing for geometry in geometries),
        shapes_after_crop=tuple(geometry.size for geometry in geometries),
        intensity={str(channel): dict.fromkeys(names, 1.0) for channel in range(raw.num_channels)},
        median_relative_size_after_cropping=1.0,
    )


def check_folds(raw: RawDataset, folds: Sequence[int]) -> int:
    """How many folds the dataset has; ConfigurationError where it does not have these."""
    if not folds or len(set(folds)) != len(folds):
        raise ConfigurationError(f"--folds {','.join(map(str, folds)) or 'none'}: expected such as 0-4, or 0,2")
    folder = preprocessed_folder() / raw.name
    count = 5
    if any((where / "splits_final.json").is_file() for where in (folder, raw.folder)):
        count = len(load_or_make_splits(make_folder(folder), [case.identifier for case in raw.cases], raw.folder))
    missing = [str(fold) for fold in folds if not 0 <= fold < count]
    if missing:
        raise ConfigurationError(f"--folds: fold {', '.join(missing)} does not exist, {raw.name} has 0 to {count - 1}")
    return count


def check_memory(plan: FinetunePlan, recipe: Recipe, labels: LabelScheme, resources: Resources) -> None:
    """Warn where training is foreseen to need more memory than the kind of GPU that ``--gpus`` names."""
    kind = resources.gpus.rpartition(":")[0].lower().replace("_", "").replace("-", "")
    known = next((size for name, size in _MEMORY_OF.items() if kind in (name, f"nvidia{name}")), None)
    if known is None:
        return
    plan = adapted_plan(plan, recipe)
    ranks = resources.nodes * resources.num_gpus
    needed = plan_memory(
        plan.replaced(batch_size=max(1, -(-plan.batch_size // ranks))),
        labels.num_heads,
        StepSettings.of(recipe),
        len(plan.stage_channels(labels)),
    ).total
    if needed > known * 10**9:
        logger.warning(
            "training is foreseen to need %s, a %s may have only %d GB (%s): try --fit-gpu %dGB",
            gib(needed),
            kind,
            known,
            gib(known * 10**9),
            known,
        )
    logger.debug("foreseen memory: %.1f GiB", needed / GIB)


def check_results_folder(for_cluster: bool) -> None:
    """Raise OutputError where the results folder can't be written; warn where other machines are not likely to see it."""
    folder = make_folder(results_folder())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"nnUNet_results={folder} can't be written ({error.strerror}): choose another folder", path=folder
        ) from error
    if not for_cluster:
        return
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        where = Path(os.environ.get(variable, ""))
        kind = _file_system(where, _mounts())
        if kind in _LOCAL_FILE_SYSTEMS:
            logger.warning(
                "%s=%s looks local to this machine (%s): the cluster's nodes must see it, too", variable, where, kind
            )


def _mounts() -> list[tuple[str, str]]:
    """Mount points with their kinds of file system; none where that can't be told."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [(words[1], words[2]) for line in lines if len(words := line.split()) > 2]


def _file_system(path: Path, mounts: Iterable[tuple[str, str]]) -> str:
    resolved = path.resolve()
    holding = [(point, kind) for point, kind in mounts if resolved.is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]), default=("", ""))[1]


def check_setup(setup: Path | None) -> None:
    """Raise ConfigurationError where the file that every job sources fails, or this package can't be loaded after it."""
    if setup is None:
        return
    if not setup.is_file():
        raise ConfigurationError(f"--setup {setup}: no such file", path=setup)
    script = f"source {shlex.quote(str(setup))} && {shlex.quote(sys.executable)} -c 'import nnssl_adapt'"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit code {done.returncode}"
        raise ConfigurationError(f"--setup {setup} fails: {said}", path=setup)
