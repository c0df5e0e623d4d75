"""docs/cluster.md and the containers' files: their commands exist, their scripts are bash, their Python fits the package."""

import argparse
import ast
import json
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
    assert len(blocks("bash")) == 9
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


def dockerfile():
    """Instructions and their arguments, lines that go on put together."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def apptainer():
    """The header as a dictionary, and the sections' lines, as apptainer's manual describes a definition file."""
    header, sections, lines = {}, {}, None
    for line in (ROOT / "apptainer.def").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.strip().startswith("#"):
            continue
        if line.startswith("%"):
            lines = sections.setdefault(line[1:].strip(), [])
        elif lines is None:
            key, _, value = line.partition(":")
            header[key.strip()] = value.strip()
        else:
            assert line.startswith("    "), line
            lines.append(line.strip())
    return header, sections


SECTIONS = {"arguments", "setup", "files", "environment", "post", "runscript", "startscript", "test", "labels", "help"}
INSTRUCTIONS = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "VOLUME", "USER", "ENTRYPOINT", "CMD"}


def test_the_dockerfile_is_one():
    steps = dockerfile()
    assert steps[0][0] == "FROM" and {name for name, _ in steps} == INSTRUCTIONS
    for name, words in steps:
        if name == "RUN":
            subprocess.run(["bash", "-n"], input=words, text=True, check=True)
        elif name in ("ENTRYPOINT", "CMD", "VOLUME"):
            assert all(isinstance(word, str) for word in json.loads(words)), name
        elif name == "COPY":
            assert (ROOT / words.split()[0]).exists(), words
    (user,) = [words for name, words in steps if name == "USER"]
    assert user not in ("0", "root")
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ".git" in ignored and not {"configs", "nnssl_adapt", "pyproject.toml", "README.md", "LICENSE"} & set(ignored)


def test_the_apptainer_definition_is_one():
    header, sections = apptainer()
    assert header == {"Bootstrap": "docker", "From": dict(dockerfile())["FROM"]}
    assert set(sections) <= SECTIONS and {"files", "post", "environment", "runscript"} <= set(sections)
    for name in ("post", "environment", "runscript"):
        subprocess.run(["bash", "-n"], input="\n".join(sections[name]), text=True, check=True)
    arguments = {line.partition("=")[0] for line in sections["arguments"]}
    assert set(re.findall(r"{{\s*(\w+)\s*}}", "\n".join(sections["post"]))) == arguments
    for line in sections["files"]:
        source, target = line.split()
        assert (ROOT / source).exists() and any(target in command for command in sections["post"])
    assert sections["runscript"] == ['exec nnssl-adapt "$@"']


def test_containers_install_what_the_project_needs():
    torch = re.search(r'"(torch[^"]*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    for name in ("Dockerfile", "apptainer.def"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert f'"{torch}"' in text and "TORCH_INDEX" in text, name
        folders = set(re.findall(r"nnUNet_(raw|preprocessed|results)=/nnUNet_", text))
        assert folders == {"raw", "preprocessed", "results"}, name
