"""Show what this installation would run on: versions, devices, folders, and which package owns which command.

With --gpu, test the GPU instead, in about two minutes: precisions, fused parts against their references, training steps,
bandwidths, /dev/shm, NCCL between the cards. The last line is "ready", or says what is wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from nnssl_adapt.cli.common import EXIT_FAILED, EXIT_OK, add_verbose

_PACKAGES = (
    "nnssl-adapt",
    "torch",
    "dynamic-network-architectures",
    "blosc2",
    "SimpleITK",
    "huggingface_hub",
    "numpy",
    "scipy",
    "nnunetv2",
)
_COMMANDS = (
    "nnUNetv2_preprocess_like_nnssl",
    "nnUNetv2_plan_like_dynamic",
    "nnUNetv2_train_pretrained",
    "nnssl-adapt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", action="store_true", help="test the GPU, about two minutes")
    parser.add_argument("-device", "--device", default="cuda", help="with --gpu: which, e.g. cuda:1 (default cuda)")
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.gpu:
        return _test_gpu(arguments.device)
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        print(f"  {package:32s} {_version(package)}")
    print("devices")
    for line in _devices():
        print(f"  {line}")
    problems = [*_show_folders(), *_show_commands()]
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print("no problems found")
    return EXIT_FAILED if problems else EXIT_OK


def _test_gpu(name: str) -> int:
    import torch

    from nnssl_adapt.machine.device import check_device
    from nnssl_adapt.training.self_test import self_test

    device = check_device(name)
    print(f"torch {torch.__version__}; testing {device}")
    result = self_test(device, lambda finding: print(finding, flush=True))
    print(result.verdict)
    return EXIT_OK if result.is_ready else EXIT_FAILED


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed" + (" (not needed)" if package == "nnunetv2" else "")


def _devices() -> list[str]:
    import torch

    lines = [f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.cuda.device_count() == 0:
        lines.append("cuda: none (train and predict with -device cpu)")
    if torch.backends.mps.is_available():
        lines.append("mps: available")
    return lines


def _show_folders() -> list[str]:
    print("folders")
    problems = []
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnssl_pretrained_models"):
        value = os.environ.get(variable)
        optional = variable == "nnssl_pretrained_models"
        if not value:
            print(f"  {variable:26s} not set" + (" (optional)" if optional else ""))
            if not optional:
                problems.append(f"{variable} is not set: export {variable}=/path/to/a/folder")
            continue
        folder = Path(value).expanduser()
        state = f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB free" if folder.is_dir() else "does not exist yet"
        print(f"  {variable:26s} {value} ({state})")
        if folder.is_dir() and variable in ("nnUNet_preprocessed", "nnUNet_results") and not os.access(folder, os.W_OK):
            problems.append(f"{variable}={value} is not writable")
        if variable == "nnUNet_raw" and not folder.is_dir():
            problems.append(f"nnUNet_raw={value} does not exist")
    return problems


def _show_commands() -> list[str]:
    print("commands")
    problems = []
    for command in _COMMANDS:
        scripts = entry_points(group="console_scripts", name=command)
        owners = sorted({script.dist.name for script in scripts if script.dist is not None})
        print(f"  {command:32s} {', '.join(owners) or 'nobody'} ({shutil.which(command) or 'not on the PATH'})")
        if len(owners) > 1:
            problems.append(f"{command} belongs to {' and '.join(owners)}: whichever was installed last wins")
    return problems
