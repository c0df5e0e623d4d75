"""A hub on this machine, and caches in temporary folders."""

import pytest
from hub_server import HubServer


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
