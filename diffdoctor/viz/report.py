"""A report to look at: one HTML file that holds its pictures and opens from the disk."""

import base64
import contextlib
import io
from importlib import resources

from diffdoctor.runs.errors import missing_extra
from diffdoctor.runs.files import atomic_write_text


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

    @contextlib.contextmanager
    def tiles(self, width: int):
        """What is added inside stands side by side, as many in a row as fit when each has `width` pixels or more."""
        self._parts.append(("tiles", width))
        yield
        self._parts.append(("end", None))

    def image(
        self, data: bytes, caption: str = "", alt: str | None = None, pixels: bool = True, link: str | None = None
    ):
        """A PNG or JPEG file's bytes; `pixels` keeps enlarged pixels sharp, `link` is a URL to go to from it."""
        kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
        source = f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")
        item = {"source": source, "caption": caption, "alt": alt or caption, "pixels": pixels, "link": link}
        self._parts.append(("image", item))

    def figure(self, figure, caption: str = ""):
        """A matplotlib figure as a picture."""
        self.image(figure_png(figure), caption, pixels=False)

    def write(self, path):
        """Write the page to `path`, whole or not at all."""
        from jinja2 import Environment

        page = resources.files("diffdoctor.viz").joinpath("report.html").read_text(encoding="utf-8")
        template = Environment(autoescape=True).from_string(page)
        atomic_write_text(path, template.render(title=self.title, parts=self._parts))

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
