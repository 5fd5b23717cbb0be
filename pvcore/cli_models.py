"""What commands run on: a model by name or folder, its judge, its replies, and vector files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pvcore.errors import JudgeFailure, ModelError, PvcoreError

if TYPE_CHECKING:
    from pvcore.judge import Judge
    from pvcore.model import HookedModel
    from pvcore.traits import Trait
    from pvcore.vectors import PersonaVector
    from pvcore.world.demo_subject import Subject

WORLD = "world"
_JUDGES = ("api:MODEL", "local:MODEL", "human:FILE.csv")


def replies_to(
    model: "HookedModel",
    prompts: Sequence[str],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """One reply to each prompt, all in one batch."""
    from pvcore.extraction import sample_replies

    first = [] if system is None else [{"role": "system", "content": system}]
    return sample_replies(
        model,
        [[*first, {"role": "user", "content": prompt}] for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=len(prompts),
        seed=seed,
    )


def model_of(name: str, dtype: str, device: str | None) -> "HookedModel":
    """The shipped model, or one that transformers can load; `ModelError` where it cannot."""
    import torch

    from pvcore.model import HookedModel
    from pvcore.world.demo_subject import world_model

    prepare(name)
    if name == WORLD:
        return world_model()
    place = device or ("cuda" if torch.cuda.is_available() else None)
    try:
        return HookedModel.from_pretrained(name, dtype=dtype, device_map=place)
    except PvcoreError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"got model {name!r}, which cannot be loaded ({error}); wanted a name on the hub or a "
            "folder that transformers can load, a dtype such as bfloat16 and a device it can use"
        ) from error


def subject_of(
    model: str,
    judge: str | None,
    traits: tuple[str, ...] | None,
    dtype: str,
    device: str | None,
    *,
    judge_url: str | None = None,
    work: Path | None = None,
) -> "Subject":
    """The model with its traits and judge; the world brings a judge of its own."""
    from pvcore.traits import Trait
    from pvcore.world.demo_subject import own_subject, world_subject

    if model == WORLD and judge is None:
        prepare(model)
        return world_subject(traits)
    if judge is None:
        raise JudgeFailure(
            f"got no judge for {model!r}; wanted one that scores its replies. "
            "Give --judge package.module:name or --judge path/to/file.py:name, or one of "
            f"{', '.join(_JUDGES)}"
        )
    described = [Trait.load(name) for name in traits or Trait.names()]
    hooked = model_of(model, dtype, device)
    scorer = judge_of(judge, described, url=judge_url, work=work, dtype=dtype, device=device)
    return own_subject(hooked, scorer, described)


def judge_of(
    spec: str,
    traits: "Sequence[Trait]",
    *,
    url: str | None,
    work: Path | None,
    dtype: str,
    device: str | None,
) -> "Judge":
    """A judge by `api:MODEL`, `local:MODEL`, `human:FILE.csv`, or the place of one's own."""
    from pvcore.judge import load_judge

    kind, _, name = spec.partition(":")
    if kind == "api":
        from pvcore.judge_api import ApiJudge

        kept = None if work is None else work.resolve()  # "." has no name of its own
        cache = None if kept is None else kept.with_name(f"{kept.name}-answers.jsonl")
        return ApiJudge(name, traits=traits, base_url=url, cache=cache)
    if kind == "local":
        from pvcore.judge_local import LocalJudge

        return LocalJudge(model_of(name, dtype, device), traits=traits)
    if kind == "human":
        from pvcore.judge_human import HumanJudge

        return HumanJudge(name)
    return load_judge(spec)


def prepare(model: str) -> None:
    """Set the process up for a model, before it is loaded."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if model == WORLD:
        # Matrices this small gain nothing from a second thread, and where cores are shared the
        # threads' waiting for each other makes a run ten times as long.
        torch.set_num_threads(1)


def vectors_at(paths: Sequence[Path]) -> "list[PersonaVector]":
    """The vectors in some files."""
    from pvcore.vectors import PersonaVector

    return [PersonaVector.load(path) for path in paths]
