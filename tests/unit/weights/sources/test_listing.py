"""Trained model folders as sources: found wherever they are, folds chosen, one rule for folders, zips and the hub."""

import hashlib
import logging
import zipfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nnssl_adapt.errors import SourceError, SourceNotFound, SourceUnavailable
from nnssl_adapt.weights.sources.listing import choose_files
from nnssl_adapt.weights.sources.resolve import resolve_source
from nnssl_adapt.weights.sources.resolved import SourceOptions

TRAINER = "nnUNetTrainer__nnUNetPlans__3d_fullres"
DATASET = "Dataset501_SyntheticCord"


def model_files(folds=("0",), folder=TRAINER, names=("checkpoint_final.pth", "checkpoint_best.pth"), jsons=True):
    """Name → content, every content its own."""
    below = f"{folder}/" if folder else ""
    files = {f"{below}fold_{fold}/{name}": f"{name} of fold {fold}" for fold in folds for name in names}
    return files | ({f"{below}{name}": name for name in ("plans.json", "dataset.json")} if jsons else {})


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- where it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["", f"{DATASET}", f"{DATASET}/{TRAINER}", f"{DATASET}/{TRAINER}/fold_0"])
def test_a_model_is_found_from_every_folder_around_it(tmp_path, named):
    write(tmp_path / DATASET, model_files())
    resolved = resolve_source(tmp_path / named)
    assert resolved.weights == tmp_path / DATASET / TRAINER / "fold_0" / "checkpoint_final.pth"
    assert resolved.model_folder == tmp_path / DATASET / TRAINER
    origin = resolved.origin
    assert (origin.kind, origin.fold, origin.sha256) == ("model_folder", "0", digest("checkpoint_final.pth of fold 0"))


def test_a_file_in_a_fold_knows_its_model(tmp_path, monkeypatch):
    write(tmp_path, model_files(("0", "3")))
    path = tmp_path / TRAINER / "fold_3" / "checkpoint_best.pth"
    resolved = resolve_source(path)
    assert (resolved.weights, resolved.model_folder) == (path, tmp_path / TRAINER)
    assert (resolved.origin.kind, resolved.origin.fold) == ("file", "3")
    monkeypatch.chdir(path.parent)
    assert resolve_source("checkpoint_best.pth").model_folder == tmp_path / TRAINER
    assert resolve_source(".").origin.fold == "3"


def test_a_wish_goes_before_the_fold_in_the_path(tmp_path):
    """A plan keeps the first fold's path as a hint, and the wish for a mean."""
    write(tmp_path, model_files(("0", "1")))
    named = tmp_path / TRAINER / "fold_0"
    for source in (named, named / "checkpoint_final.pth"):
        resolved = resolve_source(source, SourceOptions(fold="mean"))
        assert (resolved.origin.fold, len(resolved.other_folds)) == ("mean", 1)
    assert (
        resolve_source(
            named / "checkpoint_final.pth", SourceOptions(filename="checkpoint_final.pth", fold="1")
        ).origin.fold
        == "1"
    )


def test_linked_folds_are_followed(tmp_path):
    write(tmp_path / "elsewhere", {"checkpoint_final.pth": "weights"})
    write(tmp_path / "model", {"plans.json": "", "dataset.json": ""})
    (tmp_path / "model" / "fold_0").symlink_to(tmp_path / "elsewhere")
    assert resolve_source(tmp_path / "model").model_folder == tmp_path / "model"


def test_several_models_are_listed(tmp_path):
    other = TRAINER.replace("3d_fullres", "3d_lowres")
    write(tmp_path, model_files() | model_files(folder=other))
    with pytest.raises(
        SourceNotFound, match=f"holds 2 trained models: {TRAINER}, {other}; choose one with --file"
    ) as caught:
        resolve_source(tmp_path)
    one_line(caught)
    assert resolve_source(tmp_path, SourceOptions(filename=other)).model_folder.name == other
    assert (
        resolve_source(tmp_path, SourceOptions(filename=f"{other}/fold_0/checkpoint_best.pth")).model_folder.name
        == other
    )


def test_2d_networks_are_passed_over_unless_named(tmp_path):
    flat = TRAINER.replace("3d_fullres", "2d")
    write(tmp_path, model_files() | model_files(folder=flat))
    assert resolve_source(tmp_path).model_folder.name == TRAINER
    for named in (flat, f"{flat}/fold_0", f"{flat}/fold_0/checkpoint_final.pth"):
        assert resolve_source(tmp_path / named).model_folder.name == flat


def test_what_nnssl_leaves_has_folds_but_is_no_trained_model(tmp_path):
    files = model_files(("all",), "BaseMAETrainer__nnsslPlans__onemmiso", jsons=False)
    write(tmp_path, files | {"BaseMAETrainer__nnsslPlans__onemmiso/fold_all/adaptation_plan.json": "{}"})
    resolved = resolve_source(tmp_path)
    assert (resolved.model_folder, resolved.origin.kind, resolved.origin.fold) == (None, "folder", "all")
    assert resolved.sidecar.parent == resolved.weights.parent


# -- which fold ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folds", "taken"), [(("2",), "2"), (("all",), "all"), (("0", "1", "all"), "all"), (("10", "2", "3"), "2")]
)
def test_the_fold_without_a_wish(tmp_path, caplog, folds, taken):
    write(tmp_path, model_files(folds, folder=""))
    with caplog.at_level(logging.INFO, logger="nnssl_adapt"):
        assert resolve_source(tmp_path).origin.fold == taken
    said = [record.getMessage() for record in caplog.records if "--fold-of-source" in record.getMessage()]
    assert len(said) == (len(folds) > 1)
    assert all(f"using {taken}" in line for line in said)


def test_a_fold_can_be_asked_for(tmp_path):
    write(tmp_path, model_files(("0", "1", "all"), folder=""))
    for fold, folder in (("1", "fold_1"), ("fold_1", "fold_1"), ("all", "fold_all")):
        assert resolve_source(tmp_path, SourceOptions(fold=fold)).weights.parent.name == folder
    with pytest.raises(SourceNotFound, match=r"has no fold 4; it has 0, 1, all \(or mean\)") as caught:
        resolve_source(tmp_path, SourceOptions(fold="4"))
    one_line(caught)


def test_the_mean_is_of_all_numbered_folds_in_order(tmp_path):
    write(tmp_path, model_files(("1", "0", "10", "2", "all"), folder=""))
    resolved = resolve_source(tmp_path, SourceOptions(fold="mean"))
    assert resolved.weights.parent.name == "fold_0"
    assert [path.parent.name for path in resolved.other_folds] == ["fold_1", "fold_2", "fold_10"]
    joined = "".join(digest(f"checkpoint_final.pth of fold {fold}") for fold in (0, 1, 2, 10))
    assert (resolved.origin.fold, resolved.origin.sha256) == ("mean", digest(joined))


def test_the_mean_of_one_fold_is_that_fold(tmp_path):
    write(tmp_path, model_files(("3",), folder=""))
    resolved = resolve_source(tmp_path, SourceOptions(fold="mean"))
    assert (resolved.other_folds, resolved.origin.sha256) == ((), digest("checkpoint_final.pth of fold 3"))


def test_final_goes_before_best_unless_asked_for(tmp_path):
    files = model_files(("0", "1"), folder="")
    del files["fold_1/checkpoint_final.pth"]
    write(tmp_path, files)
    assert resolve_source(tmp_path, SourceOptions(fold="0")).weights.name == "checkpoint_final.pth"
    assert resolve_source(tmp_path, SourceOptions(fold="1")).weights.name == "checkpoint_best.pth"
    best = resolve_source(tmp_path, SourceOptions(filename="checkpoint_best.pth", fold="mean"))
    assert {path.name for path in (best.weights, *best.other_folds)} == {"checkpoint_best.pth"}
    assert (
        resolve_source(tmp_path, SourceOptions(filename="checkpoint_final.pth")).origin.fold == "0"
    )  # the only one that has it
    with pytest.raises(SourceNotFound, match=r"no fold 1 with checkpoint_final\.pth; it has 0"):
        resolve_source(tmp_path, SourceOptions(filename="checkpoint_final.pth", fold="1"))
    with pytest.raises(SourceNotFound, match=r"no other\.pth; it holds fold_0/checkpoint_best\.pth") as caught:
        resolve_source(tmp_path, SourceOptions(filename="other.pth"))
    one_line(caught)


def test_several_unknown_files_in_a_fold_are_listed(tmp_path):
    write(tmp_path, model_files(names=("a.pth", "b.pth"), folder=""))
    with pytest.raises(
        SourceNotFound, match=r"fold_0 has several weight files: a\.pth, b\.pth; choose one with --file"
    ):
        resolve_source(tmp_path)
    assert resolve_source(tmp_path, SourceOptions(filename="b.pth")).model_folder == tmp_path


def test_a_fold_of_what_has_none_is_an_error(tmp_path):
    write(tmp_path, {"checkpoint_final.pth": "weights"})
    for source in (tmp_path, tmp_path / "checkpoint_final.pth"):
        with pytest.raises(SourceError, match="is in no trained model folder.*no fold '0'") as caught:
            resolve_source(source, SourceOptions(fold="0"))
        one_line(caught)


# -- the same rules everywhere ---------------------------------------------------------------------------------------

CASES = [
    (["checkpoint_final.pth", "checkpoint_best.pth"], "checkpoint_final.pth"),
    (["only.ckpt", "adaptation_plan.json", "README.md"], "only.ckpt"),
    (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
    (["net.pth", "net.safetensors"], "net.safetensors"),
    (["mae/checkpoint_final.pth", "mae/adaptation_plan.json", "docs/a.png"], "mae/checkpoint_final.pth"),
    (sorted(model_files(("0", "1"))), f"{TRAINER}/fold_0/checkpoint_final.pth"),
    (sorted(model_files(folder="")), "fold_0/checkpoint_final.pth"),
    (["checkpoint_final.pth", *sorted(model_files())], "checkpoint_final.pth"),
]
AMBIGUOUS = [
    ["a.pth", "b.pth"],
    ["a.safetensors", "b.pth"],
    ["x/a.pth", "y/a.pth"],
    ["x/a.pth", "x/b.pth"],
    ["README.md"],
    [],
]


@pytest.mark.parametrize(("names", "expected"), CASES)
def test_folder_zip_and_repository_choose_alike(tmp_path, hub, names, expected):
    files = {name: f"content of {name}" for name in names}
    write(tmp_path / "folder", files)
    with zipfile.ZipFile(tmp_path / "zip.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    hub.add("owner/name", {name: content.encode() for name, content in files.items()})
    sources = (tmp_path / "folder", tmp_path / "zip.zip", "owner/name")
    found = [resolve_source(source, SourceOptions(cache_dir=tmp_path / "cache")) for source in sources]
    assert {resolved.weights.read_text() for resolved in found} == {f"content of {expected}"}
    assert len({resolved.origin.sha256 for resolved in found}) == 1
    for beside in ("sidecar", "model_folder"):
        assert len({getattr(resolved, beside) is None for resolved in found}) == 1


@pytest.mark.parametrize("names", AMBIGUOUS)
def test_folder_zip_and_repository_refuse_alike(tmp_path, hub, names):
    write(tmp_path / "folder", dict.fromkeys(names, "x"))
    (tmp_path / "folder").mkdir(exist_ok=True)
    with zipfile.ZipFile(tmp_path / "zip.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    hub.add("owner/name", dict.fromkeys(names, b"x"))
    listed = "in several folders: x, y" if "y/a.pth" in names else ", ".join(names) or "nothing"
    for source in (tmp_path / "folder", tmp_path / "zip.zip", "owner/name"):
        with pytest.raises(SourceNotFound, match=listed) as caught:
            resolve_source(source, SourceOptions(cache_dir=tmp_path / "cache"))
        assert str(source) in one_line(caught)


def test_a_folder_can_be_chosen_by_its_name():
    names = ["x/checkpoint_final.pth", "x/adaptation_plan.json", "y/a.pth", "y/z/b.pth"]
    assert choose_files(names, "here", "x").names == ("x/adaptation_plan.json", "x/checkpoint_final.pth")
    assert choose_files(names, "here", "y/").weights == ("y/a.pth",)
    assert choose_files(names, "here", "y/z").weights == ("y/z/b.pth",)


def test_a_name_may_leave_out_its_folders():
    names = ["a/x.pth", "a/adaptation_plan.json", "b/y.pth", "b/z.pth"]
    assert choose_files(names, "here", "x.pth").weights == ("a/x.pth",)
    assert choose_files(names, "here", "x.pth").sidecar == "a/adaptation_plan.json"
    with pytest.raises(SourceNotFound, match=r"several z\.pth: b/z\.pth, c/z\.pth"):
        choose_files([*names, "c/z.pth"], "here", "z.pth")


_PARTS = [
    "fold_0",
    "fold_1",
    "fold_all",
    "A__B__3d_fullres",
    "A__B__2d",
    "Dataset001_X",
    "wrapping",
    "__MACOSX",
    ".git",
]
_FILES = ["checkpoint_final.pth", "checkpoint_best.pth", "a.pth", "b.safetensors", "x.zip", "plans.json", "dataset.json",
          "adaptation_plan.json", "README.md"]  # fmt: skip
_NAMES = st.builds(
    lambda folders, file: "/".join([*folders, file]),
    st.lists(st.sampled_from(_PARTS), max_size=3),
    st.sampled_from(_FILES),
)


@example({"A__B__2d/fold_0/fold_0/checkpoint_final.pth"}, None, None)
@given(
    st.sets(_NAMES, max_size=8),
    st.none() | st.sampled_from([*_PARTS, *_FILES]) | _NAMES,
    st.sampled_from([None, "0", "1", "all", "mean"]),
)
def test_any_mess_is_chosen_from_or_refused_in_one_line(names, filename, fold):
    try:
        chosen = choose_files(names, "here", filename, fold)
    except SourceError as error:
        assert "\n" not in str(error)
        assert "here" in str(error)
        return
    assert set(chosen.names) <= names
    assert not any(part.startswith((".", "__MACOSX")) for name in chosen.names for part in name.split("/"))
    if fold is not None and not chosen.is_archive:
        assert chosen.fold == fold
    if filename in _FILES and not chosen.is_archive:
        assert all(name.endswith(filename) for name in chosen.weights)


# -- on the hub ------------------------------------------------------------------------------------------------------


def test_a_model_folder_on_the_hub_comes_whole_and_works_offline(tmp_path, hub):
    files = model_files(("0", "1"))
    repository = hub.add("owner/model", {name: content.encode() for name, content in files.items()})
    resolved = resolve_source("owner/model", SourceOptions(cache_dir=tmp_path, fold="mean"))
    assert (resolved.model_folder / "plans.json").read_text() == "plans.json"
    assert (resolved.model_folder / "dataset.json").read_text() == "dataset.json"
    assert [path.parent.name for path in (resolved.weights, *resolved.other_folds)] == ["fold_0", "fold_1"]
    assert (resolved.origin.revision, resolved.origin.fold) == (repository.commit, "mean")
    assert (
        resolve_source("owner/model", SourceOptions(cache_dir=tmp_path, fold="mean", local_files_only=True)) == resolved
    )
    pinned = resolve_source(
        f"owner/model@{repository.commit}", SourceOptions(cache_dir=tmp_path, fold="mean", local_files_only=True)
    )
    assert pinned.weights == resolved.weights
    with pytest.raises(SourceUnavailable, match=r"is not in the Hugging Face cache"):
        resolve_source("owner/model", SourceOptions(cache_dir=tmp_path, fold="7", local_files_only=True))
    with pytest.raises(SourceNotFound, match="no fold 7; it has 0, 1"):
        resolve_source("owner/model", SourceOptions(cache_dir=tmp_path, fold="7"))


def test_an_address_of_one_fold_s_file_finds_its_model(tmp_path, hub):
    hub.add("owner/model", {name: content.encode() for name, content in model_files(("0", "1")).items()})
    address = f"{hub.url}/owner/model/blob/main/{TRAINER}/fold_1/checkpoint_best.pth"
    resolved = resolve_source(address, SourceOptions(cache_dir=tmp_path))
    assert (resolved.origin.fold, resolved.weights.name) == ("1", "checkpoint_best.pth")
    assert resolved.model_folder.name == TRAINER
    for page, fold in ((f"{TRAINER}/fold_1", "1"), (TRAINER, "0")):
        resolved = resolve_source(f"{hub.url}/owner/model/tree/main/{page}", SourceOptions(cache_dir=tmp_path))
        assert (resolved.origin.fold, resolved.model_folder.name) == (fold, TRAINER)


def test_a_zip_on_the_hub_is_unpacked(tmp_path, hub):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, content in model_files(("0", "1")).items():
            archive.writestr(name, content)
    repository = hub.add("owner/zipped", {"model.zip": (tmp_path / "x.zip").read_bytes(), "README.md": b"#"})
    for options in ({}, {"filename": "model.zip"}, {"filename": "checkpoint_final.pth"}, {"local_files_only": True}):
        resolved = resolve_source("owner/zipped", SourceOptions(cache_dir=tmp_path / "cache", **options))
        assert resolved.weights.read_text() == "checkpoint_final.pth of fold 0"
        origin = resolved.origin
        assert (origin.kind, origin.repo_id, origin.revision) == ("huggingface", "owner/zipped", repository.commit)
    assert resolve_source("owner/zipped", SourceOptions(cache_dir=tmp_path / "cache", fold="1")).origin.fold == "1"
