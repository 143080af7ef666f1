"""From a drawing function to SVG text that a page can hold: no script, no style, no font, no date, the page's own ink.

The same drawing gives the same bytes. Text stays text. Colours of `openwork.report.style` become `currentColor` with
a class, so that a dark page can choose its own; every name is escaped by the XML writer.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from openwork.report.style import INK, LIGHT, PAGE_LIGHT, TEXT_LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_LOOK: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "openwork",
    "text.parse_math": False,  # a `$` in a name is a `$`
    "text.color": INK,
    "font.size": 11.0,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.labelsize": 11.0,
    "axes.titlesize": 11.0,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "figure.dpi": 72,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 11.0,
    "ytick.labelsize": 11.0,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3.5,
    "ytick.major.size": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 11.0,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.0,
}


def render(draw: Callable[[Figure], None], width: float, height: float, *, name: str, alt: str) -> str:
    """Return the SVG text of a figure of `width` x `height` CSS pixels that `draw` fills.

    Args:
        draw: Gets an empty matplotlib figure whose unit is the pixel; pyplot is never involved.
        width: In pixels.
        height: In pixels.
        name: Goes before every id, so that several figures fit on one page.
        alt: What the picture shows, for those who do not see it.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph")  # the page's fonts draw the text, not matplotlib's
        matplotlib.rcdefaults()
        cast(dict[str, Any], matplotlib.rcParams).update(_LOOK)
        figure = Figure(figsize=(width / 72.0, height / 72.0))
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return tidy(text.getvalue(), name=name, alt=alt)


def tidy(text: str, *, name: str, alt: str) -> str:
    """Return matplotlib's SVG as one `<svg>` element without styles, metadata, unused ids and long decimals."""
    ET.register_namespace("", SVG)
    root = ET.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    used = set(re.findall(r"(?:url\(|href=\")#([\w.-]+)", text))
    for element in root.iter():
        _plain(element, used, name)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"class": "plot", "role": "img", "aria-label": alt, "stroke-linejoin": "round"}
    return ET.tostring(root, encoding="unicode")


def standalone(svg: str) -> str:
    """Return an SVG file of its own: the page's paper behind the drawing, and its ink."""
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    width, height = box.groups() if box else ("100%", "100%")
    font = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
    opening = f'{head} width="{width}" height="{height}" color="{TEXT_LIGHT}" fill="{TEXT_LIGHT}" font-family="{font}">'
    return f'{opening}<rect width="100%" height="100%" fill="{PAGE_LIGHT}"/>{body}\n'


def _plain(element: ET.Element, used: set[str], name: str) -> None:
    """Turn one element's style into attributes, its colours into the page's, its ids into the figure's own."""
    attributes = element.attrib
    element.text, element.tail = (t if t and t.strip() else None for t in (element.text, element.tail))
    for part in attributes.pop("style", "").split(";"):
        key, _, value = part.partition(":")
        if key.strip() and key.strip() != "font-family":
            attributes[key.strip()] = value.strip()
    if _HREF in attributes:
        attributes["href"] = f"#{name}-{attributes.pop(_HREF).removeprefix('#')}"
    if "clip-path" in attributes:
        attributes["clip-path"] = attributes["clip-path"].replace("#", f"#{name}-")
    found = attributes.pop("id", None)
    if found in used:
        attributes["id"] = f"{name}-{found}"
    for key in ("fill", "stroke"):
        _recolour(attributes, key)
    for key in ("d", "x", "y", "transform", "points"):
        if key in attributes:
            attributes[key] = _short(attributes[key])
    if attributes.get("transform", "").startswith("rotate(0 "):
        del attributes["transform"]


def _recolour(attributes: dict[str, str], key: str) -> None:
    colour = attributes.get(key, "").lower()
    if colour == INK:
        attributes[key] = "currentColor"
    elif colour in LIGHT:
        attributes |= {key: "currentColor", "class": f"s{LIGHT.index(colour)}", "color": colour}


def _short(text: str) -> str:
    text = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found.group()):.2f}".rstrip("0").rstrip("."), text)
    text = re.sub(r"(?<![\d.])-0(?![\d.])", "0", text)
    return re.sub(r"\s+", " ", text).strip()
