"""The catalogue of bad input: what a user may do wrong, the error it must end in, its words."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

import pvcore as pv
from pvcore import errors
from tests.families import BOS, build, tokenizer
from tests.subjects import Subject, prompts, trio, vector

IDS = prompts([7])[0]
POSTS = [pv.resid_post(layer) for layer in range(3)]
USER = {"role": "user", "content": "Hi"}
SHORT = {"do_sample": False, "max_new_tokens": 1}

Attempt = Callable[[Subject], Any]
Case = tuple[Attempt, type[pv.PvcoreError], str]


def evil(**changes: Any) -> pv.PersonaVector:
    return vector("evil", POSTS, seed=0, **changes)


def made_of(directions: Any, **changes: Any) -> pv.PersonaVector:
    settings: dict[str, Any] = {"trait": "evil", "sites": [pv.resid_post(1)], **changes}
    return pv.PersonaVector(directions=directions, **settings)


def spoiled(value: float) -> Tensor:
    directions = torch.ones(1, 64)
    directions[0, 3] = value
    return directions


def run(found: Subject, *interventions: Any, **settings: Any) -> None:
    """A whole use: arm, then one forward of one row."""
    with found.model.steer(*interventions, **settings), torch.no_grad():
        found.model.hf(IDS[None])


def generate(found: Subject, chats: Any, *interventions: Any, **settings: Any) -> None:
    with found.model.steer(*interventions):
        found.model.generate_ids(chats, **{**SHORT, **settings})


def nearly(one: pv.PersonaVector, trait: str) -> pv.PersonaVector:
    return (one + 1e-5 * vector("noise", one.sites, seed=9)).rename(trait)


def without_template(found: Subject) -> pv.HookedModel:
    return pv.HookedModel(found.model.hf, tokenizer(template=None))


VECTORS: dict[str, Case] = {
    "NaN": (lambda _: made_of(spoiled(float("nan"))), errors.VectorError, "evil.*NaN|NaN.*evil"),
    "infinite": (lambda _: made_of(spoiled(float("inf"))), errors.VectorError, "infinite|inf"),
    "zero": (lambda _: made_of(torch.zeros(1, 64)), errors.VectorError, "zero"),
    "one axis": (lambda _: made_of(torch.ones(64)), errors.VectorError, r"shape"),
    "rows for other sites": (lambda _: made_of(torch.ones(2, 64)), errors.VectorError, "sites?"),
    "no numbers": (lambda _: made_of("evil"), errors.VectorError, "tensor|Tensor"),
    "no sites": (lambda _: made_of(torch.ones(0, 64), sites=[]), errors.VectorError, "layer|site"),
    "a site twice": (
        lambda _: made_of(torch.ones(2, 64), sites=[pv.resid_post(1)] * 2),
        errors.VectorError,
        "twice",
    ),
    "no name": (lambda _: made_of(torch.ones(1, 64), trait=""), errors.VectorError, "trait"),
    "a name twice in a bank": (
        lambda _: pv.VectorBank([evil(), evil()]),
        errors.VectorError,
        "evil",
    ),
    "a bank of nothing": (lambda _: pv.VectorBank([]), errors.VectorError, "one at least"),
    "no site in common": (
        lambda _: pv.VectorBank([evil().at([0]), vector("humor", [POSTS[1]], seed=1)]),
        errors.VectorError,
        "site|layer",
    ),
    "a layer the vector lacks": (
        lambda _: pv.Add(evil().at([0]), coeff=1.0, layers=[1]),
        errors.VectorError,
        r"no direction.*resid_post\.1.*has resid_post\.0",
    ),
    "two widths": (
        lambda _: evil() + made_of(torch.ones(3, 32), sites=POSTS),
        errors.VectorError,
        "64.*32|32.*64",
    ),
    "an unknown trait of a bank": (
        lambda _: pv.VectorBank([evil()])["humour"],
        errors.VectorError,
        "humour.*evil",
    ),
    "an unknown trait": (lambda _: pv.Trait.load("evilness"), errors.TraitError, "evilness.*evil"),
}

SITES: dict[str, Case] = {
    "one number for a list": (
        lambda found: found.model.read([IDS], sites=1, span="all"),
        errors.SiteError,
        "wanted a list of layer numbers",
    ),
    "a batch size that is no whole number": (
        lambda found: found.model.read([IDS], sites=[1], span="all", batch_size=1.5),
        errors.SpanError,
        "got batch_size 1.5",
    ),
    "negative": (lambda _: pv.resid_post(-1), errors.SiteError, r"layer -1.*counted from 0"),
    "a negative layer of a step": (
        lambda _: pv.Add(evil(), coeff=1.0, layers=[-1]),
        errors.SiteError,
        "layer -1",
    ),
    "too deep to read": (
        lambda found: found.model.read([IDS], sites=[pv.resid_post(3)], span="all"),
        errors.SiteError,
        r"resid_post\.3.*3 blocks, 0 to 2",
    ),
    "too deep to steer": (
        lambda found: run(found, pv.Add(vector("evil", [pv.resid_pre(9)], seed=0), coeff=1.0)),
        errors.SiteError,
        r"resid_pre\.9.*3 blocks",
    ),
    "too deep to watch": (
        lambda found: found.model.monitor(
            pv.VectorBank([vector("evil", [pv.resid_mid(3)], seed=0)])
        ),
        errors.SiteError,
        r"resid_mid\.3.*3 blocks",
    ),
    "no sites": (
        lambda found: found.model.read([IDS], sites=[], span="all"),
        errors.SiteError,
        "no layers",
    ),
    "a kind that is none": (
        lambda _: pv.Site("resid_final", 1),  # type: ignore[arg-type]
        errors.SiteError,
        "resid_final.*resid_pre, resid_mid, resid_post",
    ),
    "a text that is none": (lambda _: pv.Site.parse("post.1"), errors.SiteError, "post.1.*KIND"),
}

STEPS: dict[str, Case] = {
    "NaN": (lambda _: pv.Add(evil(), coeff=float("nan")), errors.PlanError, "nan in coeff.*finite"),
    "infinite": (lambda _: pv.Add(evil(), coeff=[1.0, float("inf")]), errors.PlanError, "finite"),
    "a NaN bound": (lambda _: pv.Cap(evil(), max=float("nan")), errors.PlanError, "nan in max"),
    "a NaN of a layer": (
        lambda _: pv.Add(evil(), coeff={0: 1.0, 1: float("nan"), 2: 1.0}),
        errors.PlanError,
        "nan in coeff",
    ),
    "too large for float32": (
        lambda _: pv.Add(evil(), coeff=1e39),
        errors.PlanError,
        "float32 can hold",
    ),
    "a set": (lambda _: pv.Add(evil(), coeff={1.0, 2.0}), errors.PlanError, "a set for coeff"),
    "on the meta device": (
        lambda _: pv.Add(evil(), coeff=torch.ones(2, device="meta")),
        errors.PlanError,
        "meta device",
    ),
    "no number": (lambda _: pv.Add(evil(), coeff="2"), errors.PlanError, "coeff"),
    "no numbers": (lambda _: pv.Add(evil(), coeff=[]), errors.PlanError, "no numbers for coeff"),
    "a matrix": (lambda _: pv.Add(evil(), coeff=torch.ones(2, 2)), errors.PlanError, r"\[2, 2\]"),
    "layers without a number": (
        lambda _: pv.Add(evil(), coeff={0: 1.0}),
        errors.PlanError,
        r"layers \[0\].*\[0, 1, 2\]",
    ),
    "no bounds": (lambda _: pv.Cap(evil()), errors.PlanError, "without bounds.*max="),
    "min above max": (lambda _: pv.Cap(evil(), min=2.0, max=1.0), errors.PlanError, "min is above"),
    "min above max in one row": (
        lambda _: pv.Cap(evil(), min=[0.0, 2.0], max=1.0),
        errors.PlanError,
        "min is above",
    ),
    "an unknown span": (
        lambda _: pv.Ablate(evil(), span="reply"),  # type: ignore[arg-type]
        errors.SpanError,
        "'reply'.*all, prompt, response, last_prompt_token",
    ),
    "no vectors": (lambda _: pv.Ablate([]), errors.VectorError, "one at least"),
    "two rows for one": (
        lambda found: run(found, pv.Add(evil(), coeff=[1.0, 2.0])),
        errors.PlanError,
        "2 per-row coefficients for a batch of 1",
    ),
    "three rows for two chats": (
        lambda found: generate(found, [IDS, IDS], pv.Cap(evil(), max=[1.0, 2.0, 3.0])),
        errors.PlanError,
        "3 per-row.*batch of 2",
    ),
    "three rows for two chats read": (
        lambda found: read_under(found, [IDS, IDS], pv.Add(evil(), coeff=[1.0, 2.0, 3.0])),
        errors.PlanError,
        "3 per-row.*batch of 2",
    ),
    "one row per beam": (
        lambda found: generate(found, [IDS], pv.Add(evil(), coeff=[1.0] * 3), num_beams=3),
        errors.PlanError,
        "3 per-row.*batch of 1",
    ),
    "rows for two batches in one plan": (
        lambda _: pv.Plan(pv.Add(evil(), coeff=[1.0]), pv.Cap(evil(), max=[1.0, 2.0])),
        errors.PlanError,
        r"\[1, 2\] rows",
    ),
    "nearly dependent": (
        lambda found: run(found, pv.Ablate([evil(), nearly(evil(), "spite")])),
        errors.PlanError,
        "nearly dependent.*evil, spite",
    ),
    "three dependent ones": (
        lambda found: run(found, pv.Cap([*trio(*POSTS)[:2], sum_of_two()], max=1.0)),
        errors.PlanError,
        "nearly dependent.*evil, sycophancy, both",
    ),
    "another model": (
        lambda found: run(found, pv.Add(evil(model_id="other/gpt"), coeff=1.0)),
        errors.PlanError,
        r"other/gpt.*tiny/qwen2.*check_model=False",
    ),
    "another model to watch": (
        lambda found: found.model.monitor(pv.VectorBank([evil(model_id="other/gpt")])),
        errors.PlanError,
        "other/gpt",
    ),
    "another width": (
        lambda found: run(found, pv.Add(made_of(torch.ones(1, 32)), coeff=1.0)),
        errors.PlanError,
        "width 32.*width 64",
    ),
    "no plan": (lambda found: found.model.arm(evil()), errors.PlanError, "PersonaVector.*Plan"),
    "an empty plan": (lambda _: pv.Plan(), errors.PlanError, "empty plan"),
    "a vector for a step": (lambda _: pv.Plan(evil()), errors.PlanError, "Add, Ablate or Cap"),
    "a vector for a bank": (
        lambda found: found.model.monitor(evil()),
        errors.PlanError,
        "PersonaVector.*VectorBank",
    ),
    "a word for a condition": (
        lambda _: pv.Add(evil(), coeff=1.0, when="evil > 4"),
        errors.PlanError,
        "str as a condition.*pv.Above or pv.Below",
    ),
    "a bank for a condition": (
        lambda _: pv.Above(pv.VectorBank([evil()]), 4.0),
        errors.PlanError,
        "VectorBank to compare.*one PersonaVector",
    ),
    "an alarm level of words": (
        lambda found: found.model.monitor(pv.VectorBank([evil()]), alarms={"evil": "high"}),
        errors.PlanError,
        "'high' as a threshold; wanted a number",
    ),
    "a reaction of words": (
        lambda found: found.model.monitor(
            pv.VectorBank([evil()]), alarms={"evil": 4.0}, on_alarm="halt"
        ),
        errors.PlanError,
        "on_alarm='halt'; wanted 'stop'",
    ),
}


def sum_of_two() -> pv.PersonaVector:
    one, two, _ = trio(*POSTS)
    return (one + two).rename("both")


def read_under(found: Subject, chats: Sequence[Any], *interventions: Any) -> None:
    with found.model.steer(*interventions):
        found.model.read(chats, sites=[POSTS[1]], span="all")


def reading(chats: Any, **settings: Any) -> Attempt:
    return lambda found: found.model.read(chats, **{"sites": [POSTS[1]], **settings})


CHATS: dict[str, Case] = {
    "a prompt has no response": (reading([IDS]), errors.SpanError, "chat 0.*'response'.*prompt"),
    "an unanswered chat has no response": (reading([[USER]]), errors.SpanError, "chat 0.*response"),
    "an empty reply": (
        reading([[USER, {"role": "assistant", "content": ""}]]),
        errors.SpanError,
        "chat 0.*reply is empty",
    ),
    "an unknown span": (
        reading([IDS], span="reply"),
        errors.SpanError,
        "'reply'.*all, prompt, response, last_prompt_token",
    ),
    "an unknown reduction": (
        reading([IDS], span="all", reduce="sum"),
        errors.SpanError,
        "'sum'.*mean",
    ),
    "no batch": (reading([IDS], span="all", batch_size=0), errors.PvcoreError, "batch_size 0"),
    "no chats": (reading([], span="all"), errors.ChatError, "no chats"),
    "no tokens": (reading([IDS[:0]], span="all"), errors.ChatError, "empty prompt"),
    "an empty string": (reading([""], span="all"), errors.ChatError, "empty prompt"),
    "half a token": (reading([IDS.float()], span="all"), errors.ChatError, "token ids"),
    "masked labels": (reading([IDS - 100], span="all"), errors.ChatError, "token id -"),
    "an id beyond the vocabulary": (
        reading([IDS + 999], span="all"),
        errors.ChatError,
        "embeds 128",
    ),
    "a number": (reading([7], span="all"), errors.ChatError, "int"),
    "a message without a role": (reading([[{"content": "Hi"}]]), errors.ChatError, "role"),
    "a doubled BOS": (
        reading([torch.tensor([BOS, BOS, 9])], span="all"),
        errors.ChatError,
        "doubled BOS",
    ),
    "too long": (
        reading([IDS.repeat(20)], span="all"),
        errors.ChatError,
        "140 tokens.*at most 128",
    ),
    "no template": (
        lambda found: without_template(found).read([[USER]], sites=[POSTS[1]], span="all"),
        errors.ChatError,
        "chat 0.*without a template.*chat_template",
    ),
    "no tokenizer": (
        lambda found: pv.HookedModel(found.model.hf).read(["Hi"], sites=[POSTS[1]], span="all"),
        errors.ChatError,
        "no tokenizer",
    ),
    "no tokenizer to write with": (
        lambda found: pv.HookedModel(found.model.hf).generate([IDS], **SHORT),
        errors.ChatError,
        "generate_ids",
    ),
    "nothing to answer": (
        lambda found: found.model.generate([[USER, {"role": "assistant", "content": "Yes"}]]),
        errors.ChatError,
        "nothing to generate",
    ),
}


def stream(**settings: Any) -> Attempt:
    def attempt(found: Subject) -> None:
        list(found.model.stream([IDS], pv.VectorBank([evil()]), **{**SHORT, **settings}))

    return attempt


def foreign_generation(found: Subject) -> None:
    with found.model.monitor(pv.VectorBank([evil()])):
        found.model.hf.generate(IDS[None], attention_mask=torch.ones(1, 7).long(), **SHORT)


def unseen(found: Subject) -> None:
    with found.model.monitor(pv.VectorBank([evil()])) as seen:
        found.model.generate_ids([IDS], **SHORT)
    seen["humor"]


def too_early(found: Subject) -> None:
    with found.model.monitor(pv.VectorBank([evil()])) as seen:
        seen["evil"]


def prompt_span_in_training(found: Subject) -> None:
    hf = found.model.hf.train()
    try:
        run(found, pv.Add(evil(), coeff=1.0, span="prompt"))
    finally:
        hf.eval()


def compiled(found: Subject) -> pv.HookedModel:
    return pv.HookedModel(torch.compile(build("qwen2"), backend="eager"))


def encoder_decoder(_: Subject) -> pv.HookedModel:
    sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16}
    config = transformers.T5Config(vocab_size=32, **sizes)
    return pv.HookedModel(transformers.T5ForConditionalGeneration(config))


RUNS: dict[str, Case] = {
    "ids of one's own": (
        lambda found: found.model.generate_ids([IDS], input_ids=IDS[None]),
        errors.PlanError,
        "input_ids.*chats are the input",
    ),
    "assisted decoding": (
        lambda found: generate(found, [IDS], pv.Add(evil(), coeff=1.0), prompt_lookup_num_tokens=2),
        errors.PlanError,
        "prompt_lookup_num_tokens",
    ),
    "beams in a stream": (stream(num_beams=2), errors.PlanError, "beams"),
    "an alarm on nothing": (stream(alarms={"humor": 1.0}), errors.PlanError, "humor.*evil"),
    "a foreign generation": (foreign_generation, errors.HookError, "model.generate"),
    "a trait nobody watched": (unseen, errors.VectorError, "humor.*evil"),
    "a look before the first forward": (too_early, errors.HookError, "no forward to report"),
    "prompts of training rows": (prompt_span_in_training, errors.SpanError, "'prompt'.*span='all'"),
    "a compiled model": (compiled, errors.ModelError, "compile"),
    "an encoder-decoder": (encoder_decoder, errors.ModelError, "encoder-decoder"),
    "no language model": (
        lambda _: pv.HookedModel(torch.nn.Linear(2, 2)),
        errors.ModelError,
        "Linear.*causal LM",
    ),
}

CASES = {
    f"{kind}: {what}": case
    for kind, cases in {
        "vector": VECTORS,
        "site": SITES,
        "step": STEPS,
        "chat": CHATS,
        "run": RUNS,
    }.items()
    for what, case in cases.items()
}
