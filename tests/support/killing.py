"""Work in child processes, and killing it at a moment of one's own choice."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable


def forked(work: Callable[[], object]) -> int:
    """Do ``work`` in a child process and return its id; it exits with 1 if that fails."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed_while(work: Callable[[], object], after: float) -> bool:
    """Do ``work`` in a child process that is killed ``after`` so many seconds; whether that was before its end."""
    child = forked(work)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed, and not because it was killed"
    return os.WIFSIGNALED(status)
