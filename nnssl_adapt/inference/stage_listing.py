"""Which trained model is meant where files of several lie together: a cascade comes with its first stage, as their plans say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nnssl_adapt.errors import NnsslAdaptError, SourceNotFound
from nnssl_adapt.planning.plan import resolve_configuration
from nnssl_adapt.planning.plans_file import read_plans
from nnssl_adapt.weights.sources.listing import MODEL_FILES, ModelListing, join_path


def meant_models(
    models: Sequence[ModelListing],
    where: str,
    file_of: Callable[[str], Path],
    configuration: str | None = None,
) -> tuple[ModelListing, ...]:
    """The one model that is more than the first stage of another; of a cascade, its first stage comes after it.

    Args:
        models: all that are there, at least one.
        where: what to call the place in messages.
        file_of: gets a file by its name there.
        configuration: of the model that is meant; None: there must be only one.

    Raises SourceNotFound for several, or none of this configuration; it lists them.
    """
    asked = [model for model in models if configuration is None or _named(model)[1] == configuration]
    if len(models) == 1 and asked:
        return (models[0],)
    firsts = {model.folder: _first_stage(model, models, file_of) for model in models}
    of_others = [first for first in firsts.values() if first is not None and configuration is None]
    meant = [model for model in asked if model not in of_others]
    if len(meant) != 1:
        listed = ", ".join(model.folder or "." for model in meant or models)
        wanted = f" of configuration {configuration}" if configuration is not None else ""
        if not meant:
            raise SourceNotFound(f"{where} holds no trained model{wanted}; there is: {listed}")
        raise SourceNotFound(
            f"{where} holds {len(meant)} trained models{wanted}: {listed}. Install one: nnssl-adapt install {where} -c "
            f"{_named(meant[0])[1] or 'CONFIGURATION'}; or unpack them and give one folder"
        )
    first = firsts[meant[0].folder]
    return (meant[0],) if first is None else (meant[0], first)


def _named(model: ModelListing) -> tuple[str, str]:
    """Trainer and plans, and the configuration, by the folder's name; both are empty where it has another form."""
    before, separator, configuration = model.folder.rpartition("/")[2].rpartition("__")
    return (before, configuration) if separator else ("", "")


def _first_stage(
    model: ModelListing, models: Sequence[ModelListing], file_of: Callable[[str], Path]
) -> ModelListing | None:
    """The model beside it that its plans name as its previous stage; None where it has none, or that is not there."""
    trained, configuration = _named(model)
    if not trained or not model.complete:
        return None
    try:
        content = read_plans(file_of(join_path(model.folder, MODEL_FILES[0])))
        previous = resolve_configuration(content, configuration).get("previous_stage")
    except (NnsslAdaptError, KeyError, TypeError, AttributeError):
        return None  # who opens it says what is wrong
    wanted = join_path(model.folder.rpartition("/")[0], f"{trained}__{previous}")
    return next((other for other in models if other.folder == wanted), None)
