"""Until when a run has: a time limit of its own, and the end of the Slurm job it runs in."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from nnssl_adapt.errors import ConfigurationError

logger = logging.getLogger(__name__)

_SLURM_ANSWERS = 15.0
"""Seconds that squeue is waited for: a controller that is busy must not keep a run from starting."""

_NO_LIMIT = ("none", "unlimited", "infinite", "-1")

_FORMS = (  # Slurm's, as its --time takes them; see the manual page of sbatch
    re.compile(r"(?P<minutes>\d+(\.\d+)?)"),
    re.compile(r"(?P<minutes>\d+):(?P<seconds>[0-5]?\d)"),
    re.compile(r"(?P<hours>\d+):(?P<minutes>[0-5]?\d):(?P<seconds>[0-5]?\d)"),
    re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>[0-5]?\d)(:(?P<seconds>[0-5]?\d))?)?"),
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


@dataclass(frozen=True)
class Deadline:
    """When a run has to be over.

    Attributes:
        at: seconds since 1970.
        reason: what sets it, in the words that the user is told.
    """

    at: float
    reason: str


def is_unlimited(text: str) -> bool:
    """Whether a time limit says that there is none: ``none``, or Slurm's ``UNLIMITED``, ``INFINITE`` and ``-1``."""
    return text.strip().lower() in _NO_LIMIT


def read_time_limit(text: str, flag: str = "--time-limit") -> float:
    """Return the seconds that a time stands for, in any of the forms of Slurm's ``--time``.

    ``90`` (minutes, also ``1.5``), ``19:52`` (minutes:seconds), ``23:30:00``, ``1-12`` (days-hours), ``1-12:30`` and
    ``1-12:30:00``. Raises ConfigurationError, which names ``flag``, for anything else, and for no time.
    """
    match = next((found for form in _FORMS if (found := form.fullmatch(text.strip()))), None)
    seconds = sum(_SECONDS[unit] * float(number or 0) for unit, number in match.groupdict().items()) if match else 0.0
    if seconds <= 0:
        raise ConfigurationError(
            f"{flag} {text}: expected minutes above 0 (90), minutes:seconds (19:52), hours:minutes:seconds (23:30:00), "
            "days-hours (1-12), days-hours:minutes:seconds (1-12:30:00), or none"
        )
    return seconds


def find_deadline(
    time_limit: str | None = None,
    started: float | None = None,
    environment: Mapping[str, str] | None = None,
    ask_slurm: Callable[[str], float | None] | None = None,
) -> Deadline | None:
    """The earliest end that is known: ``time_limit`` from ``started`` on, and the end of the Slurm job this runs in.

    Args:
        time_limit: in a form of :func:`read_time_limit`; ``none``: no end, not even Slurm's; None: Slurm's, if any.
        started: seconds since 1970; None: now.
        environment: where Slurm's variables are looked for; None: this process's. ``SLURM_JOB_END_TIME`` (seconds since 1970)
            is set by Slurm 23.02 and newer.
        ask_slurm: gives the end of a job by its number where the environment does not have it; None: :func:`end_of_job`.
    """
    if time_limit is not None and is_unlimited(time_limit):
        return None
    environment = os.environ if environment is None else environment
    now = time.time() if started is None else started
    deadlines = []
    if time_limit is not None:
        deadlines.append(Deadline(now + read_time_limit(time_limit), f"the time limit of {time_limit}"))
    end = _end_in(environment, now)
    if end is None and (job := environment.get("SLURM_JOB_ID")):
        end = (ask_slurm or end_of_job)(job)
    if end is not None and end > now:
        deadlines.append(Deadline(end, "the end of the Slurm job"))
    return min(deadlines, key=lambda deadline: deadline.at, default=None)


def _end_in(environment: Mapping[str, str], now: float) -> float | None:
    """The end that the environment has; one in the past belongs to a job that was extended, or to another."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    if not text.isdigit():
        return None
    if int(text) > now:
        return float(text)
    logger.warning("SLURM_JOB_END_TIME is in the past and is ignored")
    return None


def end_of_job(job: str) -> float | None:
    """When a Slurm job ends (seconds since 1970), by ``squeue``; None where it has no end, or Slurm does not answer."""
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%e"]
    environment = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SLURM_ANSWERS, env=environment)
        return datetime.fromisoformat(answer.stdout.split()[0]).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        logger.debug("squeue does not say when job %s ends: %s", job, error)
        return None
