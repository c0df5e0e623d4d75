"""Stage 1: the tests marked ``cuda``, each a row; and labels made on the device beside the CPU's, on a case of real size."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

from gpu_program.setting import Setting

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = "NNSSL_ADAPT_REHEARSE_CUDA"
"""Runs those tests on the CPU; see tests/conftest.py."""

SECONDS = 450
"""What the tests may take; the rest of the stage's time is for what comes after them."""


def run(setting: Setting) -> None:
    with setting.surviving("labels of a large case"):
        large_labels(setting)
    with setting.surviving("pytest -m cuda"):
        marked_tests(setting)


def marked_tests(setting: Setting) -> None:
    """``pytest -m cuda -n 0``, a row for each test; in a rehearsal on the CPU.

    Those in tests/cuda need little; the others are beside the code that they test, and need what their neighbours need.
    """
    files = [str(ROOT / "tests" / "cuda")]
    others = files_with_marked_tests()
    if importlib.util.find_spec("SimpleITK") is None:
        setting.write("pytest -m cuda, left out", len(others), "files, since SimpleITK is missing")
    else:
        files += others
    report = setting.folder / "cuda_tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-n", "0", "-p", "no:cacheprovider"]
    environment = {**os.environ, **({REHEARSAL: "1"} if setting.rehearse else {})}
    with (setting.folder / "cuda_tests.log").open("w") as log:
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}", *files],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
            )
            problem = None if done.returncode in (0, 1) else f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"took more than {SECONDS} s"
    if problem or not report.is_file():
        raise RuntimeError(f"{problem}: {last_words(setting.folder / 'cuda_tests.log')}")
    tell_tests(setting, report)


def files_with_marked_tests() -> list[str]:
    unit = ROOT / "tests" / "unit"
    return [
        str(path) for path in sorted(unit.rglob("test_*.py")) if "@pytest.mark.cuda" in path.read_text(encoding="utf-8")
    ]


def last_words(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])


def tell_tests(setting: Setting, report: Path) -> None:
    """A row for each test, and one for all."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    total = 0.0
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        wrong = next((each for each in case if each.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        end = "failed" if wrong is not None else "skipped" if skipped is not None else "passed"
        counts[end] += 1
        total += float(case.get("time") or 0)
        if wrong is not None:
            setting.write(name, "failed", error=" ".join((wrong.get("message") or "").split())[:300])
        elif skipped is not None:
            setting.write(name, "skipped", " ".join((skipped.get("message") or "").split())[:200])
        else:
            setting.write(name, float(case.get("time") or 0), "s, passed")
    text = ", ".join(f"{count} {end}" for end, count in counts.items() if count)
    right = counts["failed"] == 0 and counts["passed"] > 0
    setting.write("pytest -m cuda", text or "nothing ran", f"in {total:.0f} s", passed=right)


def large_labels(setting: Setting) -> None:
    """Labels made on the device are the CPU's, voxel by voxel, on the same grid and resampled."""
    from nnssl_adapt.geometry.logits import logits_to_labels
    from nnssl_adapt.geometry.logits_on_device import labels_on_device

    shape, classes = setting.choose(((96, 160, 176), 30), ((12, 14, 16), 5))
    logits = smooth_logits(shape, classes, setting.device)
    on_cpu = logits.cpu()
    one, thick = (1.0, 1.0, 1.0), (4.0, 1.0, 1.0)
    larger = tuple(n * 5 // 4 for n in shape)
    for name, size, spacing, new_spacing in (
        ("same grid", shape, one, one),
        ("resampled", larger, one, one),
        ("resampled, planes apart", (shape[0] // 2, *larger[1:]), thick, thick),
    ):
        found = labels_on_device(logits, size, spacing, new_spacing).cpu().numpy()
        share = float((found == logits_to_labels(on_cpu, size, spacing, new_spacing)).mean())
        setting.write(f"labels of a large case, {name}", share, "of the CPU's", passed=share == 1)


def smooth_logits(
    shape: tuple[int, ...], classes: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """About as many compact structures as classes, background around them; surfaces with a little noise. (K, Z, Y, X)."""
    random = torch.Generator().manual_seed(0)
    axes = [
        torch.linspace(-1, 1, n, device=device).reshape([-1 if a == i else 1 for a in range(3)])
        for i, n in enumerate(shape)
    ]
    radius = sum(((axis / 0.9) ** 2 for axis in axes), torch.zeros((), device=device))
    logits = torch.empty((classes, *shape), device=device, dtype=dtype)
    for number in range(classes):
        coarse = torch.randn((1, 1, 5, 5, 5), generator=random).to(device)
        field = 8 * torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0, 0]
        field += 40 * (radius - 1) if number == 0 else 0
        logits[number] = field.add_(torch.randn(shape, device=device), alpha=0.05)
    return logits
