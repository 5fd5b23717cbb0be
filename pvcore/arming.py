"""Arming: what can be put up around the forwards of a model, for a block or for longer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, TypeVar, overload

from pvcore.alarms import Alarms
from pvcore.blocks import Decoder
from pvcore.errors import PlanError
from pvcore.guards import Guard, GuardSummary, Reaction, Rules, Standby
from pvcore.interventions import Intervention
from pvcore.monitor import Seen, SeenSummary
from pvcore.plan import Plan
from pvcore.programs import SiteProgram, compile_programs
from pvcore.sessions import Reader, Session
from pvcore.sites import Site
from pvcore.summaries import Keep, check_keep
from pvcore.taps import Taps
from pvcore.trace import Tracing
from pvcore.vectors import VectorBank

Shown = TypeVar("Shown", bound=Seen)


class Arming:
    """The part of a `HookedModel` that arms plans on it."""

    model_id: str
    _decoder: Decoder
    _taps: Taps
    _tracing: Tracing

    @overload
    def arm(
        self, plan: Plan, *, keep: Literal["all"] = "all", check_model: bool = True
    ) -> AbstractContextManager[Seen]: ...

    @overload
    def arm(
        self, plan: Plan, *, keep: Literal["summary"], check_model: bool = True
    ) -> AbstractContextManager[SeenSummary]: ...

    def arm(
        self, plan: Plan, *, keep: Keep | str = "all", check_model: bool = True
    ) -> AbstractContextManager[Any]:
        """Run a plan in every forward inside the `with` block, in this thread only.

        Plans nest: an inner one acts after the outer one. Raises one typed error before anything
        is armed if the plan does not fit, and `HookError` on leaving if no forward ran. `keep` is
        that of `monitor`, for what the plan watches.
        """
        if not isinstance(plan, Plan):
            raise PlanError(f"got {type(plan).__name__}; wanted a Plan, as in pv.Plan(pv.Add(...))")
        self._tracing.refuse_inside("a plan to arm")
        kind = SeenSummary if check_keep(keep) == "summary" else Seen
        if kind is SeenSummary and plan.monitor is None:
            raise PlanError('got keep="summary" and a plan that watches nothing: give it monitor=')
        plan.check(self._decoder, self.model_id, check_model=check_model)
        return self._armed(plan, kind(plan.monitor))

    @contextmanager
    def _armed(self, plan: Plan, seen: Shown) -> Iterator[Shown]:
        dials = seen.dials if isinstance(seen, Guard) else ()
        with self._taps.armed(
            compile_programs(plan.interventions, dials),
            readers=[seen] if plan.monitor else [],
            row_counts=plan.row_counts,
        ):
            yield seen

    def arm_programs(
        self, plan: Plan, programs: Mapping[Site, SiteProgram], *, check_model: bool = True
    ) -> AbstractContextManager[Session]:
        """Arm a plan whose steps are carried out by programs of the caller's own."""
        self._tracing.refuse_inside("a plan to arm")
        self.check(plan, check_model=check_model)
        return self._taps.armed(programs, row_counts=plan.row_counts)

    def hold_programs(
        self,
        plan: Plan,
        programs: Mapping[Site, SiteProgram],
        *,
        lapsed: Callable[[], bool],
        check_model: bool = True,
    ) -> Callable[[], None]:
        """Like `arm_programs` without a block: until `lapsed` is true or the result is called.

        For programs that act with gradients on.
        """
        self._tracing.refuse_inside("a plan to arm")
        self.check(plan, check_model=check_model)
        return self._taps.hold(programs, row_counts=plan.row_counts, lapsed=lapsed)

    def hold_reader(
        self, plan: Plan, reader: Reader, *, lapsed: Callable[[], bool], check_model: bool = True
    ) -> Callable[[], None]:
        """Like `hold_programs`, for a reader of one's own at the sites of the plan's monitor."""
        self._tracing.refuse_inside("a plan to arm")
        self.check(plan, check_model=check_model)
        return self._taps.hold({}, readers=[reader], lapsed=lapsed)

    def check(self, plan: Plan, *, check_model: bool = True) -> None:
        """Raise one `PlanError` or `SiteError` if a plan does not fit this model."""
        plan.check(self._decoder, self.model_id, check_model=check_model)

    def steer(
        self, *interventions: Intervention, check_model: bool = True
    ) -> AbstractContextManager[Seen]:
        """Short for `arm(Plan(*interventions))`."""
        return self.arm(Plan(*interventions), check_model=check_model)

    @overload
    def monitor(
        self,
        bank: VectorBank,
        *,
        keep: Literal["all"] = "all",
        alarms: Alarms | None = None,
        on_alarm: Reaction | str | None = None,
        standby: Standby = (),
        check_model: bool = True,
    ) -> AbstractContextManager[Guard]: ...

    @overload
    def monitor(
        self,
        bank: VectorBank,
        *,
        keep: Literal["summary"],
        alarms: Alarms | None = None,
        on_alarm: Reaction | str | None = None,
        standby: Standby = (),
        check_model: bool = True,
    ) -> AbstractContextManager[GuardSummary]: ...

    def monitor(
        self,
        bank: VectorBank,
        *,
        keep: Keep | str = "all",
        alarms: Alarms | None = None,
        on_alarm: Reaction | str | None = None,
        standby: Standby = (),
        check_model: bool = True,
    ) -> AbstractContextManager[Any]:
        """Short for `arm(Plan(monitor=bank))`, with alarms.

        `keep="summary"` keeps no projection of any token, however long replies get: `seen["evil"]`
        is a `TraitSummary`, with each chat's projection at the last prompt token, and mean,
        highest and lowest over its reply. `PlanError` for beams, whose steps are sorted out only
        at the end.

        `alarms` maps a trait of the bank to a number or a `Threshold`, or to one for each layer
        that is to ring; each crossing from below rings once, per reply. `on_alarm` decides what
        happens from the next token on: `"stop"` ends the reply, an intervention acts on it from
        then on, a function is given the `Alarm` and the `Controls` of the reply. Interventions it
        may set are named in `standby`, with the level they begin at if that is not 0. With
        `on_alarm` every token waits for its projections, in compiled generation for whether one of
        them rang; and so it does for `alarms` of which summaries are kept.
        """
        kind = GuardSummary if check_keep(keep) == "summary" else Guard
        rules = Rules.of(bank, alarms, on_alarm, standby)
        self._tracing.refuse_inside("a plan to arm")
        plan = Plan(*rules.interventions, monitor=bank)
        self.check(plan, check_model=check_model)
        return self._armed(plan, kind(bank, rules))
