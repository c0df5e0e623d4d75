"""What goes wrong in worker processes, for tests: they are sent to workers by name."""

import os
import signal
import time

from nnssl_adapt.errors import OutputError
from nnssl_adapt.inference.steps import export_in_worker


def export_or_die(steps, task, *arguments):
    """Export, but die in the middle of image ``b``."""
    if task.identifier == "b":
        (task.target.parent / f".unfinished-xyz-{task.target.name}").write_bytes(b"half a file")
        record, until = task.target.parent / "predicted.jsonl", time.monotonic() + 60
        while not (record.exists() and '"image": "a"' in record.read_text()):  # ``a``, beside it, is done
            assert time.monotonic() < until, "waited in vain"
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    export_in_worker(steps, task, *arguments)


def export_or_fill_the_disk(steps, task, *arguments):
    """Export, but find the disk full at image ``b``."""
    if task.identifier == "b":
        raise OutputError(f"no space left while writing {task.target}")
    export_in_worker(steps, task, *arguments)
