"""Zips: the layouts they come in, and those that mean harm."""

import hashlib
import io
import os
import stat
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nnssl_adapt.errors import DigestMismatch, SourceError, SourceNotFound
from nnssl_adapt.weights.sources import archive as module
from nnssl_adapt.weights.sources.archive import is_archive, list_archive, unpack
from nnssl_adapt.weights.sources.resolve import resolve_source
from nnssl_adapt.weights.sources.resolved import SourceOptions

MODEL = "nnUNetTrainer__nnUNetPlans_contrast_agnostic__3d_fullres"
MODEL_FILES = {
    f"{MODEL}/plans.json": b"plans",
    f"{MODEL}/dataset.json": b"dataset",
    f"{MODEL}/dataset_fingerprint.json": b"fingerprint",
    f"{MODEL}/fold_0/checkpoint_final.pth": b"weights of fold 0",
    f"{MODEL}/fold_0/progress.png": b"a picture",
    f"{MODEL}/fold_0/training_log_2026.txt": b"a log",
}


def write_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def below(folder, files):
    return {f"{folder}/{name}": content for name, content in files.items()}


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        MODEL_FILES,
        below("Dataset501_SyntheticCord", MODEL_FILES),
        below("release_r20260101", MODEL_FILES),
        below("release/Dataset501_SyntheticCord", MODEL_FILES),
        {name.removeprefix(f"{MODEL}/"): content for name, content in MODEL_FILES.items()},
        MODEL_FILES | {"README.md": b"#", "__MACOSX/fold_1/._checkpoint_final.pth": b"junk", ".DS_Store": b"junk"},
        MODEL_FILES | {f"__MACOSX/{name}": b"junk" for name in MODEL_FILES},
    ],
    ids=["trainer at the root", "dataset", "wrapped", "wrapped dataset", "bare", "extra files", "from a Mac"],
)
def test_every_layout_of_a_trained_model_is_found(tmp_path, own_cache, files):
    resolved = resolve_source(write_zip(tmp_path / "model.zip", files))
    assert resolved.weights.read_bytes() == b"weights of fold 0"
    assert resolved.weights.parent.parent == resolved.model_folder
    assert (resolved.model_folder / "plans.json").read_bytes() == b"plans"
    assert (resolved.model_folder / "dataset.json").read_bytes() == b"dataset"
    origin = resolved.origin
    assert (origin.kind, origin.fold, origin.filename) == ("zip", "0", "checkpoint_final.pth")
    assert origin.sha256 == hashlib.sha256(b"weights of fold 0").hexdigest()
    assert resolved.archive == tmp_path / "model.zip"
    unpacked = {name.rpartition("/")[2] for name in files_below(own_cache)}
    assert unpacked == {"plans.json", "dataset.json", "checkpoint_final.pth", "unpacked.json"}


@pytest.mark.parametrize("folder", ["", "mae/", "deep/er/"])
def test_a_zip_of_a_checkpoint_with_its_plan(tmp_path, folder):
    files = {f"{folder}checkpoint_final.pth": b"weights", f"{folder}adaptation_plan.json": b"{}"}
    resolved = resolve_source(write_zip(tmp_path / "mae.zip", files))
    assert (resolved.weights.read_bytes(), resolved.sidecar.read_bytes()) == (b"weights", b"{}")
    assert (resolved.model_folder, resolved.origin.fold) == (None, None)


def test_several_models_are_listed_and_one_can_be_chosen(tmp_path):
    other = {name.replace(MODEL, "nnUNetTrainer__nnUNetPlans__3d_lowres"): b"other" for name in MODEL_FILES}
    path = write_zip(tmp_path / "two.zip", {**MODEL_FILES, **other})
    with pytest.raises(
        SourceNotFound, match=rf"two\.zip holds 2 trained models: .*3d_lowres, {MODEL}.*--file"
    ) as caught:
        resolve_source(path)
    one_line(caught)
    assert resolve_source(path, SourceOptions(filename=MODEL)).weights.read_bytes() == b"weights of fold 0"
    chosen = resolve_source(
        path, SourceOptions(filename="nnUNetTrainer__nnUNetPlans__3d_lowres/fold_0/checkpoint_final.pth")
    )
    assert chosen.weights.read_bytes() == b"other"
    assert chosen.model_folder.name.endswith("3d_lowres")


def test_a_zip_without_weights_lists_what_it_holds(tmp_path, own_cache):
    path = write_zip(tmp_path / "pictures.zip", {"a.png": b"", "b/notes.txt": b""})
    with pytest.raises(
        SourceNotFound, match=r"pictures\.zip has no checkpoint_final\.pth.*a\.png, b/notes\.txt"
    ) as caught:
        resolve_source(path)
    one_line(caught)
    with pytest.raises(SourceError, match=r"a\.png is not a weight file"):
        resolve_source(path, SourceOptions(filename="a.png"))
    with pytest.raises(SourceError, match="holds another zip"):
        resolve_source(write_zip(tmp_path / "nested.zip", {"inner.zip": b"PK"}))


def test_the_only_zip_of_a_folder_is_taken(tmp_path):
    (tmp_path / "here").mkdir()
    write_zip(tmp_path / "here" / "model.zip", MODEL_FILES)
    assert resolve_source(tmp_path / "here").origin.kind == "zip"
    write_zip(tmp_path / "here" / "other.zip", MODEL_FILES)
    with pytest.raises(SourceNotFound, match=r"several zips: model\.zip, other\.zip"):
        resolve_source(tmp_path / "here")
    assert resolve_source(tmp_path / "here", SourceOptions(filename="other.zip")).archive.name == "other.zip"


def test_a_torch_file_is_no_archive_although_it_is_a_zip(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {"a": torch.ones(2, 3)}}, path)
    assert zipfile.is_zipfile(path)
    assert not is_archive(path)
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.zip")
    assert not is_archive(tmp_path / "weights.zip")
    assert resolve_source(path).origin.kind == "file"
    assert is_archive(write_zip(tmp_path / "download", MODEL_FILES))
    assert is_archive(write_zip(tmp_path / "with_pth.zip", {"checkpoint_final.pth": path.read_bytes()}))


# -- kept ------------------------------------------------------------------------------------------------------------


def test_a_zip_is_unpacked_once_wherever_it_lies(tmp_path, monkeypatch):
    first = resolve_source(write_zip(tmp_path / "model.zip", MODEL_FILES))
    moved = (tmp_path / "model.zip").rename(tmp_path / "renamed.zip")
    monkeypatch.setattr(module, "_extract", None)
    assert resolve_source(moved).weights == first.weights


def test_another_zip_of_the_same_name_is_unpacked_anew(tmp_path):
    path = write_zip(tmp_path / "model.zip", MODEL_FILES)
    first = resolve_source(path)
    write_zip(path, {**MODEL_FILES, f"{MODEL}/fold_0/checkpoint_final.pth": b"other weights"})
    second = resolve_source(path)
    assert (first.weights.read_bytes(), second.weights.read_bytes()) == (b"weights of fold 0", b"other weights")


@pytest.mark.parametrize("name", ["fold_0/checkpoint_final.pth", "plans.json", "dataset.json"])
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_copy_is_noticed(tmp_path, name, damage):
    path = write_zip(tmp_path / "model.zip", MODEL_FILES)
    victim = resolve_source(path).model_folder / name
    victim.unlink() if damage == "gone" else victim.write_bytes(b"X" + victim.read_bytes()[1:])
    error = SourceNotFound if damage == "gone" else DigestMismatch
    with pytest.raises(error, match=victim.name) as caught:
        resolve_source(path)
    one_line(caught)


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    path, cache = write_zip(tmp_path / "model.zip", MODEL_FILES), tmp_path / "cache"

    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            module, "file_digest", lambda p: killed() if p != path else hashlib.sha256(p.read_bytes()).hexdigest()
        )
        with pytest.raises(KeyboardInterrupt):
            unpack(path, cache)
    assert files_below(cache) == []
    # A SIGKILL leaves the staging folder, which nobody looks into; a folder without its record is not believed.
    target = cache / "unpacked" / hashlib.sha256(path.read_bytes()).hexdigest()
    (target / MODEL / "fold_0").mkdir(parents=True)
    (target / MODEL / "fold_0" / "checkpoint_final.pth").write_bytes(b"half")
    record = unpack(path, cache)
    assert (record.path.parent / MODEL / "fold_0" / "checkpoint_final.pth").read_bytes() == b"weights of fold 0"


def test_many_may_unpack_one_zip_at_the_same_time(tmp_path):
    files = {f"{MODEL}/fold_{fold}/checkpoint_final.pth": bytes([fold]) * 300_000 for fold in range(8)}
    path = write_zip(tmp_path / "model.zip", files)
    with ThreadPoolExecutor(6) as pool:
        records = list(pool.map(lambda _: unpack(path, tmp_path / "cache"), range(6)))
    assert all(record == records[0] for record in records)
    assert len(list((tmp_path / "cache" / "unpacked").iterdir())) == 1
    assert files_below(records[0].path.parent) == [*sorted(files), "unpacked.json"]


# -- dangerous -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil.pth", "a path out of"),
        ("a/../../evil.pth", "a path out of"),
        ("..\\evil.pth", "a path out of"),
        ("/tmp_evil.pth", "an absolute path"),
        ("C:/evil.pth", "an absolute path"),
        ("C:evil.pth", "an absolute path"),
        ("\\\\server\\evil.pth", "an absolute path"),
        ("a\\evil.pth", "a backslash"),
        ("../picture.png", "a path out of"),
    ],
)
def test_names_outside_the_folder_are_refused(tmp_path, own_cache, name, reason):
    path = write_zip(tmp_path / "evil.zip", {**MODEL_FILES, name: b"evil"})
    with pytest.raises(SourceError, match=rf"{reason}.*refused") as caught:
        resolve_source(path)
    assert repr(name) in one_line(caught)
    assert files_below(own_cache) == []
    assert files_below(tmp_path) == ["evil.zip"]


@pytest.mark.parametrize(("kind", "reason"), [(stat.S_IFLNK, "a symbolic link"), (stat.S_IFIFO, "no regular file")])
def test_links_and_devices_are_refused(tmp_path, own_cache, kind, reason):
    entry = zipfile.ZipInfo(f"{MODEL}/fold_0/checkpoint_best.pth")
    entry.create_system = 3  # Unix
    entry.external_attr = (kind | 0o777) << 16
    path = write_zip(tmp_path / "link.zip", MODEL_FILES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(SourceError, match=rf"checkpoint_best\.pth', {reason}: refused"):
        resolve_source(path)
    assert files_below(own_cache) == []


def test_a_bomb_is_refused_before_it_goes_off(tmp_path, own_cache, monkeypatch):
    path = write_zip(tmp_path / "bomb.zip", {"checkpoint_final.pth": bytes(80 << 20)})
    assert path.stat().st_size < 100_000
    with pytest.raises(SourceError, match=r"bomb\.zip .* would unpack to 80\.0 MiB, more than 100 times") as caught:
        resolve_source(path)
    one_line(caught)
    monkeypatch.setattr(module, "MAX_BYTES", 70 << 20)
    with pytest.raises(SourceError, match=r"would unpack to 80\.0 MiB, more than 70\.0 MiB"):
        resolve_source(path)
    monkeypatch.setattr(module, "MAX_ENTRIES", 0)
    with pytest.raises(SourceError, match="holds 1 files"):
        resolve_source(path)
    assert files_below(own_cache) == []


def test_a_bomb_of_overlapping_entries_is_refused(tmp_path, monkeypatch):
    """Many names for the same bytes: each is harmless alone, the sum is not."""
    content = os.urandom(1000) + bytes(9 << 20)
    path = write_zip(tmp_path / "many.zip", {f"{i}.pth": content for i in range(20)})
    with pytest.raises(SourceError, match=r"would unpack to 0\.2 GiB"):
        unpack(path, tmp_path)


def test_weights_of_zeros_in_a_small_zip_are_no_bomb(tmp_path):
    path = write_zip(tmp_path / "zeros.zip", {"checkpoint_final.pth": bytes(20 << 20)})
    assert resolve_source(path).weights.stat().st_size == 20 << 20


def with_claimed_size(path, size):
    """The zip, its only file claiming another size, in the central directory and before the data."""
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = content.index(signature) + offset
        content[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("claimed", [10, 5 << 20])
def test_a_size_that_lies_is_noticed(tmp_path, own_cache, claimed):
    path = write_zip(tmp_path / "liar.zip", {"checkpoint_final.pth": bytes(1 << 20)})
    with pytest.raises(SourceError, match=r"liar\.zip.*(damaged|refused)") as caught:
        resolve_source(with_claimed_size(path, claimed))
    one_line(caught)
    assert files_below(own_cache) == []


def test_one_name_twice_is_refused(tmp_path):
    path = write_zip(tmp_path / "twice.zip", {"checkpoint_final.pth": b"one"})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("checkpoint_final.pth", b"two")
    with pytest.raises(SourceError, match=r"checkpoint_final\.pth twice"):
        resolve_source(path)


# -- damaged ---------------------------------------------------------------------------------------------------------


def test_a_truncated_zip_gets_one_clear_error_wherever_it_ends(tmp_path, own_cache):
    whole = write_zip(tmp_path / "whole.zip", MODEL_FILES | {"big/x.pth": os.urandom(5000)}).read_bytes()
    path = tmp_path / "short.zip"
    for length in range(0, len(whole), len(whole) // 23):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError, match=r"short\.zip.*damaged") as caught:
            resolve_source(path)
        one_line(caught)
    assert files_below(own_cache) == []


def test_flipped_bytes_are_never_taken_for_weights(tmp_path):
    """Anywhere in the zip: either it is refused, or what comes out is what went in."""
    content = bytes((7 * i * i + 13 * i) % 251 for i in range(400))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("checkpoint_final.pth", content)
    path, refused = tmp_path / "flipped.zip", 0
    for position in range(len(buffer.getvalue())):
        damaged = bytearray(buffer.getvalue())
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert resolve_source(path).weights.read_bytes() == content
        except SourceError:
            refused += 1
    assert refused > len(buffer.getvalue()) // 2


def test_a_zip_with_a_password_says_what_to_do(tmp_path):
    path = write_zip(tmp_path / "locked.zip", {"checkpoint_final.pth": b"weights"})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"can't be unpacked.*password.*unpack it yourself") as caught:
        resolve_source(path)
    one_line(caught)


def test_names_are_listed_without_folders(tmp_path):
    path = write_zip(tmp_path / "model.zip", {"a/": b"", "a/b.pth": b""})
    assert list_archive(path) == ["a/b.pth"]
