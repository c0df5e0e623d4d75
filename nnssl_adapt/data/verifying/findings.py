"""What is said about a raw dataset: findings with a fix for each, and the verdict over all of them."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nnssl_adapt.errors import DatasetError
from nnssl_adapt.text import lines_and_more


@dataclass(frozen=True)
class Finding:
    """One row: an ``error`` prevents training, a ``warning`` may be intended; ``case`` is ``-`` for the whole dataset."""

    level: str
    case: str
    check: str
    message: str
    fix: str


@dataclass(frozen=True)
class Verdict:
    """What was found in the dataset at ``folder``, which has ``num_cases`` complete cases."""

    folder: Path
    num_cases: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What prevents training."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What may be intended."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    @property
    def is_good(self) -> bool:
        """No errors; warnings are allowed."""
        return not self.errors

    def raise_if_bad(self) -> None:
        """Raise DatasetError with the errors (the first twenty in its text, all as ``mistakes``) if there are any."""
        if self.is_good:
            return
        mistakes = [f"{finding.case}: {finding.message}" for finding in self.errors]
        bad = len({finding.case for finding in self.errors})
        raise DatasetError(
            f"{self.folder.name}: {bad} of {self.num_cases} cases can't be used, correct or remove them:\n"
            + lines_and_more(mistakes),
            path=self.folder,
            mistakes=mistakes,
            next_command=f"nnssl-adapt verify -d {self.folder.name}",
        )

    def __str__(self) -> str:
        counts = Counter(finding.level for finding in self.findings)
        title = (
            f"{self.folder.name}: {self.num_cases} cases, {counts['error']} error(s), {counts['warning']} warning(s)"
        )
        rows = [f"{f.level:<8}{f.case}  [{f.check}] {f.message}\n{'':8}fix: {f.fix}" for f in self.findings]
        return "\n".join([title, *rows])

    def to_csv(self) -> str:
        """The table, with a header line."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("level", "case", "check", "message", "fix"))
        writer.writerows((f.level, f.case, f.check, f.message, f.fix) for f in self.findings)
        return text.getvalue()
