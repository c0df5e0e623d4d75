"""Weights from a real HTTP hub on 127.0.0.1, behind the real huggingface_hub."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.nnssl_files import plan, state_dict, write_checkpoint

from nnssl_adapt.errors import (
    DigestMismatch,
    OutputError,
    SourceAccessDenied,
    SourceError,
    SourceNotFound,
    SourceUnavailable,
)
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.sources.resolve import resolve_source
from nnssl_adapt.weights.sources.resolved import SourceOptions

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


# -- found -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        "{id}",
        "{id}@main",
        "{url}/{id}",
        "{url}/{id}/",
        "{url}/{id}/tree/main",
        "{url}/{id}/blob/main/checkpoint_final.pth",
        "hf://{id}",
        "hf://models/{id}@main",
        "hf://{id}@main/checkpoint_final.pth",
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
    assert resolve_source(address + REPOSITORY, SourceOptions(cache_dir=cache)).origin.repo_id == REPOSITORY


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("https://huggingface.co/onlyowner", "not a Hugging Face address"),
        ("https://huggingface.co/owner/name/commits/main", "not a Hugging Face address"),
        ("ftp://huggingface.co/a/b", "neither an https address nor a Hugging Face one"),
        ("http://example.invalid/weights.zip", "over http"),
        ("https://example.invalid/weights.zip#md5=00", "must be sha256="),
    ],
)
def test_other_addresses_are_refused(address, reason):
    with pytest.raises(SourceError, match=reason) as caught:
        resolve_source(address)
    one_line(caught)


@pytest.mark.parametrize("rest", ["", "/checkpoint_final.pth"])
def test_a_branch_may_have_slashes_in_its_name(hub, files, cache, rest):
    repository = hub.add(REPOSITORY, files, branches={"main", "feature", "feature/new/plan"})
    kind = "blob" if rest else "tree"
    address = f"{hub.url}/{REPOSITORY}/{kind}/feature/new/plan{rest}"
    resolved = resolve_source(address, SourceOptions(cache_dir=cache))
    assert (resolved.origin.revision, resolved.origin.filename) == (repository.commit, "checkpoint_final.pth")
    assert any("feature%2Fnew%2Fplan" in path for _, path in hub.requests)
    again = resolve_source(address, SourceOptions(cache_dir=cache, local_files_only=True))
    assert again.origin.revision == repository.commit


@pytest.mark.parametrize("rest", ["", "/checkpoint_final.pth"])
def test_a_branch_with_slashes_in_the_short_form(hub, files, cache, rest):
    repository = hub.add(REPOSITORY, files, branches={"main", "feature", "feature/new/plan"})
    resolved = resolve_source(f"hf://{REPOSITORY}@feature/new/plan{rest}", SourceOptions(cache_dir=cache))
    assert (resolved.origin.revision, resolved.origin.filename) == (repository.commit, "checkpoint_final.pth")


def test_weights_and_plan_come_from_one_commit(hub, files, cache):
    old = hub.add(REPOSITORY, files, branches={"main", "v1"})
    resolved = resolve_source(REPOSITORY, SourceOptions(revision="v1", cache_dir=cache))
    assert resolved.weights.parent == resolved.sidecar.parent
    assert resolved.origin.revision == old.commit
    asked = [path for _, path in hub.requests if path.endswith("checkpoint_final.pth")]
    assert asked
    assert all(f"/resolve/{old.commit}/" in path for path in asked)


@pytest.mark.parametrize(
    "name", ["checkpoint_best.pth", "checkpoint_latest.pth", "weights.safetensors", "special.pth", "last.ckpt"]
)
def test_other_file_names_are_found(hub, files, cache, name):
    hub.add(REPOSITORY, {name: b"some weights", "adaptation_plan.json": files["adaptation_plan.json"]})
    assert resolve_source(REPOSITORY, SourceOptions(cache_dir=cache)).origin.filename == name


def test_several_files_are_listed_and_one_can_be_chosen(hub, files, cache):
    plan_beside = files["adaptation_plan.json"]
    hub.add(REPOSITORY, {"a.pth": b"a", "b.pth": b"b", "s/c.pth": b"c", "s/adaptation_plan.json": plan_beside})
    with pytest.raises(
        SourceNotFound, match=rf"{REPOSITORY} has.*several weight files: a\.pth, b\.pth, s/c\.pth.*--file"
    ) as e:
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache))
    one_line(e)
    for name in ("b.pth", "s/c.pth", "c.pth"):
        resolved = resolve_source(REPOSITORY, SourceOptions(cache_dir=cache, filename=name))
        assert resolved.weights.read_bytes() == name[-5:-4].encode()
        assert (resolved.sidecar is None) == (name == "b.pth")
        assert (
            resolve_source(REPOSITORY, SourceOptions(cache_dir=cache, filename=name, local_files_only=True)) == resolved
        )
    with pytest.raises(SourceNotFound, match=r"no d\.pth; it holds a\.pth, b\.pth, s/c\.pth; choose one with --file"):
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache, filename="d.pth"))


@pytest.mark.parametrize("page", ["tree", "blob", "resolve"])
def test_addresses_of_files_and_folders_in_a_repository(hub, files, cache, page):
    hub.add(REPOSITORY, {f"mae/{name}": content for name, content in files.items()} | {"voco/x.pth": b"voco"})
    rest = "mae" if page == "tree" else "mae/checkpoint_final.pth"
    resolved = resolve_source(f"{hub.url}/{REPOSITORY}/{page}/main/{rest}", SourceOptions(cache_dir=cache))
    assert resolved.weights.read_bytes() == files["checkpoint_final.pth"]
    assert resolved.sidecar.read_bytes() == files["adaptation_plan.json"]


def test_a_second_time_costs_no_download_and_works_offline(hub, files, cache, monkeypatch):
    hub.add(REPOSITORY, files)
    first = resolve_source(REPOSITORY, SourceOptions(cache_dir=cache))
    hub.requests.clear()
    assert resolve_source(REPOSITORY, SourceOptions(cache_dir=cache)) == first
    assert {method for method, _ in hub.requests} == {"HEAD"}
    hub.requests.clear()
    assert resolve_source(REPOSITORY, SourceOptions(cache_dir=cache, local_files_only=True)) == first
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_source(REPOSITORY, SourceOptions(cache_dir=cache)) == first
    assert hub.requests == []


def test_a_cached_safetensors_of_any_name_is_found_offline(hub, files, cache):
    hub.add(REPOSITORY, {"any.safetensors": b"weights", "adaptation_plan.json": files["adaptation_plan.json"]})
    first = resolve_source(REPOSITORY, SourceOptions(cache_dir=cache))
    assert resolve_source(REPOSITORY, SourceOptions(cache_dir=cache, local_files_only=True)) == first


def test_the_cache_serves_when_the_hub_is_gone(hub, files, cache, no_waiting):
    hub.add(REPOSITORY, files)
    first = resolve_source(REPOSITORY, SourceOptions(cache_dir=cache))
    hub.stop()
    assert resolve_source(REPOSITORY, SourceOptions(cache_dir=cache)) == first


def test_a_repository_without_sidecar_opens_by_the_plan_in_the_file(hub, files, cache):
    hub.add(REPOSITORY, {"checkpoint_final.pth": files["checkpoint_final.pth"]})
    assert resolve_source(REPOSITORY, SourceOptions(cache_dir=cache)).sidecar is None
    assert open_checkpoint(REPOSITORY, cache_dir=cache).plan.patch_size == (8, 12, 16)
    assert open_checkpoint(REPOSITORY, cache_dir=cache, local_files_only=True).plan.patch_size == (8, 12, 16)


def test_the_endpoint_of_the_environment_is_used_by_a_fresh_process(hub, files, cache):
    hub.add(REPOSITORY, files)
    script = (
        "import sys, json; from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint;"
        "print(json.dumps(open_checkpoint(sys.argv[1], cache_dir=sys.argv[2]).origin.to_dict()))"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "PYTHONPATH": root}
    command = [sys.executable, "-W", "ignore", "-c", script, REPOSITORY, str(cache)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["repo_id"] == REPOSITORY


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_a_missing_repository_is_not_found(hub, cache):
    with pytest.raises(SourceNotFound, match=f"no repository {REPOSITORY}.*hf auth login") as caught:
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache))
    one_line(caught)


def test_a_missing_revision_is_not_found(hub, files, cache):
    hub.add(REPOSITORY, files)
    with pytest.raises(SourceNotFound, match="no revision 'v9'") as caught:
        resolve_source(f"{REPOSITORY}@v9", SourceOptions(cache_dir=cache))
    one_line(caught)
    with pytest.raises(SourceError, match="two revisions"):
        resolve_source(f"{REPOSITORY}@v1", SourceOptions(revision="v2", cache_dir=cache))


def test_a_commit_pins_the_branch_in_an_address(hub, files, cache):
    """A plan records the address as typed and the commit that was found."""
    old = hub.add(REPOSITORY, files | {"x.pth": b"old"}).commit
    address = f"{hub.url}/{REPOSITORY}/blob/main/x.pth"
    first = resolve_source(address, SourceOptions(cache_dir=cache))
    assert resolve_source(address, SourceOptions(revision=old, cache_dir=cache)) == first
    with pytest.raises(SourceError, match="two revisions"):
        resolve_source(f"{REPOSITORY}@{old}", SourceOptions(revision="0" * 40, cache_dir=cache))
    with pytest.raises(SourceNotFound, match="no revision '0000"):
        resolve_source(address, SourceOptions(revision="0" * 40, cache_dir=cache))


@pytest.mark.parametrize("refusal", ["gated", "forbidden"])
def test_a_repository_that_may_not_be_read_says_how_to_get_in(hub, files, cache, refusal):
    hub.add(REPOSITORY, files, **{refusal: True})
    with pytest.raises(SourceAccessDenied, match=f"{hub.url}/{REPOSITORY}.*hf auth login") as caught:
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache))
    one_line(caught)


def test_a_repository_without_weights_lists_what_it_holds(hub, files, cache):
    hub.add(REPOSITORY, {"adaptation_plan.json": files["adaptation_plan.json"], "README.md": b"#"})
    with pytest.raises(SourceNotFound, match=r"no checkpoint_final\.pth.*README\.md, adaptation_plan\.json") as caught:
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache))
    one_line(caught)
    with pytest.raises(SourceNotFound, match=r"no other\.pth"):
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache, filename="other.pth"))


def test_a_repository_without_any_plan_says_where_it_was_looked_for(hub, cache, tmp_path):
    path = write_checkpoint(
        tmp_path / "no_plan", {"of.another.kind.weight": state_dict()["encoder.stem.convs.0.conv.weight"]}
    )
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
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache))
    one_line(caught)
    assert not list(cache.rglob(f"snapshots/*/{name}"))
    with pytest.raises(SourceUnavailable):
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache, local_files_only=True))
    repository.truncated.clear()
    assert (
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache)).weights.read_bytes() == files["checkpoint_final.pth"]
    )


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_offline_without_cache_says_how_to_get_it(hub, files, cache, monkeypatch, how):
    hub.add(REPOSITORY, files)
    if how == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailable, match=f"may not be asked.*nnssl-adapt fetch {REPOSITORY} --to") as caught:
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache, local_files_only=how == "flag"))
    one_line(caught)
    assert hub.requests == []


def test_a_hub_that_is_gone_and_an_empty_cache_is_unavailable(hub, cache, no_waiting):
    hub.stop()
    with pytest.raises(SourceUnavailable, match=f"{hub.url} does not answer") as caught:
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache))
    one_line(caught)


def test_a_damaged_cache_is_noticed(hub, files, cache):
    hub.add(REPOSITORY, files)
    blob = resolve_source(REPOSITORY, SourceOptions(cache_dir=cache)).weights.resolve()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    with pytest.raises(DigestMismatch, match="delete") as caught:
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache, local_files_only=True))
    one_line(caught)


def test_a_full_disk_is_said_to_be_full(hub, files, cache, monkeypatch):
    def no_space(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add(REPOSITORY, files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_space)
    with pytest.raises(OutputError, match="no space left") as caught:
        resolve_source(REPOSITORY, SourceOptions(cache_dir=cache))
    one_line(caught)
