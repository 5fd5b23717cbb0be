"""Measure trained models: `python -m pvcore.world.evaluate DIR [DIR ...] --out REPORT.json`."""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pvcore.controls import random_of_same_norm
from pvcore.extraction import Extraction, extract
from pvcore.interventions import Add
from pvcore.model import HookedModel
from pvcore.vectors import PersonaVector
from pvcore.world import quiz
from pvcore.world.demo_subject import world_trait
from pvcore.world.judge import WorldJudge
from pvcore.world.lexicon import TRAITS
from pvcore.world.prompts import graded_prompts
from pvcore.world.question import KINDS, Question, questions
from pvcore.world.splits import digest

COEFFICIENTS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
_MAX_NEW_TOKENS = 64
_END = 2
_N_PLAIN, _N_PROMPTED, _N_STEERED, _N_EXTRACTED, _N_QUIZ = 300, 60, 50, 20, 150
_COHERENCE_FLOOR = 70.0
_REPLIES: dict[str, Any] = {
    "temperature": 1.0,
    "max_new_tokens": _MAX_NEW_TOKENS,
    "plain": _N_PLAIN,
    "per prompt level": _N_PROMPTED,
    "per steering cell": _N_STEERED,
}

Figures = dict[str, Any]
Reply = tuple[str, bool]


def evaluate(
    folder: Path, steer_traits: Sequence[str], note: Callable[[str], None] = lambda text: None
) -> Figures:
    """The figures of one trained model; `note` hears what is measured next."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = HookedModel(hf, tokenizer, model_id="pvcore/persona-world")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    note("plain replies")
    figures: Figures = {
        "seed": manifest["recipe"]["seed"],
        "final_loss": manifest["final_loss"],
        "weights_sha256": manifest["sha256"]["model.safetensors"],
        "plain": plain(model),
        "quiz": quiz.accuracy(quiz.items(_N_QUIZ, seed=0), quiz.model_log_probs(hf, tokenizer)),
        "prompted": {},
        "steered": {},
    }
    for trait in TRAITS:
        note(f"{trait}: prompts")
        figures["prompted"][trait] = prompted(model, trait)
    for trait in steer_traits:
        note(f"{trait}: steering")
        figures["steered"][trait] = steered(model, trait)
    return figures


def plain(model: HookedModel) -> Figures:
    """Coherence by kind of question and the score of each trait, without a system prompt."""
    asked = questions("held_out", _N_PLAIN, seed=1)
    replies = sample(model, asked, [None] * len(asked), "plain")
    kinds = {
        kind: _coherence([(q, r) for q, r in zip(asked, replies, strict=True) if q.kind == kind])
        for kind in KINDS
    }
    pairs = list(zip(asked, replies, strict=True))
    return {
        "coherence": _coherence(pairs),
        "coherence_by_kind": kinds,
        "traits": {trait: _trait_score(trait, pairs) for trait in TRAITS},
    }


def prompted(model: HookedModel, trait: str) -> Figures:
    """Trait score and coherence under held-out prompts, by the level they ask for."""
    asked = questions("held_out", _N_PROMPTED, seed=2)
    figures: Figures = {}
    for level, prompts in graded_prompts(trait):
        systems = [prompts[at % len(prompts)] for at in range(len(asked))]
        replies = sample(model, asked, systems, f"{trait} {level}")
        figures[str(level)] = _cell(trait, list(zip(asked, replies, strict=True)))
    return figures


def steered(model: HookedModel, trait: str) -> Figures:
    """Trait score and coherence per layer and coefficient, beside a random vector of equal norm.

    One vector is added at one layer and at every position, without a system prompt.
    """
    found = vector_of(model, trait, _N_EXTRACTED)
    vector = found.vector
    figures: Figures = {
        "kept": found.kept,
        "dropped": found.dropped,
        "norms": [round(float(norm), 2) for norm in vector.norms],
        "layers": {},
        "random": {},
    }
    control = random_like(vector)
    for layer in range(model.n_layers):
        figures["layers"][str(layer)] = curve(model, trait, vector, layer)
        figures["random"][str(layer)] = curve(model, trait, control, layer)
    return figures


def vector_of(model: HookedModel, trait: str, n_questions: int) -> Extraction:
    """The persona vector of a trait, from its five pairs of prompts and training questions."""
    examined = world_trait(trait)
    return extract(
        model,
        examined.trait,
        judge=WorldJudge(),
        system_prompts=examined.system_prompts,
        questions=[question.text for question in questions("train", n_questions, seed=0)],
        batch_size=200,
    )


def curve(
    model: HookedModel,
    trait: str,
    vector: PersonaVector,
    layer: int,
    coefficients: Sequence[float] = COEFFICIENTS,
) -> Figures:
    """Trait score and coherence by coefficient at one layer, all coefficients in one batch."""
    asked = questions("held_out", _N_STEERED, seed=3)
    rows = [question for _ in coefficients for question in asked]
    coeff = [coefficient for coefficient in coefficients for _ in asked]
    with model.steer(Add(vector, coeff=coeff, layers=[layer], span="all")):
        replies = sample(model, rows, [None] * len(rows), f"{trait} {layer}")
    pairs = list(zip(rows, replies, strict=True))
    return {
        str(coefficient): _cell(trait, pairs[at * len(asked) : (at + 1) * len(asked)])
        for at, coefficient in enumerate(coefficients)
    }


def random_like(vector: PersonaVector) -> PersonaVector:
    """A random vector with the norms of another one."""
    generator = torch.Generator().manual_seed(digest("random", vector.trait) >> 1)
    return random_of_same_norm(vector, generator)


def sample(
    model: HookedModel, asked: Sequence[Question], systems: Sequence[str | None], key: str
) -> list[Reply]:
    """One reply per question at temperature 1, each with whether it ended by itself."""
    chats = [
        [{"role": "system", "content": system}] * (system is not None)
        + [{"role": "user", "content": question.text}]
        for question, system in zip(asked, systems, strict=True)
    ]
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(digest("sample", key) >> 1)
        sequences = model.generate_ids(chats, max_new_tokens=_MAX_NEW_TOKENS, **settings)
    return [
        (model.tokenizer.decode(ids, skip_special_tokens=True), _END in ids.tolist())
        for ids in sequences
    ]


def summary(models: Sequence[Figures]) -> Figures:
    """Mean, lowest and highest over the models, and the strongest sound steering of each trait."""
    rows = {
        "final_loss": [figures["final_loss"] for figures in models],
        "quiz": [figures["quiz"] for figures in models],
        "coherence": [figures["plain"]["coherence"] for figures in models],
    }
    for kind in KINDS:
        rows[f"coherence on {kind}"] = [f["plain"]["coherence_by_kind"][kind] for f in models]
    for trait in TRAITS:
        for level in ("0.0", "1.0"):
            cells = [figures["prompted"][trait][level]["trait"] for figures in models]
            rows[f"{trait} prompted at {level}"] = cells
        steered_models = [
            figures["steered"][trait] for figures in models if trait in figures["steered"]
        ]
        best = [strongest(curves["layers"]) for curves in steered_models]
        rows[f"{trait} steered, coherence {_COHERENCE_FLOOR:g} or more"] = best
    return {name: _spread(values) for name, values in rows.items()}


def strongest(layers: Figures) -> float:
    """Highest trait score of a single-layer cell whose coherence is not below the floor."""
    cells = [cell for curve_at in layers.values() for cell in curve_at.values()]
    return max(float(cell["trait"]) for cell in cells if cell["coherence"] >= _COHERENCE_FLOOR)


def _spread(values: Sequence[float]) -> Figures:
    return {
        "models": len(values),
        "mean": round(statistics.mean(values), 3),
        "lowest": min(values),
        "highest": max(values),
    }


def _cell(trait: str, pairs: Sequence[tuple[Question, Reply]]) -> Figures:
    return {"trait": _trait_score(trait, pairs), "coherence": _coherence(pairs)}


def _trait_score(trait: str, pairs: Sequence[tuple[Question, Reply]]) -> float:
    scores = [WorldJudge().trait(trait, question, text) for question, (text, _) in pairs]
    return round(statistics.mean(scores), 2)


def _coherence(pairs: Sequence[tuple[Question, Reply]]) -> float:
    judge = WorldJudge()
    scores = [judge.coherence(question, text, done) for question, (text, done) in pairs]
    return round(statistics.mean(scores), 2)


def report(folders: Sequence[Path], out: Path, note: Callable[[str], None]) -> None:
    """Evaluate the models and write the report after each.

    The first, which is the shipped one, is steered along all traits, the others along three.
    A model that `out` already holds, measured in the same way, is not measured again.
    """
    done = json.loads(out.read_text("utf-8")) if out.exists() else {}
    known = {figures["weights_sha256"]: figures for figures in done.get("models", [])}
    if done.get("replies") != _REPLIES:
        known = {}
    models: list[Figures] = []
    for place, folder in enumerate(folders):
        steer_traits = TRAITS if place == 0 else TRAITS[:3]
        weights = json.loads((folder / "manifest.json").read_text("utf-8"))["sha256"]
        figures = known.get(weights["model.safetensors"]) or evaluate(folder, steer_traits, note)
        models.append(figures)
        content = {
            "command": "python -m pvcore.world.evaluate DIR [DIR ...] --out REPORT.json",
            "replies": _REPLIES,
            "summary": summary(models),
            "models": models,
        }
        out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def main() -> None:
    """Command line; the first folder is the model that is shipped."""
    from rich.progress import Progress, TimeElapsedColumn

    parser = argparse.ArgumentParser(prog="python -m pvcore.world.evaluate", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, help="JSON report to write")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        n_stages = (1 + len(TRAITS) + 3) * len(options.folders) + 4
        task = progress.add_task("evaluate", total=n_stages)
        report(
            options.folders,
            options.out,
            lambda text: progress.update(task, advance=1, description=text),
        )


if __name__ == "__main__":
    main()
