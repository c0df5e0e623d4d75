"""Self-contained HTML pages from templates: what comes from data is escaped, and nothing comes from the network.

A template extends ``base.html``, and uses the tables, tiles and pictures of ``pieces.html``. Its Content-Security-Policy
forbids the browser every request, whatever a page's data say.
"""

from __future__ import annotations

import base64
import io
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HERE = "nnssl_adapt.evaluation.report"


def render(template: str, package: str = _HERE, **context: Any) -> str:
    """A whole document from a template in ``templates`` of a package; every value in ``context`` is escaped."""
    return _environment(package).get_template(template).render(**context)


def asset(name: str, package: str = _HERE) -> Markup:
    """A style or script of ours, as it stands in ``templates``."""
    return Markup((files(package) / "templates" / name).read_text(encoding="utf-8"))


def frame(document: str) -> str:
    """A whole document inside another page, such as a notebook; neither's style touches the other's."""
    style = "width: 100%; height: 720px; border: 1px solid #d8dee4"
    return str(Markup('<iframe srcdoc="{}" style="{}"></iframe>').format(escape(document), style))


def data_address(content: bytes, kind: str = "image/png") -> str:
    """Bytes as an address inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def png_of(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()


@cache
def _environment(package: str) -> Environment:
    loaders = [PackageLoader(name) for name in dict.fromkeys((package, _HERE))]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["asset"] = asset
    environment.filters["picture"] = data_address
    return environment
