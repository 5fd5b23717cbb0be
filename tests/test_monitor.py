"""What a monitor reports, against dot products of residuals taken by raw hooks."""

import gc
import weakref

import pytest
import torch

import pvcore as pv
from pvcore.errors import HookError, VectorError
from pvcore.frames import Call
from pvcore.monitor import _Record
from pvcore.sessions import Columns
from tests.families import build, tokenizer
from tests.subjects import prompts, subject
from tests.test_plan import vector

BANK = pv.VectorBank([vector(), vector("humor", seed=2)])


def raw_rows(hf, ids):
    """Block outputs of one forward over `ids`, `[layer, pos, d_model]`, by hooks of our own."""
    taken = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: taken.append(out.detach()[0]))
        for block in hf.model.layers
    ]
    with torch.no_grad():
        hf(ids[None])
    for hook in hooks:
        hook.remove()
    return torch.stack(taken).double()


def expected(hf, ids, trait):
    units = torch.stack([trait.direction(site) for site in BANK.sites]).double()
    units = units / units.norm(dim=1, keepdim=True)
    return torch.einsum("lpd,ld->pl", raw_rows(hf, ids), units)


def test_prompt_and_steps_are_projections_of_the_sequence():
    model, twin = subject("qwen2").model, build("qwen2")
    chats = prompts([6, 3])
    with model.monitor(BANK) as seen:
        replies = model.generate_ids(chats, max_new_tokens=5, do_sample=False)
    for trait in BANK.vectors:
        scores = seen[trait.trait]
        assert scores.steps.shape == (5, 3, 2)
        assert scores.prompt.shape == (6, 3, 2)
        for row, (chat, reply) in enumerate(zip(chats, replies, strict=True)):
            wanted = expected(twin, torch.cat([chat, reply]), trait)
            n = len(chat)
            assert (scores.prompt[:n, :, row] - wanted[:n]).abs().max() < 1e-5
            assert (scores.steps[..., row] - wanted[n - 1 : -1]).abs().max() < 1e-5
            assert scores.prompt[n:, :, row].isnan().all()
            assert wanted.abs().max() > 0.1
        assert torch.equal(scores.last_prompt_token, scores.steps[0])


def test_steps_after_the_end_are_nan():
    model = subject("qwen2").model
    chats = prompts([6, 3])
    free = model.generate_ids(chats, max_new_tokens=6, do_sample=False)
    end = int(free[0][2])
    with model.monitor(BANK) as seen:
        replies = model.generate_ids(
            chats, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0
        )
    assert len(replies[0]) < 6
    for row, reply in enumerate(replies):
        real = ~seen["evil"].steps[:, 0, row].isnan()
        assert real.sum() == len(reply)
        assert real[: len(reply)].all()


def test_stop_strings_end_a_row_as_well():
    model = subject("qwen2").model
    free = model.generate_ids(["Is it", "x"], max_new_tokens=6, do_sample=False)
    stop = model.tokenizer.decode(free[0][2:3])
    with model.monitor(BANK) as seen:
        replies = model.generate_ids(
            ["Is it", "x"], max_new_tokens=6, do_sample=False, stop_strings=[stop]
        )
    text = model.tokenizer.decode(replies[0])
    assert text.endswith(stop)
    assert len(replies[0]) < 6
    assert int((~seen["evil"].steps[:, 0, 0].isnan()).sum()) == len(replies[0])


def test_beams_are_followed_into_the_returned_sequences():
    model, twin = subject("qwen2").model, build("qwen2")
    chats = prompts([6, 3])
    with model.monitor(BANK) as seen:
        replies = model.generate_ids(
            chats, max_new_tokens=5, do_sample=False, num_beams=3, num_return_sequences=2
        )
    assert seen["evil"].steps.shape == (5, 3, 4)
    for row, reply in enumerate(replies):
        ids = torch.cat([chats[row // 2], reply])
        wanted = expected(twin, ids, BANK["evil"])[len(chats[row // 2]) - 1 : -1]
        assert (seen["evil"].steps[: len(reply), :, row] - wanted).abs().max() < 1e-5
    assert not torch.equal(replies[0], replies[1])


def test_reading_a_conversation_gives_the_steps_of_its_reply():
    model = subject("qwen2").model
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "no"}]
    with model.monitor(BANK) as seen:
        acts = model.read([chat], sites=[pv.resid_post(1)], reduce="none")
    wanted = acts[pv.resid_post(1)][0].double() @ BANK["humor"].direction(pv.resid_post(1)).double()
    wanted /= BANK["humor"].direction(pv.resid_post(1)).double().norm()
    got = seen["humor"].steps[1 : 1 + int(acts.lengths[0]), 1, 0]
    assert (got - wanted).abs().max() < 1e-5


def test_calls_follow_each_other_and_read_keeps_the_order_of_chats():
    model = subject("qwen2").model
    chats = prompts([9, 2, 5, 7, 3])
    with model.monitor(BANK) as seen:
        model.read(chats, sites=[pv.resid_post(2)], span="prompt", batch_size=2)
        model.generate_ids(chats[:2], max_new_tokens=2, do_sample=False)
    together = seen["evil"].last_prompt_token
    assert together.shape == (3, 7)
    for row, chat in enumerate([*chats, *chats[:2]]):
        with model.monitor(BANK) as alone:
            model.generate_ids([chat], max_new_tokens=1, do_sample=False)
        assert (together[:, row] - alone["evil"].last_prompt_token[:, 0]).abs().max() < 1e-5
    assert (together[:, 0] - together[:, 1]).abs().max() > 1e-3


def test_a_monitor_sees_what_flows_on_after_every_intervention():
    model = subject("qwen2").model
    chats = prompts([6])
    cap = pv.Cap(vector(), max=-1.0, layers=[1])
    with model.monitor(BANK) as outer, model.steer(cap), model.monitor(BANK) as inner:
        model.generate_ids(chats, max_new_tokens=3, do_sample=False)
    assert (outer["evil"].steps[:, 1] <= -1.0 + 1e-5).all()
    assert torch.equal(outer["evil"].steps, inner["evil"].steps)


def test_what_was_not_watched_is_refused():
    model = subject("qwen2").model
    chats = prompts([4])
    with model.monitor(BANK) as seen:
        with pytest.raises(HookError, match="got no forward to report yet"):
            seen["evil"]
        model.generate_ids(chats, max_new_tokens=1)
    with pytest.raises(VectorError, match="got trait 'envy'; this monitor watches evil, humor"):
        seen["envy"]
    with model.steer(pv.Add(vector(), coeff=1.0)) as seen:
        model.generate_ids(chats, max_new_tokens=1)
    with pytest.raises(VectorError, match="this plan watches nothing"):
        seen["evil"]


def test_a_failed_generation_leaves_no_rows():
    model = pv.HookedModel(build("qwen2"), tokenizer())
    with model.monitor(BANK) as seen:
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate_ids(prompts([4]), max_new_tokens=-3)
        model.generate_ids(prompts([4]), max_new_tokens=2)
    assert seen["evil"].steps.shape == (2, 3, 1)


def test_a_call_that_is_over_keeps_no_cache_alive():
    model, caches = subject("qwen2").model, []
    handle = model.hf.model.register_forward_pre_hook(
        lambda _m, _a, given: caches.append(weakref.ref(given["past_key_values"])),
        with_kwargs=True,
    )
    with model.monitor(BANK) as seen:
        model.generate_ids(prompts([6, 3]), max_new_tokens=5, do_sample=False)
    handle.remove()
    gc.collect()
    assert len(caches) == 5
    assert all(cache() is None for cache in caches)
    assert seen["evil"].steps.shape[0] == 5


def test_what_was_seen_so_far_may_be_asked_in_the_middle_of_a_step():
    model, asked = subject("qwen2").model, []
    with model.monitor(BANK) as alone:
        model.generate_ids(prompts([6, 3]), max_new_tokens=6, do_sample=False)

    def ask(_module, _args, out):
        if out.shape[1] == 1:
            asked.append(len(seen["evil"].steps))

    handle = model.hf.model.layers[1].register_forward_hook(ask)
    with model.monitor(BANK) as seen:
        model.generate_ids(prompts([6, 3]), max_new_tokens=6, do_sample=False)
    handle.remove()
    assert asked == [1, 2, 3, 4, 5]
    assert torch.equal(seen["evil"].steps, alone["evil"].steps)


@pytest.mark.parametrize("inference", [False, True])
def test_a_model_that_updates_its_residual_in_place_is_scored_layer_by_layer(inference):
    def in_place(hf):
        for block in hf.model.layers:
            plain = block.forward

            def forward(hidden_states, *args, plain=plain, **kwargs):
                return hidden_states.copy_(plain(hidden_states, *args, **kwargs))

            block.forward = forward
        return hf

    model, twin = pv.HookedModel(in_place(build("qwen2")), tokenizer()), build("qwen2")
    (chat,) = prompts([6])
    with torch.inference_mode(inference), model.monitor(BANK) as seen:
        (reply,) = model.generate_ids([chat], max_new_tokens=5, do_sample=False)
    trait = BANK.vectors[0]
    wanted = expected(twin, torch.cat([chat, reply[:-1]]), trait)[len(chat) - 1 :]
    torch.testing.assert_close(
        seen[trait.trait].steps[..., 0].double(), wanted, rtol=1e-5, atol=1e-5
    )
    assert float((wanted[1:, 0] - wanted[1:, -1]).abs().min()) > 1e-3


def test_scores_are_put_together_once_for_all_traits(monkeypatch):
    model, made = subject("qwen2").model, []
    put_together = pv.Seen._put_together

    def counted(self, record):
        made.append(record)
        return put_together(self, record)

    monkeypatch.setattr(pv.Seen, "_put_together", counted)
    with model.monitor(BANK) as seen:
        model.generate_ids(prompts([6, 3]), max_new_tokens=5, do_sample=False)
        first = {trait: seen[trait] for trait in (*seen.traits, *seen.traits)}
        assert len(made) == 1
        wanted = first["evil"].steps.clone()
        first["evil"].steps.zero_()
        assert torch.equal(seen["evil"].steps, wanted)
        model.generate_ids(prompts([4]), max_new_tokens=5, do_sample=False)
    both = {trait: seen[trait] for trait in seen.traits}
    assert len(made) == 2
    assert torch.equal(both["evil"].steps[..., :2], wanted)
    assert both["evil"].steps.shape == (5, 3, 3)
    assert (both["evil"].steps - both["humor"].steps).abs().min() > 0


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_what_was_put_together_early_grows_with_the_reply(engine):
    model = subject("qwen2").model
    settings = {"max_new_tokens": 6, "do_sample": False, "engine": engine}
    with model.monitor(BANK) as seen:
        model.generate_ids(prompts([6, 3]), **settings)
    wanted, found = seen["humor"].steps, []
    with model.monitor(BANK) as seen:

        def look(ids, _scores, **_):
            found.append((seen["evil"].steps.clone(), seen["humor"].steps.clone()))
            return torch.zeros(len(ids), dtype=torch.bool)

        model.generate_ids(prompts([6, 3]), stopping_criteria=[look], **settings)
    assert [len(humor) for _, humor in found] == [1, 2, 3, 4, 5, 6]
    for _, humor in found:
        assert torch.equal(humor, wanted[: len(humor)])
    assert torch.equal(seen["humor"].steps, wanted)


@pytest.mark.parametrize("lengths", [(5, 5), (2, 5), (4, 5)])
def test_the_newest_of_a_prompt_in_chunks_is_each_rows_last_token(lengths: tuple[int, int]) -> None:
    scores, site = torch.arange(20.0).view(2, 5, 2), pv.resid_post(0)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    call = Call(rows=torch.arange(2), n_chats=2, mask=mask, last=None, generating=False)
    record = _Record(call=call, columns=Columns(1), given={site: [scores[:, :3], scores[:, 3:]]})
    wanted = torch.stack([scores[row, length - 1] for row, length in enumerate(lengths)])
    assert torch.equal(record.newest([site]), wanted[None])
