"""A report as one HTML file that needs no other file and no network."""

import base64
from collections.abc import Sequence
from html import escape

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1080px; margin: 24px auto; padding: 0 16px; color: #222 }
h1 { font-size: 24px } h2 { font-size: 19px; margin-top: 34px; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 10px 0; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #eee }
th:first-child, td:first-child { text-align: left }
td.better { color: #15803d } td.worse { color: #b91c1c }
p.note { color: #666; max-width: 800px } img { max-width: 100%; display: block; margin: 6px 0 }
th { max-width: 260px; overflow-wrap: anywhere }
"""


class Page:
    """A page to which sections are added in order.

    Args:
        title: of the page.
        subtitle: one line below.
    """

    def __init__(self, title: str, subtitle: str) -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>", f"<p class='note'>{escape(subtitle)}</p>"]

    def section(self, title: str, note: str = "") -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(title)}</h2>")
        if note:
            self._parts.append(f"<p class='note'>{escape(note)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str | float | None]], *, changes: int = -1) -> None:
        """Add a table: text as it is, numbers with one decimal, None as '-'.

        Args:
            header: names of the columns.
            rows: the cells.
            changes: the column of differences, which is colored and has a sign.
        """
        lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>"]
        for row in rows:
            cells = []
            for i, value in enumerate(row):
                kind, text = "", value if isinstance(value, str) else "-" if value is None else f"{value:.1f}"
                if i == changes and isinstance(value, int | float):
                    text = f"{value:+.1f}"
                    kind = " class='better'" if value > 0.05 else " class='worse'" if value < -0.05 else ""
                cells.append(f"<td{kind}>{escape(text)}</td>")
            lines.append("<tr>" + "".join(cells) + "</tr>")
        self._parts.append("<table>" + "\n".join(lines) + "</table>")

    def text(self, line: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(line)}</p>")

    def image(self, data: bytes, caption: str = "") -> None:
        """Add a PNG or JPEG, with a caption above."""
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        if caption:
            self.text(caption)
        self._parts.append(f"<img alt='{escape(caption)}' src='data:image/{kind};base64,{_base64(data)}'>")

    def html(self) -> str:
        """Return the page."""
        head = f"<meta charset='utf-8'><title>{escape(self._title)}</title><style>{_STYLE}</style>"
        body = "\n".join(self._parts)
        return f"<!doctype html><html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n"


def less(value: float | None, other: float | None) -> float | None:
    """Return the difference of two cells of a table; None if one is missing."""
    return None if value is None or other is None else value - other


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
