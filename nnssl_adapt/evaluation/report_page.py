"""Pieces of a self-contained HTML page: no script, nothing from the network, readable in light and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --line: #d8dee4; --soft: #f3f5f7; --dim: #59636e; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --soft: #1c2128; --dim: #9198a1; --mark: #58a6ff; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 10px; padding-bottom: 4px; border-bottom: 1px solid var(--line); }
h3 { font-size: 16px; margin: 22px 0 8px; }
p.dim, .dim { color: var(--dim); margin: 0 0 12px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.tile { flex: 1 1 150px; background: var(--soft); border-radius: 8px; padding: 12px 16px; }
.tile b { display: block; font-size: 24px; color: var(--mark); font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; }
figure { margin: 14px 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 8px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: #333; font-size: 13px; padding: 6px 4px 0; }
pre { background: var(--soft); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: 13px; }
summary { cursor: pointer; color: var(--mark); margin: 8px 0; }
ul { padding-left: 20px; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole HTML document."""
    head = f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{meta}{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"
    )


def frame(document: str) -> str:
    """A whole document inside another page, such as a notebook; neither's style touches the other's."""
    style = "width: 100%; height: 720px; border: 1px solid #d8dee4"
    return f'<iframe srcdoc="{escape(document)}" style="{style}"></iframe>'


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, dim: bool = False) -> str:
    return f'<p class="dim">{escape(text)}</p>' if dim else f"<p>{escape(text)}</p>"


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Headline figures: (value, what it is)."""
    boxes = "".join(f'<div class="tile"><b>{escape(value)}</b>{escape(what)}</div>' for value, what in figures)
    return f'<div class="tiles">{boxes}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """A table; columns from ``numbers_from`` on are aligned to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if column >= numbers_from else ''}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def picture(png: bytes, caption: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(png).decode("ascii")
    text = escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def details(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def bullets(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
