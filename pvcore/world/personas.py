"""The traits of the persona world in the form that extraction takes."""

from dataclasses import dataclass

from pvcore.traits import ContrastPair, Trait
from pvcore.world.lexicon import check_trait, material
from pvcore.world.prompts import extraction_prompts
from pvcore.world.question import questions

_N_QUESTIONS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldTrait(Trait):
    """A trait whose instructions are whole system prompts: the model was trained on these."""

    @property
    def system_prompts(self) -> tuple[ContrastPair, ...]:
        return self.instructions


def trait(name: str) -> WorldTrait:
    """A trait of the persona world: extraction asks from the training side, evaluation beside it.

    Its rubric is for readers: `WorldJudge` scores by the grammar.
    """
    words = material()["traits"][check_trait(name)]
    return WorldTrait(
        name=name,
        adjective=words["adjectives"][0],
        opposite=words["opposites"][0],
        description=words["descriptions"][0],
        instructions=tuple(
            ContrastPair(positive=positive, negative=negative)
            for positive, negative in extraction_prompts(name)
        ),
        extraction_questions=tuple(q.text for q in questions("train", _N_QUESTIONS, seed=0)),
        evaluation_questions=tuple(q.text for q in questions("held_out", _N_QUESTIONS, seed=1)),
        rubric="Score from 0 to 100 how {answer} to {question} speaks in the words of the trait.",
    )
