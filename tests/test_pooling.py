"""Pooling: three averages in one forward, sums that can be taken up, memory that stays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import pytest
import torch
from torch import Tensor

import pvcore as pv
from pvcore.chats import Encoded
from pvcore.errors import WorkError
from pvcore.pooling import Pass, Pooled
from pvcore.vectors import VARIANTS
from tests.families import D_MODEL, build, tokenizer

SITES = (pv.resid_post(0), pv.resid_mid(1), pv.resid_post(1))
N_PAIRS = 9


@cache
def model() -> pv.HookedModel:
    return pv.HookedModel(build("qwen2"), tokenizer(), model_id="tiny/qwen2")


@cache
def encoded() -> tuple[Encoded, ...]:
    return tuple(
        model().encode(
            [
                [
                    {"role": "user", "content": f"Is it {side}{'so' * (1 + at % 4)}?"},
                    {"role": "assistant", "content": side * (1 + at % 5)},
                ]
                for side in ("Yes. ", "no")
                for at in range(N_PAIRS)
            ]
        )
    )


def a_pass(*, batch_size: int = 4, resamples: int = 5, rows: Sequence[Encoded] = ()) -> Pass:
    return Pass(
        model=model(),
        encoded=rows or encoded(),
        sites=SITES,
        batch_size=batch_size,
        resamples=resamples,
        seed=0,
    )


def sums(pooled: dict[str, Pooled]) -> dict[str, Tensor]:
    return {
        f"{variant} {name}": tensor.clone()
        for variant, one in pooled.items()
        for name, tensor in one.tensors().items()
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def beginning(batches: range, *, n: int) -> range:
    """The batches of a pass that goes no further than the first few."""
    return batches[:n]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_is_a_read_of_its_own_span(variant: str) -> None:
    span, reduce = {
        "response_mean": ("response", "mean"),
        "prompt_mean": ("prompt", "mean"),
        "prompt_last": ("last_prompt_token", "last"),
    }[variant]
    spans = model().read_spans(encoded(), sites=SITES, spans=[(span, reduce)], batch_size=4)
    rows = torch.empty(len(SITES), 2 * N_PAIRS, D_MODEL, dtype=torch.float64)
    for chosen, (part,) in spans:
        assert part.values is not None
        rows[:, chosen] = part.values.double()
    found = a_pass().run()[variant]  # type: ignore[index]
    wanted = rows[:, :N_PAIRS].mean(1) - rows[:, N_PAIRS:].mean(1)
    assert float((found.vector - wanted).abs().max()) < 1e-12
    assert float(wanted.norm(dim=-1).min()) > 0.1
    halves = [rows[:, at:N_PAIRS:2].mean(1) - rows[:, N_PAIRS + at :: 2].mean(1) for at in (0, 1)]
    for got, right in zip(found.split, halves, strict=True):
        assert float((got - right).abs().max()) < 1e-12
    sides = rows[:, :N_PAIRS], rows[:, N_PAIRS:]
    spread = (sum(side.var(1, correction=0).sum(-1) for side in sides) / 2).sqrt()
    assert float((found.spread - spread).abs().max()) < 1e-12


def test_all_variants_come_of_one_forward_a_batch() -> None:
    forwards = []
    handle = model().hf.model.layers[0].register_forward_pre_hook(lambda *_: forwards.append(1))
    a_pass(batch_size=5).run()
    handle.remove()
    assert len(forwards) == -(-2 * N_PAIRS // 5)


def test_sums_taken_up_anywhere_come_to_the_same_numbers() -> None:
    whole = sums(a_pass().run())
    saved: list[bytes] = []
    a_pass().run(save=saved.append)
    # How often sums are saved depends on the clock; the last time is certain.
    assert equal(sums(a_pass().run(begun=saved[-1])), whole)

    for batches in range(1, 5):
        kept: list[bytes] = []
        a_pass().run(save=kept.append, shown=partial(beginning, n=batches))
        assert equal(sums(a_pass().run(begun=kept[-1])), whole)
    assert float(whole["response_mean positive 0 mean"].abs().max()) > 0.1


def test_sides_that_are_alike_are_told_from_rounding() -> None:
    chats = [
        [
            {"role": "user", "content": f"Is it {'so' * (1 + at % 4)}?"},
            {"role": "assistant", "content": side * (1 + at % 5)},
        ]
        for side in ("Yes. ", "no")
        for at in range(N_PAIRS)
    ]
    pooled = a_pass(rows=model().encode(chats)).run()
    assert 0 < float(pooled["prompt_mean"].vector.norm(dim=-1).max()) < 1e-5
    assert [one.tells_sides_apart for one in pooled.values()] == [True, False, False]
    assert all(one.tells_sides_apart for one in a_pass().run().values())


def test_sums_do_not_grow_with_the_conversations() -> None:
    few, many = (
        sums(a_pass(rows=encoded()[:N_PAIRS] * n + encoded()[N_PAIRS:] * n).run()) for n in (1, 4)
    )
    assert {name: tensor.shape for name, tensor in few.items()} == {
        name: tensor.shape for name, tensor in many.items()
    }
    counted = [int(part["response_mean positive 0 count"]) for part in (few, many)]
    assert counted == [5, 18]


@pytest.mark.parametrize("begun", [b"", b"sums", b"\x02\0\0\0\0\0\0\0{}"])
def test_sums_that_are_none_are_one_typed_error(begun: bytes) -> None:
    with pytest.raises(WorkError, match="got sums of a pooling pass that cannot be taken up"):
        a_pass().run(begun=begun)


def test_sums_of_other_sites_are_one_typed_error() -> None:
    saved: list[bytes] = []
    a_pass(resamples=5).run(save=saved.append)
    with pytest.raises(WorkError, match="cannot be taken up"):
        a_pass(resamples=6).run(begun=saved[-1])
