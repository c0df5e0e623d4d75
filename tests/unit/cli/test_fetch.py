"""``nnssl-adapt fetch``: what it leaves is found, and proven, by the very command that it prints."""

import logging
import re
import shlex
import zipfile
from types import SimpleNamespace

import pytest
from support.hub_server import Page, WebServer
from support.nnssl_files import plan, state_dict, write_checkpoint

from nnssl_adapt.cli.common import open_source
from nnssl_adapt.cli.main import build_parser, main
from nnssl_adapt.errors import SourceUnavailable
from nnssl_adapt.planning.provenance import Provenance
from nnssl_adapt.training.starting_weights import find_checkpoint
from nnssl_adapt.weights.sources.hub import Hub
from nnssl_adapt.weights.sources.resolve import resolve_source
from nnssl_adapt.weights.sources.resolved import SourceOptions

REPOSITORY = "made-up/ResEncL-OpenMind-MAE"


@pytest.fixture(autouse=True)
def no_settings(tmp_path, monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "nnssl_pretrained_models"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache_home"))
    logger = logging.getLogger("nnssl_adapt")  # the command sends it to a screen that is gone after the test
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def published(tmp_path):
    """A folder with a checkpoint and its plan."""
    return write_checkpoint(tmp_path / "published", state_dict(), embedded=plan(), sidecar=plan()).parent


@pytest.fixture
def hub(hub, published):
    hub.add(REPOSITORY, {path.name: path.read_bytes() for path in published.iterdir()}, branches={"main", "v2"})
    return hub


@pytest.fixture
def zipped(published):
    """Address of a zip with the checkpoint."""
    path = published.parent / "r20260101.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in published.iterdir():
            archive.write(file, f"mae/{file.name}")
    with WebServer() as server:
        server.pages["/download/r20260101.zip"] = Page(path.read_bytes())
        yield f"{server.url}/download/r20260101.zip", server


def fetch(capsys, *arguments):
    """Exit code, what was printed, and the arguments of the printed preprocessing command."""
    code = main(["fetch", *map(str, arguments)])
    output = capsys.readouterr()
    printed = re.search(r"nnUNetv2_preprocess_like_nnssl (.*)", output.out)
    return code, output, shlex.split(printed[1]) if printed else []


def resolve_as_printed(words):
    """What the preprocessing command would open."""
    parsed = build_parser().parse_args(["preprocess", *["0" if word == "ID" else word for word in words]])
    return resolve_source(
        parsed.source,
        SourceOptions(
            revision=parsed.revision, cache_dir=parsed.cache_dir, filename=parsed.source_file, fold=parsed.source_fold
        ),
    )


def test_a_repository_stays_in_the_cache_and_the_command_pins_its_commit(tmp_path, hub, capsys, monkeypatch):
    code, output, words = fetch(capsys, f"{REPOSITORY}@v2", "--cache-dir", tmp_path / "hf")
    assert code == 0, output.err
    commit = hub.repositories[REPOSITORY].commit
    assert words == ["-d", "ID", "-n", "NAME", "-pc", f"{REPOSITORY}@{commit}", "--cache-dir", str(tmp_path / "hf")]
    assert "HF_HUB_OFFLINE=1 nnUNetv2_preprocess_like_nnssl" in output.out
    assert "ResidualEncoderUNet" in output.out  # it was opened
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_as_printed(words).origin.revision == commit
    assert hub.requests == []


def test_a_file_named_by_its_address_is_named_in_the_command(tmp_path, hub, published, capsys):
    hub.add("made-up/two", {f"{name}.pth": (published / "checkpoint_final.pth").read_bytes() for name in "ab"})
    code, _, words = fetch(capsys, f"{hub.url}/made-up/two/blob/main/b.pth", "--cache-dir", tmp_path / "hf")
    assert code == 0
    assert words[words.index("--file") + 1] == "b.pth"
    assert resolve_as_printed(words).weights.name == "b.pth"


def test_a_plan_finds_again_what_its_address_named(tmp_path, hub, published, capsys, monkeypatch):
    """Made with an address of one file; then trained online, offline, and with a carried copy only."""
    files = {f"{name}.pth": (published / "checkpoint_final.pth").read_bytes() for name in "ab"}
    hub.add("made-up/two", files | {"checkpoint_final.pth": b"not this one"})
    address = f"{hub.url}/made-up/two/blob/main/b.pth"
    recorded = resolve_source(address, SourceOptions(cache_dir=tmp_path / "hf")).origin.to_dict()
    plan_ = SimpleNamespace(
        provenance=Provenance.parse({"source": recorded}, "plan"), pretrain_info={}, plans_name="ptPlans__two"
    )
    monkeypatch.setattr(
        "nnssl_adapt.weights.sources.resolve.Hub",
        lambda repo, rev, _cache, local: Hub(repo, rev, tmp_path / "hf", local),
    )
    assert find_checkpoint(plan_).origin.filename == "b.pth"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_checkpoint(plan_).origin.filename == "b.pth"
    for source in (address, address.replace("b.pth", "a.pth"), "made-up/two@main"):
        fetch(capsys, source, "--to", tmp_path / "stick", "--cache-dir", tmp_path / "hf")
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path / "stick"))
    origin = find_checkpoint(plan_).origin
    assert (origin.kind, origin.filename, origin.revision) == ("folder", "b.pth", recorded["revision"])


@pytest.mark.parametrize("file", ["b.pth", "voco/checkpoint_final.pth"])
def test_files_of_one_repository_are_carried_side_by_side(tmp_path, hub, published, capsys, monkeypatch, file):
    """And none of them is mistaken for what the repository's bare name means."""
    names = ("checkpoint_final.pth", "b.pth", "voco/checkpoint_final.pth")
    contents = {}
    for seed, name in enumerate(names):
        path = write_checkpoint(tmp_path / str(seed), state_dict(seed=seed), embedded=plan())
        contents[name] = path.read_bytes()
    hub.add("made-up/three", contents)
    shelf, to = tmp_path / "stick", ("--to", tmp_path / "stick", "--cache-dir", tmp_path / "hf")
    code, output, words = fetch(capsys, "made-up/three", "--file", file, *to)
    assert code == 0, output.err
    monkeypatch.setenv("nnssl_pretrained_models", str(shelf))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_as_printed(words).weights.read_bytes() == contents[file]
    with pytest.raises(SourceUnavailable):
        resolve_source("made-up/three", SourceOptions(cache_dir=tmp_path / "empty"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("nnssl_pretrained_models")
    assert fetch(capsys, "made-up/three", *to)[0] == 0
    monkeypatch.setenv("nnssl_pretrained_models", str(shelf))
    hub.stop()
    for source, wish, expected in (
        ("made-up/three", None, "checkpoint_final.pth"),
        ("made-up/three", file, file),
        (words[5], None, file),
    ):
        resolved = resolve_source(source, SourceOptions(filename=wish))
        assert resolved.weights.read_bytes() == contents[expected]
        assert resolved.weights.is_relative_to(shelf)
        assert (
            resolve_source(source, SourceOptions(revision=resolved.origin.revision, filename=wish)).weights
            == resolved.weights
        )


def test_an_address_is_printed_with_its_digest(zipped, capsys, monkeypatch):
    address, server = zipped
    code, output, words = fetch(capsys, address)
    assert code == 0, output.err
    assert re.fullmatch(rf"{re.escape(address)}#sha256=[0-9a-f]{{64}}", words[5])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.stop()
    assert resolve_as_printed(words).weights.name == "checkpoint_final.pth"


@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_repository_is_carried_and_keeps_its_name(tmp_path, hub, capsys, monkeypatch, revision):
    shelf = tmp_path / "stick"
    source = f"{REPOSITORY}@{revision}" if revision else REPOSITORY
    code, output, words = fetch(capsys, source, "--to", shelf, "--cache-dir", tmp_path / "hf")
    assert code == 0, output.err
    assert f"export nnssl_pretrained_models={shelf}" in output.out
    assert words == ["-d", "ID", "-n", "NAME", "-pc", source]
    hub.stop()
    moved = shelf.rename(tmp_path / "on_the_cluster")
    monkeypatch.setenv("nnssl_pretrained_models", str(moved))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    resolved = resolve_as_printed(words)
    commit = hub.repositories[REPOSITORY].commit
    assert resolved.weights.is_relative_to(moved)
    assert resolved.sidecar.is_relative_to(moved)
    assert (resolved.origin.repo_id, resolved.origin.revision) == (REPOSITORY, commit)
    # What a plan records finds it too: the repository at its commit, and its address.
    if revision is None:
        assert resolve_source(REPOSITORY, SourceOptions(revision=commit)).weights == resolved.weights
        for source in (f"https://huggingface.co/{REPOSITORY}", f"{REPOSITORY}@main", f"{REPOSITORY}@{commit[:12]}"):
            assert resolve_source(source).weights == resolved.weights
        with pytest.raises(Exception, match="not in the Hugging Face cache"):
            resolve_source(REPOSITORY, SourceOptions(revision="v3", cache_dir=tmp_path / "empty"))
        with pytest.raises(Exception, match="not in the Hugging Face cache"):
            resolve_source(
                f"another/{REPOSITORY.rpartition('/')[2]}", SourceOptions(revision="v3", cache_dir=tmp_path / "empty")
            )


def test_a_zip_is_carried_and_found_by_address_and_name(tmp_path, zipped, capsys, monkeypatch):
    address, server = zipped
    shelf = tmp_path / "stick"
    code, output, words = fetch(capsys, address, "--to", shelf)
    assert code == 0, output.err
    assert words[5] == "r20260101"
    server.stop()
    monkeypatch.setenv("nnssl_pretrained_models", str(shelf))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    for name in ("r20260101", "r20260101.zip", address):
        assert resolve_source(name).weights.parent == shelf / "r20260101"
    with pytest.raises(Exception, match="can't be reached"):
        resolve_source(f"{address}#sha256={'0' * 64}")
    with pytest.raises(Exception, match="can't be reached"):
        resolve_source(address.replace("/download/", "/other/"))


def test_a_file_at_an_address_is_carried_whatever_the_server_calls_it(tmp_path, published, capsys, monkeypatch):
    content = (published / "checkpoint_final.pth").read_bytes()
    with WebServer() as server:
        address = f"{server.url}/r1/mae.pth?download=1"
        server.pages["/r1/mae.pth"] = Page(content, headers={"Content-Disposition": "attachment; filename=other.pth"})
        code, output, words = fetch(capsys, address, "--to", tmp_path / "stick")
    assert (code, words[5]) == (0, "mae"), output.err
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path / "stick"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    for name in ("mae", "mae.pth", address):
        assert resolve_source(name).weights.read_bytes() == content


def test_a_trained_model_is_carried_with_its_plans_and_only_its_folds(tmp_path, published, capsys, monkeypatch):
    model = tmp_path / "Dataset501_Cord" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    for fold in (0, 1, 2):
        write_checkpoint(model / f"fold_{fold}", state_dict(seed=fold), embedded=plan())
    for name in ("plans.json", "dataset.json"):
        (model / name).write_text("{}")
    (model / "fold_1" / "progress.png").write_bytes(b"picture")
    monkeypatch.setattr("nnssl_adapt.weights.checkpoint.checkpoint.read_checkpoint", lambda resolved, options: "read")
    code, output, words = fetch(capsys, model, "--fold-of-source", "1", "--to", tmp_path / "stick")
    assert code == 0, output.err
    shelf = tmp_path / "stick" / model.name
    copied = sorted(path.relative_to(shelf).as_posix() for path in shelf.rglob("*") if path.is_file())
    below = [f"{model.name}/{name}" for name in ("dataset.json", "fold_1/checkpoint_final.pth", "plans.json")]
    assert copied == ["fetched.json", *below]
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path / "stick"))
    assert resolve_as_printed(words).origin.fold == "1"
    code, output, words = fetch(capsys, model, "--fold-of-source", "mean", "--to", tmp_path / "other")
    assert words[-2:] == ["--fold-of-source", "mean"]
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path / "other"))
    resolved = resolve_as_printed(words)
    assert (resolved.origin.fold, len(resolved.other_folds)) == ("mean", 2)
    assert resolved.origin.sha256 == resolve_source(model, SourceOptions(fold="mean")).origin.sha256


def test_fetching_twice_changes_nothing(tmp_path, hub, capsys):
    arguments = (REPOSITORY, "--to", tmp_path / "stick", "--cache-dir", tmp_path / "hf")
    fetch(capsys, *arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stick").rglob("*")}
    code, output, _ = fetch(capsys, *arguments)
    assert (code, "there already, unchanged" in output.out) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stick").rglob("*")} == before


def test_other_weights_of_the_same_name_are_replaced_only_when_asked(tmp_path, published, capsys):
    shelf = tmp_path / "stick"
    fetch(capsys, published, "--to", shelf)
    first = (shelf / "published" / "checkpoint_final.pth").read_bytes()
    write_checkpoint(published, state_dict(seed=1), embedded=plan(), sidecar=plan())
    code, output, _ = fetch(capsys, published, "--to", shelf)
    assert code == 1
    assert "has another checkpoint_final.pth" in output.err
    assert "--overwrite" in output.err
    assert output.err.count("\n") == 1
    assert (shelf / "published" / "checkpoint_final.pth").read_bytes() == first
    assert fetch(capsys, published, "--to", shelf, "--overwrite")[0] == 0
    assert resolve_source(shelf / "published").origin.sha256 == resolve_source(published).origin.sha256
    assert [path.name for path in shelf.iterdir()] == ["published"]  # nothing set aside is left


def test_a_folder_that_fetch_did_not_make_is_left_alone(tmp_path, published, capsys):
    (tmp_path / "stick" / "published").mkdir(parents=True)
    (tmp_path / "stick" / "published" / "thesis.txt").write_text("the only copy")
    for flags in ((), ("--overwrite",)):
        code, output, _ = fetch(capsys, published, "--to", tmp_path / "stick", *flags)
        assert (code, "was not put there by fetch" in output.err) == (1, True)
    assert (tmp_path / "stick" / "published" / "thesis.txt").read_text() == "the only copy"


def test_a_copy_that_changed_later_is_noticed(tmp_path, published, capsys):
    fetch(capsys, published, "--to", tmp_path / "stick")
    path = tmp_path / "stick" / "published" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(Exception, match=r"is not what fetched\.json beside it recorded.*--overwrite") as caught:
        resolve_source(tmp_path / "stick" / "published")
    assert type(caught.value).__name__ == "DigestMismatch"


def test_what_can_t_be_read_is_not_carried(tmp_path, capsys):
    (tmp_path / "checkpoint_final.pth").write_bytes(b"not a checkpoint")
    code, output, _ = fetch(capsys, tmp_path / "checkpoint_final.pth", "--to", tmp_path / "stick")
    assert code == 1
    assert output.err.count("\n") == 1
    assert not (tmp_path / "stick").exists()


def test_a_local_source_needs_no_download(published, capsys):
    code, output, words = fetch(capsys, published)
    assert (code, words[5]) == (0, str(published))
    assert "nothing had to be downloaded" in output.out
    assert "HF_HUB_OFFLINE" not in output.out


@pytest.mark.parametrize("command", ["fetch", "inspect", "preprocess", "finetune"])
def test_every_command_knows_how_to_choose(command):
    given = {
        "fetch": ["x"],
        "inspect": ["x"],
        "preprocess": ["-d", "1", "-n", "n", "-pc", "x"],
        "finetune": ["-d", "1", "-pc", "x"],
    }
    flags = ["--file", "a.pth", "--fold-of-source", "mean", "--stem", "7", "--axes", "xyz", "--revision", "v1"]
    parsed = build_parser().parse_args([command, *given[command], *flags])
    chosen = (parsed.source_file, parsed.source_fold, parsed.source_stem, parsed.source_axes, parsed.revision)
    assert chosen == ("a.pth", "mean", "7", "xyz", "v1")
    assert parsed.source == "x"


def test_the_choices_reach_the_checkpoint(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(
        "nnssl_adapt.weights.checkpoint.checkpoint.open_checkpoint", lambda source, **kw: seen.update(kw, source=source)
    )
    flags = ["--file", "a.pth", "--fold-of-source", "mean", "--stem", "7", "--axes", "xyz", "--revision", "v1"]
    open_source(build_parser().parse_args(["fetch", "x", *flags, "--cache-dir", "c", "--local-files-only"]))
    assert seen == {
        "source": "x",
        "revision": "v1",
        "cache_dir": "c",
        "local_files_only": True,
        "filename": "a.pth",
        "fold": "mean",
        "stem": "7",
        "axes": "xyz",
    }
