"""Scores are those of the paper's loop, whatever the batch, the family and the path they take."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import pvcore as pv
from pvcore import flag_replies
from pvcore.blocks import length_borders
from pvcore.errors import HookError
from pvcore.flag_replies import GeneratedReplies
from pvcore.flag_rows import Form
from pvcore.flag_scan import (
    FORWARD,
    LAST_PROMPT_TOKEN,
    RESPONSE_MEAN,
    Scorer,
    packed,
    pool,
    pool_packed,
)
from pvcore.flag_settings import reading_of
from pvcore.flag_sources import resolve
from pvcore.flag_tokens import Sample
from tests.families import FAMILIES, VOCAB, build, tokenizer
from tests.flag_data import bank, chats, model
from tests.subjects import fresh

CHATS = chats(23)


def samples(hooked: pv.HookedModel, conversations: list[Any] = CHATS) -> list[Sample]:
    (source,) = resolve([{"messages": one} for one in conversations])
    reading = reading_of(hooked, Form())
    found, _ = reading.samples([(source, raw) for raw in source.rows(frozenset())])
    assert all(isinstance(one, Sample) for one in found)
    return found  # type: ignore[return-value]


def paper_loop(hf: Any, conversations: list[Any], found: pv.VectorBank) -> Tensor:
    """One conversation at a time, no padding, all hidden states and logits: plain transformers."""
    plain, rows = tokenizer(), []
    for chat in conversations:
        prompt = plain.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
        ids = plain(prompt + chat[-1]["content"], add_special_tokens=False)["input_ids"]
        start = len(plain(prompt, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            states = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
        row = []
        for site in found.sites:
            h = states[site.layer + 1][0].double()
            pair = torch.stack([h[start:].mean(0), h[start - 1]])
            along = [one.direction(site).double() for one in found]
            row.append(torch.stack([pair @ v / v.norm() for v in along], dim=-1))
        rows.append(torch.stack(row))
    return torch.stack(rows)  # [chat, site, 2, n_vec]


# The last entry of hidden_states is made after the final norm, so that the loop cannot see layer 2.
BANK = bank("evil", "humor", sites=[pv.resid_post(0), pv.resid_post(1)])


@pytest.mark.parametrize("max_tokens", [1, 100, 2048])
def test_equals_the_papers_loop(max_tokens: int) -> None:
    hooked = model()
    got = torch.from_numpy(Scorer(hooked, BANK, max_tokens)(samples(hooked)))
    wanted = paper_loop(build("qwen2"), CHATS, BANK)
    assert got.dtype == torch.float32
    assert float((got - wanted).abs().max() / wanted.abs().max()) <= 1e-5
    assert float(wanted.std(0).min()) > 0.01
    spread = (wanted[:, :, RESPONSE_MEAN] - wanted[:, :, LAST_PROMPT_TOKEN]).abs()
    assert float(spread.median()) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_what_a_masked_read_gives(family: str) -> None:
    """Without an attention mask, padding on the right must change nothing."""
    found = fresh(family)
    hooked, some = found.model, CHATS[:9]
    got = torch.from_numpy(Scorer(hooked, bank(), 300)(samples(hooked, some)))
    for kind, span, reduce in ((0, "response", "mean"), (1, "last_prompt_token", "last")):
        acts = hooked.read(some, sites=bank().sites, span=span, reduce=reduce, batch_size=5)
        assert acts.values is not None
        wanted = torch.einsum("scd,skd->csk", acts.values.float(), bank().units)
        torch.testing.assert_close(got[:, :, kind], wanted, atol=2e-5, rtol=1e-5)


def test_batches_keep_to_their_budget_and_hold_every_sample_once() -> None:
    found = samples(model())
    for budget in (1, 64, 200, 10**6):
        batches = list(packed(found, budget))
        assert sorted(at for batch in batches for at in batch.places) == list(range(len(found)))
        assert all(batch.ids.numel() <= budget or len(batch.ids) == 1 for batch in batches)
    assert len(list(packed(found, 10**6))) == 1
    lengths = [length for batch in packed(found, 64) for length in batch.lengths]
    assert lengths == sorted(lengths, reverse=True)


def test_batches_are_cut_where_that_costs_least() -> None:
    found = samples(model())[:9]
    lengths = sorted((len(one.ids) for one in found), reverse=True)
    assert len(set(lengths)) > 3
    for budget in (80, 200, 1000):

        def cost(cuts: tuple[int, ...], budget: int = budget) -> float:
            total = 0.0
            for first, end in itertools.pairwise((0, *cuts, len(lengths))):
                padded = lengths[first] * (end - first)
                if padded > budget and end - first > 1:
                    return float("inf")
                total += padded + FORWARD * budget
            return total

        ways = (
            cuts
            for count in range(len(lengths))
            for cuts in itertools.combinations(range(1, len(lengths)), count)
        )
        best = min(map(cost, ways))
        sizes = [len(batch.places) for batch in packed(found, budget)]
        assert cost(tuple(itertools.accumulate(sizes[:-1]))) == pytest.approx(best)
    assert list(packed([], 100)) == []


def test_few_samples_of_many_lengths_are_hardly_padded() -> None:
    found = samples(model())
    own = sum(len(one.ids) for one in found)
    padded = sum(batch.ids.numel() for batch in packed(found, 1024))
    assert padded <= 1.1 * own
    together = len(found) * max(len(one.ids) for one in found)
    assert together > 1.3 * own


def test_one_launch_pools_what_the_loop_over_rows_pools() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(5, 17, 8, generator=generator)
    h[2, 9:] = float("nan")  # what lies in padding is nobody's business
    prompts, replies = [3, 1, 5, 16, 4], [(3, 9), (2, 17), (6, 9), (16, 17), (4, 5)]
    got, wanted = pool_packed(h, prompts, replies), pool(h, prompts, replies)
    torch.testing.assert_close(got, wanted)
    by_hand = torch.stack([h[row, a:b].double().mean(0) for row, (a, b) in enumerate(replies)])
    torch.testing.assert_close(wanted[0].double(), by_hand, atol=1e-6, rtol=1e-6)
    assert torch.equal(wanted[1], torch.stack([h[row, p - 1] for row, p in enumerate(prompts)]))


def test_a_float64_model_is_scored_in_float64() -> None:
    hooked = pv.HookedModel(build("gpt2", dtype=torch.float64), tokenizer(), model_id="")
    got = Scorer(hooked, BANK, 200)(samples(hooked))
    wanted = paper_loop(build("gpt2", dtype=torch.float64), CHATS, BANK).numpy()
    assert got.dtype == np.float64
    assert np.abs(got - wanted).max() <= 1e-9 * np.abs(wanted).max()


def test_the_forward_ends_at_the_deepest_site_and_makes_no_logits() -> None:
    hooked = model()
    ran: list[str] = []
    for name in ("model.layers.1", "model.layers.2", "lm_head"):
        hooked.hf.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    Scorer(hooked, BANK, 10**6)(samples(hooked))
    assert ran in ([], ["model.layers.1"])  # the tap that ends the forward may be the first hook
    Scorer(hooked, bank(), 10**6)(samples(hooked))
    assert "lm_head" not in ran


def test_an_armed_plan_acts_on_what_is_scored() -> None:
    hooked = model()
    found, evil = samples(hooked), bank()["evil"]
    plain = Scorer(hooked, bank(), 300)(found)
    with hooked.steer(pv.Add(evil, coeff=1.0, layers=[1], span="all")):
        moved = Scorer(hooked, bank(), 300)(found)
    norm = float(evil.direction(pv.resid_post(1)).norm())
    np.testing.assert_allclose(moved[:, 1, :, 0] - plain[:, 1, :, 0], norm, rtol=1e-4)
    assert np.array_equal(moved[:, 0], plain[:, 0])


def test_a_model_that_runs_no_block_is_not_scored_as_nothing() -> None:
    hooked = model()
    hooked.hf.model.layers = torch.nn.ModuleList(list(hooked.hf.model.layers)[:1])
    with pytest.raises(HookError):
        Scorer(hooked, BANK, 300)(samples(hooked))


def longrope() -> Any:
    """A tiny Phi-3 that turns its positions by other factors beyond 44 of them."""
    config = transformers.Phi3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        original_max_position_embeddings=44,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0 + at for at in range(8)],
        },
    )
    torch.manual_seed(0)
    made = transformers.Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for one in made.parameters():
            if one.ndim > 1:
                one.mul_(6.0)  # attention that looks somewhere
    made.generation_config.eos_token_id = None
    return made


def test_a_row_is_read_as_if_it_were_alone_where_length_changes_the_positions() -> None:
    hooked = pv.HookedModel(longrope(), tokenizer(), model_id="tiny/phi3")
    assert length_borders(hooked.hf) == (44,)
    found = samples(hooked)
    lengths = [len(one.ids) for one in found]
    assert min(lengths) <= 44 < max(lengths)
    assert 44 in lengths or 45 in lengths
    got = torch.from_numpy(Scorer(hooked, BANK, 10**6)(found))
    plain, evil = longrope(), BANK["evil"].unit().direction(BANK.sites[1]).double()

    def mean(ids: Any, row: int, reply: tuple[int, int]) -> float:
        with torch.no_grad():
            h = plain(ids, output_hidden_states=True).hidden_states[2][row]
        return float(h[slice(*reply)].double().mean(0) @ evil)

    alone = [mean(torch.from_numpy(one.ids.astype(np.int64))[None], 0, one.reply) for one in found]
    np.testing.assert_allclose(got[:, 1, RESPONSE_MEAN, 0], alone, atol=2e-5, rtol=1e-5)
    together = [batch.lengths for batch in packed(found, 10**6, (44,))]
    assert [min(one) > 44 for one in together] == [True, False]
    # Read together as before, rows below the border are others.
    (mixed,) = packed(found, 10**6)
    row = mixed.places.index(lengths.index(min(lengths)))
    assert abs(mean(mixed.ids, row, mixed.replies[row]) - alone[mixed.places[row]]) > 1e-3


def test_own_replies_do_not_depend_on_their_neighbours_length(tmp_path: Path) -> None:
    hooked = pv.HookedModel(longrope(), tokenizer(), model_id="tiny/phi3")
    found = samples(hooked, chats(12))
    asked = [one.prompt_length for one in found]
    assert min(asked) + 14 < 44 < max(asked) + 14
    (tmp_path / "replies").mkdir()

    def own(name: str) -> list[str | None]:
        made = GeneratedReplies(hooked, tmp_path, mark=name, max_new_tokens=14, batch_size=12)
        return made(0, found)

    plain, template, wanted = longrope(), tokenizer(), []
    for one in found:
        ids = torch.from_numpy(one.ids[: one.prompt_length].astype(np.int64))[None]
        with torch.no_grad():
            made = plain.generate(ids, do_sample=False, max_new_tokens=14)
        wanted.append(template.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    assert own("apart") == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flag_replies, "length_borders", lambda hf: ())
        assert own("mixed") != wanted
