"""Progress: what was there counts as rows and not as speed; an unknown length shows no share."""

from __future__ import annotations

from math import isnan

import pytest

from pvcore import flag_progress
from pvcore.flag_progress import Meter, bar
from pvcore.flag_shards import Footer


def footer(*, share: float = 0.5) -> Footer:
    return Footer(
        fingerprint="f", shard=0, scored=90, rejected=10, tokens=4000, digest="", share=share
    )


def test_speed_is_that_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(flag_progress.time, "monotonic", lambda: now[0])
    meter = Meter()
    meter.add(footer(), fresh=False)
    now[0] = 2.0
    assert meter.text == "90 rows, 0 tokens/s, 10 rejected"
    meter.add(footer(share=0.75), fresh=True)
    assert meter.text == "180 rows, 2,000 tokens/s, 20 rejected"
    assert meter.share == 0.75
    meter.add(footer(share=-1.0), fresh=True)
    assert isnan(meter.share)


def test_the_bar_writes_to_standard_error_and_only_if_wanted(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for shown in (False, True):
        with bar(shown=shown) as show:
            meter = Meter()
            for share in (0.25, -1.0, 1.0):
                meter.add(footer(share=share), fresh=True)
                show(meter)
        out, err = capfd.readouterr()
        assert out == ""
        assert ("270 rows" in err) is shown
