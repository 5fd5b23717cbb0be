"""Extraction: a persona vector from contrasting system prompts (arXiv 2507.21509, 2 and A.1)."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pvcore.chats import encode, span_range
from pvcore.errors import ChatError, ExtractionError, SpanError
from pvcore.judge import Judge, judge_all
from pvcore.model import HookedModel
from pvcore.moments import Moments
from pvcore.provenance import Provenance
from pvcore.sites import Site, as_sites, resid_post
from pvcore.traits import ContrastPair, Trait
from pvcore.vectors import PersonaVector

Score = float | int | None
Conversation = list[dict[str, str]]
Half = tuple[bool, int]  # whether positive, and which half of the pairs
_FEWEST_PAIRS = 2  # one for each half of the split whose cosine is the confidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled reply with its scores; `dropped` says why the mean leaves it out, "" if kept."""

    positive: bool
    system_prompt: str
    question: str
    answer: str
    trait_score: float | None
    coherence_score: float | None
    dropped: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuality:
    """How good the vector is at one site.

    `separation` is its norm in units of the spread of replies around their side's mean.
    `split_half_cosine` compares the vectors of two halves of the kept pairs.
    """

    site: Site
    norm: float
    separation: float
    split_half_cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """A vector, and the rollouts it was made of: positive replies first, pairs in one order."""

    vector: PersonaVector
    rollouts: tuple[Rollout, ...]

    @property
    def kept(self) -> int:
        """Rollouts that the means are taken over, half of them on each side."""
        return sum(not rollout.dropped for rollout in self.rollouts)

    @property
    def dropped(self) -> int:
        return len(self.rollouts) - self.kept

    @property
    def reasons(self) -> Mapping[str, int]:
        """How many rollouts were dropped for each reason."""
        return Counter(rollout.dropped for rollout in self.rollouts if rollout.dropped)

    @property
    def confidence(self) -> Float[Tensor, " n_sites"]:
        """Cosine between the vectors of two halves of the kept pairs, at each site."""
        return self.vector.statistics["split_half_cosine"]

    @property
    def layers(self) -> tuple[LayerQuality, ...]:
        """The quality of the vector at each of its sites."""
        columns = (self.vector.norms, self.vector.statistics["reply_spread"], self.confidence)
        return tuple(
            LayerQuality(
                site=site,
                norm=norm,
                separation=norm / spread if spread else math.inf,
                split_half_cosine=cosine,
            )
            for site, norm, spread, cosine in zip(
                self.vector.sites, *(column.tolist() for column in columns), strict=True
            )
        )


def extract(
    model: HookedModel,
    trait: Trait,
    *,
    judge: Judge,
    layers: Iterable[int | Site] | None = None,
    system_prompts: Sequence[ContrastPair] | None = None,
    questions: Sequence[str] | None = None,
    rollouts: int = 1,
    max_new_tokens: int = 64,
    temperature: float | int = 1.0,
    threshold: float | int = 50.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Extraction:
    """Sample replies under contrasting system prompts, judge and filter them, subtract the means.

    Every question is asked under both sides of every pair of system prompts, `rollouts` times;
    prompts and questions are by default those of the trait. At each of `layers` (default: all) the
    vector is the mean over kept positive replies of the residual averaged over reply tokens, minus
    the same of kept negative ones. Raises `ExtractionError` when fewer than two pairs are kept.
    """
    sites = as_sites(map(resid_post, range(model.n_layers)) if layers is None else layers)
    prompts = trait.system_prompts if system_prompts is None else system_prompts
    asked = trait.extraction_questions if questions is None else questions
    chats = _asked(prompts, asked, rollouts)
    how: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "progress": progress,
    }
    replies = sample_replies(model, chats, batch_size=batch_size, seed=seed, **how)
    rows = _filtered(_judged(model, trait, judge, chats, replies, progress), threshold)
    halves = _halves(model, sites, _kept(rows, trait), batch_size)
    note = f"rollouts {rollouts}, at most {max_new_tokens} tokens, temperature {temperature:g}"
    provenance = _provenance(rows, judge, chats, threshold, seed, note)
    return Extraction(vector=_vector(model, trait, sites, halves, provenance), rollouts=rows)


def pairwise_filter(
    positive_scores: Sequence[Score],
    negative_scores: Sequence[Score],
    positive_coherence: Sequence[Score],
    negative_coherence: Sequence[Score],
    threshold: float | int = 50.0,
) -> tuple[bool, ...]:
    """Which rows are kept: both replies coherent, the positive one with the trait, the other not.

    The rule of the paper's code, by row: three scores from `threshold` up, and the negative trait
    score below it. A row with a score that is None or NaN is not kept.
    """
    columns = (positive_scores, negative_scores, positive_coherence, negative_coherence)
    if len({len(column) for column in columns}) > 1:
        raise ExtractionError(
            f"got {', '.join(str(len(column)) for column in columns)} scores; wanted one of each "
            "kind per row"
        )
    numbers = ((math.nan if n is None else n for n in row) for row in zip(*columns, strict=True))
    return tuple(
        positive >= threshold
        and negative < threshold
        and coherent >= threshold
        and negative_coherent >= threshold
        for positive, negative, coherent, negative_coherent in numbers
    )


def sample_replies(
    model: HookedModel,
    chats: Sequence[Conversation],
    *,
    max_new_tokens: int,
    temperature: float | int = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> list[str]:
    """Plain samples: the model's own top-k, top-p and repetition penalty are switched off.

    Every batch is seeded by `seed` and its place, so the same call gives the same replies on one
    machine; the random state outside is left as it was. Temperature 0 means greedy.
    """
    if batch_size < 1 or max_new_tokens < 1 or not temperature >= 0:
        raise ExtractionError(
            f"got batch_size={batch_size}, max_new_tokens={max_new_tokens}, temperature="
            f"{temperature}; wanted at least 1, at least 1, and at least 0"
        )
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = (how if temperature else {"do_sample": False}) | {"repetition_penalty": 1.0}
    firsts = range(0, len(chats), batch_size)
    replies: list[str] = []
    for first in _shown(firsts, "sampling") if progress else firsts:
        with _seeded(f"{seed}/{first // batch_size}"):
            batch = chats[first : first + batch_size]
            replies += model.generate(batch, max_new_tokens=max_new_tokens, **settings)
    return replies


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    # Seeding reaches every CUDA device, so the state of each is put back.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(int.from_bytes(sha256(key.encode()).digest()[:7], "big"))
        yield


def _asked(
    prompts: Sequence[ContrastPair], questions: Sequence[str], rollouts: int
) -> list[Conversation]:
    """Every question under every positive prompt, then in the same order under every negative."""
    if rollouts < 1 or not prompts or not questions:
        raise ExtractionError(
            f"got {len(prompts)} pairs of system prompts, {len(questions)} questions and rollouts="
            f"{rollouts}; wanted at least one of each"
        )
    sides = [pair.positive for pair in prompts], [pair.negative for pair in prompts]
    return [
        [{"role": "system", "content": prompt}, {"role": "user", "content": question}]
        for side in sides
        for prompt, question, _ in product(side, questions, range(rollouts))
    ]


def _judged(
    model: HookedModel,
    trait: Trait,
    judge: Judge,
    chats: Sequence[Conversation],
    replies: Sequence[str],
    progress: bool,
) -> list[Rollout]:
    """Every reply with its scores; those that cannot be read or judged already dropped."""
    flaws = [_flaw(model, chat, reply) for chat, reply in zip(chats, replies, strict=True)]
    sound = [index for index, flaw in enumerate(flaws) if not flaw]
    if not sound:
        raise ExtractionError(
            f"got no readable reply among {len(replies)} for {trait.name!r} ({flaws[0]}); wanted "
            "replies to judge. Look at what the model writes, or raise max_new_tokens"
        )
    texts = [(chats[index][1]["content"], replies[index]) for index in sound]
    judgements = judge_all(judge, trait.name, texts, progress=progress).rows
    judged = dict(zip(sound, judgements, strict=True))
    rows = []
    for index, (chat, reply, flaw) in enumerate(zip(chats, replies, flaws, strict=True)):
        judgement = judged.get(index)
        failed = judgement is not None and judgement.failure is not None
        rows.append(
            Rollout(
                positive=index < len(chats) // 2,
                system_prompt=chat[0]["content"],
                question=chat[1]["content"],
                answer=reply,
                trait_score=judgement.trait_score if judgement else None,
                coherence_score=judgement.coherence_score if judgement else None,
                dropped="the judge failed" if failed else flaw,
            )
        )
    return rows


def _flaw(model: HookedModel, chat: Conversation, reply: str) -> str:
    """Why the residuals of a reply cannot be read; "" if they can."""
    if not reply.strip():
        return "empty reply"
    longest = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None)
    try:
        whole = [*chat, {"role": "assistant", "content": reply}]
        span_range(encode(model.tokenizer, whole, max_length=longest), "response")
    except SpanError:
        return "reply whose tokens cannot be told from the prompt's"
    except ChatError:
        return "reply too long for the model"
    return ""


def _filtered(rows: Sequence[Rollout], threshold: float) -> tuple[Rollout, ...]:
    """The rollouts with the reason why the pairwise filter drops them."""
    positive, negative = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    kept = pairwise_filter(
        [row.trait_score for row in positive],
        [row.trait_score for row in negative],
        [row.coherence_score for row in positive],
        [row.coherence_score for row in negative],
        threshold,
    )
    return tuple(
        replace(row, dropped="" if keep else _reason(row, threshold))
        for row, keep in zip(rows, (*kept, *kept), strict=True)
    )


def _reason(row: Rollout, threshold: float) -> str:
    if row.dropped or row.trait_score is None or row.coherence_score is None:
        return row.dropped
    if (row.trait_score >= threshold) != row.positive:
        return "positive without the trait" if row.positive else "negative with the trait"
    return "incoherent" if row.coherence_score < threshold else "its counterpart was dropped"


def _kept(rows: Sequence[Rollout], trait: Trait) -> list[Rollout]:
    kept = [row for row in rows if not row.dropped]
    if len(kept) < 2 * _FEWEST_PAIRS:
        reasons = Counter(row.dropped for row in rows if row.dropped)
        raise ExtractionError(
            f"got {len(kept) // 2} of {len(rows) // 2} pairs kept for {trait.name!r} (replies "
            f"dropped: {', '.join(f'{n} {reason}' for reason, n in reasons.items())}); wanted at "
            f"least {_FEWEST_PAIRS}. Try more rollouts, or prompts this model follows"
        )
    return kept


def _halves(
    model: HookedModel, sites: Sequence[Site], kept: Sequence[Rollout], batch_size: int
) -> dict[Half, Moments]:
    """Moments over replies of the residual averaged over each; alternate pairs in two halves."""
    pairs = len(kept) // 2
    half_of: list[Half] = [(row.positive, at % pairs % 2) for at, row in enumerate(kept)]
    halves = {half: Moments.zeros([len(sites), model.d_model]) for half in sorted(set(half_of))}
    chats = [
        [
            {"role": "system", "content": row.system_prompt},
            {"role": "user", "content": row.question},
            {"role": "assistant", "content": row.answer},
        ]
        for row in kept
    ]
    for chosen, part in model.read_batches(chats, sites=sites, batch_size=batch_size):
        assert part.values is not None, "a mean over a span has values"
        for half in halves:
            rows = [at for at, chat in enumerate(chosen) if half_of[chat] == half]
            halves[half] = halves[half].add(part.values[:, rows].transpose(0, 1))
    return halves


def _provenance(
    rows: Sequence[Rollout],
    judge: Judge,
    chats: Sequence[Conversation],
    threshold: float,
    seed: int,
    note: str,
) -> Provenance:
    return Provenance(
        thresholds={"trait": threshold, "coherence": threshold},
        judge=type(judge).__qualname__,
        kept=sum(not row.dropped for row in rows),
        dropped=sum(bool(row.dropped) for row in rows),
        prompt_hash=sha256(json.dumps(chats).encode()).hexdigest(),
        seeds=(seed,),
        note=note,
    )


def _vector(
    model: HookedModel,
    trait: Trait,
    sites: Sequence[Site],
    halves: Mapping[Half, Moments],
    provenance: Provenance,
) -> PersonaVector:
    positive, negative = (halves[side, 0].merge(halves[side, 1]) for side in (True, False))
    first, second = (halves[True, half].mean - halves[False, half].mean for half in (0, 1))
    spread = (positive.variance.sum(-1) + negative.variance.sum(-1)) / 2
    return PersonaVector(
        trait=trait.name,
        sites=sites,
        directions=positive.mean - negative.mean,
        model_id=model.model_id,
        revision=getattr(model.hf.config, "_commit_hash", None),
        provenance=provenance,
        statistics={
            "split_half_cosine": cosine_similarity(first, second, dim=-1),
            "reply_spread": spread.sqrt(),
        },
    )


def _shown(steps: Sequence[int], what: str) -> Iterable[int]:
    # Imported here, because rich draws random numbers when it is imported.
    from rich.console import Console
    from rich.progress import track

    return track(steps, description=what, console=Console(stderr=True))
