"""Reading ``study.yaml``: every mistake is found before anything starts, and all are told together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nnssl_adapt.errors import ConfigurationError, NnsslAdaptError
from nnssl_adapt.evaluation.compare import COMPARABLE, LESIONS
from nnssl_adapt.evaluation.lesions import LesionRule
from nnssl_adapt.evaluation.measures import Judging
from nnssl_adapt.geometry.spacing import canonical_mode, check_fixed
from nnssl_adapt.planning.plan import CONFIGURATION, PLANAR
from nnssl_adapt.planning.request import CONFIGURATIONS
from nnssl_adapt.studies.spec import SCRATCH, Arm, StudySpec
from nnssl_adapt.text import did_you_mean
from nnssl_adapt.training.recipe.recipe import configs_folder

Made = TypeVar("Made")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")

_SHARED = ("configuration", "spacing", "spacing_mm", "normalization", "recipe", "trainer", "set")
"""Fields of an arm that may stand beside ``arms`` as well, for all of them."""


def read_study_file(source: str | Path, **changes: Any) -> StudySpec:
    """Read a study: the name of one in ``configs/studies`` or a YAML file; ``changes`` replace entries.

    Raises ConfigurationError: it is not there, or every mistake in it at once (``.mistakes``).
    """
    path = _find(source)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} is not a readable YAML file: {' '.join(str(error).split())}", path=path
        ) from error
    return study_from(content, path, **changes)


def study_from(content: Any, file: Path | None = None, **changes: Any) -> StudySpec:
    """Make a study of what its YAML file says; ``changes`` replace entries. Raises as :func:`read_study_file`."""
    where = str(file) if file is not None else "study"
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"{where}: expected lines 'field: value', got {type(content).__name__}", path=file)
    reading = _Reading({**content, **changes}, file)
    study = reading.study()
    if reading.mistakes or study is None:
        lines = "".join(f"\n  {mistake}" for mistake in reading.mistakes)
        raise ConfigurationError(
            f"{where}: {len(reading.mistakes)} mistake(s){lines}", path=file, mistakes=reading.mistakes
        )
    return study


def _find(source: str | Path) -> Path:
    folder = configs_folder() / "studies"
    for path in (Path(source), folder / f"{str(source).removesuffix('.yaml')}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ConfigurationError(f"no study {str(source)!r}: give a YAML file or one of {names}", path=source)


class _Reading:
    """Turns a file's content into a StudySpec, and collects what is wrong with it."""

    def __init__(self, content: Mapping[str, Any], file: Path | None) -> None:
        self.content = content
        self.file = file
        self.mistakes: list[str] = []

    def study(self) -> StudySpec | None:
        known = {item.name for item in fields(StudySpec)} - {"judging", "file"}
        known |= {"tolerance", "empty", "surface_dice", "lesions", *_SHARED}
        for key in self.content:
            if key not in known:
                self.mistakes.append(f"unknown field {key!r}{did_you_mean(str(key), known)}")
        arms = self._arms({key: self.content[key] for key in _SHARED if key in self.content})
        name = str(self.content.get("name") or (self.file.stem if self.file else "study"))
        if not _NAME.fullmatch(name):
            self.mistakes.append(f"name {name!r}: expected letters, digits and _ . + -")
        if "dataset" not in self.content:
            self.mistakes.append("dataset: missing; give the id or name of a dataset")
        reference = str(self.content.get("reference") or (arms[0].name if arms else ""))
        if arms and reference not in [arm.name for arm in arms]:
            self.mistakes.append(f"reference {reference!r} is no arm: expected {', '.join(arm.name for arm in arms)}")
        folds, seeds = self._whole_numbers("folds"), self._whole_numbers("seeds")
        fractions, metrics = self._fractions(), self._metrics()
        classes = tuple(str(item) for item in self._list("classes"))
        judging = self._judging(metrics)
        subject = self.content.get("subject")
        if subject is not None:
            self._try(lambda: re.compile(str(subject)), f"subject {subject!r} is no regular expression")
        if self.mistakes or judging is None:
            return None
        return StudySpec(
            name=name,
            dataset=str(self.content["dataset"]),
            arms=tuple(arms),
            reference=reference,
            judging=judging,
            subject=None if subject is None else str(subject),
            device=str(self.content.get("device", "cuda")),
            file=self.file,
            folds=folds,
            seeds=seeds,
            fractions=fractions,
            metrics=metrics,
            classes=classes,
        )

    # -- arms --------------------------------------------------------------------------------------------------------

    def _arms(self, shared: Mapping[str, Any]) -> list[Arm]:
        given = self.content.get("arms")
        if not isinstance(given, Mapping) or len(given) < 2:
            self.mistakes.append("arms: expected at least two, each 'NAME: {weights: SOURCE, …}'")
            return []
        sources = [str(arm["weights"]) for arm in given.values() if isinstance(arm, Mapping) and "weights" in arm]
        pretrained = list(dict.fromkeys(source for source in sources if source != SCRATCH))
        arms = [arm for name, content in given.items() if (arm := self._arm(str(name), content, shared, pretrained))]
        for number, arm in enumerate(arms):
            same = [other.name for other in arms[:number] if _without_name(other) == _without_name(arm)]
            if same:
                self.mistakes.append(f"arms {same[0]} and {arm.name} differ in nothing")
        return arms

    def _arm(self, name: str, content: Any, shared: Mapping[str, Any], pretrained: list[str]) -> Arm | None:
        before = len(self.mistakes)
        if not _NAME.fullmatch(name):
            self.mistakes.append(f"arm {name!r}: expected a name of letters, digits and _ . + -")
        if not isinstance(content, Mapping) or "weights" not in content:
            self.mistakes.append(f"arm {name}: 'weights' is missing; give a source, or 'scratch'")
            return None
        known = {
            "weights",
            "network",
            "configuration",
            "spacing",
            "spacing_mm",
            "normalization",
            "recipe",
            "trainer",
            "set",
        }
        for key in content:
            if key not in known:
                self.mistakes.append(f"arm {name}: unknown field {key!r}{did_you_mean(str(key), known)}")
        merged = {**{key: value for key, value in shared.items() if key not in ("recipe", "trainer")}, **content}
        if "recipe" not in content and "trainer" not in content:  # an arm's trainer replaces the study's recipe
            merged |= {key: shared[key] for key in ("recipe", "trainer") if key in shared}
        if merged.get("recipe") is not None and merged.get("trainer") is not None:
            self.mistakes.append(f"arm {name}: give 'recipe' or 'trainer', not both")
        weights = str(content["weights"])
        network = content.get("network") or (weights if weights != SCRATCH else None)
        if network is None and len(pretrained) == 1:
            network = pretrained[0]
        configuration = self._configuration(name, merged.get("configuration", CONFIGURATION))
        if network is None and configuration != PLANAR:
            self.mistakes.append(f"arm {name}: say with 'network: SOURCE' whose network is trained from scratch")
        settings = self._settings(name, shared.get("set"), content.get("set"))
        mode, spacing = self._spacing(name, merged)
        if len(self.mistakes) > before:
            return None
        arm = Arm(
            name=name,
            weights=weights,
            network=None if network is None else str(network),
            configuration=configuration,
            spacing_mode=mode,
            spacing=spacing,
            normalization=None if merged.get("normalization") is None else str(merged["normalization"]),
            recipe=None if merged.get("recipe") is None else self._recipe_source(str(merged["recipe"])),
            trainer=None if merged.get("trainer") is None else str(merged["trainer"]),
            settings=settings,
        )
        self._try(arm.resolved_recipe, f"arm {name}")
        return arm if len(self.mistakes) == before else None

    def _recipe_source(self, recipe: str) -> str:
        """A recipe file is named relative to the study's own folder."""
        beside = self.file.parent / recipe if self.file is not None else Path(recipe)
        return str(beside.resolve()) if recipe.endswith((".yaml", ".yml")) and beside.is_file() else recipe

    def _settings(self, name: str, shared: Any, own: Any) -> tuple[tuple[str, str], ...]:
        merged: dict[str, str] = {}
        for given in (shared, own):
            if given is None:
                continue
            if not isinstance(given, Mapping):
                self.mistakes.append(f"arm {name}: 'set' expects 'field: value' lines, got {given!r}")
                continue
            merged |= {str(key): _as_setting(value) for key, value in given.items()}
        for field_of_study in ("seed", "from_scratch", "trainer_name"):
            if field_of_study in merged:
                self.mistakes.append(f"arm {name}: {field_of_study} can't be set; the study sets it")
        return tuple(sorted(merged.items()))

    def _configuration(self, name: str, given: Any) -> str:
        if given not in CONFIGURATIONS:
            self.mistakes.append(f"arm {name}: configuration {given!r}: expected one of {', '.join(CONFIGURATIONS)}")
        return str(given)

    def _spacing(self, name: str, merged: Mapping[str, Any]) -> tuple[str, tuple[float, float, float] | None]:
        mode = str(merged.get("spacing", "like_pretrained"))
        given = merged.get("spacing_mm")
        spacing: tuple[float, float, float] | None = None
        try:
            mode = canonical_mode(mode)
            if given is not None:
                z, y, x = (float(mm) for mm in given)
                spacing = (z, y, x)
            check_fixed(mode, spacing)
        except (TypeError, ValueError):
            self.mistakes.append(f"arm {name}: spacing_mm expects three numbers (Z, Y, X), got {given!r}")
        except NnsslAdaptError as error:
            self.mistakes.append(f"arm {name}: {error}")
        return mode, spacing

    # -- lists and how to evaluate --------------------------------------------------------------------------------------

    def _list(self, key: str, default: tuple[Any, ...] = ()) -> list[Any]:
        given = self.content.get(key, list(default))
        given = given if isinstance(given, (list, tuple)) else [given]
        if len({str(item) for item in given}) < len(given):
            self.mistakes.append(f"{key}: one stands twice in {given}")
        return list(given)

    def _whole_numbers(self, key: str) -> tuple[int, ...]:
        given = self._list(key, (0,))
        if not given or any(not isinstance(item, int) or isinstance(item, bool) or item < 0 for item in given):
            self.mistakes.append(f"{key}: expected whole numbers of 0 or more, got {given}")
        return tuple(given)

    def _fractions(self) -> tuple[float, ...]:
        given = self._list("fractions", (1.0,))
        numbers = [item for item in given if isinstance(item, (int, float)) and not isinstance(item, bool)]
        if not given or len(numbers) < len(given) or any(not 0 < number <= 1 for number in numbers):
            self.mistakes.append(f"fractions: expected numbers above 0 and at most 1, got {given}")
        return tuple(sorted(float(number) for number in numbers))

    def _metrics(self) -> tuple[str, ...]:
        by_lower = {name.lower(): name for name in COMPARABLE}
        given = self._list("metrics", ("Dice",))
        unknown = [str(item) for item in given if str(item).lower() not in by_lower]
        if unknown or not given:
            self.mistakes.append(
                f"metrics: no {', '.join(unknown) or 'metric'}: expected some of {', '.join(COMPARABLE)}"
            )
        return tuple(by_lower[str(item).lower()] for item in given if str(item).lower() in by_lower)

    def _judging(self, metrics: tuple[str, ...]) -> Judging | None:
        found = self.content.get("lesions")
        wanted = found is not None or any(metric in LESIONS for metric in metrics)
        lesions: LesionRule | None = None
        if wanted and not isinstance(found or {}, Mapping):
            self.mistakes.append(f"lesions: expected 'overlap: …' and so on, got {found!r}")
            return None
        names = {item.name for item in fields(LesionRule)}
        for key in found or {}:
            if key not in names:
                self.mistakes.append(f"lesions: unknown field {key!r}{did_you_mean(str(key), names)}")
        with_rule = {key: value for key, value in (found or {}).items() if key in names}
        if wanted:
            lesions = self._try(lambda: LesionRule(**with_rule), "lesions")
        how = {
            "tolerance": self.content.get("tolerance", 1.0),
            "empty": str(self.content.get("empty", "nan")),
            "surface": self.content.get("surface_dice", "voxels"),
        }
        return self._try(lambda: Judging(lesions=lesions, **how), "judging")

    def _try(self, make: Callable[[], Made], where: str) -> Made | None:
        """What ``make`` returns; None, and its mistakes noted, where it fails."""
        try:
            return make()
        except NnsslAdaptError as error:
            self.mistakes += [f"{where}: {mistake}" for mistake in error.mistakes or [str(error)]]
        except (TypeError, re.error) as error:
            self.mistakes.append(f"{where}: {error}")
        return None


def _without_name(arm: Arm) -> tuple[Any, ...]:
    return tuple(getattr(arm, item.name) for item in fields(Arm) if item.name != "name")


def _as_setting(value: Any) -> str:
    """A YAML value as ``--set field=value`` takes it."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={number}" for name, number in value.items())
    if isinstance(value, (list, tuple)):
        return ",".join(str(item) for item in value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
