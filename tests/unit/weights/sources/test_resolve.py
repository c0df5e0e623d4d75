"""Where weights come from: what is on this machine. The hub is in test_hub_source.py."""

import hashlib
import zipfile

import pytest
from support.nnssl_files import plan, state_dict, write_checkpoint

from nnssl_adapt.errors import SourceError, SourceNotFound
from nnssl_adapt.weights.sources.resolve import resolve_source
from nnssl_adapt.weights.sources.resolved import SourceOptions


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert resolve_source(tmp_path, SourceOptions(filename="checkpoint_best.pth")).weights.name == "checkpoint_best.pth"


@pytest.mark.parametrize("names", [[], ["notes.txt"], ["a.pth", "b.pth"]])
def test_a_folder_without_a_clear_checkpoint_lists_what_it_holds(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceNotFound, match=", ".join(names) or "holds nothing") as caught:
        resolve_source(tmp_path)
    assert "checkpoint_final.pth" in one_line(caught)


@pytest.mark.parametrize(
    "source",
    ["nowhere.pth", "/no/such/folder/checkpoint.pth", "just_a_name", "a/b/c", "", "~nobody_here/x", "x" * 5000],
)
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
    assert resolve_source("owner/by_id", SourceOptions(revision="v2")).weights.parent.name == "by_id@v2"


@pytest.mark.parametrize(
    "name", ["weights.ckpt", "weights.pt", "pytorch_model.bin", "weights.safetensors", "WEIGHTS.PTH"]
)
def test_every_usual_ending_is_taken_in_a_folder_and_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "config.json").write_bytes(b"{}")
    assert resolve_source(tmp_path).weights == tmp_path / name
    assert resolve_source(tmp_path / name).weights == tmp_path / name


def test_a_file_without_ending_is_taken_when_named(tmp_path):
    (tmp_path / "weights").write_bytes(b"x")
    (tmp_path / "adaptation_plan.json").write_bytes(b"{}")
    assert resolve_source(tmp_path / "weights").sidecar == tmp_path / "adaptation_plan.json"


def test_a_file_is_no_folder_to_choose_from(tmp_path):
    """A plan keeps the path as a hint and the wish for a file: they agree."""
    path = write_checkpoint(tmp_path / "here", state_dict(), sidecar=plan())
    for wish in ("checkpoint_final.pth", "here/checkpoint_final.pth", "here"):
        assert resolve_source(path, SourceOptions(filename=wish)).weights == path
    with pytest.raises(SourceError, match="is a file itself: leave 'other.pth' out") as caught:
        resolve_source(path, SourceOptions(filename="other.pth"))
    one_line(caught)


def test_hidden_files_are_no_weights(tmp_path):
    for name in (".unfinished-x-checkpoint_final.pth", "._a.pth", ".cache/b.pth", "c.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert resolve_source(tmp_path).weights.name == "c.pth"


def test_a_whole_disk_is_not_searched(tmp_path, monkeypatch):
    monkeypatch.setattr("nnssl_adapt.weights.sources.local.MAX_FILES", 3)
    for index in range(5):
        (tmp_path / f"{index}.txt").write_bytes(b"")
    with pytest.raises(SourceError, match="holds more than 3 files: name the checkpoint") as caught:
        resolve_source(tmp_path)
    one_line(caught)
    deep = tmp_path / "deep" / "a" / "b" / "c" / "d" / "e" / "f"
    deep.mkdir(parents=True)
    (deep / "checkpoint_final.pth").write_bytes(b"x")
    with pytest.raises(SourceNotFound, match="holds nothing"):
        resolve_source(tmp_path / "deep")
    assert resolve_source(deep).weights.parent == deep


def test_zips_on_the_shelf_are_found_by_their_names(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "model_r1.zip", "w") as archive:
        archive.writestr("checkpoint_final.pth", "zipped")
    write_checkpoint(tmp_path / "model_r2", state_dict(), sidecar=plan())
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path))
    for name in ("model_r1.zip", "model_r1", "somewhere/model_r1.zip"):
        assert resolve_source(name).weights.read_bytes() == b"zipped"
    for name in ("model_r2.zip", "model_r2"):
        assert resolve_source(name).weights.parent == tmp_path / "model_r2"
    with pytest.raises(SourceNotFound, match="nnssl_pretrained_models="):
        resolve_source("model_r3.zip")


def test_an_existing_path_wins_and_has_no_revision(tmp_path, monkeypatch, hub):
    write_checkpoint(tmp_path / "owner" / "name", state_dict(), sidecar=plan())
    monkeypatch.chdir(tmp_path)
    assert resolve_source("owner/name").origin.kind == "folder"
    assert hub.requests == []
    with pytest.raises(SourceError, match="no revision 'main'"):
        resolve_source("owner/name", SourceOptions(revision="main"))
