"""Pooling: the means an extraction is made of, beside a bare forward and the published loop."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from subprocess import run
from typing import Any

import torch
from torch import Tensor

import pvcore as pv
from benches import paper_loop, record, rounds
from benches.random_models import Shape, random_qwen2, twin
from benches.reading import Case, chat_tokenizer, conversations
from benches.record import ROOT, Cell, Check, Record
from pvcore.chats import Encoded, length_buckets, pad
from pvcore.pooling import Pass, Pooled
from pvcore.vectors import VARIANTS, Variant

NAME = "pooling"
BARE = "bare"
ROWS = {
    "again": "bare forward, timed twice",
    "pool": "pooling pass, all layers, three variants",
    "resampled": "the same with 100 resamples",
}
FASTER = "pooling pass, chats rendered and tokenized too"
MEMORY = "peak memory"
COLUMNS: dict[str, rounds.Clock] = {"CPU time": "cpu", "wall clock": "wall"}
TARGETS = {"pool": round(1 / 0.9, 4)}  # nine tenths of the bare forward's tokens a second
ERROR_BOUND = 1e-5
BATCH_SIZE = 16
RESAMPLES = 100

Job = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured; memory is that of `few` and of `many` conversations."""

    cases: tuple[Case, ...] = (
        Case(shape=Shape(hidden=256, layers=8, vocabulary=2112), conversations=200),
        Case(shape=Shape(hidden=512, layers=12, vocabulary=32000), conversations=60),
    )
    rounds: int = 9
    few: int = 100
    many: int = 800
    processes: int = 3
    seed: int = 0


QUICK = Settings(
    cases=(Case(shape=Shape(hidden=64, layers=3, vocabulary=2112), conversations=6),),
    rounds=2,
    few=4,
    many=8,
    processes=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The same conversations, the first half of them positive, in several ways."""

    plain: Any
    model: pv.HookedModel
    tokenizer: Any
    chats: list[list[dict[str, str]]]
    encoded: list[Encoded]

    def passed(self, resamples: int = 0) -> dict[Variant, Pooled]:
        sites = tuple(map(pv.resid_post, range(self.model.n_layers)))
        return Pass(
            model=self.model,
            encoded=self.encoded,
            sites=sites,
            batch_size=BATCH_SIZE,
            resamples=resamples,
            seed=0,
        ).run()

    def whole(self) -> dict[Variant, Pooled]:
        """From texts, as the published loop begins."""
        self.model.encode(self.chats)
        return self.passed()

    def paper(self) -> dict[str, Tensor]:
        half = len(self.chats) // 2
        sides = self.chats[:half], self.chats[half:]
        return paper_loop.vectors(self.plain, self.tokenizer, *sides)

    def bare(self) -> None:
        """The decoder alone over the batches of the pass: no logits, nothing read."""
        for chosen in length_buckets(self.encoded, BATCH_SIZE):
            batch = pad([self.encoded[i] for i in chosen], side="right", pad_id=0)
            with torch.no_grad():
                self.plain.model(batch.ids, attention_mask=batch.mask.long(), use_cache=False)

    def flop_bound(self) -> float:
        """How many times more arithmetic the published loop does, by the sizes of its matrices."""
        config = self.plain.config
        embedding = self.plain.get_input_embeddings().weight.numel()
        body = sum(weight.numel() for weight in self.plain.model.parameters()) - embedding
        logits = config.vocab_size * config.hidden_size
        lengths = [len(one.ids) for one in self.encoded]
        padded = sum(
            len(chosen) * max(lengths[i] for i in chosen)
            for chosen in length_buckets(self.encoded, BATCH_SIZE)
        )
        return float(sum(lengths) * (body + logits) / (padded * body))


def task_of(case: Case, tokenizer: Any, *, seed: int) -> Task:
    """One model with and without taps, on the same weights."""
    plain = random_qwen2(case.shape, seed=seed)
    model = pv.HookedModel(twin(plain), tokenizer, model_id="")
    chats = conversations(case, seed=seed)
    return Task(
        plain=plain, model=model, tokenizer=tokenizer, chats=chats, encoded=model.encode(chats)
    )


def check(task: Task) -> dict[str, Check]:
    """Vectors are the published loop's, as shares of their lengths.

    The last layer is left out: the loop has it only after the final norm.
    """
    wanted, got = task.paper(), task.passed()
    found = {}
    for variant in VARIANTS:
        right = wanted[variant][1:-1].double()
        apart = (got[variant].vector[:-1] - right).norm(dim=-1) / right.norm(dim=-1)
        found[f"{variant}"] = Check(worst=float(apart.nan_to_num(nan=1.0).max()), bound=ERROR_BOUND)
    alike = max(
        float(torch.cosine_similarity(wanted[one][1:-1], wanted[other][1:-1]).max())
        for one, other in (VARIANTS[:2], VARIANTS[1:])
    )
    found["variants that are the same"] = Check(worst=float(alike > 0.99), bound=0.0)
    return found


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    tokenizer = chat_tokenizer()
    tasks = {case: task_of(case, tokenizer, seed=settings.seed) for case in settings.cases}
    checks: dict[str, Check] = {}
    for case, task in tasks.items():
        checks |= {f"{case}: {name}": one for name, one in check(task).items()}
    wrong = [name for name, one in checks.items() if not one.passed]
    cells: dict[str, Cell] = {}
    for case, task in tasks.items():
        cells |= refused(case, wrong[0]) if wrong else timed(case, task, settings)
    if not wrong:
        cells[f"{MEMORY}/{settings.many} conversations beside {settings.few}/resident"] = memory(
            settings
        )
    bounds = ", ".join(f"{task.flop_bound():.2f} ({case})" for case, task in tasks.items())
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload={
            "ratio": "time beside a bare forward without logits over the same batches, and time of "
            "the published loop beside ours",
            "model": "Qwen2, random weights, float32",
            "chats": "generated by the persona world's grammar",
            "batch size": BATCH_SIZE,
            "arithmetic of the published loop beside ours": bounds,
            "rounds": settings.rounds,
        },
        checks=checks,
        cells=cells,
    )


def _beside(case: Case) -> str:
    return f"published loop beside ours, {case}"


def refused(case: Case, reason: str) -> dict[str, Cell]:
    labels = [f"{case}/{row}" for row in ROWS.values()] + [f"{_beside(case)}/{FASTER}"]
    return {
        f"{label}/{column}": Cell(status="failed", reason=reason)
        for label in labels
        for column in COLUMNS
    }


def timed(case: Case, task: Task, settings: Settings) -> dict[str, Cell]:
    jobs: dict[str, Job] = {
        BARE: task.bare,
        "again": task.bare,
        "pool": lambda: _silent(task.passed()),
        "resampled": lambda: _silent(task.passed(RESAMPLES)),
        "whole": lambda: _silent(task.whole()),
        "paper": lambda: _silent(task.paper()),
    }
    laps = rounds.interleave(jobs, rounds=settings.rounds, seed=settings.seed, what=str(case))
    cells = {
        f"{case}/{row}/{column}": rounds.paired(
            laps[arm], laps[BARE], clock=clock, target=TARGETS.get(arm)
        )
        for arm, row in ROWS.items()
        for column, clock in COLUMNS.items()
    }
    for column, clock in COLUMNS.items():
        faster = rounds.paired(laps["paper"], laps["whole"], clock=clock)
        cells[f"{_beside(case)}/{FASTER}/{column}"] = faster
    return cells


def memory(settings: Settings) -> Cell:
    """Peak resident memory of processes that pool many and few conversations."""
    ratios = [
        _peak(settings, settings.many) / _peak(settings, settings.few)
        for _ in range(settings.processes)
    ]
    return rounds.measured(ratios, target=1.05)


def _peak(settings: Settings, conversations: int) -> int:
    shape = settings.cases[0].shape
    sizes = (shape.hidden, shape.layers, shape.vocabulary, conversations)
    command = [sys.executable, "-m", "benches.pooling_memory", *map(str, sizes)]
    done = run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def _silent(_result: object) -> None:
    """Drop what a job made."""
