"""Hearing: the alarms of one call, judged here from its scores or by its compiled decode steps."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pvcore.alarms import Alarm, AlarmBell
from pvcore.resident_alarms import Bells


class Hearing:
    """Follows one call from its prompt on, either step by step or by looking back at its end.

    Step 0 is the prompt's and is always judged here; where decode steps judge for themselves, they
    go on from what it left.
    """

    def __init__(self, bell: AlarmBell) -> None:
        self._bell = bell
        self._bells: Bells | None = None
        self._first: tuple[Alarm, ...] = ()
        self._rung: list[Bool[Tensor, "step site batch n_vec"]] = []
        self.asked = False

    @property
    def on_device(self) -> bool:
        """Whether decode steps judge."""
        return self._bells is not None

    def judge(self, step: int, scores: Float[Tensor, "site batch n_vec"]) -> tuple[Alarm, ...]:
        """The alarms of a step by its scores; NaN changes nothing."""
        by_trait = {trait: scores[..., k] for k, trait in enumerate(self._bell.traits)}
        return self._bell.ring(step, by_trait)

    def begin(self, prompt: Float[Tensor, "site batch n_vec"]) -> None:
        """Judge step 0 of a call in which nobody asks, and keep what it says until the end."""
        self._first = self.judge(0, prompt)

    def hand_over(self, bells: Bells) -> None:
        """Let decode steps judge from here on."""
        self._bells = bells
        bells.begin(self._bell.rung(len(bells.rows)))

    def ask(self, step: int, over: Bool[Tensor, " batch"]) -> tuple[Alarm, ...]:
        """The alarms of the step just made, of rows that are not over.

        Unless something rang, one truth for each row is all that the device hands over.
        """
        assert self._bells is not None
        (rows,) = (self._bells.rows_rung() & ~over).nonzero(as_tuple=True)
        if not len(rows):
            return ()
        rung = self._bells.fetch(step - 1, rows)
        shape = (rung.scores.shape[0], len(over), rung.scores.shape[2])
        ringing = torch.zeros(shape, dtype=torch.bool, device="cpu").index_copy(
            1, rows, rung.ringing
        )
        scores = rung.scores.new_zeros(shape).index_copy(1, rows, rung.scores)
        return self._bell.told(step, ringing, scores)

    def receive(self, steps: Bool[Tensor, "step site batch n_vec"]) -> None:
        """What rang in the next decode steps."""
        self._rung.append(steps)

    def look_back(
        self, steps: Float[Tensor, "step site chat n_vec"], lengths: Int[Tensor, " chat"]
    ) -> Iterator[Alarm]:
        """The alarms of a call that nobody waited for; `steps` are NaN after a chat's end."""
        if self._bells is None:
            for step, scores in enumerate(steps):
                yield from self.judge(step, scores)
            return
        yield from self._first
        first = 1
        for rung in self._rung:
            made = torch.arange(first, first + len(rung), device="cpu")
            told = rung & (made[:, None] < lengths)[:, None, :, None]
            for place in told.flatten(1).any(1).nonzero()[:, 0].tolist():
                yield from self._bell.told(first + place, told[place], steps[first + place])
            first += len(rung)
