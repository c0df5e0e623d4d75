"""Every entry of the catalogue with a stand-in of its file at its real size, fetched by its short name and opened."""

from dataclasses import replace

import pytest
from support.hub_server import HubServer, Page, WebServer
from support.published_files import files_of, zipped

from nnssl_adapt.errors import AdaptationPlanError
from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint
from nnssl_adapt.weights.families.family import SECOND_HAND
from nnssl_adapt.weights.sources.hub_files import HubAddress
from nnssl_adapt.weights.sources.published import published_models

MODELS = published_models()
EVERY = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)


@pytest.fixture(scope="module")
def servers():
    with HubServer() as hub, WebServer() as web:
        yield hub, web


@pytest.fixture(autouse=True)
def hollow_files(monkeypatch):
    """A tensor that claims more than its file holds is refused otherwise (test_malformed_tensors.py)."""
    monkeypatch.setattr("nnssl_adapt.weights.checkpoint.state_dict._check_memory", lambda weights, path: None)


@pytest.fixture
def place(servers, tmp_path, monkeypatch):
    """``place(model)`` publishes its files where the catalogue says, or puts them where one does who downloaded them by hand."""
    hub, web = servers
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path / "store"))

    def put(model):
        files, source = files_of(model), model.source
        address = HubAddress.parse(source) if source else None
        if address is not None:
            if address.filename and len(files) == 1:
                files = {address.filename: next(iter(files.values()))}
            for repository in (address.repo_id, *model.also):
                hub.add(repository, files)
        elif source:
            source = source.replace("https://github.com", web.url)
            content = zipped(files) if source.endswith(".zip") else files[source.rpartition("/")[2]]
            web.pages[source.removeprefix(web.url)] = Page(content)
        else:
            for name, content in files.items():
                path = tmp_path / "store" / model.id / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        catalogue = tuple(replace(other, source=source) if other is model else other for other in published_models())
        for module in ("published", "resolve"):
            monkeypatch.setattr(f"nnssl_adapt.weights.sources.{module}.published_models", lambda: catalogue)

    return put


@EVERY
def test_an_entry_is_opened_by_its_short_name_and_told_by_its_layout(place, tmp_path, model):
    place(model)
    checkpoint = open_checkpoint(model.id, cache_dir=None if _on_hub(model) else tmp_path / "cache", **_asked(model))
    assert checkpoint.published is not None and checkpoint.published.id == model.id
    shown = str(checkpoint)
    for fact in model.unverified:
        assert shown.count(f"{SECOND_HAND}{fact}") == 1, fact
    assert shown.count(SECOND_HAND) == len({line for line in shown.splitlines() if SECOND_HAND in line})
    assert model.licence is None or model.terms in shown
    if model.id == "nninteractive-v1":  # its folder tells, and prompts are left behind; a file alone has eight channels
        (name,) = [name for name in files_of(model) if name.endswith(".pth")]
        (tmp_path / "unknown.pth").write_bytes(files_of(model)[name])
        checkpoint = open_checkpoint(tmp_path / "unknown.pth")
    assert bool(model.layout) == (model.id in {other.id for other in checkpoint.similar_published()})
    assert not model.supervised or checkpoint.plan.supervised
    assert checkpoint.plan.orientation in (model.orientation, None)


def _on_hub(model):
    return model.source is not None and HubAddress.parse(model.source) is not None


def _asked(model):
    """What a user has to say: only where the catalogue says that it isn't known."""
    return {"patch_merging": "old"} if any("--patch-merging" in fact for fact in model.unverified) else {}


def test_a_copy_under_the_other_owner_is_told_where_nobody_compared_them(place):
    (model,) = [model for model in MODELS if model.id == "openmind-resencl-voco"]
    place(model)
    checkpoint = open_checkpoint(model.also[0])
    same = f"{SECOND_HAND}that {model.also[0]} holds the same files as {model.source}"
    assert model.also_unverified and checkpoint.notes.count(same) == 1 and checkpoint.published.id == model.id


@pytest.mark.parametrize("name", ["voco-10k", "nvidia-swinunetr-btcv"])
def test_a_swin_unetr_that_only_its_file_name_tells_is_not_asked_for(tmp_path, name):
    (model,) = [model for model in MODELS if model.id == name]
    ((filename, content),) = files_of(model).items()
    (tmp_path / filename).write_bytes(content)
    checkpoint = open_checkpoint(tmp_path / filename)
    assert checkpoint.architecture.kwargs["patch_merging"] == "old" and checkpoint.published.id == name
    assert any("patch merging" in note and SECOND_HAND in note for note in checkpoint.notes)
    assert checkpoint.plan.normalization_schemes == ("CTNormalization",)
    (tmp_path / "mine.pt").write_bytes(content)
    with pytest.raises(AdaptationPlanError, match="--patch-merging old"):
        open_checkpoint(tmp_path / "mine.pt")
