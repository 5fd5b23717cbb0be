# ruff: noqa: RUF001 (readers get true minus signs, dashes and multiplication signs)
import math
import os
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pvcore import report
from pvcore.errors import PvcoreError
from pvcore.report import (
    Block,
    Figure,
    Note,
    Page,
    ReportError,
    Scale,
    Section,
    SideBySide,
    Table,
    TokenStrip,
    Verdict,
    Verdicts,
)

HOSTILE = "<script>alert('x')</script> & \"quoted\" \x00\ud800"
CIRCLE = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="0 0 10 10"><defs><style>*{color:red}</style><circle id="dot" r="2"/></defs>'
    '<clipPath id="clip"><rect width="9" height="9"/></clipPath>'
    '<use xlink:href="#dot" clip-path="url(#clip)"/></svg>'
)


class Reader(HTMLParser):
    """Collects the elements and the text of a page, and checks that its elements nest."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, document: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [
            attributes
            for _, attributes in self.elements
            if name in (attributes.get("class") or "").split()
        ]


def page(*blocks: Block, **kwargs: Any) -> Page:
    return Page(
        title="Title", lead="Lead", sections=[Section(title="One", blocks=blocks)], **kwargs
    )


def read(*blocks: Block) -> Reader:
    return Reader(report.render(page(*blocks)))


def everything(text: str) -> Page:
    strip = TokenStrip(tokens=[text, " b"], values={text: [1.0, -2.0]}, caption=text, prompt=text)
    return Page(
        title=text,
        lead=text,
        footer=text,
        sections=[
            Section(
                title=text,
                text=text,
                blocks=[
                    strip,
                    Table(columns=[text, "n"], rows=[[text, 1.5]], caption=text),
                    Verdicts(
                        verdicts=[Verdict(claim=text, measured=text, bound=text, passed=True)]
                    ),
                    Note(text=text),
                    SideBySide(left=strip, right=strip, left_title=text, right_title=text),
                    Figure(svg=CIRCLE, caption=text),
                ],
            ),
            Section(title=text),
        ],
    )


def test_all_text_is_escaped_and_unreadable_characters_replaced() -> None:
    document = report.render(everything(HOSTILE))
    reader = Reader(document)
    assert "script" not in {tag for tag, _ in reader.elements}
    assert reader.text.count("<script>alert('x')</script> & \"quoted\" \ufffd\ufffd") >= 15
    assert "\x00" not in document
    document.encode("utf-8")


def test_a_page_reaches_for_nothing_outside_itself() -> None:
    document = report.render(everything("text"))
    assert "http" not in document
    assert "@import" not in document
    for tag, attributes in Reader(document).elements:
        assert tag not in {"script", "link", "iframe", "img", "image", "object", "base"}
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
        assert "url(" not in (attributes.get("clip-path") or "").replace("url(#", "")


def test_ids_are_unique_and_references_resolve_with_a_figure_shown_twice() -> None:
    document = report.render(page(Figure(svg=CIRCLE), Figure(svg=CIRCLE)))
    elements = Reader(document).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids)) == 5
    used = [attributes for tag, attributes in elements if tag == "use"]
    assert len(used) == 2
    for attributes in used:
        assert str(attributes["href"])[1:] in ids
        assert str(attributes["clip-path"])[len("url(#") : -1] in ids
    assert "color:red" not in document  # a figure's style sheet would reach the whole page


@pytest.mark.parametrize(
    "inside",
    [
        "<script>alert(1)</script>",
        '<image href="x.png"/>',
        "<foreignObject/>",
        '<a href="#x"/>',
        '<rect onclick="alert(1)"/>',
        '<use href="other.svg#dot"/>',
        '<rect style="fill: url(other.svg#dot)"/>',
        '<rect style="fill: URL (#dot)"/>',
        '<rect style="fill: u\\72l(x)"/>',
        "<broken",
    ],
)
def test_a_figure_that_does_or_fetches_something_is_refused(inside: str) -> None:
    with pytest.raises(ReportError, match="got a figure"):
        report.render(page(Figure(svg=f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>')))


def test_a_figure_must_be_an_svg() -> None:
    with pytest.raises(ReportError, match="root is 'html'"):
        report.render(page(Figure(svg="<html/>")))


def test_tokens_are_coloured_by_sign_and_size() -> None:
    values = {"evil": [4.0, -2.0, 0.0, math.nan]}
    reader = read(TokenStrip(tokens=["a", "b", "c", "d"], values=values))
    assert [(token["style"], token["data-v"]) for token in reader.with_class("up")] == [
        ("--a:1.00", "+4.00"),
        ("--a:0.00", "0"),
    ]
    assert [(token["style"], token["data-v"]) for token in reader.with_class("down")] == [
        ("--a:0.50", "−2.00")
    ]
    assert [token["data-v"] for token in reader.with_class("unknown")] == ["no value"]
    assert "highest +4.00 at a" in reader.text


def test_a_given_scale_makes_two_strips_comparable() -> None:
    scales = {"evil": Scale(centre=-10.0, reach=4.0)}
    weak = read(TokenStrip(tokens=["a"], values={"evil": [-9.0]}, scales=scales))
    beyond = read(TokenStrip(tokens=["a"], values={"evil": [-99.0]}, scales=scales))
    assert weak.with_class("up")[0]["style"] == "--a:0.25"
    assert beyond.with_class("down")[0]["style"] == "--a:1.00"
    assert "−14.0−6.00" in weak.text


@pytest.mark.parametrize(("active", "shown"), [(None, 0), ("humor", 1)])
def test_one_trait_is_shown_first_and_the_switch_needs_no_script(
    active: str | None, shown: int
) -> None:
    values = {"evil": [1.0], "humor": [2.0]}
    elements = read(TokenStrip(tokens=["a"], values=values, active=active)).elements
    buttons = [attributes for tag, attributes in elements if tag == "input"]
    labels = [attributes["for"] for tag, attributes in elements if tag == "label"]
    assert ["checked" in button for button in buttons] == [index == shown for index in (0, 1)]
    assert [button["id"] for button in buttons] == labels
    assert len({button["name"] for button in buttons}) == 1


def test_line_breaks_are_seen_and_empty_strips_stand() -> None:
    assert "a↵\nb" in read(TokenStrip(tokens=["a\nb"], values={"evil": [1.0]})).text
    assert "no values" in read(TokenStrip(tokens=["a"], values={"evil": [math.nan]})).text
    assert "no values" in read(TokenStrip(tokens=[], values={"evil": []})).text
    assert read(TokenStrip(tokens=["a"], values={"evil": [0.0]})).with_class("up")


def test_table_columns_of_numbers_share_their_decimals() -> None:
    rows: list[list[report.Cell]] = [["a", 1.0, 3, None, True], ["b", 1.074, 40, math.nan, False]]
    reader = read(Table(columns=["arm", "ratio", "n", "gap", "kept"], rows=rows))
    assert "a1.0003–yes" in reader.text
    assert "b1.07440–no" in reader.text
    assert len(reader.with_class("number")) == 9  # three columns, each with its head


def test_verdicts_show_figures_and_the_head_counts_them() -> None:
    verdicts = [
        Verdict(claim="`steering` works", measured=83.42, bound="≥ 60", passed=True),
        Verdict(claim="cheap", measured="1.07×", bound="≤ 1.05×", passed=False),
        Verdict(claim="served", measured="–", bound="≤ 1.1×", passed=None),
    ]
    reader = read(Verdicts(verdicts=verdicts))
    assert "1 of 3 claims hold, 1 not measured" in reader.text
    assert "✓ holds83.4wanted ≥ 60steering works" in reader.text
    assert "✗ fails1.07×wanted ≤ 1.05×cheap" in reader.text
    assert reader.with_class("summary")[0]["class"] == "summary failed"
    assert read(Verdicts(verdicts=verdicts[:1])).with_class("summary")[0]["class"] == (
        "summary passed"
    )
    assert read(Verdicts(verdicts=verdicts[::2])).with_class("summary")[0]["class"] == (
        "summary open"
    )
    assert read(Note(text="n")).with_class("summary") == []


def test_text_has_paragraphs_and_code() -> None:
    section = Section(title="s", text="first `x < y`\n\n  second")
    document = report.render(Page(title="t", lead="", sections=[section]))
    assert "<p>first <code>x &lt; y</code></p><p>second</p>" in document


def test_both_themes_are_in_the_page_and_equal_pages_are_equal_text() -> None:
    document = report.render(everything("text"))
    assert document == report.render(everything("text"))
    assert document.count("prefers-color-scheme") >= 2
    assert report.render(everything("other")) != document


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TokenStrip(tokens=["a"], values={}), "without traits"),
        (lambda: TokenStrip(tokens=["a"], values={"evil": []}), "got 0 values of evil for 1"),
        (lambda: TokenStrip(tokens=["a"], values={"evil": [math.inf]}), "infinite value of evil"),
        (lambda: TokenStrip(tokens=[], values={"evil": []}, active="humor"), "active='humor'"),
        (lambda: Table(columns=["a"], rows=[["x", "y"]]), "got 2 cells in row 0"),
        (lambda: Table(columns=[], rows=[]), "without columns"),
        (lambda: Scale(reach=0.0), "reach above 0"),
        (lambda: Scale(centre=math.nan), "finite numbers"),
    ],
)
def test_data_that_do_not_fit_are_typed_errors(make: Callable[[], object], text: str) -> None:
    assert issubclass(ReportError, PvcoreError)
    with pytest.raises(ReportError, match=text):
        make()


def test_write_makes_folders_and_replaces_the_old_report(tmp_path: Path) -> None:
    target = tmp_path / "reports" / "run.html"
    report.write(page(), target)
    report.write(page(Note(text="new")), str(target))
    assert target.read_text(encoding="utf-8") == report.render(page(Note(text="new")))
    assert [path.name for path in target.parent.iterdir()] == ["run.html"]


def test_a_page_that_cannot_be_rendered_or_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "run.html"
    target.write_text("old")
    with pytest.raises(ReportError):
        report.write(page(Figure(svg="<html/>")), target)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", refuse)
        with pytest.raises(ReportError, match=r"cannot be written \(No space left on device\)"):
            report.write(page(), target)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.html"]


def test_a_folder_in_the_place_of_the_report_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be written"):
        report.write(page(), tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ReportError, match="cannot be written"):
        report.write(page(), blocked / "run.html")
