"""Pages in a real browser: plots and colours are there, in both themes, and the switch switches."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor

import pvcore as pv
from pvcore import report
from pvcore.chat_view import chat_view
from pvcore.cli_shift import _page as shift_page
from pvcore.palette import NEGATIVE, POSITIVE, SURFACE, TRAITS, Colour
from pvcore.shift import FinetuningShift
from pvcore.transcripts import Reply, Transcript
from pvcore.world.demo_report import page as demo_page
from tests.demo_sample import sample
from tests.test_exports import transcript

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no browser"),
]
Pixels = NDArray[np.int64]
Look = Callable[..., Pixels]


@pytest.fixture
def look(tmp_path: Path) -> Look:
    """The pixels `[height, width, colour]` of a page."""

    def shot(html: str, *, dark: bool = False, height: int = 1400) -> Pixels:
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        subprocess.run(
            [
                str(BROWSER),
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--window-size=1000,{height}",
                f"--screenshot={tmp_path / 'shot.png'}",
                (tmp_path / "page.html").as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        return np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(np.int64)

    return shot


def of_colour(pixels: Pixels, colour: Colour, *, dark: bool = False, near: int = 12) -> int:
    """How many pixels have a colour, but for smoothing."""
    wanted = np.array(ImageColor.getrgb(colour.dark if dark else colour.light))
    return int((np.abs(pixels - wanted).max(-1) <= near).sum())


def tinted(pixels: Pixels, colour: Colour, *, dark: bool = False) -> int:
    """Pixels between the surface and a colour, as the token backgrounds are."""
    ends = [
        np.array(ImageColor.getrgb(one.dark if dark else one.light)) for one in (SURFACE, colour)
    ]
    way = ends[1] - ends[0]
    share = ((pixels - ends[0]) @ way) / float(way @ way)
    off = np.abs(pixels - (ends[0] + share[..., None] * way)).max(-1)
    return int(((share > 0.25) & (share < 0.9) & (off < 6)).sum())


def wide(seed: int = 0) -> Transcript:
    """A conversation whose tokens are long enough to see, low, middling and high in turn."""
    tokens = ("downwards ", "middle ", "upwards ") * 4
    values = torch.tensor([-4.0, 0.0, 4.0] * 4) + 0.01 * seed
    one = Reply(
        message=1,
        tokens=tokens,
        before=torch.zeros(2, 1),
        projections=torch.stack([values, values.roll(1) + 2.0])[:, None],
    )
    return Transcript(
        messages=(
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "".join(tokens)},
        ),
        replies=(one,),
        traits=("evil", "humor"),
        sites=(pv.resid_post(2),),
    )


def without_figures(html: str) -> str:
    return re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)


@pytest.mark.parametrize("dark", [False, True])
def test_the_chat_view_shows_colours_and_the_drift(look: Look, dark: bool) -> None:
    html = report.render(chat_view([wide(), wide(5)], levels={"evil": 0.5}))
    html = html.replace("<i></i>", "")  # the legend's own gradient
    pixels = look(html, dark=dark)
    corner = pixels[5, 5].sum()
    assert (corner < 150) == dark
    assert of_colour(pixels, TRAITS["evil"], dark=dark) > 300
    assert tinted(pixels, POSITIVE, dark=dark) > 3000
    assert tinted(pixels, NEGATIVE, dark=dark) > 3000
    plain = look(re.sub(r"--a:[0-9.]+", "--a:0", html), dark=dark)
    assert tinted(plain, POSITIVE, dark=dark) < 0.5 * tinted(pixels, POSITIVE, dark=dark)
    bare = look(without_figures(html), dark=dark)
    assert of_colour(bare, TRAITS["evil"], dark=dark) < 0.6 * of_colour(
        pixels, TRAITS["evil"], dark=dark
    )


def test_switching_the_trait_recolours_the_text(look: Look) -> None:
    html = report.render(chat_view([wide()]))
    first = look(html, height=600)
    switched = html.replace('id="chat-0-0" checked', 'id="chat-0-0"').replace(
        'id="chat-0-1"', 'id="chat-0-1" checked'
    )
    other = look(switched, height=600)
    assert np.array_equal(first, look(html, height=600))
    changed = np.abs(first - other).max(-1) > 20
    assert changed.sum() > 500
    rows = np.flatnonzero(changed.any(1))
    assert rows.max() < 600


def test_hostile_text_runs_nothing(look: Look) -> None:
    attack = "<script>document.body.style.background='#ff0000'</script>"
    attack += "<img src=x onerror=\"document.body.style.background='#ff0000'\">"
    one = transcript()
    hostile = type(one)(
        messages=({"role": "user", "content": attack}, {"role": "assistant", "content": attack}),
        replies=one.replies[:1],
        traits=one.traits,
        sites=one.sites,
    )
    red = Colour("red", "#ff0000", "#ff0000")
    page = report.render(chat_view([hostile], title=attack))
    assert of_colour(look(page, height=700), red) == 0
    armed = page.replace("</main>", f"{attack}</main>")
    assert of_colour(look(armed, height=700), red) > 10000


def test_the_demo_report_shows_its_plots(look: Look) -> None:
    html = report.render(demo_page(sample()))
    pixels, bare = look(html, height=6000), look(without_figures(html), height=6000)
    for trait in ("evil", "humor"):
        assert of_colour(pixels, TRAITS[trait]) > of_colour(bare, TRAITS[trait]) + 500


def test_the_course_of_a_shift_is_drawn(look: Look) -> None:
    site = pv.resid_post(2)
    found = {
        step: FinetuningShift(
            sites=(site,),
            shifts={"evil": torch.tensor([step / 10.0]), "humor": torch.tensor([-step / 20.0])},
            prompts=4,
        )
        for step in (10, 20, 30)
    }
    html = report.render(shift_page("before", "after", found))
    pixels, bare = look(html), look(without_figures(html))
    for trait in ("evil", "humor"):
        assert of_colour(pixels, TRAITS[trait]) > of_colour(bare, TRAITS[trait]) + 300
