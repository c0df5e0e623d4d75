"""Where weights come from: this machine, and a real HTTP hub on 127.0.0.1 behind the real huggingface_hub."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nnssl_files import plan, state_dict, write_checkpoint

from nnssl_adapt.errors import (
    DigestMismatch,
    OutputError,
    SourceAccessDenied,
    SourceError,
    SourceNotFound,
    SourceUnavailable,
)
from nnssl_adapt.weights.checkpoint import open_checkpoint
from nnssl_adapt.weights.source import resolve_source

REPOSITORY = "made-up/ResEncL-OpenMind-MAE"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name → bytes of what a repository holds."""
    folder = tmp_path_factory.mktemp("published")
    write_checkpoint(folder, state_dict(), embedded=plan(), sidecar=plan(trainer_name="BaseMAETrainer"))
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"config.json": b"{}"}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- this machine ----------------------------------------------------------------------------------------------------


def test_a_file_and_a_folder_resolve_with_their_sidecar_and_digest(tmp_path):
    path = write_checkpoint(tmp_path / "here", state_dict(), sidecar=plan())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for source, kind in ((path, "file"), (str(path.parent), "folder")):
        resolved = resolve_source(source)
        assert (resolved.weights, resolved.sidecar) == (path, path.parent / "adaptation_plan.json")
        assert (resolved.origin.kind, resolved.origin.sha256, resolved.origin.source) == (kind, digest, str(source))


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["checkpoint_best.pth", "checkpoint_final.pth"], "checkpoint_final.pth"),
        (["checkpoint_latest.pth", "checkpoint_best.pth"], "checkpoint_best.pth"),
        (["weights.safetensors", "notes.txt"], "weights.safetensors"),
        (["only.pth"], "only.pth"),
    ],
)
def test_a_folder_prefers_nnssl_names(tmp_path, present, chosen):
    for name in present:
        (tmp_path / name).write_bytes(b"x")
    assert resolve_source(tmp_path).weights.name == chosen


def test_a_named_file_in_a_folder_is_taken(tmp_path):
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        (tmp_path / name).write_bytes(b"x")
    assert resolve_source(tmp_path, filename="checkpoint_best.pth").weights.name == "checkpoint_best.pth"


@pytest.mark.parametrize("names", [[], ["notes.txt"], ["a.pth", "b.pth"]])
def test_a_folder_without_a_clear_checkpoint_lists_what_it_holds(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceNotFound, match=", ".join(names) or "holds nothing") as caught:
        resolve_source(tmp_path)
    assert "checkpoint_final.pth" in one_line(caught)


@pytest.mark.parametrize("source", ["nowhere.pth", "/no/such/folder/checkpoint.pth", "just_a_name", "a/b/c", ""])
def test_what_is_neither_here_nor_an_id_is_not_found(source, monkeypatch):
    monkeypatch.delenv("nnssl_pretrained_models", raising=False)
    with pytest.raises(SourceNotFound, match="owner/name") as caught:
        resolve_source(source)
    one_line(caught)


def test_a_folder_of_models_is_searched_before_the_hub(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "owner" / "by_id", state_dict(), sidecar=plan())
    write_checkpoint(tmp_path / "by_name", state_dict(), sidecar=plan())
    write_checkpoint(tmp_path / "owner" / "by_id@v2", state_dict(), sidecar=plan())
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path))
    assert resolve_source("owner/by_id").weights.parent == tmp_path / "owner" / "by_id"
    assert resolve_source("other/by_name").weights.parent == tmp_path / "by_name"
    assert resolve_source("owner/by_id", revision="v2").weights.parent.name == "by_id@v2"


def test_an_existing_path_wins_and_has_no_revision(tmp_path, monkeypatch, hub):
    write_checkpoint(tmp_path / "owner" / "name", state_dict(), sidecar=plan())
    monkeypatch.chdir(tmp_path)
    assert resolve_source("owner/name").origin.kind == "folder"
    assert hub.requests == []
    with pytest.raises(SourceError, match="no revision 'main'"):
        resolve_source("owner/name", revision="main")


# -- the hub: found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        "{id}",
        "{id}@main",
        "{url}/{id}",
        "{url}/{id}/",
        "{url}/{id}/tree/main",
        "{url}/{id}/blob/main/checkpoint_final.pth",
    ],
)
def test_every_way_to_name_a_repository_gives_the_same_checkpoint(hub, files, cache, spelling):
    repository = hub.add(REPOSITORY, files)
    checkpoint = open_checkpoint(spelling.format(id=REPOSITORY, url=hub.url), cache_dir=cache)
    origin = checkpoint.origin
    assert (origin.kind, origin.repo_id, origin.revision) == ("huggingface", REPOSITORY, repository.commit)
    assert origin.sha256 == hashlib.sha256(files["checkpoint_final.pth"]).hexdigest()
    assert checkpoint.trainer_name == "BaseMAETrainer"


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/", "http://huggingface.co/", "huggingface.co/", "https://hf.co/"]
)
def test_the_public_address_is_served_by_the_configured_endpoint(hub, files, cache, address):
    hub.add(REPOSITORY, files)
    assert resolve_source(address + REPOSITORY, cache_dir=cache).origin.repo_id == REPOSITORY


@pytest.mark.parametrize(
    "address", ["https://example.com/a/b", "https://huggingface.co/onlyowner", "ftp://huggingface.co/a/b"]
)
def test_other_addresses_are_refused(address):
    with pytest.raises(SourceNotFound, match="no Hugging Face address") as caught:
        resolve_source(address)
    one_line(caught)


def test_weights_and_plan_come_from_one_commit(hub, files, cache):
    old = hub.add(REPOSITORY, files, branches={"main", "v1"})
    resolved = resolve_source(REPOSITORY, revision="v1", cache_dir=cache)
    assert resolved.weights.parent == resolved.sidecar.parent
    assert resolved.origin.revision == old.commit
    asked = [path for _, path in hub.requests if path.endswith("checkpoint_final.pth")]
    assert asked
    assert all(f"/resolve/{old.commit}/" in path for path in asked)


@pytest.mark.parametrize("name", ["checkpoint_best.pth", "checkpoint_latest.pth", "weights.safetensors", "special.pth"])
def test_other_file_names_are_found(hub, files, cache, name):
    hub.add(REPOSITORY, {name: b"some weights", "adaptation_plan.json": files["adaptation_plan.json"]})
    assert resolve_source(REPOSITORY, cache_dir=cache).origin.filename == name


def test_a_second_time_costs_no_download_and_works_offline(hub, files, cache, monkeypatch):
    hub.add(REPOSITORY, files)
    first = resolve_source(REPOSITORY, cache_dir=cache)
    hub.requests.clear()
    assert resolve_source(REPOSITORY, cache_dir=cache) == first
    assert {method for method, _ in hub.requests} == {"HEAD"}
    hub.requests.clear()
    assert resolve_source(REPOSITORY, cache_dir=cache, local_files_only=True) == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_source(REPOSITORY, cache_dir=cache) == first
    assert hub.requests == []


def test_a_cached_safetensors_of_any_name_is_found_offline(hub, files, cache):
    hub.add(REPOSITORY, {"any.safetensors": b"weights", "adaptation_plan.json": files["adaptation_plan.json"]})
    first = resolve_source(REPOSITORY, cache_dir=cache)
    assert resolve_source(REPOSITORY, cache_dir=cache, local_files_only=True) == first


def test_the_cache_serves_when_the_hub_is_gone(hub, files, cache, no_waiting):
    hub.add(REPOSITORY, files)
    first = resolve_source(REPOSITORY, cache_dir=cache)
    hub.stop()
    assert resolve_source(REPOSITORY, cache_dir=cache) == first


def test_a_repository_without_sidecar_opens_by_the_plan_in_the_file(hub, files, cache):
    hub.add(REPOSITORY, {"checkpoint_final.pth": files["checkpoint_final.pth"]})
    assert resolve_source(REPOSITORY, cache_dir=cache).sidecar is None
    assert open_checkpoint(REPOSITORY, cache_dir=cache).plan.patch_size == (8, 12, 16)
    assert open_checkpoint(REPOSITORY, cache_dir=cache, local_files_only=True).plan.patch_size == (8, 12, 16)


def test_the_endpoint_of_the_environment_is_used_by_a_fresh_process(hub, files, cache):
    hub.add(REPOSITORY, files)
    script = (
        "import sys, json; from nnssl_adapt.weights.checkpoint import open_checkpoint;"
        "print(json.dumps(open_checkpoint(sys.argv[1], cache_dir=sys.argv[2]).origin.to_dict()))"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "PYTHONPATH": root}
    command = [sys.executable, "-W", "ignore", "-c", script, REPOSITORY, str(cache)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["repo_id"] == REPOSITORY


# -- the hub: trouble ------------------------------------------------------------------------------------------------


def test_a_missing_repository_is_not_found(hub, cache):
    with pytest.raises(SourceNotFound, match=f"no repository {REPOSITORY}.*hf auth login") as caught:
        resolve_source(REPOSITORY, cache_dir=cache)
    one_line(caught)


def test_a_missing_revision_is_not_found(hub, files, cache):
    hub.add(REPOSITORY, files)
    with pytest.raises(SourceNotFound, match="no revision 'v9'") as caught:
        resolve_source(f"{REPOSITORY}@v9", cache_dir=cache)
    one_line(caught)
    with pytest.raises(SourceError, match="two revisions"):
        resolve_source(f"{REPOSITORY}@v1", revision="v2", cache_dir=cache)


@pytest.mark.parametrize("refusal", ["gated", "forbidden"])
def test_a_repository_that_may_not_be_read_says_how_to_get_in(hub, files, cache, refusal):
    hub.add(REPOSITORY, files, **{refusal: True})
    with pytest.raises(SourceAccessDenied, match=f"{hub.url}/{REPOSITORY}.*hf auth login") as caught:
        resolve_source(REPOSITORY, cache_dir=cache)
    one_line(caught)


def test_a_repository_without_weights_lists_what_it_holds(hub, files, cache):
    hub.add(REPOSITORY, {"adaptation_plan.json": files["adaptation_plan.json"], "README.md": b"#"})
    with pytest.raises(SourceNotFound, match=r"no checkpoint_final\.pth.*README\.md, adaptation_plan\.json") as caught:
        resolve_source(REPOSITORY, cache_dir=cache)
    one_line(caught)
    with pytest.raises(SourceNotFound, match=r"no other\.pth"):
        resolve_source(REPOSITORY, cache_dir=cache, filename="other.pth")


def test_a_repository_without_any_plan_says_where_it_was_looked_for(hub, cache, tmp_path):
    path = write_checkpoint(tmp_path / "no_plan", state_dict())
    hub.add(REPOSITORY, {"checkpoint_final.pth": path.read_bytes()})
    with pytest.raises(Exception, match=rf"adaptation_plan\.json in the repository {REPOSITORY}") as caught:
        open_checkpoint(REPOSITORY, cache_dir=cache)
    assert type(caught.value).__name__ == "AdaptationPlanError"
    one_line(caught)


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "adaptation_plan.json"])
def test_a_broken_transfer_is_never_taken_for_whole(hub, files, cache, no_waiting, name):
    repository = hub.add(REPOSITORY, files)
    repository.truncated.add(name)
    with pytest.raises(SourceUnavailable, match=f"download of {name}.*broke off") as caught:
        resolve_source(REPOSITORY, cache_dir=cache)
    one_line(caught)
    assert not list(cache.rglob(f"snapshots/*/{name}"))
    with pytest.raises(SourceUnavailable):
        resolve_source(REPOSITORY, cache_dir=cache, local_files_only=True)
    repository.truncated.clear()
    assert resolve_source(REPOSITORY, cache_dir=cache).weights.read_bytes() == files["checkpoint_final.pth"]


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_offline_without_cache_says_how_to_get_it(hub, files, cache, monkeypatch, how):
    hub.add(REPOSITORY, files)
    if how == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailable, match=f"may not be asked.*hf download {REPOSITORY}") as caught:
        resolve_source(REPOSITORY, cache_dir=cache, local_files_only=how == "flag")
    one_line(caught)
    assert hub.requests == []


def test_a_hub_that_is_gone_and_an_empty_cache_is_unavailable(hub, cache, no_waiting):
    hub.stop()
    with pytest.raises(SourceUnavailable, match=f"{hub.url} does not answer") as caught:
        resolve_source(REPOSITORY, cache_dir=cache)
    one_line(caught)


def test_a_damaged_cache_is_noticed(hub, files, cache):
    hub.add(REPOSITORY, files)
    blob = resolve_source(REPOSITORY, cache_dir=cache).weights.resolve()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    with pytest.raises(DigestMismatch, match="delete") as caught:
        resolve_source(REPOSITORY, cache_dir=cache, local_files_only=True)
    one_line(caught)


def test_a_full_disk_is_said_to_be_full(hub, files, cache, monkeypatch):
    def no_space(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add(REPOSITORY, files)
    monkeypatch.setattr("nnssl_adapt.weights.hub.hf_hub_download", no_space)
    with pytest.raises(OutputError, match="no space left") as caught:
        resolve_source(REPOSITORY, cache_dir=cache)
    one_line(caught)
