"""Reports: one HTML file that contains its pictures and opens from the disk."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from diffdoctor.runs.errors import missing_extra
from diffdoctor.runs.files import atomic_write_text

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure


class Report:
    """Collects headings, text, tables and pictures, then writes them as one self-contained HTML page.

    Args:
        title: of the page.
    """

    def __init__(self, title: str):
        self.title = title
        self._parts = []

    def heading(self, text: str) -> None:
        """Add a section's heading."""
        self._parts.append(("heading", text))

    def lead(self, text: str) -> None:
        """Add the most important sentence, which is emphasised."""
        self._parts.append(("lead", text))

    def warning(self, text: str) -> None:
        """Add a sentence that must not be overlooked."""
        self._parts.append(("warning", text))

    def text(self, text: str) -> None:
        """Add a paragraph of plain text."""
        self._parts.append(("text", text))

    def code(self, text: str) -> None:
        """Add text in a fixed-width box: settings, commands."""
        self._parts.append(("code", text))

    def table(self, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
        """Add a table.

        Args:
            header: of the columns.
            rows: of cells; a cell is anything printable, or a pair (text, "number" | "good" | "bad"). A column that
                begins with a number is aligned as numbers are, its header too.
        """
        cells = [[self._cell(cell) for cell in row] for row in rows]
        first = cells[0] if cells else []
        numbers = [index for index, cell in enumerate(first) if cell["style"] == "number"]
        self._parts.append(("table", {"header": list(header), "rows": cells, "numbers": numbers}))

    @contextlib.contextmanager
    def tiles(self, width: int) -> Iterator[None]:
        """Lay out what is added inside the context side by side, each at least `width` pixels wide."""
        self._parts.append(("tiles", width))
        yield
        self._parts.append(("end", None))

    def image(
        self,
        data: bytes,
        caption: str = "",
        alt: str | None = None,
        pixels: bool = True,
        link: str | None = None,
        *,
        links: dict[str, str] | None = None,
        boxes: Sequence[Sequence[float]] = (),
        size: tuple[int, int] | None = None,
    ) -> None:
        """Add a picture.

        Args:
            data: the bytes of a PNG, JPEG or WebP file, which may be animated.
            caption: text below the picture.
            alt: text in place of the picture; None: the caption.
            pixels: keep enlarged pixels sharp.
            link: URL that a click on the picture opens.
            links: {name: URL} behind the caption.
            boxes: (x, y, width, height) to be drawn over the picture, in pixels of a picture of `size`.
            size: (height, width) that the boxes refer to.
        """
        item = {"source": _data_url(data), "caption": caption, "alt": alt or caption, "pixels": pixels, "link": link}
        item |= {"links": links or {}, "boxes": list(boxes), "size": size}
        self._parts.append(("image", item))

    def slider(
        self,
        before: bytes,
        after: bytes,
        caption: str = "",
        *,
        pixels: bool = True,
        link: str | None = None,
        boxes: Sequence[Sequence[float]] = (),
        size: tuple[int, int] | None = None,
    ) -> None:
        """Add two pictures of one size, one over the other, with a line between them that can be moved.

        Args:
            before: the bytes of a PNG or JPEG file, shown left of the line.
            after: likewise, right of it.
            caption: text below; a link to `link` is added.
            pixels: keep enlarged pixels sharp.
            link: URL of the picture after.
            boxes: see `image`.
            size: see `image`.
        """
        item = {"before": _data_url(before), "after": _data_url(after), "caption": caption, "pixels": pixels}
        self._parts.append(("slider", item | {"link": link, "boxes": list(boxes), "size": size}))

    def figure(self, figure: Figure, caption: str = "") -> None:
        """Add a matplotlib figure as a picture."""
        self.image(figure_png(figure), caption, pixels=False)

    def write(self, path: str | Path) -> None:
        """Write the page to `path`, completely or not at all."""
        from jinja2 import Environment

        page = resources.files("diffdoctor.viz").joinpath("report.html").read_text(encoding="utf-8")
        template = Environment(autoescape=True).from_string(page)
        atomic_write_text(path, template.render(title=self.title, parts=self._parts))

    @staticmethod
    def _cell(cell: object) -> dict[str, object]:
        text, style = cell if isinstance(cell, tuple) else (cell, "")
        return {"text": text, "style": style}


def _data_url(data: bytes) -> str:
    subtype = "jpeg" if data.startswith(b"\xff\xd8") else "webp" if data.startswith(b"RIFF") else "png"
    return f"data:image/{subtype};base64," + base64.b64encode(data).decode("ascii")


def figure_png(figure: Figure, dpi: int = 110) -> bytes:
    """Encode a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def new_figure(columns: int = 1, width: float = 5.0, height: float = 3.2) -> tuple[Figure, np.ndarray]:
    """A matplotlib figure, made without pyplot, whose global backend belongs to the user's program.

    Args:
        columns: number of axes, side by side.
        width: of each axes, in inches.
        height: of the figure, in inches.

    Returns:
        The figure and its axes (columns,).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "stages") from None
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]
