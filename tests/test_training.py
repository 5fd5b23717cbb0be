"""Prevention: every training forward is steered as by raw hooks, no other one is, nothing stays."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvcore as pv
from tests.families import D_MODEL
from tests.finetuning import (
    CHECKPOINTING,
    COEFF,
    adding,
    delta,
    gradients,
    ids,
    same,
    subject,
    vector,
    with_lora,
)

# PEFT and Trainer ask by names that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
SIX = ("qwen2", "llama", "gemma2", "gpt2", "gpt_neox", "mistral")


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", SIX)
def test_gradients_are_those_of_a_constant_added_by_hand(
    name: str, checkpointing: str, lora: bool
) -> None:
    hf, called = subject(name, checkpointing, lora=lora)
    evil = vector(0, 2)
    deltas = {layer: delta(evil, layer) for layer in (0, 2)}
    with adding(hf, name, deltas):
        wanted = gradients(called)
    plain = gradients(called)
    with pv.prevent(called, pv.Add(evil, coeff=COEFF)):
        got = gradients(called)
    assert same(got, wanted)
    assert not same(got, plain)
    assert same(gradients(called), plain)


@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, "off") for name in SIX), ("qwen2", "reentrant"), ("qwen2", "without reentry")],
)
def test_other_adapters_train_as_under_a_constant_added_by_hand(
    name: str, checkpointing: str, variant: str
) -> None:
    hf, called = subject(name, checkpointing, lora=True, **{variant: True})
    evil = vector(0, 2)
    with adding(hf, name, {layer: delta(evil, layer) for layer in (0, 2)}):
        wanted = gradients(called)
    plain = gradients(called)
    with pv.prevent(called, pv.Add(evil, coeff=COEFF)):
        got = gradients(called)
    assert same(got, wanted)
    assert not same(got, plain)
    _, lora = subject(name, checkpointing, lora=True)
    assert not same(gradients(lora), plain)


def test_twenty_steps_follow_the_same_curve_and_end_at_the_same_weights() -> None:
    evil = vector(1)
    curves, weights = [], []
    for way in ("by hand", "prevent", "plain"):
        hf, _ = subject("qwen2")
        optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-2)
        if way == "prevent":
            steering: Any = pv.prevent(hf, pv.Add(evil, coeff=COEFF))
        else:
            steering = adding(hf, "qwen2", {1: delta(evil, 1)} if way == "by hand" else {})
        losses = []
        with steering:
            for step in range(20):
                loss = hf(input_ids=ids(step % 4), labels=ids(step % 4)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        curves.append(losses)
        weights.append({name: p.detach().clone() for name, p in hf.state_dict().items()})
    assert curves[0] == curves[1]
    assert same(weights[0], weights[1])
    assert curves[1] != curves[2]
    assert curves[1][-1] < curves[1][0]


def test_only_forwards_that_train_are_steered() -> None:
    hf, _ = subject("qwen2")
    model = pv.HookedModel(hf)
    evil = vector(1)

    def logits() -> Tensor:
        output: Tensor = hf(input_ids=ids()).logits
        return output.detach()

    trained = logits()
    hf.eval()
    with torch.no_grad():
        plain = logits()
        reply = model.generate_ids([ids()[0]], max_new_tokens=4, do_sample=False)
    with pv.prevent(model, pv.Add(evil, coeff=COEFF)):
        hf.train()
        assert not torch.equal(logits(), trained)
        with torch.no_grad():
            assert torch.equal(logits(), trained)
        hf.eval()
        assert torch.equal(logits(), plain)
        again = model.generate_ids([ids()[0]], max_new_tokens=4, do_sample=False)
        graph = model.generate_ids([ids()[0]], max_new_tokens=4, do_sample=False, engine="graph")
    assert torch.equal(again[0], reply[0])
    assert torch.equal(graph[0], reply[0])


def test_ablation_while_training_is_that_of_raw_hooks() -> None:
    hf, _ = subject("llama")
    evil = vector(1)
    unit = evil.direction(pv.resid_post(1)) / evil.direction(pv.resid_post(1)).norm()
    hook = hf.model.layers[1].register_forward_hook(
        lambda _m, _a, h: h - (h @ unit)[..., None] * unit
    )
    wanted = gradients(hf)
    hook.remove()
    with pv.prevent(hf, pv.Ablate(evil)):
        got = gradients(hf)
    plain = gradients(hf)
    for name in wanted:
        assert torch.allclose(got[name], wanted[name], rtol=1e-4, atol=1e-6)
    assert not same(got, plain)


def test_a_schedule_scales_the_coefficient() -> None:
    hf, _ = subject("qwen2")
    evil = vector(1)
    add = pv.Add(evil, coeff={1: COEFF})
    with pv.prevent(hf, pv.Add(evil, coeff=COEFF / 2)):
        half = gradients(hf)
    with pv.prevent(hf, add, schedule=lambda done: 1 - done) as prevention:
        full = gradients(hf)
        prevention.advance(0.5)
        assert same(gradients(hf), half)
        prevention.advance(1.0)
        none = gradients(hf)
    assert not same(full, half)
    assert same(none, gradients(hf))
    with pytest.raises(pv.PvcoreError, match="wanted the share of the training"):
        prevention.advance(1.5)
    with (
        pytest.raises(pv.PvcoreError, match="no coefficient to scale"),
        pv.prevent(hf, pv.Ablate(evil), schedule=lambda done: done),
    ):
        pass


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks itself
def test_a_compiled_model_hooked_before_is_steered() -> None:
    torch._dynamo.reset()
    hf, _ = subject("qwen2")
    model, evil = pv.HookedModel(hf), vector(1)
    with pv.prevent(model, pv.Add(evil, coeff=COEFF)):
        wanted = gradients(hf)
    compiled = torch.compile(hf, backend="eager")
    plain = gradients(compiled)
    with pv.prevent(model, pv.Add(evil, coeff=COEFF)):
        got = gradients(compiled)
    bare = {name.removeprefix("_orig_mod."): one for name, one in got.items()}
    assert bare.keys() == wanted.keys()
    assert all(torch.allclose(bare[name], wanted[name], atol=1e-5) for name in wanted)
    assert not same(got, plain)


def test_what_does_not_fit_is_refused_before_anything_is_armed() -> None:
    hf, _ = subject("qwen2")
    plain = gradients(hf)
    wide = pv.PersonaVector(
        trait="evil", sites=[pv.resid_post(0)], directions=torch.ones(1, D_MODEL // 8)
    )
    for wrong, text in (
        (pv.Add(wide, coeff=1.0), "width 8"),
        (pv.Add(vector(7), coeff=1.0), "3 blocks"),
    ):
        with pytest.raises(pv.PvcoreError, match=text), pv.prevent(hf, wrong):
            pass
    with pytest.raises(pv.PvcoreError, match="empty plan"):
        pv.PreventionCallback()
    with pytest.raises(pv.PvcoreError, match="no forward"), pv.prevent(hf, pv.Ablate(vector(0))):
        pass
    assert same(gradients(hf), plain)


def test_layer_incremental_vectors_add_up_to_the_vector_itself() -> None:
    """Paper, appendix J.3: each layer adds what the one below has not added yet."""
    hf, _ = subject("qwen2")
    evil = vector(0, 1, 2)
    steps = {
        layer: delta(evil, layer) - (delta(evil, layer - 1) if layer else 0.0) for layer in range(3)
    }
    with adding(hf, "qwen2", steps):
        wanted = gradients(hf)
    with pv.prevent(hf, pv.Add(evil.layer_incremental(), coeff=COEFF)):
        got = gradients(hf)
    plain = gradients(hf)
    assert all(torch.allclose(got[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)
    assert not all(torch.allclose(got[name], plain[name], rtol=1e-4, atol=1e-6) for name in plain)


def test_named_schedules_and_unknown_ones() -> None:
    hf, _ = subject("qwen2")
    add = pv.Add(vector(1), coeff=COEFF)
    with pv.prevent(hf, add, schedule=lambda done: 1 - done) as prevention:
        prevention.advance(0.25)
        wanted = gradients(hf)
    with pv.prevent(hf, add, schedule="linear") as prevention:
        full = gradients(hf)
        prevention.advance(0.25)
        got = gradients(hf)
    assert same(got, wanted)
    assert not same(got, full)
    with (
        pytest.raises(pv.PvcoreError, match="wanted constant, linear"),
        pv.prevent(hf, add, schedule="cosine"),
    ):
        pass


def test_a_schedule_that_nobody_tells_of_progress_is_an_error_not_a_constant() -> None:
    hf, _ = subject("qwen2")
    with (
        pytest.raises(pv.PvcoreError, match="a schedule that stood still"),
        pv.prevent(hf, pv.Add(vector(1), coeff=COEFF), schedule="linear"),
    ):
        gradients(hf)


def test_padded_rows_with_masked_labels_train_as_by_hand_and_padding_is_not_touched() -> None:
    hf, _ = subject("qwen2")
    rows, mask = ids(0, rows=3), torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:], mask[2, :4] = 0, 0  # padded at either end
    labels = rows.masked_fill(mask == 0, -100)
    labels[:, :5] = -100  # prompts are not learned, and are steered all the same
    seen: list[Tensor] = []

    def work() -> dict[str, Tensor]:
        hf.zero_grad()
        hf(input_ids=rows, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in hf.named_parameters()}

    handle = hf.model.layers[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    plain = work()
    with adding(hf, "qwen2", {1: mask[..., None] * delta(vector(1), 1)}):
        wanted = work()
    with pv.prevent(hf, pv.Add(vector(1), coeff=COEFF)):
        got = work()
    handle.remove()
    assert same(got, wanted)
    assert not same(got, plain)
    moved = (seen[2] - seen[0]).abs().amax(-1)
    assert torch.equal(moved > 0, mask > 0)


def test_conversations_packed_into_one_row_train_as_by_hand() -> None:
    hf, _ = subject("qwen2")
    row = ids(0, rows=1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = {"position_ids": positions, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    packed |= {"max_length_q": 5, "max_length_k": 5}

    def work() -> dict[str, Tensor]:
        hf.zero_grad()
        hf(input_ids=row, labels=row, use_cache=False, **packed).loss.backward()
        return {name: p.grad.clone() for name, p in hf.named_parameters()}

    with adding(hf, "qwen2", {1: delta(vector(1), 1)}):
        wanted = work()
    plain = work()
    with pv.prevent(hf, pv.Add(vector(1), coeff=COEFF)):
        got = work()
        hf.eval()
        rested = hf(input_ids=row, **packed).logits
        hf.train()
    hf.eval()
    assert torch.equal(rested, hf(input_ids=row, **packed).logits)
    assert same(got, wanted)
    assert not same(got, plain)
    model = pv.HookedModel(hf)
    with (
        pytest.raises(pv.PvcoreError, match="rows are packed"),
        model.steer(pv.Add(vector(1), coeff=COEFF)),
    ):
        hf(input_ids=row, **packed)
    hf.train()
    with (
        pytest.raises(pv.PvcoreError, match="rows are packed"),
        model.monitor(pv.VectorBank([vector(1)])),
    ):
        hf(input_ids=row, **packed)
    with (
        pytest.raises(pv.PvcoreError, match="use span='all'"),
        pv.prevent(hf, pv.Add(vector(1), coeff=COEFF, span="response")),
    ):
        work()


def _reference(hf: Any) -> dict[str, Tensor]:
    return {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(hf).items()}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "without reentry"])
@pytest.mark.parametrize("step", ["add", "ablate"])
@pytest.mark.parametrize("hooked", ["before", "after"])
def test_blocks_that_somebody_else_checkpoints_are_steered_again_when_they_are_recomputed(
    hooked: str, step: str, reentrant: bool
) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        checkpoint_wrapper,
    )

    evil = vector(0, 1)
    intervention = pv.Add(evil, coeff=COEFF) if step == "add" else pv.Ablate(evil)
    hf, _ = subject("qwen2")
    hf.enable_input_require_grads()
    with pv.prevent(hf, intervention):
        wanted = gradients(hf)
    plain = gradients(hf)
    model = pv.HookedModel(hf)
    way = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    for layer in range(3):
        hf.model.layers[layer] = checkpoint_wrapper(hf.model.layers[layer], way)
    with pv.prevent(model if hooked == "before" else hf, intervention):
        got = _reference(hf)
    assert same(got, wanted)
    assert not same(got, plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks itself
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("way", ["model", "in place", "each block"])
def test_every_way_to_compile_a_hooked_model_is_steered(way: str, checkpointing: str) -> None:
    torch._dynamo.reset()
    hf, _ = subject("qwen2", checkpointing)
    model, evil = pv.HookedModel(hf), vector(0, 2)
    with adding(hf, "qwen2", {layer: delta(evil, layer) for layer in (0, 2)}):
        wanted = gradients(hf)
    called = hf
    if way == "model":
        called = torch.compile(hf, backend="aot_eager")
    elif way == "in place":
        hf.compile(backend="aot_eager")
    else:
        for block in hf.model.layers:
            block.compile(backend="aot_eager")
    plain = gradients(called)  # compiled while nothing is armed
    with pv.prevent(model, pv.Add(evil, coeff=COEFF)):
        got = gradients(called)
    after = gradients(called)
    bare = [
        {name.removeprefix("_orig_mod."): one for name, one in found.items()}
        for found in (got, plain, after)
    ]
    assert bare[0].keys() == wanted.keys()
    assert all(torch.allclose(bare[0][name], wanted[name], atol=1e-5) for name in wanted)
    assert not all(torch.allclose(bare[0][name], bare[1][name], atol=1e-5) for name in wanted)
    assert all(torch.allclose(bare[2][name], bare[1][name], atol=1e-5) for name in wanted)


@pytest.mark.parametrize("given", ["hooked before", "hooked after", "wrapped"])
def test_a_model_may_be_hooked_before_or_after_peft(given: str) -> None:
    hf, _ = subject("qwen2")
    early = pv.HookedModel(hf)
    called = with_lora(hf)
    add = pv.Add(vector(1), coeff=COEFF)
    with adding(hf, "qwen2", {1: delta(vector(1), 1)}):
        wanted = gradients(called)
    models = {"hooked before": early, "hooked after": pv.HookedModel(called), "wrapped": called}
    with pv.prevent(models[given], add):
        got = gradients(called)
    assert same(got, wanted)
    assert all("lora" in name for name in got)
    assert not same(got, gradients(called))


def test_accumulated_gradients_and_mixed_precision() -> None:
    hf, _ = subject("qwen2")
    evil = vector(1)

    def work() -> dict[str, Tensor]:
        hf.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for seed in range(3):
                (hf(input_ids=ids(seed), labels=ids(seed)).loss / 3).backward()
        return {name: p.grad.clone() for name, p in hf.named_parameters()}

    with adding(hf, "qwen2", {1: delta(evil, 1)}):
        wanted = work()
    with pv.prevent(hf, pv.Add(evil, coeff=COEFF)):
        got = work()
    assert same(got, wanted)
    assert not same(got, work())


def test_training_a_model_in_evaluation_mode_is_refused_not_ignored() -> None:
    hf, _ = subject("qwen2")
    hf.eval()
    with (
        pytest.raises(pv.PvcoreError, match=r"none of them a training forward; call\s+model.train"),
        pv.prevent(hf, pv.Add(vector(1), coeff=COEFF)),
    ):
        gradients(hf)


def test_a_model_compiled_before_it_was_hooked_is_refused() -> None:
    hf, _ = subject("qwen2")
    compiled = torch.compile(hf, backend="eager")
    compiled(input_ids=ids())
    add = pv.Add(vector(1), coeff=COEFF)
    with pytest.raises(pv.PvcoreError, match="compiled before it was hooked"):
        pv.prevent(compiled, add).__enter__()
    assert not hf.model._forward_pre_hooks
    replicated = nn.DataParallel(hf)
    replicated.device_ids = [0, 1]
    with pytest.raises(pv.PvcoreError, match="on 2 devices by threads"):
        pv.prevent(replicated, add).__enter__()
    plain = gradients(hf)
    with pv.prevent(nn.DataParallel(hf), add):  # of one device: runs the model itself
        assert not same(gradients(hf), plain)


def test_nothing_is_left_in_what_is_saved(tmp_path: Any) -> None:
    hf, called = subject("qwen2", lora=True)
    keys, plain = list(called.state_dict()), hf(input_ids=ids()).logits.detach()
    called.save_pretrained(tmp_path / "before")
    with pv.prevent(called, pv.Add(vector(1), coeff=COEFF)):
        gradients(called)
        called.save_pretrained(tmp_path / "inside")
    assert list(called.state_dict()) == keys
    assert torch.equal(hf(input_ids=ids()).logits, plain)
    files = [
        sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir())
        for name in ("before", "inside")
    ]
    assert {name for name, _ in files[0]} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert files[0] == files[1]
