"""Flagging: a whole scan beside a bare truncated forward, and beside the authors' loop."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pvcore as pv
from benches import paper_loop, record, rounds
from benches.random_models import Shape, random_qwen2, random_vectors, twin
from benches.reading import chat_tokenizer
from benches.record import Cell, Check, Record
from pvcore import flag_settings, world
from pvcore.flag_feed import Feed
from pvcore.flag_rows import Form
from pvcore.flag_scan import packed
from pvcore.flag_settings import CPU_TOKENS, reading_of
from pvcore.flag_sources import resolve

NAME = "flagging"
ERROR_BOUND = 1e-5
# Nine tenths of the tokens a second of the bare forward.
TARGET = 1 / 0.9
COLUMNS: dict[str, rounds.Clock] = {"wall clock": "wall", "CPU time": "cpu"}
BARE, PAPER = "scan, beside a bare forward", "the authors' loop, beside the scan"


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenShape(Shape):
    """The sizes of Qwen2.5-0.5B, which are not in the proportions of the other models here."""

    intermediate: int = 4864
    heads: int = 14
    key_heads: int = 2

    def build(self, seed: int) -> Any:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(seed)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.key_heads,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                initializer_range=self.hidden**-0.5,
            )
        ).eval()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model, where it is tapped, how many conversations it scores, and what it is held to.

    `share` of the rounds are enough for it.
    """

    shape: Shape
    sites: tuple[int, ...]
    conversations: int
    against: str
    share: float = 1.0

    def __str__(self) -> str:
        taps = f"block {self.sites[0]}" if len(self.sites) == 1 else f"{len(self.sites)} blocks"
        return f"{self.shape}, tapped at {taps}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured. The first vocabulary is that of the chats' own tokenizer.

    A scan begins with a tenth of a second of checks, which would be all that a short one measures.
    """

    cases: tuple[Case, ...] = (
        Case(
            shape=Shape(hidden=256, layers=8, vocabulary=2112),
            sites=(5,),
            conversations=1000,
            against=BARE,
        ),
        Case(
            shape=Shape(hidden=512, layers=8, vocabulary=2112),
            sites=tuple(range(8)),
            conversations=400,
            against=BARE,
        ),
        Case(
            shape=QwenShape(hidden=896, layers=24, vocabulary=151936),
            sites=(16,),
            conversations=96,
            against=PAPER,
            share=0.3,
        ),
    )
    rounds: int = 10
    checked: int = 20
    seed: int = 0

    def of(self, case: Case) -> int:
        """How often a case is timed."""
        return max(round(self.rounds * case.share), 1)


QUICK = Settings(
    cases=(
        Case(
            shape=Shape(hidden=64, layers=3, vocabulary=2112),
            sites=(0, 1),
            conversations=12,
            against=BARE,
        ),
        Case(
            shape=Shape(hidden=64, layers=3, vocabulary=2112),
            sites=(1,),
            conversations=4,
            against=PAPER,
        ),
    ),
    rounds=2,
    checked=4,
)


class Task:
    """The ways to score the same conversations, on the same weights."""

    def __init__(self, case: Case, folder: Path, *, seed: int) -> None:
        shape = case.shape
        self.hf = (
            shape.build(seed) if isinstance(shape, QwenShape) else random_qwen2(shape, seed=seed)
        )
        self.tokenizer = chat_tokenizer()
        self.model = pv.HookedModel(twin(self.hf), self.tokenizer, model_id="")
        self.bank = pv.VectorBank(random_vectors(shape.hidden, case.sites, seed=seed))
        corpus = world.chats.corpus(seed)
        self.chats = [world.chats.as_dicts(c) for c in islice(corpus, case.conversations)]
        self._folder, self._scans = folder, count()
        self._data = folder / "data.jsonl"
        lines = (json.dumps({"messages": chat}) + "\n" for chat in self.chats)
        self._data.write_text("".join(lines), encoding="utf-8")

    def scan(self) -> pv.Flags:
        """Everything a user waits for: files read and hashed, rows scored and on the disk."""
        out = self._folder / f"scan-{next(self._scans)}"
        return pv.flag(self.model, self._data, self.bank, out=out)

    def batches(self) -> list[Tensor]:
        """What the scan's forwards are given."""
        feed = Feed(
            sources=resolve(self._data),
            reading=reading_of(self.model, Form()),
            shard_rows=flag_settings.Settings().shard_rows,
            held=lambda shard: None,
        )
        parts = [packed(portion.samples, CPU_TOKENS) for portion in feed.portions()]
        return [batch.ids for batch in chain.from_iterable(parts)]

    def bare(self) -> Callable[[], None]:
        """The forwards of the scan and nothing else: no reads, no pooling, no files."""
        batches = self.batches()
        layer = max(site.layer for site in self.bank.sites)

        def run() -> None:
            with stopping(self.hf.model.layers[layer]), torch.no_grad():
                for ids in batches:
                    try:
                        self.hf(input_ids=ids, use_cache=False)
                    except _Stop:
                        continue

        return run

    def paper(self, chats: Sequence[Any]) -> Tensor:
        """Mean over the reply on every vector, at the deepest site."""
        site = self.bank.sites[-1]
        raw = [one.direction(site) for one in self.bank]
        index = site.hidden_states_index
        return paper_loop.projections(self.hf, self.tokenizer, chats, raw, index=index)


class _Stop(Exception):
    """Ends a forward at the block that raises it."""


@contextmanager
def stopping(block: Any) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Stop

    handle = block.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def check(task: Task, checked: int) -> dict[str, Check]:
    """The scan's numbers are those of the loop. Errors are shares of a usual projection."""
    site = task.bank.sites[-1]
    columns = [f"{trait}/{site}/response_mean" for trait in task.bank.traits]
    (values,) = (rows for _, rows in task.scan().values(columns))
    got = torch.from_numpy(values)[:checked]
    # transformers shows the last block only after the final norm, which the scan never runs.
    last = site.layer == len(task.hf.model.layers) - 1
    chats = task.chats[:checked]
    wanted = (hooked(task, chats) if last else task.paper(chats)).double()
    usual = wanted.square().mean(0).sqrt()
    errors = ((got - wanted).abs() / usual).nan_to_num(nan=1.0, posinf=1.0)
    return {
        "error of a projection": Check(worst=float(errors.max()), bound=ERROR_BOUND),
        "vectors along which all conversations look alike": Check(
            worst=int((wanted.std(0) < 1e-3 * usual).sum()), bound=0
        ),
    }


def hooked(task: Task, chats: Sequence[Any]) -> Tensor:
    """The loop over conversations with a bare hook in the place of hidden states."""
    site, kept = task.bank.sites[-1], list[Tensor]()
    handle = task.hf.model.layers[site.layer].register_forward_hook(
        lambda _module, _given, h: kept.append(h[0])
    )
    rows = []
    for chat in chats:
        prompt = task.tokenizer.apply_chat_template(
            chat[:-1], tokenize=False, add_generation_prompt=True
        )
        whole = task.tokenizer(prompt + chat[-1]["content"], add_special_tokens=False)["input_ids"]
        start = len(task.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            task.hf(torch.tensor([whole]))
        mean = kept.pop()[start:].double().mean(0)
        along = [one.direction(site).double() for one in task.bank]
        rows.append(torch.stack([mean @ v / v.norm() for v in along]))
    handle.remove()
    return torch.stack(rows)


def most(case: Case) -> float:
    """How many times faster it can be by skipping blocks and logits alone: a ratio of FLOPs."""
    shape = case.shape
    heads, keys = getattr(shape, "heads", 0) or 4, getattr(shape, "key_heads", 0) or 2
    width = getattr(shape, "intermediate", shape.hidden * 11 // 4)
    block = shape.hidden * (2 * shape.hidden * (1 + keys / heads) + 3 * width)
    head = shape.hidden * shape.vocabulary
    return (shape.layers * block + head) / ((max(case.sites) + 1) * block)


def measure(settings: Settings, *, command: str) -> Record:
    """Check first, then time. A failed check leaves no figure standing."""
    checks: dict[str, Check] = {}
    cells: dict[str, Cell] = {}
    for case in settings.cases:
        with tempfile.TemporaryDirectory() as folder:
            task = Task(case, Path(folder), seed=settings.seed)
            found = {f"{case}: {name}": one for name, one in check(task, settings.checked).items()}
            checks |= found
            wrong = [name for name, one in found.items() if not one.passed]
            cells |= refused(case, wrong[0]) if wrong else timed(case, task, settings)
    if not all(one.passed for one in checks.values()):
        reason = next(name for name, one in checks.items() if not one.passed)
        cells = {label: Cell(status="failed", reason=reason) for label in cells}
    loop = next(case for case in settings.cases if case.against == PAPER)
    return Record(
        name=NAME,
        command=command,
        commit=record.commit(),
        date=record.today(),
        versions=record.versions(),
        device=record.device(torch.device("cpu")),
        workload={
            "ratio": "time of one beside the other",
            "model": "Qwen2, random weights, float32",
            "chats": "generated by the persona world's grammar",
            "a scan": "files read and hashed, rows tokenised, scored and written",
            "conversations": ", ".join(str(case.conversations) for case in settings.cases),
            "tokens of a batch": CPU_TOKENS,
            "the authors' loop would be slower by FLOPs alone": f"{most(loop):.2f} times",
            "rounds": ", ".join(str(settings.of(case)) for case in settings.cases),
        },
        checks=checks,
        cells=cells,
    )


def refused(case: Case, reason: str) -> dict[str, Cell]:
    return {
        f"{case}/{case.against}/{column}": Cell(status="failed", reason=reason)
        for column in COLUMNS
    }


def timed(case: Case, task: Task, settings: Settings) -> dict[str, Cell]:
    def scan() -> None:
        task.scan()

    def paper() -> None:
        task.paper(task.chats)

    jobs = {"scan": scan, "other": paper if case.against == PAPER else task.bare()}
    laps = rounds.interleave(jobs, rounds=settings.of(case), seed=settings.seed, what=str(case))
    above, below = ("other", "scan") if case.against == PAPER else ("scan", "other")
    target = None if case.against == PAPER else round(TARGET, 3)
    return {
        f"{case}/{case.against}/{column}": rounds.paired(
            laps[above], laps[below], clock=clock, target=target
        )
        for column, clock in COLUMNS.items()
    }
