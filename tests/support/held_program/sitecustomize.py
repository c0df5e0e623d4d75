"""Python imports this by itself where it lies on PYTHONPATH: it holds a process at one place, once, for a test's sake.

``HOLD_AT`` is MODULE:FUNCTION or MODULE:CLASS.METHOD, ``HOLD_FOLDER`` where ``reached`` is written and ``go`` waited for, and
``HOLD_CALL`` the call (from 1) that is held. With ``HOLD_FAILS`` the call fails instead. A second round is not held.
"""

import importlib.abc
import importlib.util
import itertools
import os
import sys
import time
from pathlib import Path


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module, name):
        self.module, self.name = module, name

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            _patch(module, self.name)

        spec.loader.exec_module = execute_and_patch
        return spec


def _patch(module, name):
    *owners, last = name.split(".")
    owner = module
    for part in owners:
        owner = getattr(owner, part)
    original, folder, count = getattr(owner, last), Path(os.environ["HOLD_FOLDER"]), itertools.count(1)

    def held(*arguments, **options):
        if next(count) == int(os.environ.get("HOLD_CALL", "1")) and not (folder / "reached").exists():
            (folder / "reached").write_text(str(os.getpid()))
            if os.environ.get("HOLD_FAILS"):
                raise RuntimeError("fails as the test wants it to")
            while not (folder / "go").exists():
                time.sleep(0.05)
        return original(*arguments, **options)

    setattr(owner, last, held)


if os.environ.get("HOLD_AT"):
    sys.meta_path.insert(0, _Finder(*os.environ["HOLD_AT"].split(":")))
