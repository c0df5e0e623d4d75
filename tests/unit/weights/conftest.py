"""A hub and a web server on this machine, and caches in temporary folders."""

import pytest
from hub_server import HubServer, WebServer


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Downloads and unpacked zips of a test are its own, wherever they are kept by default."""
    folder = tmp_path_factory.mktemp("cache_home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "nnssl_adapt"


@pytest.fixture
def web(monkeypatch):
    """A running web server; ``web.pages["/name"] = Page(content)`` publishes."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "nnssl_pretrained_models"):
        monkeypatch.delenv(variable, raising=False)
    with WebServer() as server:
        yield server


@pytest.fixture
def hub(monkeypatch):
    """A running hub that huggingface_hub is pointed at; ``hub.add(repo_id, files)`` publishes."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "nnssl_pretrained_models"):
        monkeypatch.delenv(variable, raising=False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def no_waiting(monkeypatch):
    """huggingface_hub's pauses between attempts take no time."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
