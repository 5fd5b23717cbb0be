"""Reading: every family, site, padding and way to run, against residuals from raw hooks.

Bounds are absolute and per element, because residuals are of order one to ten in all families.
The same batch through the same code is bit-equal; a batch with padding or a cache sums in another
order than a row alone, which moves residuals by at most 7.7e-6 (the oracle's own spread).
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import pvcore as pv
from tests.families import D_MODEL, FAMILIES, N_LAYERS
from tests.oracle import MODES, Generated, padded
from tests.subjects import (
    NAMES,
    Subject,
    conversations,
    encoded,
    point,
    prompts,
    subject,
    unit,
    vector,
    worst,
)

LENGTHS = {"none": (9, 9, 9), "left": (13, 9, 11), "right": (13, 9, 11)}
NEW = 3
BOUND = 1e-5
WAYS = ("read", *MODES)
TRAITS = ("evil", "sycophancy")

Combination = tuple[str, str, str, str]


def combinations(name: str) -> Iterator[Combination]:
    """(family, site, padding, way), all of them."""
    kinds = ["resid_pre", "resid_post"]
    kinds += ["resid_mid"] if FAMILIES[name].attention else []
    for kind in kinds:
        for layer in range(N_LAYERS):
            for padding in LENGTHS:
                for way in WAYS:
                    yield name, f"{kind}.{layer}", padding, way


def test_the_matrix_is_as_large_as_promised() -> None:
    every = {combination for name in NAMES for combination in combinations(name)}
    assert len(NAMES) >= 12
    assert len(every) >= 300
    assert len(every) == (14 * 9 + 3 * 6) * 3 * 6


def bank_of(found: Subject) -> pv.VectorBank:
    vectors = [vector(trait, found.sites, seed=seed) for seed, trait in enumerate(TRAITS)]
    return pv.VectorBank(vectors)


@pytest.mark.parametrize("name", NAMES)
def test_read_equals_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`read` of whole sequences: bit-equal without padding, else within the bound of each alone."""
    found = subject(name)
    wrong, checked = [], set()
    for padding, lengths in LENGTHS.items():
        rows = prompts(lengths)
        side = "right" if padding == "right" else "left"
        monkeypatch.setattr(found.model.tokenizer, "padding_side", side)
        acts = found.model.read(rows, sites=found.sites, span="all", reduce="none")
        _, batch = found.oracle.forward(torch.stack(rows)) if padding == "none" else (None, None)
        for index, row in enumerate(rows):
            _, alone = found.oracle.forward(row[None])
            for site in found.sites:
                got = acts[site][index, : len(row)]
                if batch is not None:
                    same = torch.equal(got, batch.frames[0].residuals[point(site)][index])
                else:
                    same = worst(got, alone.frames[0].residuals[point(site)][0]) < BOUND
                rest = acts[site][index, len(row) :]
                checked.add((name, str(site), padding, "read"))
                if not same or not rest.isnan().all() or acts.lengths[index] != len(row):
                    wrong.append((name, str(site), padding, "read", index))
    assert not wrong
    assert checked == {one for one in combinations(name) if one[3] == "read"}


def wanted_scores(
    found: Subject, out: Generated, lengths: tuple[int, ...], site: pv.Site, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """Float64 projections of the prompt `[position, row]` and of the steps `[step, row]`."""
    width = max(lengths)
    beams = out.tape.frames[0].residuals[point(site)].shape[0] // len(lengths)
    prompt = out.tape.prompt(point(site), width)[::beams].double() @ direction
    own = torch.full((width, len(lengths)), torch.nan, dtype=torch.float64)
    for row, length in enumerate(lengths):
        own[:length, row] = prompt[row, width - length :]
    steps = [
        out.tape.step(point(site), width, step)[out.rows[:, step]].double() @ direction
        for step in range(out.tokens.shape[1])
    ]
    return own, torch.stack(steps)


@cache
def unwatched(found: Subject, way: str, lengths: tuple[int, ...]) -> Generated:
    """The oracle's run, which knows only one way to pad."""
    ids, mask = padded(prompts(lengths), side="left")
    return found.oracle.generate(ids, mask, mode=way, max_new_tokens=NEW)


@pytest.mark.parametrize("way", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_monitor_sees_what_the_oracle_sees(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projections of prompt, last prompt token and steps while generating, in every cache mode."""
    found = subject(name)
    bank = bank_of(found)
    wrong, checked, spread = [], set(), 0.0
    for padding, lengths in LENGTHS.items():
        rows = prompts(lengths)
        side = "right" if padding == "right" else "left"
        monkeypatch.setattr(found.model.tokenizer, "padding_side", side)
        out = unwatched(found, way, lengths)
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, **MODES[way]}
        with found.model.monitor(bank) as seen:
            tokens = found.model.generate_ids(rows, **settings)
        for trait in TRAITS:
            scores = seen[trait]
            for site in found.sites:
                at = seen.sites.index(site)
                prompt, steps = wanted_scores(found, out, lengths, site, unit(bank[trait], site))
                errors = (
                    worst(scores.prompt[:, at], prompt),
                    worst(scores.last_prompt_token[at], steps[0]),
                    worst(scores.steps[:, at], steps),
                )
                spread = max(spread, float(steps.std()))
                checked.add((name, str(site), padding, way))
                if max(errors) >= BOUND:
                    wrong.append((name, str(site), padding, way, trait, errors))
        if [row.tolist() for row in tokens] != out.tokens.tolist():
            wrong.append((name, "tokens", padding, way))
    assert not wrong
    assert checked == {one for one in combinations(name) if one[3] == way}
    assert spread > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_last_site_is_before_the_final_norm(name: str) -> None:
    found = subject(name)
    row = prompts([9])[0]
    last = pv.resid_post(N_LAYERS - 1)
    acts = found.model.read([row], sites=[last], span="all", reduce="none")
    with torch.no_grad():
        reported = found.oracle.hf(row[None], output_hidden_states=True).hidden_states[-1]
    normed = found.oracle.final_norm(acts[last])
    assert torch.equal(normed, reported)
    assert (acts[last] - reported).abs().max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_axes_of_the_residual_are_read_bit_for_bit_in_decode(name: str) -> None:
    """A bank of all unit axes holds the residual itself: nothing may be rounded on the way."""
    found = subject(name)
    axes = [
        pv.PersonaVector(
            trait=f"axis {axis}",
            sites=tuple(found.sites),
            directions=torch.eye(D_MODEL)[axis].expand(len(found.sites), D_MODEL),
        )
        for axis in range(D_MODEL)
    ]
    rows = prompts(LENGTHS["none"])
    out = found.oracle.generate(*padded(rows, side="left"), max_new_tokens=NEW)
    with found.model.monitor(pv.VectorBank(axes)) as seen:
        found.model.generate_ids(rows, do_sample=False, max_new_tokens=NEW)
    every = torch.stack([seen[f"axis {axis}"].steps for axis in range(D_MODEL)], -1)
    for site in found.sites:
        for step in range(NEW):
            wanted = out.tape.step(point(site), len(rows[0]), step)
            assert torch.equal(every[step, seen.sites.index(site)], wanted), (site, step)


@pytest.mark.parametrize("name", NAMES)
def test_spans_of_conversations_are_the_slices_they_name(name: str) -> None:
    found, chats = subject(name), conversations()
    alone = [found.oracle.forward(whole[None])[1].frames[0].residuals for whole, _ in encoded()]
    for span in ("all", "prompt", "response", "last_prompt_token"):
        mean = found.model.read(chats, sites=found.sites, span=span, reduce="mean")
        last = found.model.read(chats, sites=found.sites, span=span, reduce="last")
        for index, (whole, start) in enumerate(encoded()):
            reply = len(chats[index][-1]["content"])  # the tiny tokenizer has one token a character
            columns = {
                "all": slice(0, len(whole)),
                "prompt": slice(0, start),
                "response": slice(start, start + reply),
                "last_prompt_token": slice(start - 1, start),
            }[span]
            for site in found.sites:
                wanted = alone[index][point(site)][0, columns]
                assert worst(mean[site][index], wanted.double().mean(0)) < BOUND, (span, site)
                assert worst(last[site][index], wanted[-1]) < BOUND, (span, site)
                assert mean.lengths[index] == len(wanted)


ENDINGS: dict[str, dict[str, Any]] = {
    "one beam": {},
    "all beams": {"num_return_sequences": 3},
    "early": {"early_stopping": True, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2", "bloom"])
def test_beams_that_end_early_are_read_along_their_own_history(name: str, ending: str) -> None:
    """Each returned sequence, replayed alone, gives the steps that were reported for it."""
    found, rows = subject(name), prompts(LENGTHS["left"])
    probe, site = vector("probe", [pv.resid_post(2)], seed=1), pv.resid_post(2)
    ids, mask = padded(rows, side="left")
    third = int(found.oracle.generate(ids, mask, mode="beams", max_new_tokens=6).tokens[0, 2])
    ends = [third, *range(5, 128, 16)]
    settings = {"do_sample": False, "num_beams": 3, "eos_token_id": ends, **ENDINGS[ending]}
    with found.model.monitor(pv.VectorBank([probe])) as seen:
        sequences = found.model.generate_ids(rows, max_new_tokens=6, **settings)
    lengths = set()
    for index, tokens in enumerate(sequences):
        prompt, length = rows[index // (len(sequences) // 3)], len(tokens)
        _, tape = found.oracle.forward(torch.cat([prompt, tokens])[None])
        read = tape.frames[0].residuals[point(site)][0, len(prompt) - 1 : -1]
        steps = seen["probe"].steps[:, 0, index]
        assert worst(steps[:length], read.double() @ unit(probe, site)) < BOUND
        assert steps[length:].isnan().all()
        assert not set(ends) & set(tokens[:-1].tolist())
        lengths.add(length)
    assert min(lengths) < 6


@pytest.mark.parametrize("name", NAMES)
def test_batch_mates_and_their_order_change_nothing(name: str) -> None:
    found = subject(name)
    rows = prompts((13, 5, 9, 11, 7, 3))
    order = [4, 2, 0, 5, 1, 3]
    whole = found.model.read(rows, sites=found.sites, span="all", batch_size=6)
    shuffled = found.model.read([rows[i] for i in order], sites=found.sites, span="all")
    pairs = found.model.read(rows, sites=found.sites, span="all", batch_size=2)
    for site in found.sites:
        assert worst(shuffled[site], whole[site][order]) < BOUND
        assert worst(pairs[site], whole[site]) < BOUND
        assert (whole[site][0] - whole[site][1]).abs().max() > 0.1
