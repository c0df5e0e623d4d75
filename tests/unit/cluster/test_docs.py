"""docs/cluster.md and the containers' files: their commands exist, their scripts are bash, their Python fits the package."""

import argparse
import ast
import re
import shlex
import subprocess
from pathlib import Path

import nnssl_adapt as na
from nnssl_adapt.cli import train
from nnssl_adapt.cli.main import build_parser

ROOT = Path(na.__file__).parents[1]
TEXT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def blocks(language):
    return [block.split("```")[0] for block in TEXT.split(f"```{language}\n")[1:]]


def test_scripts_are_bash():
    assert len(blocks("bash")) == 8
    for script in blocks("bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_commands_exist():
    alone, seen = argparse.ArgumentParser(), []
    train.add_arguments(alone)
    for line in "".join(blocks("bash")).replace("$SLURM_ARRAY_TASK_ID", "0").splitlines():
        words = shlex.split(line, comments=True)
        if "nnssl-adapt.sif" in words and words[0] == "srun":
            words = ["nnssl-adapt", *words[words.index("nnssl-adapt.sif") + 1 :]]
        if words[:1] == ["nnssl-adapt"]:
            build_parser().parse_args(words[1:])
            seen.append(words[1])
        elif "nnUNetv2_train_pretrained" in words:
            alone.parse_args(words[words.index("nnUNetv2_train_pretrained") + 1 :])
            seen.append("nnUNetv2_train_pretrained")
    assert {"submit", "fetch", "train", "nnUNetv2_train_pretrained"} == set(seen)


def test_python_fits():
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "na":
                assert hasattr(na, node.attr), node.attr


def test_containers_install_what_the_project_needs():
    torch = re.search(r'"(torch[^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    for name in ("Dockerfile", "apptainer.def"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert f'"{torch}"' in text and "TORCH_INDEX" in text, name
        folders = set(re.findall(r"nnUNet_(raw|preprocessed|results)=/nnUNet_", text))
        assert folders == {"raw", "preprocessed", "results"}, name
