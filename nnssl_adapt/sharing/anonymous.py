"""What a published file must not say: folders of a machine, its name, and who was scanned."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from nnssl_adapt.inference.model_folder import ModelFolder

CASE = "case"
"""Stands for the name of a case."""

_POSIX = re.compile(r"(?<![\w:/.~<])~?(?:/[\w.+@=,%#-]+){2,}/?")
_WINDOWS = re.compile(r"(?<!\w)[A-Za-z]:\\[^\s\"'<>|]+|\\\\[\w.-]+\\[^\s\"'<>|]+")
_WHOLE_PATH = re.compile(r"(?:~?/|file://|[A-Za-z]:[\\/]|\\\\)[^\n]*")
_PRIVATE_KEYS = ("hostname", "host", "user", "username", "process", "git")
_ABOUT_CASES = re.compile(r"predicting|validating|segmenting|case|subject", re.IGNORECASE)
_CASE_KEYS = ("training_cases", "validation_cases", "cases", "case", "identifiers", "subjects")


@dataclass(frozen=True)
class Cleaner:
    """Takes paths and case names out of texts and JSON content.

    Attributes:
        case_names: names of training and validation cases, and of the files they are from.
        folders: of this machine, longest first; they may have blanks, which no rule would tell.
    """

    case_names: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    @classmethod
    def of_model(cls, model: ModelFolder, more_names: Iterable[str] = ()) -> Cleaner:
        """Knows the case names that the model folder itself tells, and ``more_names``."""
        names = set(more_names)
        for folder in (path for path in model.path.glob("fold_*") if path.is_dir()):
            names |= set(_cases_in(_read_json(folder / "debug.json")))
            names |= {_stem(path.name) for path in (folder / "validation").glob("*") if path.is_file()} - {"summary"}
            names |= set(_cases_in_summary(_read_json(folder / "validation" / "summary.json")))
        listed = model.dataset_json.get("dataset")
        names |= set(listed) if isinstance(listed, Mapping) else set()
        ours = {*model.channel_names, *model.labels.class_names, model.plan.dataset_name, model.plan.plans_name}
        names = {name for name in names - ours if len(name) >= (3 if name.isdigit() else 2)}
        folders = {str(model.path.absolute().parent), str(Path.home())}
        folders |= {value for key, value in os.environ.items() if key.startswith("nnUNet_") and "/" in value}
        return cls(_longest_first(names), _longest_first(folder.rstrip("/") for folder in folders if len(folder) > 2))

    def text(self, text: str) -> str:
        """Text without paths (their last part is kept) and case names (which become "case")."""
        for folder in self.folders:
            text = text.replace(f"{folder}/", "").replace(folder, PurePosixPath(folder).name)
        text = _POSIX.sub(lambda match: PurePosixPath(match[0]).name, text)
        text = _WINDOWS.sub(lambda match: PureWindowsPath(match[0]).name, text)
        return "\n".join(self._line(line) for line in text.split("\n"))

    def _line(self, line: str) -> str:
        for name in self.case_names:
            if name in line and (_is_distinct(name) or _ABOUT_CASES.search(line)):
                line = re.sub(_as_word(name), CASE, line)
        return line

    def json(self, content: Any, keep_keys: bool = False) -> Any:
        """A copy of JSON content; lists of cases become their number, keys about the machine vanish.

        ``keep_keys``: only texts are looked at, as for plans, where every key means something.
        """
        if isinstance(content, Mapping) and keep_keys:
            return {key: self.json(value, keep_keys) for key, value in content.items()}
        if isinstance(content, Mapping):
            cleaned: dict[str, Any] = {}
            for key, value in content.items():
                if str(key).lower() in _PRIVATE_KEYS:
                    continue
                if str(key).lower() in _CASE_KEYS and isinstance(value, (list, tuple)):
                    cleaned[f"number_of_{key}"] = len(value)
                elif str(key).lower() in _CASE_KEYS and isinstance(value, str):
                    cleaned[key] = CASE
                else:
                    is_case = key in self.case_names and any(letter.isdigit() for letter in key)
                    cleaned[CASE if is_case else key] = self.json(value)
            return cleaned
        if isinstance(content, (list, tuple)):
            return [self.json(value, keep_keys) for value in content]
        if isinstance(content, str):
            if _WHOLE_PATH.fullmatch(content):
                return self.text(PureWindowsPath(content.rstrip("/\\")).name)
            return self.text(content)
        return content

    def leaks_in(self, text: str) -> list[str]:
        """What of this machine and of the cases is still said; for the last look before publishing."""
        found = [folder for folder in self.folders if folder in text]
        names = [name for name in self.case_names if _is_distinct(name)]
        return found + [name for name in names if re.search(_as_word(name), text)]


def _is_distinct(name: str) -> bool:
    """Whether it can be nothing but a name; a word (``smith``) or number is one only in a line about cases."""
    return len(name) >= 3 and not name.isdigit() and any(letter.isdigit() for letter in name)


def _as_word(name: str) -> str:
    """Pattern for a name that stands alone, or before a channel's number (``sub-01_0000``)."""
    return rf"(?<![\w.]){re.escape(name)}(?!(?!_\d{{4}}(?!\w))\w)"


def _longest_first(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted((name for name in names if name), key=lambda name: (-len(name), name)))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _stem(name: str) -> str:
    for ending in (".nii.gz", ".npz", ".pkl", ".json"):
        name = name.removesuffix(ending)
    return name.partition(".")[0]


def _cases_in(content: Any) -> Iterable[str]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            if str(key).lower() in _CASE_KEYS and isinstance(value, list):
                yield from (name for name in value if isinstance(name, str))
            else:
                yield from _cases_in(value)


def _cases_in_summary(content: Any) -> Iterable[str]:
    cases = content.get("metric_per_case") if isinstance(content, Mapping) else None
    for case in cases if isinstance(cases, list) else ():
        if isinstance(case, Mapping) and isinstance(case.get("reference_file"), str):
            yield _stem(PurePosixPath(case["reference_file"]).name)
