"""Damaged, hostile and mistaken weight files: each opens or gives one clear line; none runs, hangs or takes gigabytes."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.nnssl_files import PLAINCONV, plan

from nnssl_adapt.errors import CheckpointError, NnsslAdaptError, UnreadableCheckpoint, UnsafeCheckpoint
from nnssl_adapt.weights.checkpoint.checkpoint import read_checkpoint
from nnssl_adapt.weights.network.architectures import Architecture, build_network
from nnssl_adapt.weights.sources.resolved import Origin, ResolvedSource

TINY = {**PLAINCONV, "n_stages": 2, "features_per_stage": [2, 3], "n_conv_per_stage": [1, 1]}
TINY |= {"n_conv_per_stage_decoder": [1], "kernel_sizes": [[1, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2]]}


def tiny_plan():
    content = plan("PlainConvUNet", patch=(4, 6, 8))
    content["architecture_plans"]["arch_kwargs"] = TINY
    return content


def tiny_tensors():
    return dict(build_network(Architecture("PlainConvUNet", TINY), 1, 2, (4, 6, 8)).state_dict())


def opened(path):
    """The file itself read as a checkpoint, without the search that would take a zip for an archive of several."""
    origin = Origin(str(path), "file", None, None, path.name, "0" * 64)
    return read_checkpoint(ResolvedSource(path, None, origin))


def one_line(error):
    text = str(error)
    assert text and "\n" not in text, text
    assert len(text) < 700, text
    return text


@pytest.fixture(scope="module")
def good_pth(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "checkpoint_final.pth"
    torch.save({"network_weights": tiny_tensors(), "nnssl_adaptation_plan": tiny_plan(), "epoch": np.float64(3)}, path)
    opened(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def good_legacy(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "checkpoint_final.pth"
    content = {"network_weights": tiny_tensors(), "nnssl_adaptation_plan": tiny_plan()}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    opened(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def good_safetensors(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in tiny_tensors().items() if "all_modules" in name}
    save_file(tensors, path, metadata={"nnssl_adaptation_plan": json.dumps(tiny_plan())})
    opened(path)
    return path.read_bytes()


@pytest.fixture
def little_memory():
    """Much more address space than the test has now ends in MemoryError, whatever the file claims."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1_500_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# -- damaged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pth", "legacy", "safetensors"])
@pytest.mark.parametrize("twentieth", range(20))
def test_a_file_cut_off_at_any_twentieth_is_refused(request, tmp_path, kind, twentieth):
    content = request.getfixturevalue(f"good_{kind}")
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    path.write_bytes(content[: len(content) * twentieth // 20])
    with pytest.raises(UnreadableCheckpoint, match=r"cut\.") as caught:
        opened(path)
    one_line(caught.value)


def mutated(content, randomness):
    """The content with a few bytes flipped, a piece overwritten, taken out or put in twice."""
    content = bytearray(content)
    for _ in range(randomness.choice([1, 1, 3, 20])):
        # The beginning and the end have the structure, the middle mostly numbers.
        place = randomness.choice([randomness.randrange(len(content)), randomness.randrange(min(3000, len(content)))])
        kind = randomness.randrange(5)
        if kind <= 1:
            content[place] = randomness.randrange(256)
        elif kind == 2:
            content[-1 - place] ^= 1 << randomness.randrange(8)
        elif kind == 3:
            del content[place : place + randomness.randrange(40)]
        else:
            content[place:place] = content[place : place + randomness.randrange(40)]
    return bytes(content)


@pytest.mark.parametrize(("kind", "times"), [("pth", 150), ("legacy", 150), ("safetensors", 150)])
def test_any_damage_gives_a_checkpoint_or_one_of_our_errors(request, tmp_path, kind, times, little_memory):
    content = request.getfixturevalue(f"good_{kind}")
    path = tmp_path / ("fuzz.safetensors" if kind == "safetensors" else "fuzz.pth")
    randomness = random.Random(f"{kind} 2026")
    refused = 0
    for _ in range(times):
        path.write_bytes(mutated(content, randomness))
        try:
            checkpoint = opened(path)
        except NnsslAdaptError as error:
            one_line(error)
            refused += 1
        else:
            assert all(isinstance(name, str) for name in checkpoint.tensors)
    assert refused > times // 5


@pytest.mark.parametrize("seed", range(60))
def test_random_bytes_behind_a_known_beginning_are_refused(tmp_path, seed, little_memory):
    randomness = random.Random(seed)
    beginning = randomness.choice(
        [b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b""]
    )
    path = tmp_path / "random.pth"
    path.write_bytes(beginning + randomness.randbytes(randomness.randrange(1, 400)))
    with pytest.raises(CheckpointError) as caught:
        opened(path)
    one_line(caught.value)


# -- hostile ---------------------------------------------------------------------------------------------------------


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("where", ["optimizer_state", "network_weights"])
def test_code_is_named_and_not_run_wherever_it_stands(tmp_path, protocol, where):
    marker = tmp_path / "was_here"
    content = {"network_weights": {"a": 1}, where: Runs(os.system, f"touch {marker}")}
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(UnsafeCheckpoint, match=r"(posix|nt)\.system.*nothing was run") as caught:
        opened(path)
    one_line(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("gadget", "named"),
    [
        (Runs(eval, "1/0"), "eval"),
        (Runs(print, "run"), "print"),
        (Path("checkpoint"), "pathlib"),
        (np.arange(3), "numpy"),
        (OrderedDict(a=Runs(exec, "raise SystemExit")), "exec"),
    ],
)
def test_objects_in_a_torch_file_are_refused_by_name(tmp_path, gadget, named):
    path = tmp_path / "objects.pth"
    torch.save({"network_weights": tiny_tensors(), "extra": gadget}, path)
    with pytest.raises(UnsafeCheckpoint, match=named) as caught:
        opened(path)
    one_line(caught.value)


def rewritten(content, change):
    """A torch file with its members changed by ``change(name, bytes) -> [(name, bytes, zipfile arguments)]``."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            for changed, data, arguments in change(name, old.read(name)):
                new.writestr(changed, data, **arguments)
    return result.getvalue()


def patched_claim(content, claim):
    """The central directory's uncompressed size of the first member under ``data/`` changed to a claim."""
    content = bytearray(content)
    place = content.find(b"PK\x01\x02")
    while place >= 0:
        length = struct.unpack_from("<H", content, place + 28)[0]
        if b"/data/" in content[place + 46 : place + 46 + length]:
            struct.pack_into("<II", content, place + 20, claim, claim)
            return bytes(content)
        place = content.find(b"PK\x01\x02", place + 4)
    raise AssertionError


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, data: [(name, data, {})] * (2 if name.endswith("/data/0") else 1), "twice"),
        (lambda name, data: [(name, data, {"compress_type": zipfile.ZIP_DEFLATED})], "compressed|claims to hold"),
        (lambda name, data: [] if name.endswith("data.pkl") else [(name, data, {})], "truncated or not a PyTorch"),
        (lambda name, data: [(name, data.replace(b"torch\nFloatStorage", b"torch\nStorageFloat"), {})], "StorageFloat"),
    ],
)
def test_zips_that_torch_never_writes_are_refused(tmp_path, good_pth, change, message):
    path = tmp_path / "changed.pth"
    path.write_bytes(rewritten(good_pth, change))
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(path)
    one_line(caught.value)


def test_a_member_that_claims_gigabytes_is_refused(tmp_path, good_pth, little_memory):
    path = tmp_path / "claim.pth"
    path.write_bytes(patched_claim(good_pth, 0xFFFFFFF0))
    with pytest.raises(UnreadableCheckpoint, match="claims to hold 4,29") as caught:
        opened(path)
    one_line(caught.value)


def test_a_tensor_that_claims_more_than_the_file_is_refused(tmp_path, little_memory):
    path = tmp_path / "claim.pth"
    torch.save({"network_weights": {"a": torch.zeros(1).expand(2_500_000_000)}}, path)
    with pytest.raises(UnreadableCheckpoint, match="'a' claims 10,000,000,000 bytes") as caught:
        opened(path)
    one_line(caught.value)


def test_a_storage_that_claims_its_neighbours_bytes_is_refused(tmp_path):
    path = tmp_path / "overlap.pth"
    torch.save({"network_weights": {"a": torch.zeros(200), "b": torch.ones(200)}}, path)
    # 200 numbers of the first storage become 220, so that it reaches into what follows; its shape fits nothing else.
    longer = rewritten(
        path.read_bytes(),
        lambda name, data: [(name, data.replace(b"K\xc8tq", b"K\xfatq", 1) if name.endswith(".pkl") else data, {})],
    )
    assert longer != path.read_bytes()
    path.write_bytes(longer)
    with pytest.raises(UnreadableCheckpoint, match="claim the same bytes|truncated") as caught:
        opened(path)
    one_line(caught.value)


def pickled(*pieces):
    return b"\x80\x02" + b"".join(pieces) + b"."


@pytest.mark.parametrize(
    "code",
    [
        pickled(b"c__builtin__\nbytearray\n", b"\x8a\x05\x00\x00\x00\x00\x05", b"\x85R"),
        pickled(b"cbuiltins\nbytearray\n", b"\x8a\x05\x00\x00\x00\x00\x05", b"\x85R"),
        pickled(b"cnumpy.core.multiarray\nscalar\n", b"cnumpy\ndtype\nX\x0b\x00\x00\x00V2000000000\x85R", b"\x85R"),
        pickled(b"X\xff\xff\xff\x7fabc"),
    ],
)
def test_pickles_that_ask_for_gigabytes_are_refused(tmp_path, good_pth, code, little_memory):
    path = tmp_path / "bomb.pth"
    path.write_bytes(rewritten(good_pth, lambda name, data: [(name, code if name.endswith("data.pkl") else data, {})]))
    with pytest.raises(CheckpointError, match=r"bomb\.pth") as caught:
        opened(path)
    one_line(caught.value)
    path.write_bytes(code)
    with pytest.raises(CheckpointError, match=r"bomb\.pth") as caught:
        opened(path)
    one_line(caught.value)


def safetensors_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        safetensors_file({"a": FLOATS}, b"", length=10_000_000_000),
        safetensors_file({"a": {**FLOATS, "shape": [2_500_000_000], "data_offsets": [0, 10_000_000_000]}}, bytes(8)),
        safetensors_file({"a": {**FLOATS, "shape": [2**40, 2**40]}}, bytes(8)),
        safetensors_file({"a": FLOATS, "b": FLOATS}, bytes(8)),
        safetensors_file(b'{"a": %s, "a": %s}' % ((json.dumps(FLOATS).encode(),) * 2), bytes(8)),
        safetensors_file(b'{"a":' * 20_000, bytes(8)),
        safetensors_file({"a": {**FLOATS, "dtype": "F99"}}, bytes(8)),
        safetensors_file(b'{"__metadata__": {"format": 3}, "a": 4}'),
        b"\x00" * 8 + b"{}",
    ],
)
def test_safetensors_that_lie_about_themselves_are_refused(tmp_path, content, little_memory):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnreadableCheckpoint, match=r"model\.safetensors") as caught:
        opened(path)
    one_line(caught.value)
