"""HTML that cannot be broken out of: a tree of elements whose texts are escaped when written.

Every text and attribute passes through one function, which also shows control characters, and those
that change the direction of a line, as their codes. The page loads nothing: its policy forbids it.
"""

from __future__ import annotations

import re
from typing import Final
from xml.etree import ElementTree

from moeify.reporting.style import STYLE

Element = ElementTree.Element

_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
_SEEN: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff0-\uffff\ud800-\udfff]"
)


def el(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """Make an element; of attributes, `cls` stands for class and "_" for "-", and None is left out.

    Example:
        >>> to_text(el("p", "a < b", cls="x"))
        '<p class="x">a &lt; b</p>'
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set("class" if name == "cls" else name.replace("_", "-"), str(value))
    return fill(made, *children)


def fill(parent: Element, *children: Element | str | None) -> Element:
    """Append children to an element, and return it."""
    for child in children:
        if child is None:
            continue
        if not isinstance(child, str):
            parent.append(child)
        elif len(parent):
            parent[-1].tail = (parent[-1].tail or "") + child
        else:
            parent.text = (parent.text or "") + child
    return parent


def visible(text: str) -> str:
    r"""Write characters that cannot be seen, or that move others, as their codes.

    Example:
        >>> visible("a\x00\u202eb")
        'a\\x00\\u202eb'
    """
    return _SEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def short(text: object, most: int = 200) -> str:
    """Cut a text in its middle, with an ellipsis."""
    whole = str(text)
    if len(whole) <= most:
        return whole
    head = most // 2
    return f"{whole[:head]}…{whole[head + 1 - most :]}"


def to_text(root: Element) -> str:
    """Write a tree with its texts and attributes escaped."""
    for element in root.iter():
        if element.tag in ("script", "style"):
            raise AssertionError("the page has no scripts, and its style is written by `page`")
        element.text = visible(element.text or "")
        element.tail = visible(element.tail or "")
        for name, value in element.items():
            element.set(name, visible(value))
    return ElementTree.tostring(root, encoding="unicode", method="html")


def page(title: str, *body: Element) -> str:
    """Return a whole page."""
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        '<meta name="color-scheme" content="light dark">',
        to_text(el("title", title)),
        f"<style>{STYLE}</style>",
    ]
    parts = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>"]
    return "\n".join([*parts, to_text(el("body", *body)), "</html>", ""])


def figure(picture: Element, *caption: Element | str) -> Element:
    """Make a figure with a caption, which scrolls if it is wide."""
    return el("figure", el("figcaption", *caption), el("div", picture, cls="scroll"))


def scrolled(label: str, *children: Element) -> Element:
    """Put wide content into a box that scrolls by itself, with the keyboard too."""
    return el("div", *children, cls="scroll", role="region", aria_label=label, tabindex=0)


def table(label: str, headers: list[str], rows: list[list[str]], *, numbers: int = 99) -> Element:
    """Make a table; the first column heads the rows, those from `numbers` on are right-aligned."""
    kinds = ["num" if i >= numbers else None for i in range(len(headers))]
    heads = [el("th", h, scope="col", cls=k) for h, k in zip(headers, kinds, strict=True)]
    body = el("tbody")
    for row in rows:
        first = el("th", row[0], scope="row")
        cells = [el("td", c, cls=k) for c, k in zip(row[1:], kinds[1:], strict=True)]
        body.append(el("tr", first, *cells))
    return scrolled(label, el("table", el("caption", label), el("thead", el("tr", *heads)), body))
