"""Fused norms: under every plan the results are those of the ordinary way, and of raw hooks.

On a CPU the op is plain torch in the model's own roundings, so the two ways are compared bit for
bit, in float32 and in bfloat16. Beside raw hooks, whose edits are made in float64 and rounded once,
float32 agrees to 1e-6 of the length of what is compared. In bfloat16 one element that is rounded to
the other neighbour moves all that is computed from it, so raw hooks are compared at the steered
site, element by element, to one rounding.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pvcore as pv
from pvcore_kernels import dispatch_joint
from tests.families import FAMILIES, N_LAYERS, build, tokenizer
from tests.oracle import Edit, Oracle, covers, padded
from tests.subjects import (
    Subject,
    conversations,
    encoded,
    point,
    prompts,
    raw,
    trio,
    vector,
    worst,
)
from tests.test_steering_matrix import columns, scores_of

NAMES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3")
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS, NEW = (13, 9, 11), 4
WIDTH = max(LENGTHS)
ROWS = prompts(LENGTHS)
SITE = pv.resid_post(1)
POSTS = tuple(pv.resid_post(layer) for layer in range(N_LAYERS))
ONE, TWO, THREE = trio(SITE)
BANK = pv.VectorBank([vector("probe", POSTS, seed=11)])
RELATIVE, VISIBLE = 1e-6, 1e-2
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One intervention at `SITE` on three rows, in pvcore's words and in the oracle's."""

    action: str
    vectors: tuple[pv.PersonaVector, ...]
    span: str = "all"
    coeff: tuple[float, float, float] = (1.5, 1.5, 1.5)
    bound: float = 0.2

    def intervention(self) -> pv.Add | pv.Ablate | pv.Cap:
        aim: dict[str, Any] = {"layers": [SITE], "span": self.span}
        if self.action == "add":
            alike = len(set(self.coeff)) == 1
            return pv.Add(self.vectors, coeff=self.coeff[0] if alike else list(self.coeff), **aim)
        if self.action == "ablate":
            return pv.Ablate(self.vectors, **aim)
        return pv.Cap(self.vectors, min=-self.bound, max=self.bound, **aim)

    def edit(self, where: Tensor) -> Edit:
        return Edit(
            kind=self.action,  # type: ignore[arg-type]
            point=point(SITE),
            vectors=raw(self.vectors, SITE),
            where=where,
            coeff=torch.tensor(self.coeff),
            lower=torch.full((3,), -self.bound),
            upper=torch.full((3,), self.bound),
        )


MIXED = (1.5, 0.0, -1.5)
KINDS: dict[str, tuple[Step, ...]] = {
    "one": (Step(action="add", vectors=(ONE,)),),
    "rows": (Step(action="add", vectors=(ONE, TWO), span="response", coeff=MIXED),),
    "prompt": (Step(action="add", vectors=(TWO, THREE), span="prompt"),),
    "last": (Step(action="add", vectors=(THREE,), span="last_prompt_token", coeff=MIXED),),
    "spans": (
        Step(action="add", vectors=(ONE,), span="prompt", coeff=MIXED),
        Step(action="add", vectors=(THREE,), span="response"),
    ),
    "ablate": (Step(action="ablate", vectors=(ONE, TWO, THREE)),),
    "cap": (Step(action="cap", vectors=(ONE, THREE)),),
}


def is_joint(kind: str) -> bool:
    """Whether the site is left to the ordinary way."""
    return KINDS[kind][0].action != "add"


def plan_of(kind: str) -> pv.Plan:
    return pv.Plan(*(step.intervention() for step in KINDS[kind]), monitor=BANK)


@cache
def at(name: str, dtype: torch.dtype) -> Subject:
    """One subject for each family and dtype; tests leave it as they found it."""
    return new(name, dtype)


def new(name: str, dtype: torch.dtype = torch.float32) -> Subject:
    model = pv.HookedModel(build(name, dtype=dtype), tokenizer())
    return Subject(name=name, model=model, oracle=Oracle(build(name, dtype=dtype), FAMILIES[name]))


@contextmanager
def counted() -> Iterator[list[int]]:
    """The thread of every call of the op inside the block."""
    calls: list[int] = []
    original = dispatch_joint.norm_into

    def watched(*args: Any) -> None:
        calls.append(threading.get_ident())
        original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch_joint, "norm_into", watched)
        yield calls


Answer = tuple[list[Tensor], Tensor, Tensor]


def generated(found: Subject, plan: pv.Plan) -> Answer:
    with found.model.arm(plan) as seen:
        tokens = found.model.generate_ids(ROWS, **GREEDY)
    return tokens, seen["probe"].steps, seen["probe"].prompt


def same_bits(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(got) == len(wanted) and all(
        worst(a, b) == 0 for a, b in zip(got, wanted, strict=True)
    )


def apart(got: Tensor, wanted: Tensor) -> float:
    """The length of the difference, in lengths of what was wanted."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def roundings_apart(got: Tensor, wanted: Tensor) -> float:
    """The largest difference in steps of bfloat16, beside what float32 sums lose."""
    apart = (got.double() - wanted.double()).abs()
    step = wanted.double().abs() * 2**-7 + RELATIVE * wanted.double().abs().max()
    return float((apart / step).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_generations_are_those_of_the_ordinary_way(name: str, dtype: torch.dtype) -> None:
    found = at(name, dtype)
    base = generated(found, pv.Plan(monitor=BANK))
    other_tokens = 0
    for kind in KINDS:
        wanted = generated(found, plan_of(kind))
        with pv.fused_norms(found.model) as fused, counted() as calls:
            got = generated(found, plan_of(kind))
        assert fused.norms == len(calls) == (N_LAYERS - is_joint(kind)) * NEW, kind
        assert same_bits(got[0], wanted[0]), kind
        assert same_bits(got[1:], wanted[1:]), kind
        assert worst(wanted[1], base[1]) > VISIBLE, kind
        other_tokens += not same_bits(wanted[0], base[0])
    assert other_tokens > 0


@pytest.mark.parametrize("name", NAMES)
def test_generations_are_those_of_raw_hooks(name: str) -> None:
    found = at(name, torch.float32)
    ids, mask = padded(ROWS, side="left")
    for kind, steps in KINDS.items():
        edits = [step.edit(covers(step.span, LENGTHS, WIDTH, WIDTH + NEW)) for step in steps]
        out = found.oracle.generate(ids, mask, edits, max_new_tokens=NEW)
        with pv.fused_norms(found.model):
            tokens, scores, _ = generated(found, plan_of(kind))
        assert [row.tolist() for row in tokens] == out.tokens.tolist(), kind
        assert apart(scores, scores_of(out, BANK, "probe")) <= RELATIVE, kind


@pytest.mark.parametrize("name", NAMES)
def test_an_idle_generation_is_the_models_own(name: str) -> None:
    found = at(name, torch.float32)
    ids, mask = padded(ROWS, side="left")
    out = found.oracle.generate(ids, mask, max_new_tokens=NEW)
    with pv.fused_norms(found.model) as fused, counted() as calls:
        tokens = found.model.generate_ids(ROWS, **GREEDY)
    assert [row.tolist() for row in tokens] == out.tokens.tolist()
    assert fused.norms == len(calls) == N_LAYERS * NEW


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_readings_are_those_of_the_ordinary_way_and_of_raw_hooks(
    name: str, dtype: torch.dtype
) -> None:
    """Padded on the right; a read ends at its deepest site, so that no norm follows there."""
    found = at(name, dtype)
    ids, mask = padded([whole for whole, _ in encoded()], side="right")
    own, ends = mask.bool(), torch.tensor([prompt - 1 for _, prompt in encoded()])
    _, base = found.oracle.forward(ids, mask)
    for kind, steps in KINDS.items():

        def read(steps: Sequence[Step] = steps) -> pv.Activations:
            with found.model.steer(*(step.intervention() for step in steps)):
                return found.model.read(conversations(), sites=POSTS, span="all", reduce="none")

        wanted = read()
        with pv.fused_norms(found.model) as fused, counted() as calls:
            got = read()
        assert fused.norms + 1 == len(calls) == N_LAYERS - is_joint(kind), kind
        assert same_bits([got.values], [wanted.values]), kind
        where = [own & columns(step.span, ends, ids.shape[1]) for step in steps]
        edits = [step.edit(one) for step, one in zip(steps, where, strict=True)]
        _, tape = found.oracle.forward(ids, mask, edits)
        for site in POSTS:
            hooked = tape.frames[0].residuals[point(site)][own]
            if dtype == torch.float32:
                assert apart(got[site][own], hooked) <= RELATIVE, (kind, site)
            elif site <= SITE and len(steps) == 1:
                # Raw hooks add one step after another, and round between them.
                assert roundings_apart(got[site][own], hooked) <= 1, (kind, site)
        assert worst(hooked, base.frames[0].residuals[point(POSTS[-1])][own]) > VISIBLE, kind


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_padding_on_either_side(name: str, dtype: torch.dtype, side: str) -> None:
    found = at(name, dtype)
    ids, mask = padded(ROWS, side=side)
    step = Step(action="add", vectors=(ONE, TWO), coeff=MIXED)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def logits() -> Tensor:
        with torch.no_grad(), found.model.steer(step.intervention()):
            return found.model.hf(ids, **inputs).logits

    wanted = logits()
    with pv.fused_norms(found.model) as fused:
        got = logits()
    assert torch.equal(got, wanted)
    assert fused.norms == N_LAYERS
    hooked, _ = found.oracle.forward(ids, mask, [step.edit(mask.bool())])
    base, _ = found.oracle.forward(ids, mask)
    own = mask.bool()
    if dtype == torch.float32:
        assert apart(got[own], hooked[own]) <= RELATIVE
    assert worst(hooked[own], base[own]) > VISIBLE
    with torch.no_grad(), pv.fused_norms(found.model):
        assert torch.equal(found.model.hf(ids, **inputs).logits, base)


def forward(found: Subject, *interventions: Any) -> Tensor:
    ids, mask = padded(ROWS, side="left")
    arming = found.model.steer(*interventions) if interventions else nullcontext()
    with torch.no_grad(), arming:
        logits: Tensor = found.model.hf(ids, attention_mask=mask).logits
    return logits


def check(
    run: Callable[[], Tensor], model: pv.HookedModel, norms: int, *, base: Tensor | None = None
) -> None:
    """Both ways give the same bits, the op makes so many norms, and the run differs from `base`."""
    wanted = run()
    with pv.fused_norms(model) as fused:
        got = run()
    assert same_bits([got], [wanted])
    assert fused.norms == norms
    if base is not None:
        assert worst(wanted, base) > VISIBLE


def one(site: pv.Site = SITE, coeff: float = 2.0, **more: Any) -> pv.Add:
    return pv.Add(trio(site)[0], coeff=coeff, layers=[site], span="all", **more)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_plans_at_one_site_are_added_one_after_the_other(dtype: torch.dtype) -> None:
    found = at("llama", dtype)

    def run() -> Tensor:
        with found.model.steer(one()):
            return forward(found, one(coeff=-0.7))

    check(run, found.model, N_LAYERS - 1, base=forward(found, one()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_plans_at_several_sites(dtype: torch.dtype) -> None:
    found = at("llama", dtype)

    def run() -> Tensor:
        with found.model.steer(one(POSTS[0]), one(POSTS[2])):
            return forward(found, one())

    check(run, found.model, N_LAYERS, base=forward(found, one()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_changes_the_next_blocks_input_has_it_normed_anew(dtype: torch.dtype) -> None:
    found, site = new("llama", dtype), pv.resid_pre(2)
    base = forward(found, one())
    check(lambda: forward(found, one(), one(site)), found.model, N_LAYERS - 1, base=base)
    check(lambda: forward(found, one()), found.model, N_LAYERS, base=forward(found))


def test_resid_mid_is_steered_beside_it() -> None:
    found, site = new("qwen2"), pv.resid_mid(1)
    base = forward(found, one())
    check(lambda: forward(found, one(), one(site)), found.model, N_LAYERS, base=base)


def test_a_condition_goes_the_ordinary_way() -> None:
    found = at("llama", torch.float32)
    gated = one(when=pv.Above(ONE, 0.0))
    check(lambda: forward(found, gated), found.model, N_LAYERS - 1, base=forward(found))
    assert worst(forward(found, gated), forward(found, one())) > VISIBLE


def test_a_reading_from_before_the_plan() -> None:
    found = at("llama", torch.float32)

    def run(before: bool = True) -> Tensor:
        with found.model.steer(one()):
            acts = found.model.read(ROWS, sites=[SITE], span="all", reduce="none", before=before)
        return acts.values

    check(run, found.model, 1, base=run(before=False))


def test_a_reaction_to_an_alarm() -> None:
    found = at("llama", torch.float32)

    def run(level: float = -1e6) -> Tensor:
        react = pv.Add(ONE, coeff=3.0, layers=[SITE])
        with found.model.monitor(BANK, alarms={"probe": level}, on_alarm=react) as seen:
            found.model.generate_ids(ROWS, **GREEDY)
        return seen["probe"].steps

    check(run, found.model, (N_LAYERS - 1) * NEW, base=run(level=1e6))


def test_beams_and_uncached_decoding() -> None:
    found = at("qwen3", torch.float32)
    plan = plan_of("rows")
    for mode, forwards in (({"num_beams": 3}, NEW), ({"use_cache": False}, NEW)):

        def run(mode: dict[str, Any] = mode) -> Tensor:
            with found.model.arm(plan) as seen:
                found.model.generate_ids(ROWS, **GREEDY, **mode)
            return seen["probe"].steps

        check(run, found.model, N_LAYERS * forwards)


def raises_output(_module: nn.Module, _args: Any, output: Any) -> Any:
    return output + 0.1 if torch.is_tensor(output) else (output[0] + 0.1, *output[1:])


def raises_input(_module: nn.Module, args: tuple[Any, ...]) -> Any:
    return args[0] + 0.1, *args[1:]


def writes_input(_module: nn.Module, args: tuple[Any, ...]) -> None:
    args[0].add_(0.1)


def looks_on(*_: Any) -> None:
    """Changes nothing."""


# Which module has the hook, and how many norms the op still makes.
HOOKS: dict[str, tuple[str, Callable[..., Any], int]] = {
    "block": ("layers.1", raises_output, 1),
    "block input": ("layers.1", raises_input, 1),
    "block input in place": ("layers.1", writes_input, 1),
    "mlp": ("layers.1.mlp", raises_output, 2),
    "norm": ("layers.1.input_layernorm", raises_output, 2),
    "norm input in place": ("layers.1.input_layernorm", writes_input, 2),
    "final norm": ("norm", raises_output, 2),
    "attention": ("layers.1.self_attn", raises_output, 3),
    "decoder": ("", looks_on, 3),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
def test_somebody_elses_hook_sees_and_changes_what_it_would(kind: str, inference: bool) -> None:
    """Put on after the mode: what was made before it is not used where it has a say."""
    found = at("mistral", torch.float32)
    path, hook, norms = HOOKS[kind]
    module = found.model.hf.model.get_submodule(path)
    register = module.register_forward_hook
    if hook in (raises_input, writes_input):
        register = module.register_forward_pre_hook

    def run() -> Tensor:
        handle = register(hook)
        try:
            with torch.inference_mode(inference):
                return forward(found, one())
        finally:
            handle.remove()

    changes = hook is not looks_on
    check(run, found.model, norms, base=forward(found, one()) if changes else None)
    check(lambda: forward(found, one()), found.model, N_LAYERS, base=forward(found))


@pytest.mark.parametrize("armed", [True, False])
def test_gradients_are_those_of_the_ordinary_way(armed: bool) -> None:
    found = at("llama", torch.float32)
    ids, mask = padded(ROWS, side="left")

    def run() -> Tensor:
        found.model.hf.zero_grad()
        with found.model.steer(one()) if armed else nullcontext():
            found.model.hf(ids, attention_mask=mask).logits.square().mean().backward()
        grad: Tensor = found.model.hf.model.layers[0].mlp.down_proj.weight.grad
        found.model.hf.zero_grad()
        return grad

    check(run, found.model, 0)
    assert float(run().abs().max()) > 0
    # What a backward pass may ask for later keeps no other forward from it.
    check(lambda: forward(found, one()), found.model, N_LAYERS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_and_autocast_go_the_ordinary_way(dtype: torch.dtype) -> None:
    found = at("llama", dtype)

    def train() -> Tensor:
        found.model.hf.train()
        try:
            return forward(found, one())
        finally:
            found.model.hf.eval()

    def cast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return forward(found, one())

    for run in (train, cast):
        check(run, found.model, 0, base=forward(found))
    with torch.autocast("cpu", dtype=torch.bfloat16), pv.fused_norms(found.model) as fused:
        cast()
    assert fused.norms == 0


def test_inference_mode() -> None:
    found = at("qwen2", torch.float32)
    with torch.inference_mode():
        check(lambda: forward(found, one()), found.model, N_LAYERS, base=forward(found))


def test_traces_go_the_ordinary_way() -> None:
    found = new("qwen2")
    model, ids = found.model, ROWS[0][None]
    plain = forward(found)
    delta = ONE.direction(SITE)
    with torch.no_grad(), pv.fused_norms(model) as fused:
        with model.trace(ids) as tr:
            model.resid_post[1] = model.resid_post[1] + 2.0 * delta
            logits = tr.result.logits.save()
        assert fused.norms == 0
        assert torch.equal(forward(found), plain)
        assert fused.norms == N_LAYERS
    with torch.no_grad(), model.steer(one()):
        wanted = model.hf(ids).logits
    assert worst(logits, wanted) <= 1e-5
    assert worst(logits, found.oracle.forward(ids)[0]) > VISIBLE


def test_hidden_states_are_those_of_the_ordinary_way() -> None:
    """transformers leaves a hook on every block then, after which nothing is fused."""
    found, ids = new("llama"), ROWS[0][None]

    def states() -> Tensor:
        with torch.no_grad(), found.model.steer(one()):
            return torch.stack(found.model.hf(ids, output_hidden_states=True).hidden_states)

    with pv.fused_norms(found.model):
        got = states()
    assert torch.equal(got, states())


def test_steps_of_the_graph_engine_are_compiled_as_ever() -> None:
    found = new("qwen2")
    plan = plan_of("rows")

    def run() -> Answer:
        with found.model.arm(plan) as seen:
            tokens = found.model.generate_ids(ROWS, engine=pv.Graph(backend="eager"), **GREEDY)
        return tokens, seen["probe"].steps, seen["probe"].prompt

    wanted = run()
    for _ in range(2):
        with pv.fused_norms(found.model) as fused, counted() as calls:
            got = run()
        assert same_bits(got[0], wanted[0])
        assert same_bits(got[1:], wanted[1:])
        assert fused.norms == len(calls) == N_LAYERS  # of the prompt
        assert same_bits(run()[0], wanted[0])


def test_a_compiled_model_runs_as_it_was_compiled() -> None:
    found, ids = new("llama"), ROWS[0][None]
    compiled = torch.compile(found.model.hf, backend="eager")

    def run() -> Tensor:
        with torch.no_grad():
            logits: Tensor = compiled(ids).logits
        return logits

    check(run, found.model, 0)
    torch.compiler.reset()
