"""Files that are damaged, hostile or something else: each gives one clear line, and nothing in them is run."""

import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nnssl_adapt.errors import CheckpointError, UnreadableCheckpoint, UnsafeCheckpoint
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.checkpoint.state_dict import strip_wrappers, tensors_of, unwrap
from nnssl_adapt.weights.checkpoint.weight_file import read_weight_file


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "checkpoint_final.pth"
    torch.save({"network_weights": {"a.weight": torch.arange(600.0).reshape(10, 20, 3)}}, path)
    return path


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoints_are_unreadable(good, tmp_path, fraction):
    content = good.read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[: max(1, int(fraction * len(content)))])
    with pytest.raises(UnreadableCheckpoint, match=r"cut\.pth") as caught:
        read_weight_file(path)
    one_line(caught)


@given(content=st.binary(min_size=1, max_size=300))
@settings(max_examples=60, deadline=None)
def test_random_bytes_are_refused_and_never_crash(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        tensors_of(read_weight_file(path), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Not logged in</html>", "web page"),
        (b"PK\x03\x04 not a zip at all", "truncated or not a PyTorch checkpoint"),
    ],
)
def test_what_is_often_mistaken_for_a_checkpoint_is_recognised(tmp_path, content, message):
    path = tmp_path / "checkpoint_final.pth"
    path.write_bytes(content)
    with pytest.raises(UnreadableCheckpoint, match=message) as caught:
        read_weight_file(path)
    one_line(caught)


class RunsACommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_needs_code_is_refused_by_name_and_not_run(tmp_path, write):
    marker = tmp_path / "was_here"
    path = tmp_path / "evil.pth"
    write({"network_weights": {"a": torch.zeros(2)}, "extra": RunsACommand(f"touch {marker}")}, path)
    with pytest.raises(UnsafeCheckpoint, match=r"(posix|nt)\.system.*nothing was run") as caught:
        read_weight_file(path)
    one_line(caught)
    assert not marker.exists()


def test_a_torchscript_program_is_refused_as_one(tmp_path):
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Conv3d(1, 2, 1)), path)
    with pytest.raises(UnsafeCheckpoint, match="TorchScript program") as caught:
        read_weight_file(path)
    one_line(caught)


def test_numbers_that_trainers_log_are_read(tmp_path):
    path = tmp_path / "logged.pth"
    logging = {"losses": [np.float64(0.5), np.float32(0.25)], "epoch": np.int64(3)}
    torch.save({"network_weights": {"a": torch.zeros(2)}, "logging": logging, "device": torch.device("cpu")}, path)
    assert read_weight_file(path)["logging"] == logging


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_numbers_are_read_wherever_the_numpy_that_wrote_them_kept_its_function(tmp_path, module):
    """NumPy 2 moved it; published checkpoints are older and newer than that."""
    path = tmp_path / "logged.pth"
    content = {"network_weights": {"a": torch.zeros(2)}, "_best_ema": np.float32(0.25)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    written = np.float32(0).__reduce__()[0].__module__
    path.write_bytes(path.read_bytes().replace(written.encode(), module.encode()))
    assert module.encode() in path.read_bytes()
    assert read_weight_file(path)["_best_ema"] == np.float32(0.25)


def test_a_numpy_scalar_is_a_plain_number_or_refused(tmp_path):
    path = tmp_path / "void.pth"
    torch.save({"network_weights": {"a": torch.zeros(2)}, "x": np.zeros(1, "V8")[0]}, path)
    with pytest.raises(CheckpointError, match="void.pth"):
        read_weight_file(path)


def test_tensors_saved_on_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    path = tmp_path / "cuda.pth"
    with monkeypatch.context() as saving:
        saving.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"network_weights": {"a": torch.ones(2, 3)}}, path)
    assert b"cuda:0" in path.read_bytes()
    assert read_weight_file(path)["network_weights"]["a"].device.type == "cpu"


def test_the_format_before_zip_is_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"network_weights": {"a": torch.ones(2, 3)}}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_weight_file(path)["network_weights"]["a"], torch.ones(2, 3))


def test_truncated_safetensors_are_unreadable(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10, 20)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnreadableCheckpoint, match=r"model\.safetensors") as caught:
        read_weight_file(path)
    one_line(caught)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"weights": {"a": torch.zeros(2)}}, "has no 'network_weights' .it holds 'weights'"),
        ({}, "holds nothing"),
        ({"network_weights": {}}, "is empty"),
        ({"network_weights": [torch.zeros(2)]}, "is a list"),
        ({"network_weights": {"a": torch.zeros(2), "b": 3}}, "has a int under 'b'"),
        ({"network_weights": {"a": torch.zeros(2), 7: torch.zeros(2)}}, "has the key 7"),
    ],
)
def test_what_is_not_a_state_dict_is_named(tmp_path, content, message):
    path = tmp_path / "wrong.pth"
    torch.save(content, path)
    with pytest.raises(UnreadableCheckpoint, match=message) as caught:
        tensors_of(read_weight_file(path), path)
    assert str(path) in one_line(caught)


def test_a_bare_state_dict_is_one(tmp_path):
    path = tmp_path / "bare.pth"
    torch.save({"a.weight": torch.ones(3)}, path)
    assert list(tensors_of(read_weight_file(path), path)) == ["a.weight"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.encoder.stem", "encoder.stem"),
        ("_orig_mod.encoder.stem", "encoder.stem"),
        ("module._orig_mod.encoder.stem", "encoder.stem"),
        ("_orig_mod.module.encoder.stem", "encoder.stem"),
        ("encoder._orig_mod.stem", "encoder.stem"),
        ("encoder.module.stem", "encoder.module.stem"),
        ("modules.encoder", "modules.encoder"),
        ("module.module.encoder", "encoder"),
    ],
)
def test_prefixes_of_wrappers_are_stripped(tmp_path, name, expected):
    assert list(strip_wrappers({name: torch.zeros(1)}, tmp_path)) == [expected]


def test_a_leading_module_that_only_some_have_is_a_name():
    names = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert list(strip_wrappers(names, None)) == ["module.a", "b"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net.encoder.stem", "encoder.stem"),
        ("model.net.encoder.stem", "encoder.stem"),
        ("module.network.module.encoder.stem", "encoder.stem"),
        ("net._orig_mod.eva.pos_embed", "eva.pos_embed"),
        ("nets.encoder.stem", "nets.encoder.stem"),
        ("my.encoder.stem", "my.encoder.stem"),
        ("encoder.net.stem", "encoder.net.stem"),
    ],
)
def test_the_networks_name_in_a_lightning_module_is_stripped(tmp_path, name, expected):
    tensors = {name: torch.zeros(1), "loss.weight": torch.ones(1)}
    if "module" in name:
        tensors = {key if key.startswith("module.") else f"module.{key}": value for key, value in tensors.items()}
    stripped, notes = unwrap(tensors, tmp_path, lightning=True)
    assert list(stripped) == [expected, "loss.weight"]
    assert bool(notes) == (name != expected)
    kept, _ = unwrap({"net.encoder.stem": torch.zeros(1)}, tmp_path, lightning=False)
    assert list(kept) == ["net.encoder.stem"]


def test_two_names_that_become_one_are_refused(tmp_path):
    with pytest.raises(UnreadableCheckpoint, match="with and without"):
        strip_wrappers({"_orig_mod.a": torch.zeros(1), "a": torch.ones(1)}, tmp_path)


def test_bytes_that_changed_inside_a_file_are_found_by_its_checksums(tmp_path):
    """torch reads them without a word: nothing else in the file tells."""
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {"a": torch.arange(1000.0)}}, path)
    content = bytearray(path.read_bytes())
    place = content.index(torch.arange(1000.0).numpy().tobytes()) + 2000
    content[place] ^= 1
    path.write_bytes(content)
    assert read_weight_file(path)
    with pytest.raises(UnreadableCheckpoint, match="checksum") as caught:
        open_checkpoint(path)
    assert caught.value.path == path
