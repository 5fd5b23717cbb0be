"""Guards: monitors that sound alarms while a reply is made, and act on what comes next in it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pvcore.alarms import Alarm, AlarmBell, Alarms, Bounds
from pvcore.dials import Dial
from pvcore.errors import PlanError
from pvcore.frames import Call, Outcome
from pvcore.hearing import Hearing
from pvcore.interventions import Ablate, Add, Cap, Intervention
from pvcore.monitor import Seen, SeenSummary
from pvcore.plan import Plan
from pvcore.resident_alarms import Bells
from pvcore.vectors import VectorBank

Standby = Sequence[Intervention] | Mapping[Intervention, int | float]


class Controls:
    """What may be done, from its next token on, to the reply that set off an alarm."""

    def __init__(self, guard: "Guard", call: Call, chat: int, step: int) -> None:
        self._guard, self._call, self.chat, self._step = guard, call, chat, step

    def stop(self) -> None:
        """End the reply after the token just made."""
        self._guard.stop(self._call, self.chat)

    def set(self, intervention: Intervention, level: int | float = 1.0) -> None:
        """Let an intervention on standby act on this reply: 0 rests, 1 acts as written.

        `level` multiplies the coefficients of an `Add`; `Ablate` and `Cap` know 0 and 1 only.
        `PlanError` for an intervention that is not on standby.
        """
        dial = self._guard.dial_of(intervention, level)
        dial.turn(self._call, self.chat, float(level), self._call.mask.shape[1] + self._step)


Reaction = Callable[[Alarm, Controls], None] | Literal["stop"] | Intervention


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """When to sound, what to do then, and the interventions that wait for it with their levels."""

    alarms: Alarms
    react: Callable[[Alarm, Controls], None] | None
    standby: tuple[tuple[Intervention, float], ...]

    @classmethod
    def of(
        cls,
        bank: VectorBank | None,
        alarms: Alarms | None,
        on_alarm: Reaction | str | None,
        standby: Standby,
    ) -> "Rules":
        """Checked rules; `PlanError` for what could never come into force."""
        if bank is not None:
            Plan(monitor=bank)  # refuses what is no bank
        waiting = dict(standby) if isinstance(standby, Mapping) else dict.fromkeys(standby, 0.0)
        react: Callable[[Alarm, Controls], None] | None
        if on_alarm == "stop":
            react = _stop
        elif isinstance(on_alarm, Add | Ablate | Cap):
            waiting.setdefault(on_alarm, 0.0)
            react = _sets(on_alarm)
        elif on_alarm is None or callable(on_alarm):
            react = on_alarm
        else:
            raise PlanError(
                f"got on_alarm={on_alarm!r}; wanted 'stop', an intervention to arm, or a function "
                "of the alarm and the controls of its reply"
            )
        if (react is not None or waiting) and not alarms:
            raise PlanError("got on_alarm or standby and no alarms; give alarms={trait: threshold}")
        AlarmBell(alarms or {}, bank.traits if bank else (), bank.sites if bank else ())
        for one, level in waiting.items():
            check_level(one, level)
        for one in waiting:
            check_span(one)
        return cls(alarms=dict(alarms or {}), react=react, standby=tuple(waiting.items()))

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        return tuple(one for one, _ in self.standby)


def check_level(intervention: object, level: float) -> None:
    """`PlanError` unless an intervention can act at a level."""
    if not isinstance(intervention, Add | Ablate | Cap):
        raise PlanError(f"got {type(intervention).__name__} on standby; wanted Add, Ablate or Cap")
    if not math.isfinite(level) or (not isinstance(intervention, Add) and level not in (0, 1)):
        wanted = "a finite number" if isinstance(intervention, Add) else "0 or 1"
        raise PlanError(f"got level {level} for {type(intervention).__name__}; wanted {wanted}")


def check_span(intervention: Intervention) -> None:
    """`PlanError` for a span that is over before any alarm: a reply is what an alarm can change."""
    if intervention.span not in (None, "all", "response"):
        raise PlanError(
            f"got {type(intervention).__name__} with span {intervention.span!r} on standby, which "
            "no alarm of a reply can reach; wanted 'response' or 'all'"
        )


def _stop(alarm: Alarm, controls: Controls) -> None:
    controls.stop()


def _sets(intervention: Intervention) -> Callable[[Alarm, Controls], None]:
    return lambda alarm, controls: controls.set(intervention)


class Guard(Seen):
    """What a monitor with alarms saw: also `alarms`, in the order they rang."""

    def __init__(self, bank: VectorBank | None, rules: Rules) -> None:
        super().__init__(bank)
        self._rules = rules
        self.dials = tuple(Dial(float(level)) for _, level in rules.standby)
        self._hearings: dict[Call, Hearing] = {}
        self._stopped: dict[Call, Bool[Tensor, " batch"]] = {}
        self._rung: dict[Call, list[Alarm]] = {}
        self._sizes: dict[Call, int] = {}

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """All alarms so far; `chat` counts along the chat axis of the projections."""
        rung, before = [], 0
        for call in self._records:
            rung += [replace(one, chat=one.chat + before) for one in self._rung.get(call, ())]
            before += self._sizes.get(call, len(call.rows))
        return tuple(rung)

    @property
    def acts(self) -> bool:
        """Whether each token has to wait for its alarms."""
        return self._rules.react is not None

    @property
    def sounds(self) -> bool:
        """Whether there are alarms to sound."""
        return bool(self._rules.alarms)

    def watch(self, call: Call, lengths: Int[Tensor, " batch"]) -> tuple[Alarm, ...]:
        """Sound the alarms of the step just made and carry out what they lead to.

        `lengths` counts the tokens of each row; a row that has fewer than the longest has ended.
        """
        count = int(lengths.max())
        over = lengths < count
        hearing = self._hearing(call)
        hearing.asked = True
        if hearing.on_device:
            alarms = hearing.ask(count - 1, over)
        else:
            scores = self.newest(call).masked_fill(over[:, None], torch.nan)
            alarms = hearing.judge(count - 1, scores)
        self._rung.setdefault(call, []).extend(alarms)
        if self._rules.react is not None:
            for alarm in alarms:
                self._rules.react(alarm, Controls(self, call, alarm.chat, alarm.step))
        return alarms

    def close(self, call: Call, outcome: Outcome | None) -> None:
        super().close(call, outcome)
        hearing = self._hearings.pop(call, None)
        self._stopped.pop(call, None)
        if outcome is None or not self._rules.alarms:
            return
        self._sizes[call] = len(outcome.rows)
        hearing = hearing or Hearing(self._bell())
        if not hearing.asked:
            # A generation that did not have to wait for its alarms.
            steps = self._tables(self._records[call])[0].permute(1, 2, 3, 0)
            self._rung[call] = [*hearing.look_back(steps, outcome.lengths)]

    def bounds(self) -> Bounds:
        return self._bell().bounds()

    def hand_over(self, call: Call, bells: Bells) -> bool:
        hearing = self._hearing(call)
        if not hearing.asked:
            hearing.begin(self.newest(call))
        hearing.hand_over(bells)
        return not hearing.asked

    def receive_rung(self, call: Call, steps: Bool[Tensor, "step site batch n_vec"]) -> None:
        self._hearings[call].receive(steps)

    def _hearing(self, call: Call) -> Hearing:
        if call not in self._hearings:
            self._hearings[call] = Hearing(self._bell())
        return self._hearings[call]

    def _bell(self) -> AlarmBell:
        return AlarmBell(self._rules.alarms, self.traits, self.sites)

    def stop(self, call: Call, row: int) -> None:
        """End a row after the token just made."""
        self.stopped(call)[row] = True

    def stopped(self, call: Call) -> Bool[Tensor, " batch"]:
        """The rows of a call that were ended here."""
        if call not in self._stopped:
            self._stopped[call] = torch.zeros(len(call.rows), dtype=torch.bool)
        return self._stopped[call]

    def dial_of(self, intervention: Intervention, level: float) -> Dial:
        """The dial of an intervention that waits here; `PlanError` if it does not, or cannot."""
        waiting = self._rules.interventions
        if intervention not in waiting:
            raise PlanError(
                f"got {type(intervention).__name__} to set, which is not on standby; give it "
                "standby=[...] when the generation begins, so that nothing compiles anew"
            )
        check_level(intervention, level)
        return self.dials[waiting.index(intervention)]


class GuardSummary(Guard, SeenSummary):
    """A guard that keeps summaries in place of all scores."""
