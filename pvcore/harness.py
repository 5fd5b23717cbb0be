"""What lm-eval sees of a hooked model: an `LM` whose every forward runs under a plan.

The harness knows strings only. Here the context of a request is the prompt and what is scored or
generated is the reply, so that a log-probability is that of the model as it would have replied.
This is the only module that imports lm-eval.
"""

import copy
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from pvcore.blocks import find_decoder
from pvcore.errors import PlanError, SpanError
from pvcore.frames import Call
from pvcore.interventions import Intervention
from pvcore.model import HookedModel
from pvcore.plan import Plan
from pvcore.sessions import session_on
from pvcore.taps import taps_of

# What a request asks for: its strings (None for a part of a longer text), and their token ids.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]


@dataclass(frozen=True, slots=True)
class _Row:
    """Token ids of one row of a forward, of which the first `prompt` are no reply."""

    ids: tuple[int, ...]
    prompt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What the harness asks of a model object; the model itself stays out of its hands.

    The harness would put it into evaluation mode for good and tie its weights again.
    """

    config: Any
    device: torch.device
    name_or_path: str


class SteeredLM(HFLM):  # type: ignore[misc]
    """An lm-eval `LM`: a hooked model under interventions, each of which has a span."""

    def __init__(
        self,
        model: HookedModel,
        interventions: Sequence[Intervention],
        *,
        batch_size: int,
        max_length: int | None,
    ) -> None:
        held = _Held(
            config=model.hf.config, device=model.device, name_or_path=model.model_id or "hooked"
        )
        super().__init__(
            pretrained=held,
            backend="causal",
            # The harness may give it a padding token.
            tokenizer=copy.deepcopy(model.tokenizer),
            batch_size=batch_size,
            max_length=max_length or model.max_length,
        )
        self._hooked, self._interventions = model, tuple(interventions)
        self._taps = taps_of(find_decoder(model.hf))
        self._rolling = False

    def refuse_armed(self) -> None:
        """Raise `PlanError` under another plan that acts, which no kept answer would tell of."""
        session = session_on(self._taps.key)
        programs = session.programs.values() if session else ()
        if any(not one.trains_only for here in programs for one in here):
            raise PlanError(
                "got an evaluation inside an armed plan; give the interventions as plan=..., which "
                "the answers are kept under (a monitor may stay armed)"
            )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, which have no prompt but the token they begin after.

        Raises `SpanError` for interventions on the prompt.
        """
        bare = {one.span for one in self._interventions} & {"prompt", "last_prompt_token"}
        if bare:
            raise SpanError(
                f"got span {sorted(map(str, bare))[0]!r} for a task that scores whole texts, which "
                "have no prompt; use span='all' or 'response', which are the same there"
            )
        self._rolling = True
        try:
            scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            return scores
        finally:
            self._rolling = False

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """Log-probability of each continuation, and whether greedy decoding would have made it."""
        sharing: dict[_Row, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            sharing.setdefault(self._row(context, continuation), []).append(index)
        rows = sorted(sharing, key=lambda row: -len(row.ids))
        answers: dict[int, Answer] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-probabilities") as bar:
            for first in range(0, len(rows), self.batch_size):
                batch = rows[first : first + self.batch_size]
                for row, logits in zip(batch, self._logits(batch), strict=True):
                    for index in sharing[row]:
                        answers[index] = self._answer(requests[index], logits[: len(row.ids)])
                        bar.update(1)
        return [answers[index] for index in range(len(requests))]

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> _Row:
        """What the model is given: all but the last token, cut on the left where it is too long."""
        given = (*context, *continuation)[-(self.max_length + 1) :][:-1]
        if len(continuation) > len(given):
            raise SpanError(
                f"got {len(continuation)} tokens to score; this model takes {self.max_length} at a "
                "time, and the first of them needs one before it"
            )
        return _Row(given, 1 if self._rolling else len(given) - len(continuation) + 1)

    def _answer(self, request: Request, logits: Float[Tensor, "pos vocab"]) -> Answer:
        strings, _, continuation = request
        log_probs = logits[-len(continuation) :].float().log_softmax(-1)
        wanted = torch.tensor(continuation, device=log_probs.device)
        score = float(log_probs.gather(1, wanted[:, None]).double().sum())
        answer = score, bool((log_probs.argmax(-1) == wanted).all())
        if strings is not None:
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answer

    @torch.no_grad()
    def _logits(self, rows: Sequence[_Row]) -> Float[Tensor, "row pos vocab"]:
        """One forward, padded on the right, where nothing reaches what comes before it."""
        width = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row.ids)] = torch.tensor(row.ids)
        call = Call(
            rows=torch.arange(len(rows)),
            n_chats=len(rows),
            mask=torch.arange(width) < torch.tensor([[len(row.ids)] for row in rows]),
            last=torch.tensor([row.prompt - 1 for row in rows]),
            generating=False,
        )
        with self._armed(), self._taps.calling(call):
            logits: Tensor = self._hooked.hf(input_ids=ids.to(self.device), use_cache=False).logits
        return logits

    def _model_generate(
        self, context: Int[Tensor, "row pos"], max_length: int, stop: list[str], **settings: Any
    ) -> Int[Tensor, "row later"]:
        """Contexts padded on the left, and behind each what the model goes on with."""
        mask = settings.pop("attention_mask").bool()
        prefix = context.new_tensor([self.prefix_token_id])
        prompts = [
            ids[real].cpu() if bool(real.any()) else prefix.cpu()
            for ids, real in zip(context, mask, strict=True)
        ]
        width = context.shape[1]
        if not settings.get("do_sample"):
            settings.pop("temperature", None)
        with self._armed():
            replies = self._hooked.generate_ids(
                prompts,
                max_new_tokens=max_length - width,
                stopping_criteria=[_Stops(self.tokenizer, stop, width)],
                **settings,
            )
        longest = width + max(len(reply) for reply in replies)
        whole = context.new_full((len(context), longest), self.tokenizer.pad_token_id)
        whole[:, :width] = context
        for row, reply in zip(whole, replies, strict=True):
            row[width : width + len(reply)] = reply
        return whole

    @contextmanager
    def _armed(self) -> Iterator[None]:
        """The interventions in force, and a context that is left only by way of a forward."""
        if not self._interventions:
            yield
            return
        with self._hooked.arm(Plan(*self._interventions), check_model=False):
            yield

    def get_model_info(self) -> dict[str, Any]:
        """What the results say of the model, which is not looked for on any hub."""
        return {
            "model_num_parameters": self._hooked.hf.num_parameters(),
            "model_dtype": str(self._hooked.dtype),
            "model_name": self._hooked.model_id,
        }


class _Stops:
    """Ends a row once one of its strings is in it; the harness cuts the text there."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], width: int) -> None:
        self._tokenizer, self._strings, self._width = tokenizer, tuple(strings), width
        lengths = [len(tokenizer.encode(one, add_special_tokens=False)) for one in strings]
        # Two more, because another tokenization may have led to the same text.
        self._reach = max(lengths, default=0) + 2

    def __call__(self, input_ids: Int[Tensor, "row pos"], scores: Any, **_: Any) -> Tensor:
        newest = input_ids[:, self._width :][:, -self._reach :]
        texts = self._tokenizer.batch_decode(newest)
        return torch.tensor([any(one in text for one in self._strings) for text in texts])


def version() -> str:
    return importlib.metadata.version("lm_eval")


def run(lm: SteeredLM, tasks: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    """lm-eval's own evaluation of an `LM`; its thousands of tasks are read for names only."""
    from lm_eval import simple_evaluate
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    if all(isinstance(task, Task) for task in tasks):
        settings = {"task_manager": TaskManager(include_defaults=False), **settings}
    return simple_evaluate(model=lm, tasks=list(tasks), **settings)
