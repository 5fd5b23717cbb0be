"""Reports: one HTML file made from plain data, that needs no network, script or other file."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count
from math import isinf, isnan
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable
from xml.etree import ElementTree

from pvcore.files import write_whole
from pvcore.numerals import Number, decimals_of, number
from pvcore.palette import css_variables, trait_colours
from pvcore.token_colours import ReportError as ReportError
from pvcore.token_colours import Scale as Scale
from pvcore.token_colours import legend_html, readable, text_html, token_html

Cell = str | Number | None
_ACTIVE_SVG = {"script", "foreignObject", "iframe", "image", "a", "animate", "set"}
_BADGES = {
    True: ("passed", "✓ holds"),
    False: ("failed", "✗ fails"),
    None: ("open", "○ not measured"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """An SVG drawing, such as `pvcore.plots` returns; anything active in it is refused."""

    svg: str
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of cells; columns of numbers are set right, None and NaN are shown as a dash."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.columns:
            raise ReportError("got a table without columns; wanted at least one")
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ReportError(
                    f"got {len(row)} cells in row {index} of a table; wanted "
                    f"{len(self.columns)}, one for each of {', '.join(self.columns)}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStrip:
    """A reply, every token coloured by its projection; the reader switches between the traits.

    `values` holds one number a token for each trait, NaN where there is none. `active` is the
    trait shown first. Give two strips the same `scales` to compare them; without one, a trait's
    colour is full at its largest absolute value. `means` are those of the whole reply, where the
    tokens are only its beginning.
    """

    tokens: Sequence[str]
    values: Mapping[str, Sequence[Number]]
    caption: str = ""
    active: str | None = None
    prompt: str = ""
    scales: Mapping[str, Scale] = field(default_factory=dict)
    means: Mapping[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values:
            raise ReportError("got a token strip without traits; wanted at least one")
        for trait, numbers in self.values.items():
            if len(numbers) != len(self.tokens):
                raise ReportError(
                    f"got {len(numbers)} values of {trait} for {len(self.tokens)} tokens; "
                    "wanted one a token, NaN where there is none"
                )
            if any(isinf(number) for number in numbers):
                raise ReportError(f"got an infinite value of {trait}; wanted finite numbers or NaN")
        if self.active is not None and self.active not in self.values:
            raise ReportError(f"got active={self.active!r}; wanted one of {', '.join(self.values)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A claim with its figure and bound; `passed=None` says that it was not measured."""

    claim: str
    measured: str | Number
    bound: str
    passed: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Claims side by side, each with a badge; the page's head counts them."""

    verdicts: Sequence[Verdict]


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A remark set apart from the text."""

    text: str
    tone: Literal["information", "warning"] = "information"


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """Two blocks beside each other where there is room, below each other where not."""

    left: "Block"
    right: "Block"
    left_title: str = ""
    right_title: str = ""


@runtime_checkable
class Drawn(Protocol):
    """A block from elsewhere, which draws itself; `number` is one that no other block has."""

    def html(self, number: int) -> str: ...


Block = Figure | Table | TokenStrip | SideBySide | Verdicts | Note | Drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, text (blank lines part paragraphs, backticks mark code), and what it shows."""

    title: str
    text: str = ""
    blocks: Sequence[Block] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A whole report; `footer` is the place for model, commit and versions."""

    title: str
    lead: str
    sections: Sequence[Section]
    footer: str = ""


def write(page: Page, path: str | Path) -> None:
    """Render and put the file in place in one step: readers see the old report or the new one.

    Raises `ReportError` when the place cannot be written to.
    """
    target = Path(path)
    document = render(page).encode("utf-8")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, document)
    except OSError as problem:
        raise ReportError(
            f"got {target}, which cannot be written ({problem.strerror}); "
            "wanted a file path in a folder you may write to"
        ) from problem


def render(page: Page) -> str:
    """The page as one HTML document; equal pages give equal text."""
    numbers = count()
    style = files("pvcore").joinpath("data", "report.css").read_text(encoding="utf-8")
    sections = [
        f'<section id="section-{index}"><h2>{text_html(section.title)}</h2>'
        f"{_paragraphs(section.text)}{''.join(_block(block, numbers) for block in section.blocks)}"
        "</section>"
        for index, section in enumerate(page.sections)
    ]
    links = [
        f'<a href="#section-{index}">{text_html(section.title)}</a>'
        for index, section in enumerate(page.sections)
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text_html(page.title)}</title>\n<style>\n{css_variables()}\n{style}</style>\n"
        f"</head>\n<body>\n<header><h1>{text_html(page.title)}</h1>"
        f'<p class="lead">{text_html(page.lead)}</p>{_summary(page)}'
        + (f"<nav>{''.join(links)}</nav>" if len(links) > 1 else "")
        + "</header>\n<main>\n"
        + "\n".join(sections)
        + f"\n</main>\n<footer>{_paragraphs(page.footer)}</footer>\n</body>\n</html>\n"
    )


def _summary(page: Page) -> str:
    blocks = [block for section in page.sections for block in section.blocks]
    verdicts = [v for block in blocks if isinstance(block, Verdicts) for v in block.verdicts]
    if not verdicts:
        return ""
    passed = sum(verdict.passed is True for verdict in verdicts)
    failed = sum(verdict.passed is False for verdict in verdicts)
    unknown = len(verdicts) - passed - failed
    state, sign = ("failed", "✗") if failed else ("open", "○") if unknown else ("passed", "✓")
    text = f"{passed} of {len(verdicts)} claims hold"
    if unknown:
        text += f", {unknown} not measured"
    return f'<div class="summary {state}">{sign} {text}</div>'


def _block(block: Block, numbers: Iterator[int]) -> str:
    match block:
        case Figure():
            body = f'<div class="wide">{_inline_svg(block, next(numbers))}</div>'
            return f'<figure class="card figure">{body}{_caption(block.caption)}</figure>'
        case Table():
            return f'<div class="card wide">{_table(block)}</div>'
        case TokenStrip():
            return _strip(block, next(numbers))
        case Verdicts():
            return f'<ul class="verdicts">{"".join(map(_verdict, block.verdicts))}</ul>'
        case Note():
            return f'<div class="card note {block.tone}">{_paragraphs(block.text)}</div>'
        case SideBySide():
            left = _side(block.left_title, block.left, numbers)
            return f'<div class="pair">{left}{_side(block.right_title, block.right, numbers)}</div>'
        case _:
            return block.html(next(numbers))


def _side(title: str, block: Block, numbers: Iterator[int]) -> str:
    heading = f"<h3>{text_html(title)}</h3>" if title else ""
    return f"<div>{heading}{_block(block, numbers)}</div>"


def _verdict(verdict: Verdict) -> str:
    state, badge = _BADGES[verdict.passed]
    measured = verdict.measured
    figure = measured if isinstance(measured, str) else number(measured)
    return (
        f'<li class="{state}"><span class="badge">{badge}</span>'
        f'<div class="measured">{text_html(figure)}</div>'
        f'<div class="bound">wanted {text_html(verdict.bound)}</div>'
        f'<p class="claim">{_inline(verdict.claim)}</p></li>'
    )


def _table(table: Table) -> str:
    columns = [
        _column(name, [row[place] for row in table.rows])
        for place, name in enumerate(table.columns)
    ]
    head, *body = ("".join(cells) for cells in zip(*columns, strict=True))
    rows = "".join(f"<tr>{cells}</tr>" for cells in body)
    caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _column(name: str, cells: Sequence[Cell]) -> Iterator[str]:
    """The head and the cells of one column; its numbers share their decimal places."""
    figures = [cell for cell in cells if isinstance(cell, int | float)]
    numeric = bool(figures) and not any(isinstance(cell, str | bool) for cell in cells)
    places = min(max(map(decimals_of, figures), default=0), 4)
    kind = ' class="number"' if numeric else ""
    yield f'<th scope="col"{kind}>{text_html(name)}</th>'
    for cell in cells:
        if isinstance(cell, str | bool):
            text = _inline(cell) if isinstance(cell, str) else "yes" if cell else "no"
        else:
            text = number(cell, decimals=0 if isinstance(cell, int) else places)
        yield f"<td{kind}>{text}</td>"


def _strip(strip: TokenStrip, index: int) -> str:
    colours = trait_colours(strip.values)
    active = strip.active if strip.active is not None else next(iter(strip.values))
    tabs = []
    for place, (trait, numbers) in enumerate(strip.values.items()):
        known = [value for value in numbers if not isnan(value)]
        whole = strip.means.get(trait, sum(known) / len(known) if known else 0.0)
        mean = f"<b>{number(whole, signed=True)}</b>" if known else ""
        reach = max(map(abs, known), default=0.0) or 1.0
        scale = strip.scales.get(trait, Scale(reach=reach))
        button = f"strip-{index}-{place}"
        tabs.append(
            f'<input type="radio" name="strip-{index}" id="{button}"'
            f'{" checked" if trait == active else ""}><label for="{button}" '
            f'style="--trait:{colours[trait].css}" title="mean projection over the reply">'
            f"{text_html(trait)}{mean}</label>"
            f'<div class="pane"><p class="reply">'
            f"{''.join(map(token_html, strip.tokens, numbers, [scale] * len(numbers)))}</p>"
            f"{legend_html(strip.tokens, numbers, scale)}</div>"
        )
    prompt = f'<div class="prompt">{text_html(strip.prompt)}</div>' if strip.prompt else ""
    return (
        f'<figure class="card">{prompt}<div class="tabs">{"".join(tabs)}</div>'
        f"{_caption(strip.caption)}</figure>"
    )


def _inline_svg(figure: Figure, index: int) -> str:
    """The drawing as a part of the page: no namespaces, no styles, ids of its own."""
    try:
        root = ElementTree.fromstring(figure.svg)
    except ElementTree.ParseError as problem:
        raise ReportError(f"got a figure that is not XML ({problem}); wanted an SVG") from problem
    for element in list(root.iter()):
        for child in list(element):
            if _local(child.tag) in {"style", "metadata", "title"}:
                element.remove(child)
    if _local(root.tag) != "svg":
        raise ReportError(f"got a figure whose root is {_local(root.tag)!r}; wanted 'svg'")
    for element in root.iter():
        element.tag = _local(element.tag)
        if element.tag in _ACTIVE_SVG:
            raise ReportError(f"got a figure with <{element.tag}>; wanted shapes and text only")
        element.attrib = {
            _local(name): _own(_local(name), value, f"figure-{index}-")
            for name, value in element.attrib.items()
        }
    width = root.attrib.get("viewBox", "0 0 860 0").split()[2]
    root.attrib = {
        "viewBox": root.attrib.get("viewBox", ""),
        "style": f"max-width:{width}px",
        "role": "img",
        "aria-label": readable(figure.caption) or "figure",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _own(name: str, value: str, prefix: str) -> str:
    """An attribute's value with the figure's own ids; raises for anything that reaches outside."""
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    local = re.sub(r"url\(#([\w-]+)\)", rf"<{prefix}\1>", value)
    if name == "href" or name.startswith("on") or re.search(r"(?i)url\s*\(|@import|\\", local):
        raise ReportError(f"got a figure with {name}={value!r}; wanted references inside it only")
    return re.sub(rf"<({prefix}[\w-]+)>", r"url(#\1)", local)


def _caption(text: str) -> str:
    return f"<figcaption>{_inline(text)}</figcaption>" if text else ""


def _paragraphs(text: str) -> str:
    parts = (part.strip() for part in re.split(r"\n\s*\n", text))
    return "".join(f"<p>{_inline(part)}</p>" for part in parts if part)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text_html(text))
