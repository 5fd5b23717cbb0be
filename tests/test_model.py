"""HookedModel over unusual models: dtypes, devices, quantisation, nesting, copies, compilation."""

import contextlib
import copy
import io
import threading

import pytest
import torch
import transformers
from accelerate import cpu_offload

import pvcore as pv
from pvcore.blocks import find_decoder
from pvcore.errors import ChatError, HookError, ModelError, SiteError
from tests.families import build, tokenizer
from tests.subjects import prompts, subject
from tests.test_plan import vector

IDS = prompts([7])[0]
STEER = pv.Add(vector(model_id=""), coeff=2.0, layers=[1])


def logits(hf, ids=IDS):
    with torch.no_grad():
        return hf(input_ids=ids[None]).logits


def shifted(hf, layer=1, coeff=2.0):
    """Logits with the next block's input moved by a raw hook of our own."""
    delta = coeff * vector().direction(pv.resid_post(layer))
    hook = hf.model.layers[layer + 1].register_forward_pre_hook(
        lambda _m, args: ((args[0] + delta).to(args[0].dtype), *args[1:])
    )
    with contextlib.closing(_Removing(hook)):
        return logits(hf)


class _Removing:
    def __init__(self, hook):
        self.close = hook.remove


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_math_follows_the_residuals_dtype(dtype):
    hf = build("qwen2", dtype=dtype)
    model, base = pv.HookedModel(hf), logits(hf)
    wanted = shifted(build("qwen2", dtype=dtype))
    with model.steer(STEER):
        got = logits(hf)
    assert got.dtype == dtype == model.dtype
    assert torch.equal(got, wanted)
    assert (got - base).abs().max() > 0.05
    acts = model.read([IDS], sites=[pv.resid_post(1)], span="all")
    assert acts.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_float64_projections_are_ablated_to_float64():
    model = pv.HookedModel(build("qwen2", dtype=torch.float64))
    one, other = vector(model_id=""), vector("humor", seed=2, model_id="")
    with model.steer(pv.Ablate([one, other], layers=[1])):
        acts = model.read([IDS], sites=[pv.resid_post(1)], span="all", reduce="none")
    free = model.read([IDS], sites=[pv.resid_post(1)], span="all", reduce="none")
    for trait in (one, other):
        direction = trait.direction(pv.resid_post(1)).double()
        assert (acts.values @ direction).abs().max() < 1e-12
        assert (free.values @ direction).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz:FutureWarning")
def test_an_int8_model_is_read_and_steered():
    hf = torch.ao.quantization.quantize_dynamic(
        build("qwen2"), {torch.nn.Linear}, dtype=torch.qint8
    )
    assert type(hf.model.layers[0].mlp.up_proj).__module__.startswith("torch.ao.nn.quantized")
    model, base = pv.HookedModel(hf), logits(hf)
    delta = 2.0 * vector().direction(pv.resid_post(1))
    with model.steer(STEER):
        got = logits(hf)
        acts = model.read([IDS], sites=[pv.resid_post(1)], span="all", reduce="none")
    free = model.read([IDS], sites=[pv.resid_post(1)], span="all", reduce="none")
    assert torch.equal(acts.values, free.values + delta)
    assert (got - base).abs().max() > 0.05
    assert len(model.generate_ids([IDS], max_new_tokens=3)[0]) == 3


def test_offloaded_weights():
    plain = build("qwen2")
    wanted = shifted(plain)
    hf = cpu_offload(build("qwen2"), execution_device=torch.device("cpu"))
    model = pv.HookedModel(hf)
    assert next(hf.parameters()).device.type == "meta"
    assert model.device.type == "cpu"
    with model.steer(STEER):
        assert torch.equal(logits(hf), wanted)
    assert model.read([IDS], sites=[pv.resid_post(2)], span="all").values.shape == (1, 1, 64)
    assert len(model.generate_ids([IDS], max_new_tokens=2)[0]) == 2


def test_a_loaded_device_map(tmp_path):
    build("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = pv.HookedModel.from_pretrained(str(tmp_path), dtype="float32", device_map="cpu")
    assert torch.equal(logits(model.hf), logits(build("llama")))
    assert model.model_id == str(tmp_path)
    assert model.generate("Is it", max_new_tokens=2, do_sample=False)


def test_a_multimodal_model_is_hooked_at_its_text_decoder():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=sizes, vision_config=vision)
    config.image_token_id = 120
    hf = transformers.Gemma3ForConditionalGeneration(config).eval()
    model, base = pv.HookedModel(hf), logits(hf)
    assert (model.n_layers, model.d_model) == (3, 64)
    with model.steer(STEER):
        assert (logits(hf) - base).abs().max() > 1e-3
    assert model.read([IDS], sites=[pv.resid_mid(1)], span="all").values.shape == (1, 1, 64)


def test_copies_and_pickles_are_not_steered():
    hf = build("qwen2")
    model, base = pv.HookedModel(hf), logits(hf)
    twin = copy.deepcopy(hf)
    stored = io.BytesIO()
    torch.save(hf, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    with model.steer(STEER):
        assert torch.equal(logits(twin), base)
        assert torch.equal(logits(loaded), base)
        steered = logits(hf)
    assert not torch.equal(steered, base)
    with pv.HookedModel(twin).steer(STEER):
        assert torch.equal(logits(twin), steered)


def test_two_hooked_models_of_one_model_share_their_taps():
    hf = build("qwen2")
    one, other = pv.HookedModel(hf), pv.HookedModel(hf)
    with one.steer(STEER):
        once = logits(hf)
    with one.steer(STEER), other.steer(STEER):
        twice = logits(hf)
    assert torch.equal(once, shifted(build("qwen2")))
    assert not torch.equal(once, twice)


def test_two_models_are_armed_at_once():
    one, other = build("qwen2"), build("llama")
    with pv.HookedModel(one).steer(STEER), pv.HookedModel(other).steer(STEER):
        first, second = logits(one), logits(other)
    assert torch.equal(first, shifted(build("qwen2")))
    assert torch.equal(second, shifted(build("llama")))


def test_hooking_changes_no_name_and_no_class():
    hf = build("qwen2")
    keys, classes = list(hf.state_dict()), [type(module) for module in hf.modules()]
    model = pv.HookedModel(hf)
    with model.steer(STEER):
        logits(hf)
    assert list(hf.state_dict()) == keys
    assert [type(module) for module in hf.modules()] == classes


@pytest.mark.filterwarnings("ignore")  # dynamo warns of whatever the model itself does
class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh_dynamo(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2", "gpt2"])
    def test_a_plan_reaches_a_model_compiled_after_hooking(self, family):
        hf = build(family)
        model, base = pv.HookedModel(hf), logits(hf)
        with model.steer(STEER):
            wanted = logits(hf)
        compiled = torch.compile(hf, backend="eager")
        assert torch.allclose(logits(compiled), base, atol=1e-5)
        for _ in range(2):
            with model.steer(STEER):
                assert torch.allclose(logits(compiled), wanted, atol=1e-5)
            assert torch.allclose(logits(compiled), base, atol=1e-5)
        assert (wanted - base).abs().max() > 1e-2

    def test_an_idle_model_compiles_whole_and_wakes_when_a_plan_is_armed(self):
        hf, graphs = build("qwen2"), []
        model, base = pv.HookedModel(hf), logits(hf)

        def backend(module, _inputs):
            graphs.append(module)
            return module.forward

        with model.steer(STEER):
            wanted = logits(hf)
        whole = torch.compile(hf, backend=backend, fullgraph=True)
        assert torch.allclose(logits(whole), base, atol=1e-5)
        with pytest.raises(torch._dynamo.exc.Unsupported), model.steer(STEER):
            logits(whole)
        compiled = torch.compile(hf, backend=backend)
        assert torch.allclose(logits(compiled), base, atol=1e-5)
        assert len(graphs) == 1
        with model.steer(STEER):
            assert torch.allclose(logits(compiled), wanted, atol=1e-5)
        woken = len(graphs)
        assert torch.allclose(logits(compiled), base, atol=1e-5)
        assert len(graphs) == woken > 1
        assert (wanted - base).abs().max() > 1e-2

    def test_other_coefficients_do_not_recompile(self):
        hf = build("qwen2")
        model = pv.HookedModel(hf)
        compiled = torch.compile(hf, backend="eager")
        logits(compiled)
        with model.steer(STEER):
            logits(compiled)
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for coeff in (1.0, -3.0, 0.5):
            with model.steer(pv.Add(vector(model_id=""), coeff=coeff, layers=[2])):
                logits(compiled)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted

    def test_a_model_compiled_before_hooking_is_refused(self):
        hf = build("qwen2")
        hf.compile(backend="eager")
        logits(hf)
        with pytest.raises(HookError, match="already compiled"):
            pv.HookedModel(hf)
        with pytest.raises(ModelError, match="got a compiled model"):
            pv.HookedModel(torch.compile(build("qwen2"), backend="eager"))

    def test_a_twin_compiled_before_hooking_is_never_ignored(self):
        hf = build("qwen2")
        compiled = torch.compile(hf, backend="eager")
        logits(compiled)
        wanted = shifted(build("qwen2"))
        model = pv.HookedModel(hf)
        refused = False
        try:
            with model.steer(STEER):
                got = logits(compiled)
        except HookError:
            refused = True
        assert refused or torch.allclose(got, wanted, atol=1e-5)

    def test_new_sites_after_compiling_are_refused(self):
        hf = build("qwen2")
        model = pv.HookedModel(hf)
        hf.compile(backend="eager")
        logits(hf)
        with pytest.raises(HookError, match=r"got resid_mid\.1 untapped"):
            model.read([IDS], sites=[pv.resid_mid(1)], span="all")


def checkpoint(hf, reentrant):
    # transformers renamed the switch and warns of the old name.
    enable = getattr(hf, "activation_checkpointing_enable", None)
    (enable or hf.gradient_checkpointing_enable)({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient_and_counts_each_forward_once(reentrant):
    plan = pv.Plan(
        pv.Add(vector(model_id=""), coeff=1.0, layers=[1]),
        pv.Cap(vector("humor", seed=2, model_id=""), max=0.1, layers=[0]),
        monitor=pv.VectorBank([vector(model_id="")]),
    )
    gradients = []
    for checkpointing in (False, True):
        hf = build("qwen2").train()
        if checkpointing:
            checkpoint(hf, reentrant)
        model = pv.HookedModel(hf)
        with model.arm(plan) as seen:
            hf(input_ids=IDS[None], labels=IDS[None], use_cache=False).loss.backward()
        assert seen["evil"].steps.shape == (1, 3, 1)
        gradients.append([p.grad for p in hf.parameters() if p.grad is not None])
    free = build("qwen2").train()
    free(input_ids=IDS[None], labels=IDS[None], use_cache=False).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not torch.equal(gradients[0][0], next(free.parameters()).grad)


def test_models_that_cannot_be_hooked():
    t5 = transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with pytest.raises(ModelError, match="got the encoder-decoder"):
        pv.HookedModel(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(ModelError, match="without a config"):
        pv.HookedModel(torch.nn.Linear(2, 2))
    hf = build("qwen2")
    hf.model.other = torch.nn.ModuleList([torch.nn.ReLU() for _ in range(3)])
    with pytest.raises(ModelError, match=r"model\.layers, model\.other; wanted exactly one"):
        pv.HookedModel(hf)


@pytest.mark.parametrize("family", ["gpt_neox", "falcon_parallel", "phi"])
def test_parallel_blocks_have_no_middle(family):
    with pytest.raises(SiteError, match="run attention and MLP in parallel"):
        find_decoder(build(family)).require(pv.resid_mid(0))


def test_ids_beyond_the_vocabulary_are_refused():
    model = subject("qwen2").model
    with pytest.raises(ChatError, match="chat 1: got token id 9999; this model embeds 128"):
        model.generate_ids([IDS, torch.tensor([9999])], max_new_tokens=1)


def test_chats_longer_than_the_model_are_refused():
    model = subject("qwen2").model
    with pytest.raises(ChatError, match="chat 0"):
        model.read([torch.ones(200, dtype=torch.long)], sites=[pv.resid_post(0)], span="all")


def test_overflow_names_site_and_chats():
    hf = build("qwen2")
    hf.model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"infinite or NaN residuals at resid_post\.1"):
        pv.HookedModel(hf).read([IDS], sites=[pv.resid_post(1)], span="all")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_backward_recomputes_what_its_own_forward_did(reentrant):
    """Two forwards under two plans, then one backward, in another thread and after both plans."""

    def gradients(checkpointing):
        hf = build("qwen2").train()
        if checkpointing:
            checkpoint(hf, reentrant)
        model = pv.HookedModel(hf)
        first, second = prompts([7, 5])
        losses = []
        for ids, coeff in ((first, 2.0), (second, -3.0)):
            steps = [
                pv.Add(vector(model_id=""), coeff=coeff, layers=[1]),
                pv.Cap(vector("humor", seed=2, model_id=""), max=0.1, layers=[0]),
            ]
            with model.steer(*steps):
                losses.append(hf(input_ids=ids[None], labels=ids[None], use_cache=False).loss)
        thread = threading.Thread(target=sum(losses).backward)
        thread.start()
        thread.join()
        return [p.grad for p in hf.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_the_middle_of_a_checkpointed_block_is_refused():
    hf = build("qwen2").train()
    checkpoint(hf, False)
    model = pv.HookedModel(hf)
    middle = pv.PersonaVector(trait="evil", sites=[pv.resid_mid(1)], directions=torch.randn(1, 64))
    with (
        pytest.raises(HookError, match="under gradient checkpointing"),
        model.steer(pv.Add(middle, coeff=1.0)),
    ):
        hf(input_ids=IDS[None], use_cache=False)
