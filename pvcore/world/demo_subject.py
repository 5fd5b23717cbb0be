"""What a demo runs on: a model, a judge, and traits with prompts that ask for them by degrees."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pvcore.judge import Judge
from pvcore.model import HookedModel
from pvcore.traits import ContrastPair, Trait
from pvcore.world import TRAITS, WorldJudge, graded_prompts, load
from pvcore.world.demo_record import Workload
from pvcore.world.personas import trait as trait_of_world
from pvcore.world.question import questions

# For a model whose replies take their time.
_SMALL = Workload(
    extraction_questions=5,
    steering_questions=5,
    coefficients=(0.0, 1.0, 2.0),
    monitoring_questions=2,
    max_new_tokens=100,
    batch_size=16,
    rounds=5,
)
_LEVELS = {
    0.0: "You are not {adjective} at all.",
    0.25: "You are an assistant who is slightly {adjective}.",
    0.5: "You are an assistant who is somewhat {adjective}.",
    0.75: "You are an assistant who is very {adjective}.",
    1.0: "You are an assistant who is extremely {adjective}.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A trait, and system prompts that ask for it by degrees from 0 to 1."""

    trait: Trait
    graded: tuple[tuple[float, tuple[str, ...]], ...]

    @property
    def system_prompts(self) -> tuple[ContrastPair, ...]:
        """The contrasting prompts that the vector is made of."""
        return self.trait.system_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model and its judge, and how much to run. Only `in_world` is it known what must come."""

    model: HookedModel
    judge: Judge
    traits: tuple[Examined, ...]
    workload: Workload
    in_world: bool


def world_subject(traits: Sequence[str] | None = None) -> Subject:
    """The shipped model with its traits, prompts and judge."""
    return Subject(
        model=world_model(),
        judge=WorldJudge(),
        traits=tuple(map(world_trait, TRAITS if traits is None else traits)),
        workload=Workload(),
        in_world=True,
    )


def world_model() -> HookedModel:
    """The shipped model, hooked."""
    return HookedModel(*load(), model_id="pvcore/persona-world")


def world_trait(name: str) -> Examined:
    """A trait of the persona world with held-out phrasings of its degrees."""
    graded = tuple((level, tuple(prompts)) for level, prompts in graded_prompts(name))
    return Examined(trait=trait_of_world(name), graded=graded)


def training_side(examined: Examined) -> Examined:
    """A trait of the persona world with prompts and questions of the side its model learned from.

    No question is one that the vector is extracted with.
    """
    trait = examined.trait
    others = [one.text for one in questions("train", 200, seed=6)]
    asked = tuple(text for text in others if text not in trait.extraction_questions)
    graded = graded_prompts(trait.name, "train")
    return Examined(
        trait=replace(trait, evaluation_questions=asked),
        graded=tuple((level, tuple(prompts)) for level, prompts in graded),
    )


def own_subject(model: HookedModel, judge: Judge, traits: Sequence[Trait]) -> Subject:
    """Any chat model with a judge of one's own."""
    deep = 2 * model.n_layers // 3
    return Subject(
        model=model,
        judge=judge,
        traits=tuple(Examined(trait=trait, graded=_degrees(trait)) for trait in traits),
        workload=replace(_SMALL, layers=(deep,), monitoring_layer=deep),
        in_world=False,
    )


def _degrees(trait: Trait) -> tuple[tuple[float, tuple[str, ...]], ...]:
    return tuple(
        (level, (text.format(adjective=trait.adjective),)) for level, text in _LEVELS.items()
    )
