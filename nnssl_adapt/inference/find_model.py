"""The folder of a trained model, from what nnU-Net's users type: dataset, plans, trainer, configuration."""

from __future__ import annotations

from pathlib import Path

from nnssl_adapt.errors import ModelFolderError
from nnssl_adapt.paths import find_dataset_name, results_folder


def find_model_folder(
    dataset: int | str,
    plans: str | None = None,
    trainer: str | None = None,
    configuration: str | None = None,
) -> Path:
    """The folder ``<nnUNet_results>/<dataset>/<trainer>__<plans>__<configuration>``.

    Args:
        dataset: id (41) or name (``Dataset041_DeepGrey``).
        plans: name of the plans; None: whichever there is, as for the next two.
        trainer: name of the trainer.
        configuration: for instance ``3d_fullres``.

    Raises:
        DatasetNotFound, ConfigurationError: no such dataset, or ``nnUNet_results`` is not set.
        ModelFolderError: none or several models fit; it lists them.
    """
    name = find_dataset_name(dataset)
    folder = results_folder() / name
    models = sorted(path.parent for path in folder.glob("*__*__*/plans.json"))
    wanted = (trainer, plans, configuration)
    fitting = [model for model in models if _fits(model.name, wanted)]
    if len(fitting) == 1:
        return fitting[0]
    asked = ", ".join(
        f"{flag} {value}" for flag, value in zip(("-tr", "-p", "-c"), wanted, strict=True) if value is not None
    )
    if not models:
        raise ModelFolderError(f"{folder} has no trained model: train one, or give its folder with -m")
    listed = "\n".join(f"  -d {name} {_flags(model.name)}" for model in fitting or models)
    if fitting:
        raise ModelFolderError(f"{folder} has several models{f' with {asked}' if asked else ''}; which one?\n{listed}")
    raise ModelFolderError(f"{folder} has no model with {asked}; there is:\n{listed}")


def _parts(name: str) -> tuple[str, str, str]:
    """Trainer, plans and configuration. Names of plans may have double underscores in them; the others may not."""
    trainer, _, rest = name.partition("__")
    plans, _, configuration = rest.rpartition("__")
    return trainer, plans, configuration


def _fits(name: str, wanted: tuple[str | None, str | None, str | None]) -> bool:
    return all(requested is None or requested == part for requested, part in zip(wanted, _parts(name), strict=True))


def _flags(name: str) -> str:
    trainer, plans, configuration = _parts(name)
    return f"-tr {trainer} -p {plans} -c {configuration}"
