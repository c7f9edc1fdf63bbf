"""A page as a strict reader sees it, without running anything."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "hr", "img", "input", "link"}
LINKS = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "xlink:href"}
CELLS = {"td", "th", "dt", "dd", "p", "h1", "h2", "figcaption", "title", "code", "summary", "a", "li"}


@dataclass
class Document:
    """What is in a page."""

    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    """Tag, name, value."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """By tag: the text of each such element of CELLS."""
    scripts: list[tuple[dict[str, str], str]] = field(default_factory=list)
    """Attributes and content."""
    styles: list[str] = field(default_factory=list)

    @property
    def figures(self) -> list[dict[str, Any]]:
        return [json.loads(content) for attributes, content in self.scripts if attributes.get("class") == "figure"]

    @property
    def data(self) -> list[tuple[str, str]]:
        """The machine's value of each number, with the text that is shown."""
        values = [value for tag, name, value in self.attributes if (tag, name) == ("data", "value")]
        return list(zip(values, self.texts.get("data", []), strict=True))

    def network_addresses(self) -> list[str]:
        """Everything that a browser would fetch."""
        found = [v for _, name, v in self.attributes if name in LINKS and not v.startswith("#")]
        for style in [*self.styles, *(value for _, name, value in self.attributes if name == "style")]:
            found += re.findall(r"url\([^)]*\)|@import[^;]*", style)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.document = Document()
        self.open: list[str] = []
        self.collecting: list[tuple[str, list[str]]] = []
        self.script: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.document.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.document.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in VOID:
            return
        self.open.append(tag)
        self.script = {name: value or "" for name, value in attrs} if tag == "script" else self.script
        if tag in CELLS | {"data"}:
            self.collecting.append((tag, []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> ends nothing"
        assert self.open[-1] == tag, f"</{tag}> ends <{self.open[-1]}>"
        self.open.pop()
        if self.collecting and self.collecting[-1][0] == tag:
            self.document.texts.setdefault(tag, []).append("".join(self.collecting.pop()[1]))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.document.scripts.append((self.script, data))
        elif self.open and self.open[-1] == "style":
            self.document.styles.append(data)
        else:
            for _, parts in self.collecting:
                parts.append(data)


def read_html(text: str) -> Document:
    """AssertionError unless every element ends where it should."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert not reader.open, f"{reader.open} have no end"
    return reader.document
