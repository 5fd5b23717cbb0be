"""What a scan is asked for, checked before anything runs, and the identity it resumes by."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from pvcore.errors import FlagError
from pvcore.fingerprints import of_generation, of_tokenizing, of_weights
from pvcore.flag_dates import pinned, written
from pvcore.flag_plans import armed_on
from pvcore.flag_probe import probe
from pvcore.flag_rows import Form
from pvcore.flag_sources import Source, resolve
from pvcore.flag_tokens import Reading
from pvcore.model import HookedModel
from pvcore.numerals import Number
from pvcore.plan import Plan
from pvcore.vectors import VectorBank

Difference = Literal["approximate", "exact", "subset"]
DIFFERENCES: tuple[Difference, ...] = get_args(Difference)
# More tokens than this gain a CPU nothing, and cost it its cache; a GPU wants to be filled.
CPU_TOKENS, GPU_TOKENS = 1024, 32768
# The same in training: a model whose embeddings were resized has new ones, in training mode.
STEADY = (nn.Embedding, nn.Linear)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a scan runs. Only `max_tokens` and `reply_batch` may differ when it is resumed."""

    difference: Difference | str = "approximate"
    share: Number = 0.05
    seed: int = 0
    max_new_tokens: int = 256
    reply_batch: int = 32
    form: Form = field(default_factory=Form)
    shard_rows: int = 2048
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.difference not in DIFFERENCES:
            raise FlagError(
                f"got difference {self.difference!r}; wanted one of {', '.join(DIFFERENCES)}"
            )
        if not isinstance(self.share, Real) or not 0 < self.share <= 1:
            raise FlagError(f"got share {self.share!r}; wanted a share of the rows, above 0 to 1")
        for name in ("max_new_tokens", "reply_batch", "shard_rows", "max_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or value < 1):
                raise FlagError(f"got {name} {value!r}; wanted a whole number, at least 1")
            # NumPy's numbers are no JSON, which the manifest is.
            object.__setattr__(self, name, None if value is None else int(value))
        if not isinstance(self.seed, Integral):
            raise FlagError(f"got seed {self.seed!r}; wanted a whole number")
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "share", float(self.share))

    def tokens_on(self, model: HookedModel) -> int:
        """The budget of one batch."""
        if self.max_tokens is not None:
            return self.max_tokens
        return CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS


def reading_of(model: HookedModel, form: Form, moment: str | None = None) -> Reading:
    """How rows are read for a model; at `moment`, where the chat template prints a date."""
    if model.tokenizer is None:
        raise FlagError("got a model without a tokenizer; wanted one to read conversations with")
    if model.tokenizer.chat_template is None:
        raise FlagError(
            "got a tokenizer without a chat template; wanted one to write conversations with. Set "
            "tokenizer.chat_template"
        )
    config = model.hf.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return Reading(
        form=form,
        tokenizer=pinned(model.tokenizer, moment),
        max_length=getattr(text, "max_position_embeddings", None),
        vocabulary=len(model.hf.get_input_embeddings().weight),
    )


def check_subject(model: HookedModel, bank: VectorBank, check_model: bool) -> None:
    """Raise one typed error where the model cannot score on the bank, or not twice alike."""
    if not isinstance(model, HookedModel):
        raise FlagError(
            f"got {type(model).__name__} as model; wanted a HookedModel: "
            "pv.HookedModel(model, tokenizer, model_id=...)"
        )
    if not isinstance(bank, VectorBank):
        raise FlagError(f"got {type(bank).__name__} as bank; wanted a VectorBank")
    model.check(Plan(monitor=bank), check_model=check_model)
    armed_on(model)
    if any(one.training and type(one) not in STEADY for one in model.hf.modules()):
        raise FlagError(
            "got a model in training mode, in whole or in part, whose dropout makes scores random; "
            "call model.hf.eval()"
        )


def replies_source(replies: str | PathLike[str] | None, settings: Settings) -> Source | None:
    """The file of own replies, if one is given; `FlagError` for several, or where none is asked."""
    if replies is None:
        return None
    if settings.difference == "approximate":
        raise FlagError(
            "got replies for an approximate difference, which needs none; ask for "
            "difference='exact' or 'subset'"
        )
    found = resolve([replies])
    if len(found) != 1:
        raise FlagError(
            f"got {len(found)} files as replies, {found[0].name} and others; wanted one file"
        )
    return found[0]


def asked_of(
    model: HookedModel,
    bank: VectorBank,
    sources: Sequence[Source],
    settings: Settings,
    replies: Source | None,
    moment: str | None = None,
) -> dict[str, Any]:
    """Everything that decides about a score, as JSON holds it."""
    form, plan = settings.form, armed_on(model)
    return {
        "sources": {source.name: source.fingerprint() for source in sources},
        "order": [source.name for source in sources],
        "form": {"prompt": form.prompt, "answer": form.answer, "turn": form.turn},
        "bank": {
            "vectors": {one.trait: one.at(bank.sites).content_hash for one in bank},
            # By site too: a column is the same whatever else was scanned beside it.
            "by_site": {
                one.trait: {str(site): one.at([site]).content_hash for site in bank.sites}
                for one in bank
            },
            "order": list(bank.traits),
            "sites": [str(site) for site in bank.sites],
        },
        "model": {
            "id": Path(model.model_id).name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": model.n_layers,
            "d_model": model.d_model,
            # The weights say what no probe reaches, and the probe what else may act.
            "weights": of_weights(model.hf),
            "probe": probe(model, bank),
        },
        "tokenizer": of_tokenizing(model.tokenizer),
        "written": written(pinned(model.tokenizer, moment)),
        **({} if moment is None else {"moment": moment}),
        **({} if plan is None else {"plan": plan}),
        "difference": _difference_of(model, settings, replies),
        "shard_rows": settings.shard_rows,
    }


def _difference_of(
    model: HookedModel, settings: Settings, replies: Source | None
) -> dict[str, Any]:
    difference: dict[str, Any] = {"kind": settings.difference}
    if settings.difference == "subset":
        difference |= {"share": settings.share, "seed": settings.seed}
    if settings.difference != "approximate" and replies is None:
        generation = of_generation(model.hf)
        difference |= {"max_new_tokens": settings.max_new_tokens, "generation": generation}
    if replies is not None:
        difference |= {"replies": replies.fingerprint()}
    return difference
