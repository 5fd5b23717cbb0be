# ruff: noqa: RUF001 (readers get true minus signs, dashes and multiplication signs)
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from pvcore import plots
from pvcore.correlation import MonitoredReply, correlations
from pvcore.palette import ACCENT, MUTED, NEGATIVE, ORDERED, POSITIVE, TRAITS
from pvcore.report import Figure, Page, ReportError, Section, render

NAN = math.nan
DOSE = plots.DoseCurve(
    trait="evil",
    coefficients=[-1.0, 0.0, 1.0, 2.0],
    scores=[2.0, 5.0, 61.0, 93.0],
    coherence=[90.0, 97.0, 88.0, 71.0],
    control_scores=[4.0, 5.0, 3.0, 6.0],
    control_coherence=[95.0, 97.0, 96.0, 90.0],
)
TRADE = [
    plots.TradeOff(layer=1, scores=[5.0, 30.0, 50.0], coherence=[97.0, 90.0, 60.0]),
    plots.TradeOff(layer=2, scores=[5.0, 50.0, 80.0], coherence=[97.0, 93.0, 76.0]),
    plots.TradeOff(layer=3, scores=[5.0, 60.0, 99.0], coherence=[97.0, 80.0, 20.0]),
]
REPLIES = [
    MonitoredReply(projection=level + shift, score=20.0 * level + 7 * shift * shift, level=level)
    for level in range(4)
    for shift in (-0.5, 0.1, 0.4)
]
NAMES = ["evil", "humor", "optimism"]
COSINES = [[1.0, 0.4, -0.3], [0.4, 1.0, NAN], [-0.3, NAN, 1.0]]
NORMS = {"evil": [2.0, 3.0, 5.0], "humor": [1.0, 4.0, 7.0]}
TRACKS = {"plain": [1.0, 2.0, NAN, 4.0], "steered": [0.5, 0.0, -1.0, -1.5]}

DRAWN: dict[str, Callable[[], str]] = {
    "dose_response": lambda: plots.dose_response([DOSE]),
    "trade_off": lambda: plots.trade_off(TRADE, trait="evil"),
    "monitoring_scatter": lambda: plots.monitoring_scatter(REPLIES, trait="evil"),
    "cosine_matrix": lambda: plots.cosine_matrix(NAMES, COSINES),
    "norms_by_layer": lambda: plots.norms_by_layer(NORMS, residual=[9.0, 12.0, 15.0]),
    "drift": lambda: plots.drift(["a", "b", "c", "d"], TRACKS, trait="evil", cap=1.5),
}


def lines(svg: str, colour: str) -> list[list[np.ndarray]]:
    """The unbroken pieces of every line stroked in the colour, as arrays of SVG points."""
    found = []
    for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        style = path.attrib.get("style", "")
        if "fill: none" in style and f"stroke: {colour}" in style:
            pieces = path.attrib["d"].split("M")[1:]
            found.append(
                [np.array(re.findall(r"-?[\d.]+", piece), float).reshape(-1, 2) for piece in pieces]
            )
    return found


def assert_affine(drawn: np.ndarray, wanted: list[float], *, rising: bool) -> None:
    """The drawn coordinates are the wanted numbers up to scale and shift."""
    slope, shift = np.polyfit(wanted, drawn, 1)
    assert (slope > 0) == rising
    # Six decimals are written: an error of a thousandth of a pixel is far above their rounding.
    assert np.abs(slope * np.array(wanted) + shift - drawn).max() < 1e-3
    assert np.ptp(drawn) > 10


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_is_the_same_each_time_and_can_stand_in_a_page(name: str) -> None:
    svg = DRAWN[name]()
    assert DRAWN[name]() == svg
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "<image" not in svg
    assert "<metadata" not in svg
    page = render(Page(title="t", lead="", sections=[Section(title="s", blocks=[Figure(svg=svg)])]))
    assert "http" not in page


def test_another_process_draws_the_same_without_pyplot_or_torch() -> None:
    # An empty package in pvcore's place: its own imports are not what is measured here.
    code = (
        "import importlib.util, sys, types; package = types.ModuleType('pvcore');"
        "package.__path__ = importlib.util.find_spec('pvcore').submodule_search_locations;"
        "sys.modules['pvcore'] = package;"
        "from pvcore import plots;"
        f"print(plots.norms_by_layer({NORMS!r}), end='');"
        "print(sorted({'matplotlib.pyplot', 'torch'} & set(sys.modules)), file=sys.stderr)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert other.stdout.decode() == plots.norms_by_layer(NORMS)
    assert other.stderr.decode().strip() == "[]"


def test_dose_response_draws_scores_and_control_at_their_coefficients() -> None:
    svg = plots.dose_response([DOSE])
    (score,), (coherence,) = lines(svg, TRAITS["evil"].css)
    assert_affine(score[:, 0], list(DOSE.coefficients), rising=True)
    assert_affine(score[:, 1], list(DOSE.scores), rising=False)
    assert_affine(coherence[:, 1], list(DOSE.coherence), rising=False)
    (control,), (_,) = lines(svg, MUTED.css)
    assert len(control) == len(DOSE.control_scores)
    assert plots.dose_response([replace(DOSE, scores=[2.0, 5.0, 61.0, 92.0])]) != svg
    assert "random, same norm" in svg


def test_dose_response_sorts_coefficients_and_does_without_a_control() -> None:
    shuffled = replace(
        DOSE,
        coefficients=[2.0, -1.0, 1.0, 0.0],
        scores=[93.0, 2.0, 61.0, 5.0],
        coherence=[71.0, 90.0, 88.0, 97.0],
        control_scores=[],
        control_coherence=[],
    )
    svg = plots.dose_response([shuffled])
    (score,), _ = lines(svg, TRAITS["evil"].css)
    assert_affine(score[:, 1], list(DOSE.scores), rising=False)
    assert lines(svg, MUTED.css) == []
    assert "random" not in svg


def test_seven_traits_make_seven_panels_in_seven_colours() -> None:
    svg = plots.dose_response([replace(DOSE, trait=trait) for trait in TRAITS])
    for trait, colour in TRAITS.items():
        assert f">{trait}</text>" in svg
        assert len(lines(svg, colour.css)) == 2


def test_trade_off_draws_the_best_layer_heavier() -> None:
    svg = plots.trade_off(TRADE, trait="evil")
    widths = {
        layer: re.search(rf"stroke: {re.escape(colour.css)}; stroke-width: ([\d.]+)", svg)
        for layer, colour in zip((1, 2, 3), (ORDERED[0], ORDERED[4], ORDERED[7]), strict=True)
    }
    drawn = {layer: float(found[1]) for layer, found in widths.items() if found}
    assert max(drawn, key=lambda layer: drawn[layer]) == 2  # layer 3 scores more, incoherently
    assert len(set(drawn.values())) == 2
    ((best,),) = lines(svg, ORDERED[4].css)
    assert_affine(best[:, 0], list(TRADE[1].scores), rising=True)
    assert_affine(best[:, 1], list(TRADE[1].coherence), rising=False)
    assert f"fill: {ACCENT.css}" in svg
    assert plots.trade_off(TRADE, trait="evil", target=(50.0, 75.0)) != svg


def test_monitoring_scatter_names_both_correlations_and_draws_every_reply() -> None:
    svg = plots.monitoring_scatter(REPLIES, trait="evil")
    r = correlations(REPLIES)
    assert f"r {r.overall:+.2f} overall, " in svg
    assert f"{r.within:+.2f}".replace("-", "−") + " within a level" in svg
    assert round(r.overall, 2) != round(r.within, 2)
    for low, high in (r.overall_interval, r.within_interval):
        assert f"{low:+.2f} to {high:+.2f}".replace("-", "−") in svg
    colours = [ORDERED[step].css for step in (0, 2, 5, 7)]
    for colour in colours:
        # Three replies and the level's mark in the key.
        assert len(re.findall(rf"<use [^>]*fill: {re.escape(colour)}", svg)) == 4


def test_monitoring_scatter_leaves_out_nan_and_says_where_r_is_undefined() -> None:
    gap = MonitoredReply(projection=NAN, score=50.0, level=0)
    svg = plots.monitoring_scatter([*REPLIES, gap], trait="evil")
    assert len(re.findall("<use ", svg)) == len(re.findall("<use ", DRAWN["monitoring_scatter"]()))
    lone = [MonitoredReply(projection=1.0, score=50.0, level="only")]
    assert "r – overall, – within a level" in plots.monitoring_scatter(lone, trait="evil")
    with pytest.raises(ReportError, match="only replies with NaN"):
        plots.monitoring_scatter([gap], trait="evil")


def test_cosine_matrix_paints_sign_and_size_and_dashes_the_unknown() -> None:
    svg = plots.cosine_matrix(NAMES, COSINES)
    assert svg.count(f"fill: {POSITIVE.css}; opacity: 0.85") == 3
    assert svg.count(f"fill: {POSITIVE.css}; opacity: 0.34") == 2
    assert svg.count(f"fill: {NEGATIVE.css}; opacity: 0.255") == 2
    assert svg.count(">−0.30</text>") == 2
    assert svg.count(">–</text>") == 2


def test_norms_are_drawn_at_their_layers_beside_the_residual() -> None:
    svg = plots.norms_by_layer(NORMS, layers=[3, 7, 21], residual=[9.0, 12.0, 15.0])
    ((evil,),) = lines(svg, TRAITS["evil"].css)
    assert_affine(evil[:, 0], [3.0, 7.0, 21.0], rising=True)
    assert_affine(evil[:, 1], NORMS["evil"], rising=False)
    assert ">residual (mean)</text>" in svg


def test_drift_breaks_the_line_at_nan_and_shows_hostile_tokens_as_text() -> None:
    tokens = ["<script>", "$x$", "\n", " a\x07 much longer token"]
    svg = plots.drift(tokens, TRACKS, trait="evil", cap=1.5)
    gap, cap = sorted(lines(svg, MUTED.css) + lines(svg, ACCENT.css), key=len, reverse=True)
    assert [len(piece) for piece in gap] == [2, 1]
    assert len(cap) == 1
    assert "&lt;script&gt;" in svg
    assert ">$x$</text>" in svg
    assert ">↵</text>" in svg
    assert "a\ufffd much longe…" in svg
    assert ">cap 1.50</text>" in svg


def test_drift_compares_replies_of_different_lengths_by_position() -> None:
    svg = plots.drift([], {"plain": [1.0, 2.0, 3.0], "steered": [0.0, 1.0]}, trait="evil")
    ((steered,),) = lines(svg, TRAITS["evil"].css)
    assert len(steered) == 2
    assert ">token of the reply</text>" in svg


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (lambda: plots.dose_response([]), "got no dose curves"),
        (lambda: plots.dose_response([replace(DOSE, scores=[1.0])]), "got 1 scores of evil"),
        (
            lambda: plots.dose_response([replace(DOSE, scores=[1.0, 2.0, 3.0, math.inf])]),
            "got infinite scores of evil",
        ),
        (
            lambda: plots.dose_response([replace(DOSE, coefficients=[0.0, 1.0, NAN, 3.0])]),
            "got NaN among the coefficients",
        ),
        (lambda: plots.trade_off([], trait="evil"), "got no trade-off curves"),
        (
            lambda: plots.trade_off([replace(TRADE[0], coherence=[1.0])], trait="evil"),
            "coherence of layer 1; wanted 3",
        ),
        (lambda: plots.monitoring_scatter([], trait="evil"), "got no replies"),
        (lambda: plots.cosine_matrix(NAMES, COSINES[:2]), "got 2 rows for 3 names"),
        (lambda: plots.cosine_matrix([], []), "got no names"),
        (lambda: plots.norms_by_layer({}), "got no vectors"),
        (lambda: plots.norms_by_layer(NORMS, layers=[1]), "norms of evil; wanted 1"),
        (lambda: plots.drift([], {}, trait="evil"), "got no chats"),
        (lambda: plots.drift(["a"], TRACKS, trait="evil"), "projections of plain; wanted 1"),
    ],
)
def test_what_cannot_be_drawn_is_a_typed_error(draw: Callable[[], str], text: str) -> None:
    with pytest.raises(ReportError, match=text):
        draw()


def test_lines_without_a_single_number_are_left_out_quietly() -> None:
    hollow = replace(TRADE[0], coherence=[NAN, NAN, NAN])
    assert ">layer 1</text>" not in plots.trade_off([hollow, TRADE[1]], trait="evil")
    blank = replace(DOSE, scores=[NAN] * 4, control_scores=[NAN] * 4)
    assert "random" not in plots.dose_response([blank])
    assert ">steered</text>" not in plots.drift(
        [], {"plain": [1.0, 2.0], "steered": [NAN, NAN]}, trait="evil"
    )
