"""Safetensors that are spread over several files are one network, however one of the files is named."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.nnssl_files import plan, state_dict

from nnssl_adapt.errors import SourceNotFound, UnreadableCheckpoint
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.sources.listing import choose_files
from nnssl_adapt.weights.sources.resolve import resolve_source

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    tensors = {name: tensor.clone() for name, tensor in state_dict().items() if "all_modules" not in name}
    names = sorted(tensors)
    for number, shard in enumerate(SHARDS):
        save_file({name: tensors[name] for name in names[number::3]}, tmp_path / shard)
    weight_map = {name: SHARDS[index % 3] for index, name in enumerate(names)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(plan()))
    return tmp_path


@pytest.mark.parametrize("name", ["", INDEX, SHARDS[0], SHARDS[2]])
@pytest.mark.parametrize("as_filename", [True, False])
def test_all_shards_are_read_whichever_is_named(folder, name, as_filename):
    checkpoint = open_checkpoint(folder, filename=name or None) if as_filename else open_checkpoint(folder / name)
    expected = {name: tensor for name, tensor in state_dict().items() if "all_modules" not in name}
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in expected.items())
    assert checkpoint.notes == ()


def test_the_digest_is_of_all_shards(folder):
    before = resolve_source(folder).origin.sha256
    (folder / SHARDS[2]).write_bytes((folder / SHARDS[2]).read_bytes() + b" ")
    assert resolve_source(folder).origin.sha256 != before


@pytest.mark.parametrize("gone", SHARDS)
def test_a_missing_shard_is_named(folder, gone):
    (folder / gone).unlink()
    with pytest.raises(SourceNotFound, match=gone):
        open_checkpoint(folder)
    left = next(shard for shard in SHARDS if shard != gone)
    with pytest.raises(SourceNotFound, match=gone):
        open_checkpoint(folder / left)


def test_an_index_alone_is_no_network(folder):
    for shard in SHARDS:
        (folder / shard).unlink()
    with pytest.raises(SourceNotFound, match=r"index\.json"):
        open_checkpoint(folder / INDEX)


def test_a_tensor_in_two_shards_is_refused(folder):
    save_file({name: torch.zeros(1) for name in state_dict()}, folder / SHARDS[1])
    with pytest.raises(UnreadableCheckpoint, match=r"00003|00002"):
        open_checkpoint(folder)


def test_two_sharded_networks_have_to_be_chosen_from():
    names = ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "b-00001-of-00001.safetensors"]
    with pytest.raises(SourceNotFound, match="several"):
        choose_files(names, "folder")
    assert choose_files(names, "folder", "a.safetensors.index.json").other_shards == (names[1],)
