"""The progress bar that everything here draws."""

from __future__ import annotations

import threading

from tqdm import tqdm


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """tqdm with a lock of this process only.

    tqdm's own is shared with forked children. One that is killed while it holds it would stop its parent for ever.
    """

    _lock = threading.RLock()
