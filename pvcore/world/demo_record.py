"""The figures of a demo as plain data: what the report is drawn from and what JSON holds."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from pvcore.errors import PvcoreError
from pvcore.files import write_whole


class DemoError(PvcoreError):
    """A demo that cannot be run as asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much is run. `layers` are the blocks whose outputs are steered; the last one is shown.

    `coefficients` multiply raw vectors and start at 0, which every other dose is compared with.
    `monitoring_layer` is where projections are compared with scores; `rounds` and `timed_tokens`
    are for the overhead, `prevention` is the coefficient of preventative steering.
    """

    extraction_questions: int = 20
    rollouts: int = 1
    steering_questions: int = 30
    coefficients: tuple[float, ...] = (0.0, 1.0, 2.0, 2.5, 3.0, 3.5)
    layers: tuple[int, ...] = (1, 2)
    monitoring_layer: int = 3
    monitoring_questions: int = 6
    max_new_tokens: int = 64
    batch_size: int = 200
    rounds: int = 11
    timed_tokens: int = 32
    finetuning_chats: int = 300
    finetuning_steps: int = 60
    prevention: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        rising = sorted(set(self.coefficients)) == list(self.coefficients)
        if not rising or self.coefficients[:1] != (0.0,) or len(self.coefficients) < 2:
            raise DemoError(
                f"got coefficients {', '.join(f'{c:g}' for c in self.coefficients)}; wanted 0 and "
                "then one or more rising doses"
            )
        counts: tuple[str, ...] = (
            *("extraction_questions", "rollouts", "steering_questions", "monitoring_questions"),
            *("finetuning_chats", "finetuning_steps", "max_new_tokens", "batch_size"),
            *("rounds", "timed_tokens"),
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise DemoError(f"got {name}={getattr(self, name)}; wanted at least 1")
        if not self.layers:
            raise DemoError("got no layers to steer at; wanted at least one")

    @property
    def layer(self) -> int:
        """The layer that figures of a single layer are about."""
        return self.layers[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorFigures:
    """One extraction: how many pairs of replies were kept, and the vector at every layer.

    `reasons` count the replies that were dropped.
    """

    trait: str
    pairs: int
    kept: int
    reasons: Mapping[str, int]
    positive_score: float
    negative_score: float
    norms: tuple[float, ...]
    split_half_cosine: tuple[float, ...]
    separation: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DoseFigures:
    """Mean scores of one trait against the coefficient, beside a random vector of equal norm."""

    trait: str
    layer: int
    coefficients: tuple[float, ...]
    scores: tuple[float, ...]
    coherence: tuple[float, ...]
    control_scores: tuple[float, ...]
    control_coherence: tuple[float, ...]
    sampled: int
    judged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CapFigures:
    """Prompts that ask for the trait, alone and with projections held below `max` by layer."""

    trait: str
    max: Mapping[str, float]
    score: float
    coherence: float
    capped_score: float
    capped_coherence: float
    sampled: int
    judged: int


FinetuneWay = Literal["before", "undefended", "prevented", "random vector"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneFigures:
    """The model after a finetune on chats of a trait: scores, and the shift along every vector.

    `losses` are those of the first and the last step; "before" is the model that was not trained.
    """

    trait: str
    way: FinetuneWay
    coeff: float
    score: float
    coherence: float
    shift: Mapping[str, float]
    losses: tuple[float, ...]
    sampled: int
    judged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorFigures:
    """Projections at the last prompt token beside the scores of the replies that followed.

    `replies` are `(level of the prompt, projection, score)` at `layer`.
    """

    trait: str
    layer: int
    overall: float
    within: float
    overall_by_layer: tuple[float, ...]
    level_scores: Mapping[str, float]
    replies: tuple[tuple[float, float, float], ...]
    sampled: int
    judged: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFigures:
    """One reply token by token, with the projections of the states that produced each token."""

    title: str
    tokens: tuple[str, ...]
    projections: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFigures:
    """One question answered twice: left alone, and with an intervention."""

    trait: str
    prompt: str
    layer: int
    replies: tuple[ReplyFigures, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroFigures:
    """Greedy tokens with a coefficient of 0 and of the strongest dose, against the plain ones."""

    rows: int
    equal_at_zero: int
    equal_at_strongest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadFigures:
    """Time per token as a multiple of plain generation, over interleaved rounds."""

    label: str
    batch: int
    rounds: int
    p20: float
    p50: float
    p80: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FlaggedRowFigures:
    """One of the highest rows on a trait, and what it was written as."""

    trait: str
    kind: str
    difference: float
    reply: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagFigures:
    """A mixed data set, scored at one layer.

    `counts` and `means` go by what rows were written as; `found` is the share of a trait's rows
    among as many of the highest on its vector.
    """

    layer: int
    counts: Mapping[str, int]
    rejected: int
    found: Mapping[str, float]
    means: Mapping[str, Mapping[str, float]]
    rows: tuple[FlaggedRowFigures, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A bound that a figure must keep; `enforced` says whether breaking it fails the run."""

    name: str
    claim: str
    measured: float
    at: str
    bound: str
    passed: bool
    enforced: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRecord:
    """Everything a demo measured, with what it ran on."""

    command: str
    commit: str
    date: str
    versions: Mapping[str, str]
    device: str
    threads: int
    model: str
    judge: str
    in_world: bool
    workload: Workload
    vectors: tuple[VectorFigures, ...]
    cosines: tuple[tuple[float, ...], ...]
    doses: tuple[DoseFigures, ...]
    monitoring: tuple[MonitorFigures, ...]
    caps: tuple[CapFigures, ...]
    zero: ZeroFigures
    chats: tuple[ChatFigures, ...]
    overhead: tuple[OverheadFigures, ...]
    finetunes: tuple[FinetuneFigures, ...] = ()
    claims: tuple[Claim, ...] = ()
    flags: FlagFigures | None = None

    @property
    def failed(self) -> tuple[Claim, ...]:
        """Enforced claims that do not hold."""
        return tuple(claim for claim in self.claims if claim.enforced and not claim.passed)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON data: numbers rounded to six digits, None where there is none."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return {"name": "demo", "status": "measured"} | plain


def write_record(record: DemoRecord, path: str | Path) -> None:
    """Write the record as JSON, whole or not at all."""
    target = Path(path)
    # A line for every entry: a record can be compared with the one before it.
    entries = (f"{json.dumps(key)}: {_lines(value)}" for key, value in record.as_json().items())
    text = "{\n" + ",\n".join(entries) + "\n}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, f"{text}\n".encode())
    except OSError as problem:
        raise DemoError(
            f"got {target}, which cannot be written ({problem.strerror}); wanted a file in a "
            "folder you may write to"
        ) from problem


def _lines(value: object) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, allow_nan=False)
    return "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"


def _plain(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}") if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
