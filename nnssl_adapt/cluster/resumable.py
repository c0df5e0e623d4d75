"""For people who submit with submitit: a training that saves when its job is interrupted, and is queued again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nnssl_adapt.errors import ConfigurationError, TrainingStopped


@dataclass
class Resumable:
    """What to give submitit's ``executor.submit`` instead of a function that trains.

    submitit announces the end of a job by a signal, asks the function for a :meth:`checkpoint`, and queues again what it
    returns. It does so in the middle of a step, where there is nothing whole to save. Here the training notes the signal,
    finishes its step and saves; only then submitit has its turn. The same for a preemption's SIGTERM, which submitit ignores.

    Attributes:
        train: a function without arguments that trains with ``resume="auto"``: ``lambda: trainer.run(resume="auto").path``.
    """

    train: Callable[[], Any]

    def __call__(self) -> Any:
        """Train. Raises what ``train`` raises; a stop does not come back, where submitit queues the job again."""
        try:
            return self.train()
        except TrainingStopped:
            number = getattr(
                signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2').removeprefix('SIG')}", None
            )
            handler = None if number is None else signal.getsignal(number)
            if number is not None and callable(handler):  # submitit's own: it asks for the checkpoint and queues again
                signal.raise_signal(number)
            raise

    def checkpoint(self) -> Any:
        """What submitit queues again: the same, which goes on from what was saved. Raises ConfigurationError without submitit."""
        try:
            from submitit.helpers import DelayedSubmission
        except ImportError:
            raise ConfigurationError(
                "checkpoint() is for submitit, which is not installed: pip install submitit"
            ) from None
        return DelayedSubmission(self)
