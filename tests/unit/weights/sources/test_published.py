"""The catalogue of published networks: complete entries, short names that lead to the right files, facts that are told."""

import importlib.util
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from support.hub_server import Page

from nnssl_adapt.cli.main import main
from nnssl_adapt.errors import SourceNotFound
from nnssl_adapt.weights.network.architectures import KINDS
from nnssl_adapt.weights.sources import published
from nnssl_adapt.weights.sources.hub_files import HubAddress
from nnssl_adapt.weights.sources.published import find_published, known_name, published_models
from nnssl_adapt.weights.sources.resolve import resolve_source
from nnssl_adapt.weights.sources.resolved import SourceOptions

MODELS = published_models()
FETCHED = [model for model in MODELS if model.source]


def test_every_family_is_there_and_every_name_once():
    names = [model.id for model in MODELS]
    assert len(names) == len(set(names)) >= 80
    for family in (
        *("openmind-resencl-", "openmind-primusm-", "ssl3d-", "nnfoundation-", "totalsegmentator-", "nninteractive-"),
        *("contrast-agnostic", "stunet-", "voco-", "vocomni-", "suprem-", "nvidia-", "brainsegfounder-", "ct-fm"),
        *("vista3d-", "genesis-", "fomo300k", "fomo25-", "triad-", "missingpiece-"),
    ):
        assert any(name.startswith(family) for name in names), family
    assert sum(name.startswith("openmind") for name in names) == 14
    assert all(model.also for model in MODELS if model.id.startswith("openmind"))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_an_entry_says_what_is_needed_to_use_it(model):
    assert model.architecture and model.method and model.citation and model.page.startswith("https://")
    assert model.source or model.get
    assert model.licence or any("licence" in fact for fact in model.unverified)
    assert set(model.layout) <= {"class", "arguments", "channels", "outputs", "supervised"}
    assert not model.layout or model.layout["class"] in KINDS
    for numbers in (model.spacing, model.patch):
        assert numbers is None or len(numbers) == 3
    assert model.id in str(model) and model.command in str(model)
    assert (model.source is None) == ("-pc FILE" in model.command)


def zipped(text):
    """A trained model folder whose weights are this text."""
    stream = io.BytesIO()
    name = text.rpartition("/")[2].removesuffix(".zip")
    folder = f"{name}/nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres"
    with zipfile.ZipFile(stream, "w") as archive:
        for file, content in (("plans.json", "{}"), ("dataset.json", "{}"), ("fold_0/checkpoint_final.pth", text)):
            archive.writestr(f"{folder}/{file}", content)
    return stream.getvalue()


@pytest.fixture
def published_here(monkeypatch, hub, web, tmp_path):
    """Every entry's file on the local hub or web server, under the name that the catalogue says."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    files, models = {}, []
    for model in MODELS:
        source = model.source
        address = HubAddress.parse(source) if source else None
        if address is not None:
            for repository in (address.repo_id, *model.also):
                named = address.filename or f"{'unet_b' if 'fomo25' in model.id else 'checkpoint_final'}.pth"
                if not named.endswith((".pth", ".pt")):
                    named += "/fold_0/checkpoint_final.pth"
                    files.setdefault(repository, {}).update(
                        {f"{address.filename}/{name}": b"{}" for name in ("plans.json", "dataset.json")}
                    )
                files.setdefault(repository, {})[named] = f"{repository}/{named}".encode()
        elif source:
            source = source.replace("https://github.com", web.url)
            web.pages[source.removeprefix(web.url)] = Page(
                zipped(source) if source.endswith(".zip") else source.encode()
            )
        models.append(replace(model, source=source))
    for repository, held in files.items():
        hub.add(repository, held)
    monkeypatch.setattr(published, "published_models", lambda: tuple(models))
    monkeypatch.setattr("nnssl_adapt.weights.sources.resolve.published_models", lambda: tuple(models))
    return models


def test_every_short_name_leads_to_its_own_file(published_here, tmp_path):
    for model in published_here:
        options = SourceOptions(cache_dir=tmp_path / "cache")
        if model.source is None:
            with pytest.raises(SourceNotFound) as raised:
                resolve_source(model.id, options)
            assert model.get in str(raised.value) and model.page in str(raised.value)
            continue
        if "://" in model.source and not model.source.startswith("hf://"):
            resolved = resolve_source(model.id, options)
            assert resolved.weights.read_bytes() == model.source.encode()
            assert (resolved.model_folder is not None) == model.source.endswith(".zip")
        else:
            resolved = resolve_source(model.id, replace(options, cache_dir=None))
            assert resolved.weights.read_bytes().decode().startswith(resolved.origin.repo_id)
            assert model.files == () or resolved.origin.filename in model.files
        if model.id.startswith("fomo25"):
            continue  # two entries of one repository, told apart by --file
        assert published.published_at(resolved.origin).source == model.source


def test_names_that_lead_nowhere_are_said_with_the_closest(capsys):
    with pytest.raises(SourceNotFound, match=r"voco-b") as raised:
        known_name("voco_b")
    assert raised.value.next_command == "nnssl-adapt models --published"
    with pytest.raises(SourceNotFound, match=r"openmind-resencl-mae"):
        resolve_source("openmind-resenc-mae")
    assert main(["models", "--published", "nobody"]) == 1 and "nobody" in capsys.readouterr().err


def test_an_address_of_the_catalogue_that_leads_nowhere_is_said_with_the_page(hub, web, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.add("Luffy503/VoCo", {"other.pt": b"x"})
    for name in ("voco-b", "ct-fm"):  # a repository without the file, and none at all
        with pytest.raises(SourceNotFound, match="not where the catalogue says") as raised:
            resolve_source(name)
        assert known_name(name).page in str(raised.value)
    gone = replace(known_name("totalsegmentator-291"), source=f"{web.url}/gone.zip")
    for module in ("published", "resolve"):
        monkeypatch.setattr(f"nnssl_adapt.weights.sources.{module}.published_models", lambda: (gone,))
    with pytest.raises(SourceNotFound, match=r"totalsegmentator-291 is not where the catalogue says .*gone\.zip"):
        resolve_source("totalsegmentator-291", SourceOptions(cache_dir=tmp_path))


def test_a_path_of_the_same_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("voco-b").mkdir()
    Path("voco-b/checkpoint_final.pth").write_bytes(b"here")
    assert resolve_source("voco-b").weights.read_bytes() == b"here"


def test_what_is_fetched_by_hand_is_found_under_the_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path))
    (tmp_path / "stunet-base").mkdir()
    (tmp_path / "stunet-base" / "base_ep4k.model").write_bytes(b"there")
    resolved = resolve_source("stunet-base")
    assert resolved.weights.read_bytes() == b"there"
    assert published.published_at(resolved.origin).id == "stunet-base"


def test_a_repository_put_there_by_hand_is_found_too(tmp_path, monkeypatch):
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path))
    (tmp_path / "Luffy503" / "VoCo").mkdir(parents=True)
    (tmp_path / "Luffy503" / "VoCo" / "VoCo_B_SSL_head.pt").write_bytes(b"there")
    assert resolve_source("voco-b").weights.read_bytes() == b"there"


def test_a_file_of_a_repository_is_known_however_it_is_named(hub, tmp_path):
    files = {
        f"nnInteractive_v1.0/{name}": b"{}" for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth")
    }
    hub.add("nnInteractive/nnInteractive", files)
    options = SourceOptions(cache_dir=tmp_path, filename="nnInteractive_v1.0")
    known = published.published_at(resolve_source("nnInteractive/nnInteractive", options).origin)
    assert known.id == "nninteractive-v1" and known.commercial is False and "NOT for commercial use" in known.terms


def test_repositories_are_found_under_either_owner():
    one, other = (find_published(f"{owner}/ResEncL-OpenMind-MAE") for owner in ("AnonRes", "MIC-DKFZ"))
    assert one is other is not None and one.id == "openmind-resencl-mae" and one.commercial is True
    assert find_published("AnonRes/PrimusM-OpenMind-SimCLR").note and find_published("nobody/nothing") is None
    assert find_published("MIC-DKFZ/nnFoundationCNN").licence == "CC-BY-SA-4.0"
    assert find_published("AnonRes/PrimusM-OpenMind-MAE").licence is None  # its page was not read


def test_the_command_line_shows_all_and_one(capsys):
    assert main(["models", "--published"]) == 0
    out = capsys.readouterr().out
    assert all(model.id in out for model in MODELS) and "NOT for commercial use" in out and "nnssl-adapt[monai]" in out
    assert main(["models", "--published", "suprem-swinunetr"]) == 0
    out = capsys.readouterr().out
    assert "CC BY-NC-ND" in out and "-175" not in out and "−175" in out and "--reorient LPI" in out
    assert "second-hand, not checked" in out


@pytest.mark.parametrize("columns", [80, 160])
def test_lines_fit_a_terminal_and_a_command_can_be_copied(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["models", "--published"]) == 0 and main(["models", "--published", "totalsegmentator-301"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    (place,) = [line for line in lines if line.startswith("  openmind-resencl-mae ")]
    assert lines[lines.index(place) + 1].startswith("    " if columns == 80 else "  openmind")
    assert main(["models", "--published", "suprem-swinunetr"]) == 0
    assert known_name("suprem-swinunetr").command in capsys.readouterr().out


# -- the script that refreshes it -----------------------------------------------------------------------------------------


@pytest.fixture
def script():
    path = Path(__file__).parents[4] / ".ci" / "refresh_published.py"
    spec = importlib.util.spec_from_file_location("refresh_published", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_refresh_says_what_changed_and_writes_it(script, tmp_path, hub, web, capsys, monkeypatch):
    hub.add("here/net", {"checkpoint_final.pth": b"x" * 2**20}, licence="cc-by-4.0")
    web.pages["/net.zip"] = Page(b"y" * 2**21)
    keys = {"architecture": "X", "method": "Y", "page": "https://x", "citation": "Z"}
    entries = [
        {"id": "one", "source": "here/net", "size": "9 MB", "unverified": ["its licence: read its page"], **keys},
        {"id": "two", "source": "gone/net", **keys},
        {"id": "three", "source": f"{web.url}/net.zip", **keys},
        {"id": "four", "source": f"{web.url}/gone.zip", **keys},
        {"id": "five", "get": "it", **keys},
    ]
    catalogue = tmp_path / "published.json"
    catalogue.write_text(json.dumps({"about": "x", "models": entries}))
    assert script.main([], catalogue) == 1
    out = capsys.readouterr().out
    assert (
        "one: size: 1.0 MiB (catalogue: 9 MB)" in out
        and "one: licence: cc-by-4.0" in out
        and "two:" in out
        and "four:" in out
        and "2 of them" in out
    )
    assert json.loads(catalogue.read_text())["models"] == entries
    script.main(["--write"], catalogue)
    written = {entry["id"]: entry for entry in json.loads(catalogue.read_text())["models"]}
    assert written["one"]["size"] == "1.0 MiB" and written["three"]["size"] == "2.0 MiB" and len(written) == 5
    assert written["one"]["licence"] == "cc-by-4.0" and "unverified" not in written["one"]
