"""An HTML page that needs nothing else: headings, text, tables and figures in order, figures as inline SVG.

No network, no script; fits a phone (wide tables and figures scroll) and paper. Everything given is escaped.
"""

from __future__ import annotations

import html
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import simmoe

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto; padding: 1rem; }
body { max-width: 60rem; }
h1 { font-size: 1.5rem; line-height: 1.2; }
h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid #999; }
.answer { border: 2px solid #111; border-radius: .4rem; padding: .5rem 1rem; }
.answer.none { border-style: dashed; }
.answer strong { font-size: 1.2rem; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: 100%; min-width: 34rem; height: auto; }
figcaption { font-size: .85rem; color: #333; position: sticky; left: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid #ccc; vertical-align: top; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; background: #f2f2f2; padding: .5rem; }
li { overflow-wrap: anywhere; }
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; }
  figure, table, .answer { break-inside: avoid; }
  figure svg { min-width: 0; }
  h2 { break-after: avoid; }
  pre { background: none; }
}
"""

Figures = dict[str, Callable[[Path], None]]


class Page:
    """Parts of a page in order, and its figures by name."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []
        self.figures: Figures = {}

    def heading(self, text: str) -> None:
        """A section's title."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def items(self, lines: Sequence[str]) -> None:
        """A list."""
        self.parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")

    def code(self, text: str) -> None:
        """Text as typed."""
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; its first two columns are words."""

        def cells(tag: str, row: Sequence[str]) -> str:
            return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
        self.parts.append(f'<div class="wide"><table><tr>{cells("th", head)}</tr>{body}</table></div>')

    def figure(self, name: str, caption: str, draw: Callable[[Path], None]) -> None:
        """A figure that ``draw`` writes to the file it is given."""
        self.figures[name] = draw
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figure.svg"
            draw(path)
            svg = path.read_text(encoding="utf-8")
        svg = svg[svg.index("<svg") :]
        # ids of different figures must not meet on one page
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        label = html.escape(caption, quote=True)
        svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        self.parts.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")

    def render(self) -> str:
        """The whole page."""
        body = "\n".join(self.parts)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{html.escape(self.title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n'
            f"<body><h1>{html.escape(self.title)}</h1>\n{body}\n"
            f"<p><small>simmoe {simmoe.__version__}</small></p></body></html>\n"
        )
