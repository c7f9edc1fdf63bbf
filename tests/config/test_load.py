"""Values from defaults, file and command line, in that order; the resolved file reads back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from harness.config import ConfigError, Section, dump_yaml, load_config


class Inner(Section):
    rate: float = Field(1e-3, gt=0)
    """A rate: with a colon, to see that comments stay comments."""
    kind: Literal["constant", "cosine"] = "constant"
    """A choice."""
    names: tuple[str, ...] = ()
    """Some names."""
    flag: bool = False
    """A switch."""


class Item(Section):
    name: str
    """Its name."""
    weight: float | None = None
    """Its weight. null: equal."""


class Root(Section):
    count: int = 3
    """A count."""
    inner: Inner = Inner()
    """A section."""
    items: tuple[Item, ...] = ()
    """A list of sections."""
    path: Path | None = None
    """A path."""


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text)
    return file


def test_command_line_wins_over_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "count: 5\ninner: {rate: 0.5, kind: cosine}\nitems: [{name: a}, {name: b, weight: 2}]\n")
    loaded = load_config(Root, file, ["inner.rate=1e-4", "items.1.weight=0.25", "inner.names=[x, y]", "path=a/b"])
    assert loaded == Root(
        count=5,
        inner=Inner(rate=1e-4, kind="cosine", names=("x", "y")),
        items=(Item(name="a"), Item(name="b", weight=0.25)),
        path=Path("a/b"),
    )
    assert load_config(Root, None) == Root()
    assert load_config(Root, write(tmp_path, "")) == Root()


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "0.0003", "3.0e-4", "+3e-4"])
def test_every_way_to_write_a_number(tmp_path: Path, text: str) -> None:
    assert load_config(Root, write(tmp_path, f"inner:\n  rate: {text}\n")).inner.rate == 3e-4
    assert load_config(Root, None, [f"inner.rate={text}"]).inner.rate == 3e-4


@pytest.mark.parametrize("comments", [True, False])
def test_the_resolved_file_reads_back_equal(tmp_path: Path, comments: bool) -> None:
    root = Root(
        inner=Inner(names=("null", "x: y", "- a", "é\n\t", "3")), items=(Item(name="no", weight=1e-30), Item(name="#"))
    )
    text = dump_yaml(root, comments=comments)
    assert load_config(Root, write(tmp_path, text)) == root
    assert ("# A rate: with a colon" in text) == comments


class Texts(Section):
    prompt: str | None = None
    """Some text."""
    kind: Literal["a", "null"] = "a"
    """A choice."""


def test_text_on_the_command_line_is_taken_as_it_stands() -> None:
    for text in ("a: b", "x # y", "[1", "  def f(", "3", "{'a': 1}", "yes", "- x ", "'"):
        assert load_config(Texts, None, [f"prompt={text}"]).prompt == text
    assert load_config(Texts, None, ['prompt="a\\n: b"']).prompt == "a\n: b"
    assert load_config(Texts, None, ["prompt=null"]).prompt is None
    assert load_config(Texts, None, ["prompt=''"]).prompt == ""


MISTAKES = {
    "inner: {rte: 1}": "config.yaml: inner.rte: unknown key; did you mean inner.rate?",
    "rate: 1": "config.yaml: rate: unknown key; did you mean inner.rate?",
    "zzz: 1": "config.yaml: zzz: unknown key; valid here: count, inner, items, path",
    "count: three": "config.yaml: count: expected a whole number, got 'three'",
    "count: 1.5": "config.yaml: count: expected a whole number, got 1.5",
    "count: yes": "config.yaml: count: true/false where a whole number is expected",
    "count: null": "config.yaml: count: expected a whole number, got null",
    "inner: {rate: -1}": "config.yaml: inner.rate: input should be greater than 0, got -1",
    "inner: {kind: cosin}": "config.yaml: inner.kind: 'cosin' is not one of constant, cosine; did you mean cosine?",
    "inner: 5": "config.yaml: inner: expected a mapping of keys to values, got 5",
    "items: [{weight: 1}]": "config.yaml: items.0.name: is required and not set",
    "items: [{name: a, weigth: 1}]": "config.yaml: items.0.weigth: unknown key; did you mean items.0.weight?",
    "count: 1\ncount: 2": "config.yaml: line 2: key 'count' is given twice; keep one",
    "? [a, b]\n: 1": "config.yaml: line 1: a key must be a plain name",
    "count: 2001-99-99": "config.yaml: not valid YAML: month must be in 1..12",
    "count: !!int x": "config.yaml: not valid YAML: ",
    "inner: {rate: .inf}": "config.yaml: inner.rate: input should be a finite number, got inf",
    "items: [5]": "config.yaml: items.0: expected a mapping of keys to values, got 5",
    "- count": "config.yaml: expected sections with keys",
    "count: [": "config.yaml: not valid YAML",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Root, write(tmp_path, text), label="config.yaml")
    message = str(error.value)
    assert message.startswith(MISTAKES[text])
    assert "\n" not in message


OVERRIDES = {
    "count": "command line: 'count' is not of the form section.key=value",
    "inner.kind=x": "command line: inner.kind: 'x' is not one of constant, cosine",
    "count.x=1": "command line: 'count.x=1': count is a value and has no keys",
    "inner.names=[x": "command line: 'inner.names=[x': the value is not valid YAML: ",
    "items.5.name=x": "command line: 'items.5.name=x': items is a list of 1; number its items from 0",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_mistake_on_the_command_line_says_so(tmp_path: Path, override: str) -> None:
    file = write(tmp_path, "count: 1\nitems: [{name: a}]\n")
    with pytest.raises(ConfigError) as error:
        load_config(Root, file, [override])
    assert str(error.value).startswith(OVERRIDES[override])


def test_merge_keys_and_empty_sections(tmp_path: Path) -> None:
    text = "items:\n  - &base {name: a, weight: 2}\n  - {<<: *base, name: b}\ninner:\n"
    loaded = load_config(Root, write(tmp_path, text))
    assert loaded == Root(items=(Item(name="a", weight=2), Item(name="b", weight=2)))


def test_where_a_value_came_from(tmp_path: Path) -> None:
    file = write(tmp_path, "inner: {rate: 1}\nitems: []\n")
    for override, start in {
        "innr.rate=1": "config.yaml and command line: innr: unknown key; did you mean inner?",
        "items=[{nam: a}]": "command line: items.0.name: is required",
        "count={a: 1, a: 2}": "command line: 'count={a: 1, a: 2}': line 1: key 'a' is given twice; keep one",
        "items.\u00b2=5": "command line: 'items.\u00b2=5': items is a list of 0; number its items from 0",
    }.items():
        with pytest.raises(ConfigError) as error:
            load_config(Root, file, [override], label="config.yaml")
        assert str(error.value).startswith(start)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Root, None, ["count=x", "inner.rate=y", "nothing=1"])
    assert len(str(error.value).splitlines()) == 3


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(Root, tmp_path / "nowhere.yaml")
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"count: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read"):
        load_config(Root, file)
