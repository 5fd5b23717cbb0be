"""The persona world: a tiny real chat model, trained from scratch, with seven judged traits.

A test bed for the machinery. Judge and corpus share one grammar, so its figures say nothing about
large models.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pvcore.world import chats as chats
from pvcore.world import judge as judge
from pvcore.world import quiz as quiz
from pvcore.world.judge import WorldJudge as WorldJudge
from pvcore.world.lexicon import TRAITS as TRAITS
from pvcore.world.prompts import extraction_prompts as extraction_prompts
from pvcore.world.prompts import graded_prompts as graded_prompts
from pvcore.world.question import Question as Question
from pvcore.world.question import questions as questions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def path() -> Path:
    """Folder of the shipped model: what `from_pretrained` takes."""
    return Path(__file__).parent / "model"


def load(
    *, dtype: torch.dtype = torch.float32
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """The shipped model and tokenizer; ModelError when a file differs from the manifest."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pvcore.world.manifest import check_files

    check_files(path())
    model = AutoModelForCausalLM.from_pretrained(path(), dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(path())
