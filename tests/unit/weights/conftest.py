"""A web server on this machine, and every family of checkpoints."""

from functools import cache

import pytest
from support.hub_server import WebServer
from support.nnssl_families import FAMILIES, STEMS

from nnssl_adapt.weights.checkpoint.checkpoint import open_checkpoint


@pytest.fixture
def web(monkeypatch):
    """A running web server; ``web.pages["/name"] = Page(content)`` publishes."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "nnssl_pretrained_models"):
        monkeypatch.delenv(variable, raising=False)
    with WebServer() as server:
        yield server


@pytest.fixture
def no_waiting(monkeypatch):
    """huggingface_hub's pauses between attempts take no time."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """``family(name, channels)``: the family's files and truth, made once."""

    @cache
    def build(name, channels=1):
        return FAMILIES[name](name, tmp_path_factory.mktemp("family") / "files", channels)

    return build


@pytest.fixture(scope="session")
def opened(family):
    """``opened(name, channels)``: our reading of it; of several stems the first."""

    @cache
    def read(name, channels=1):
        stem = STEMS[0] if name == "MultiTalent" else None
        return open_checkpoint(family(name, channels).source, stem=stem)

    return read
