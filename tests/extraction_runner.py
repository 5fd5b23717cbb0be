"""Extractions in processes of their own, to be killed: one fork for each line it is told.

A line holds a work folder, a folder for the vectors, a log, and the number of the point at which
the fork kills itself. Points are: before, within and after each `os.write`, before and after each
`os.replace` and `os.fsync`, each judged reply and each written batch, each forward of the pooling
pass. A run that comes to its end leaves the number of its points beside the vectors.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pvcore import world
from pvcore.extraction import extract
from pvcore.model import HookedModel
from pvcore.replies import ModelWriter
from pvcore.rollouts import Turn
from pvcore.traits import ContrastPair
from pvcore.world.demo_subject import world_model
from pvcore.world.personas import trait

WRITE = os.write
N_QUESTIONS, BATCH_SIZE = 4, 3


class Points:
    """Counts what happens; at the one wanted, the process is gone."""

    def __init__(self, last: int) -> None:
        self.last, self.count = last, 0

    def pass_one(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.pass_one()
            result = function(*args, **kwargs)
            self.pass_one()
            return result

        return counted

    def write(self, file: int, content: bytes) -> int:
        self.pass_one()
        half = len(content) // 2
        written = WRITE(file, content[:half])
        self.pass_one()  # a line is torn here
        written += WRITE(file, content[half:])
        self.pass_one()
        return written


class LoggingJudge(world.WorldJudge):
    def __init__(self, points: Points, log: Path) -> None:
        self.points, self.log = points, log

    def trait(self, trait: str, question: Any, answer: str) -> float:
        self.points.pass_one()
        note(self.log, f"judged {question!r} {answer!r}")
        return super().trait(trait, question, answer)


class LoggingWriter(ModelWriter):
    points: Points
    log: Path

    def write(self, turns: Sequence[Turn], *, batch: int) -> list[str | None]:
        self.points.pass_one()
        note(self.log, f"wrote {batch}")
        replies = super().write(turns, batch=batch)
        self.points.pass_one()
        return replies


def note(log: Path, text: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    WRITE(file, f"{text}\n".encode())
    os.close(file)


def run(model: HookedModel, work: str, out: str, log: str, last: int) -> None:
    points = Points(last)
    os.write = points.write
    os.replace = points.around(os.replace)
    os.fsync = points.around(os.fsync)
    model.hf.model.layers[0].register_forward_pre_hook(lambda *_: points.pass_one())
    evil = trait("evil")
    writer = LoggingWriter(model, max_new_tokens=16)
    writer.points, writer.log = points, Path(log)
    result = extract(
        model,
        evil,
        judge=LoggingJudge(points, Path(log)),
        system_prompts=[ContrastPair(positive=p.positive, negative=p.negative) for p in PROMPTS],
        questions=evil.extraction_questions[:N_QUESTIONS],
        writer=writer,
        batch_size=BATCH_SIZE,
        resamples=20,
        work=work,
    )
    for variant, vector in result.vectors.items():
        vector.save(Path(out) / f"{variant}.safetensors")
    (Path(out) / "points").write_text(str(points.count), "utf-8")


PROMPTS = trait("evil").system_prompts[:1]


def main() -> None:
    torch.set_num_threads(1)
    model = world_model()
    asked = trait("evil").extraction_questions[:2]
    extract(model, trait("evil"), judge=world.WorldJudge(), questions=asked)  # to be warm
    for line in sys.stdin:
        *places, last = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            try:
                run(model, *places, int(last))
            finally:
                sys.stderr.flush()
                os._exit(0)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)


if __name__ == "__main__":
    main()
