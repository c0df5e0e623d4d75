"""Files at plain web addresses, from a real server on 127.0.0.1 that behaves and misbehaves."""

import hashlib
import zipfile
from urllib.request import Request

import pytest
from support.hub_server import Page

from nnssl_adapt.errors import (
    DigestMismatch,
    OutputError,
    SourceAccessDenied,
    SourceError,
    SourceNotFound,
    SourceUnavailable,
)
from nnssl_adapt.weights.sources import download as module
from nnssl_adapt.weights.sources.download import Address, download, safe_name
from nnssl_adapt.weights.sources.resolve import resolve_source
from nnssl_adapt.weights.sources.resolved import SourceOptions

CONTENT = bytes(range(256)) * 5000 + b"the end"  # more than one block
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def weights(web):
    """Address of a weight file."""
    web.pages["/r20251103/weights.pth"] = Page(CONTENT)
    return f"{web.url}/r20251103/weights.pth"


def fetch(url, folder, **options):
    return download(Address.parse(url), folder, **options)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# -- found -----------------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_and_then_found_without_asking(web, weights, tmp_path):
    path, digest = fetch(weights, tmp_path)
    assert (path.name, path.read_bytes(), digest) == ("weights.pth", CONTENT, DIGEST)
    assert len(web.requests) == 1
    web.stop()
    assert fetch(weights, tmp_path) == (path, digest)
    assert files_below(tmp_path) == ["download.json", "weights.pth"]


def test_two_addresses_with_one_file_name_are_kept_apart(web, weights, tmp_path):
    web.pages["/r20260101/weights.pth"] = Page(b"newer")
    old, _ = fetch(weights, tmp_path)
    new, _ = fetch(f"{web.url}/r20260101/weights.pth", tmp_path)
    assert (old.read_bytes(), new.read_bytes()) == (CONTENT, b"newer")


def test_a_source_can_be_an_address(web, weights, own_cache, tmp_path):
    resolved = resolve_source(weights)
    assert resolved.weights.is_relative_to(own_cache)
    origin = resolved.origin
    assert (origin.kind, origin.sha256, origin.source, origin.filename) == ("url", DIGEST, weights, "weights.pth")
    assert (origin.repo_id, origin.revision, resolved.sidecar) == (None, None, None)
    elsewhere = resolve_source(weights, SourceOptions(cache_dir=tmp_path / "other"))
    assert elsewhere.weights.is_relative_to(tmp_path / "other")


def test_the_right_digest_is_accepted_in_either_case(weights, tmp_path):
    assert fetch(f"{weights}#sha256={DIGEST.upper()}", tmp_path)[1] == DIGEST
    assert fetch(f"{weights}#sha256={DIGEST}", tmp_path)[1] == DIGEST


def test_redirects_are_followed_and_the_name_is_the_server_s(web, tmp_path):
    web.pages["/releases/download/r1/model.zip"] = Page(status=302, headers={"Location": "/store/0b5c7a?sig=x"})
    disposition = 'attachment; filename="model_r1.zip"'
    web.pages["/store/0b5c7a"] = Page(CONTENT, headers={"Content-Disposition": disposition})
    assert fetch(f"{web.url}/releases/download/r1/model.zip", tmp_path)[0].name == "model_r1.zip"
    web.pages["/store/0b5c7a"].headers.clear()
    assert fetch(f"{web.url}/releases/download/r1/model.zip", tmp_path / "b")[0].name == "model.zip"


def test_an_address_with_blanks_and_umlauts_is_quoted(web, tmp_path):
    web.pages["/my%20m%C3%BCde%20weights.pth"] = Page(CONTENT)
    path, _ = fetch(f"{web.url}/my müde weights.pth", tmp_path)
    assert path.name == "my_m_de_weights.pth"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("../../.ssh/authorized_keys", "authorized_keys"),
        ("..\\..\\evil.pth", "evil.pth"),
        ("/etc/passwd", "passwd"),
        (".bashrc", "bashrc"),
        ("-rf", "rf"),
        ("a b;c\n.pth", "a_b_c_.pth"),
        ("..", "download"),
        ("", "download"),
        ("x" * 300 + ".pth", "x" * 116 + ".pth"),
    ],
)
def test_names_from_servers_stay_in_their_folder(said, name):
    assert safe_name(said) == name


def test_a_hostile_file_name_stays_in_its_folder(web, tmp_path):
    web.pages["/x"] = Page(CONTENT, headers={"Content-Disposition": 'attachment; filename="../../../evil.pth"'})
    path, _ = fetch(f"{web.url}/x", tmp_path / "cache")
    assert path.name == "evil.pth"
    assert path.is_relative_to(tmp_path / "cache" / "web")


def test_a_file_called_as_our_record_is_kept_too(web, tmp_path):
    web.pages["/download.json"] = Page(CONTENT)
    for _ in range(2):
        assert fetch(f"{web.url}/download.json", tmp_path)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("record", ["", "{", "[]", '{"files": {}, "about": {}}', '{"files": [1], "about": {}}', "\xff"])
def test_a_record_that_can_t_be_read_is_no_record(web, weights, tmp_path, record):
    path, _ = fetch(weights, tmp_path)
    (path.parent / "download.json").write_text(record, encoding="latin-1")
    assert fetch(weights, tmp_path) == (path, DIGEST)
    assert len(web.requests) == 2


# -- broken transfers ------------------------------------------------------------------------------------------------


def test_a_broken_transfer_goes_on_where_it_broke(web, weights, tmp_path):
    web.pages["/r20251103/weights.pth"].breaks += [300_000, 500_000]
    assert fetch(weights, tmp_path)[0].read_bytes() == CONTENT
    assert [wanted for _, wanted in web.requests] == [None, "bytes=300000-", "bytes=800000-"]


@pytest.mark.parametrize(
    "page",
    [
        {"breaks": [300_000] * 9, "resumable": False},
        {"breaks": [300_000] * 9, "headers": {"ETag": 'W/"weak"'}},
        {"breaks": [1000] * 9},
        {"breaks": [0] * 9},
    ],
    ids=["no ranges", "version unknown", "again and again", "at once"],
)
def test_a_transfer_that_can_t_be_finished_leaves_nothing(web, weights, tmp_path, page):
    web.pages["/r20251103/weights.pth"] = Page(CONTENT, **page)
    with pytest.raises(
        SourceUnavailable, match=rf"broke off after \d+ of {len(CONTENT)} bytes.*same command"
    ) as caught:
        fetch(weights, tmp_path)
    one_line(caught)
    assert files_below(tmp_path) == []
    web.pages["/r20251103/weights.pth"] = Page(CONTENT)
    assert fetch(weights, tmp_path)[1] == DIGEST


def test_halves_of_two_versions_are_never_joined(web, weights, tmp_path):
    web.pages["/r20251103/weights.pth"].breaks.append(300_000)
    changed = Page(CONTENT[::-1])
    opened = module._Transfer.open

    def replaced_in_between(self, start=0):
        if start:
            web.pages["/r20251103/weights.pth"] = changed
        return opened(self, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Transfer, "open", replaced_in_between)
        with pytest.raises(SourceUnavailable, match="broke off"):
            fetch(weights, tmp_path)
    assert files_below(tmp_path) == []


def test_a_server_that_hides_the_length_is_believed_only_with_a_digest(web, weights, tmp_path):
    web.pages["/r20251103/weights.pth"].says_length = False
    with pytest.raises(SourceError, match="does not say how long.*#sha256=") as caught:
        fetch(weights, tmp_path)
    one_line(caught)
    assert fetch(f"{weights}#sha256={DIGEST}", tmp_path)[1] == DIGEST


def test_a_killed_run_s_leftover_is_not_taken_for_whole(web, weights, tmp_path):
    path, _ = fetch(weights, tmp_path)
    (path.parent / "download.json").unlink()  # written last
    path.write_bytes(CONTENT[:1000])
    assert fetch(weights, tmp_path)[0].read_bytes() == CONTENT
    assert len(web.requests) == 2


# -- digests ---------------------------------------------------------------------------------------------------------


def test_a_wrong_digest_is_refused_and_nothing_kept(web, weights, tmp_path):
    with pytest.raises(DigestMismatch, match=f"has sha256 {DIGEST}, and {'0' * 64} was requested") as caught:
        fetch(f"{weights}#sha256={'0' * 64}", tmp_path)
    one_line(caught)
    assert files_below(tmp_path) == []


def test_a_changed_file_under_the_same_name_is_noticed(web, weights, tmp_path):
    path, _ = fetch(weights, tmp_path)
    content = bytearray(path.read_bytes())
    content[70_000] ^= 4
    path.write_bytes(content)
    with pytest.raises(DigestMismatch, match=rf"{path} is not what download\.json.*delete {path.parent}") as caught:
        fetch(weights, tmp_path)
    one_line(caught)
    path.unlink()
    with pytest.raises(SourceNotFound, match="is gone"):
        fetch(weights, tmp_path)


def test_a_kept_file_must_have_the_digest_asked_for_later(weights, tmp_path):
    path, _ = fetch(weights, tmp_path)
    with pytest.raises(DigestMismatch, match=f"downloaded earlier.*delete {path.parent}") as caught:
        fetch(f"{weights}#sha256={'1' * 64}", tmp_path)
    one_line(caught)
    assert path.exists()


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (404, SourceNotFound, "check the address"),
        (410, SourceNotFound, "check the address"),
        (401, SourceAccessDenied, "logged in"),
        (403, SourceAccessDenied, "logged in"),
        (429, SourceUnavailable, "try again later"),
        (500, SourceUnavailable, "try again later"),
        (503, SourceUnavailable, "try again later"),
    ],
)
def test_refusals_are_told_apart(web, tmp_path, status, error, says):
    web.pages["/x.zip"] = Page(b"no", status=status)
    with pytest.raises(error, match=rf"/x\.zip.*HTTP {status}.*{says}") as caught:
        fetch(f"{web.url}/x.zip", tmp_path)
    assert type(caught.value) is error
    one_line(caught)
    assert files_below(tmp_path) == []


def test_a_web_page_is_no_file(web, tmp_path):
    web.pages["/owner/name/releases/tag/r1"] = Page(b"<html>", headers={"Content-Type": "text/html; charset=utf-8"})
    with pytest.raises(SourceError, match="is a web page.*releases/download") as caught:
        fetch(f"{web.url}/owner/name/releases/tag/r1", tmp_path)
    one_line(caught)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("target", ["http://example.invalid/x", "ftp://127.0.0.1/x", "file:///etc/passwd", "/x"])
def test_redirects_to_elsewhere_than_https_and_in_circles_are_refused(web, tmp_path, target):
    web.pages["/x"] = Page(status=302, headers={"Location": target})
    with pytest.raises(SourceError, match="redirects to .*refused") as caught:
        fetch(f"{web.url}/x", tmp_path)
    assert type(caught.value) is SourceError
    one_line(caught)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("target", ["http://github.com/x.zip", "http://127.0.0.1:80/x.zip"])
def test_https_is_never_left_for_http(target):
    request = Request("https://github.com/o/n/releases/download/t/x.zip")
    handler = module.SafeRedirects()
    with pytest.raises(SourceError, match="which is not https: refused"):
        handler.redirect_request(request, None, 302, "Found", {}, target)
    followed = handler.redirect_request(request, None, 302, "Found", {}, "https://objects.example.org/x")
    assert followed.full_url == "https://objects.example.org/x"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://example.org/x.zip", "over http"),
        ("ftp://example.org/x.zip", "neither an https address"),
        ("file:///etc/passwd", "neither an https address"),
        ("https://example.org/x.zip#sha256=abc", "64 hexadecimal digits"),
        ("https://example.org/x.zip#readme", "64 hexadecimal digits"),
        (f"https://example.org/x.zip#md5={'0' * 64}", "64 hexadecimal digits"),
    ],
)
def test_addresses_that_can_t_be_trusted_are_refused_before_asking(address, says):
    with pytest.raises(SourceError, match=says) as caught:
        Address.parse(address)
    one_line(caught)


# -- offline ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_offline_uses_only_what_was_downloaded_before(web, weights, tmp_path, monkeypatch, how):
    if how == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailable, match="nnssl-adapt fetch") as caught:
        resolve_source(weights, SourceOptions(cache_dir=tmp_path, local_files_only=how == "flag"))
    one_line(caught)
    assert web.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    online = resolve_source(weights, SourceOptions(cache_dir=tmp_path))
    web.requests.clear()
    if how == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_source(weights, SourceOptions(cache_dir=tmp_path, local_files_only=how == "flag")) == online
    assert web.requests == []


def test_a_server_that_is_gone_is_unavailable(web, weights, tmp_path):
    web.stop()
    with pytest.raises(SourceUnavailable, match="can't be reached") as caught:
        fetch(weights, tmp_path)
    one_line(caught)


def test_a_cache_that_can_t_be_written_is_said_to_be(weights, tmp_path):
    (tmp_path / "web").write_text("a file where a folder is needed")
    with pytest.raises(OutputError, match="a file stands where a folder is needed") as caught:
        fetch(weights, tmp_path)
    one_line(caught)


# -- what was downloaded is a zip ------------------------------------------------------------------------------------


def test_a_downloaded_zip_is_unpacked_beside_the_downloads(web, tmp_path):
    model = "nnUNetTrainer__nnUNetPlans__3d_fullres"
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
            archive.writestr(f"{model}/{name}", name)
    web.pages["/x.zip"] = Page((tmp_path / "x.zip").read_bytes())
    resolved = resolve_source(f"{web.url}/x.zip", SourceOptions(cache_dir=tmp_path / "cache"))
    assert resolved.weights.read_text() == "fold_0/checkpoint_final.pth"
    assert resolved.model_folder.name == model
    assert (resolved.origin.kind, resolved.origin.fold) == ("url", "0")
    assert resolved.archive.read_bytes() == web.pages["/x.zip"].content
    assert all(path.is_relative_to(tmp_path / "cache") for path in (resolved.weights, resolved.archive))
    with pytest.raises(SourceError, match="has no revision 'v1'"):
        resolve_source(f"{web.url}/x.zip", SourceOptions(revision="v1"))
