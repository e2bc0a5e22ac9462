"""A report to look at: one HTML file that holds its pictures and opens from the disk."""

import base64
import io

from diffdoctor._errors import missing_extra
from diffdoctor._io import atomic_write_text

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #d8dee4; }
p { max-width: 46rem; } .lead { font-size: 1.15rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #e6eaee; vertical-align: top; }
td.number { text-align: right; } thead th { border-bottom: 2px solid #b8c0c8; }
.good { color: #116329; } .bad { color: #a40e26; font-weight: 600; }
figure { margin: 1.2rem 0; } figcaption { color: #57606a; font-size: .9rem; max-width: 46rem; }
img { max-width: 100%; height: auto; } img.pixels { image-rendering: pixelated; }
.columns { display: flex; flex-wrap: wrap; gap: 1.5rem; } .columns > * { flex: 1 1 20rem; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .85rem; }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3; } th, td { border-color: #30363d; } pre { background: #161b22; }
  img { background: #fff; } .good { color: #4ac26b; } .bad { color: #ff7b72; }
}
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style | safe }}</style></head>
<body><h1>{{ title }}</h1>
{% for kind, item in parts -%}
{% if kind == "heading" %}<h2>{{ item }}</h2>
{% elif kind == "lead" %}<p class="lead">{{ item }}</p>
{% elif kind == "text" %}<p>{{ item }}</p>
{% elif kind == "code" %}<pre>{{ item }}</pre>
{% elif kind == "image" %}<figure><img src="{{ item.source }}" alt="{{ item.alt }}"{% if item.pixels %} class="pixels"{% endif %}>
<figcaption>{{ item.caption }}</figcaption></figure>
{% elif kind == "table" %}<table><thead><tr>{% for cell in item.header %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in item.rows %}<tr>{% for cell in row -%}
<td{% if cell.style %} class="{{ cell.style }}"{% endif %}>{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% endif %}{% endfor %}</body></html>
"""


class Report:
    """Collects headings, text, tables and pictures, then writes them as one self-contained HTML page.

    Args:
        title: of the page.
    """

    def __init__(self, title: str):
        self.title = title
        self._parts = []

    def heading(self, text: str):
        """A section's heading."""
        self._parts.append(("heading", text))

    def lead(self, text: str):
        """The sentence that one should read if one reads no other."""
        self._parts.append(("lead", text))

    def text(self, text: str):
        """A paragraph of plain text."""
        self._parts.append(("text", text))

    def code(self, text: str):
        """Text in a fixed-width box: settings, commands."""
        self._parts.append(("code", text))

    def table(self, header, rows):
        """A table; a cell is anything printable, or a pair (text, "number" | "good" | "bad")."""
        cells = [[self._cell(cell) for cell in row] for row in rows]
        self._parts.append(("table", {"header": list(header), "rows": cells}))

    def image(self, png: bytes, caption: str = "", alt: str | None = None, pixels: bool = True):
        """A PNG file's bytes; `pixels` keeps enlarged pixels sharp."""
        source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
        item = {"source": source, "caption": caption, "alt": alt or caption, "pixels": pixels}
        self._parts.append(("image", item))

    def figure(self, figure, caption: str = ""):
        """A matplotlib figure as a picture."""
        self.image(figure_png(figure), caption, pixels=False)

    def write(self, path):
        """Write the page to `path`, whole or not at all."""
        from jinja2 import Environment

        template = Environment(autoescape=True).from_string(_PAGE)
        atomic_write_text(path, template.render(title=self.title, style=_STYLE, parts=self._parts))

    @staticmethod
    def _cell(cell):
        text, style = cell if isinstance(cell, tuple) else (cell, "")
        return {"text": text, "style": style}


def figure_png(figure, dpi: int = 110) -> bytes:
    """A matplotlib figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def new_figure(columns: int = 1, width: float = 5.0, height: float = 3.2):
    """A matplotlib figure of `columns` axes side by side, each width × height inches: (figure, axes).

    Made without pyplot: the global backend belongs to the user's program.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "stages") from None
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]
