"""Transcripts: figures of conversations, and the text each token adds."""

import math

import pytest
import torch

from pvcore.errors import VectorError
from pvcore.transcripts import Reply, Transcript, token_texts
from tests.test_exports import SITES, transcript
from tests.test_stream import Bytes


def test_the_text_of_the_tokens_is_the_text() -> None:
    text = "naïve 🙂 ok"
    parts = token_texts(Bytes(), list(text.encode()))
    assert "".join(parts) == text
    assert len(parts) == len(text.encode())
    cut = token_texts(Bytes(), list("🙂".encode())[:2])
    assert "".join(cut).count("\ufffd") >= 1
    assert token_texts(Bytes(), []) == ()


def test_drift_and_summaries_leave_out_what_is_not_known() -> None:
    one = transcript(cut=True)
    drift = one.drift("dry humor")
    for turn, reply in enumerate(one.replies):
        for place in (0, 1):
            known = [v for v in reply.projections[1, place].tolist() if not math.isnan(v)]
            assert float(drift[turn, place]) == pytest.approx(sum(known) / len(known))
    summary = one.summaries()[-1]
    every = [v for reply in one.replies for v in reply.projections[1, 1].tolist() if v == v]
    assert summary.mean == pytest.approx(sum(every) / len(every))
    assert (summary.max, summary.last) == (max(every), every[-1])
    with pytest.raises(VectorError, match="got trait 'envy'; this watches evil, dry humor"):
        one.drift("envy")


def test_nothing_known_is_nan_and_no_reply_is_no_summary() -> None:
    blank = Reply(
        message=1,
        tokens=("x",),
        before=torch.zeros(1, 2),
        projections=torch.full((1, 2, 1), torch.nan),
    )
    one = Transcript(messages=(), replies=(blank,), traits=("evil",), sites=SITES)
    assert all(
        math.isnan(s.mean) and math.isnan(s.max) and math.isnan(s.last) for s in one.summaries()
    )
    bare = Transcript(messages=(), replies=(), traits=("evil",), sites=SITES)
    assert bare.summaries() == []
    assert bare.drift("evil").shape == (0, 2)
