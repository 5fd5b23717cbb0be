"""Programs: interventions at one site, made ready to run on the rows of a frame."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

import pvcore_kernels as kernels
from pvcore.amounts import Amount
from pvcore.conditions import Below, Condition
from pvcore.dials import Dial
from pvcore.errors import PlanError
from pvcore.frames import Frame
from pvcore.gauges import gauges_at, place_of
from pvcore.interventions import Ablate, Add, Intervention, sites_of
from pvcore.sites import Site
from pvcore_kernels.landing import landing, lands
from pvcore_kernels.reference import accumulator

# Beyond this, landing each projection where it was sent would take coefficients so large that
# float32 loses half its digits.
MAX_CONDITION = 1e4

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """A program that only adds: one row for each row of the batch, or one for all.

    `touched` marks the tokens it may change; None means every one.
    """

    total: Float[Tensor, "#batch #pos d_model"]
    touched: Tensor | None


class Link:
    """Tells what one plan's conditions read at earlier sites from what another's do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FarGate:
    """A gate on projections read at an earlier site; `gate.index` is their column there."""

    site: Site
    gate: kernels.Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """A program that reads the projections: its unit rows, their Gram matrix and its steps.

    `far` holds the gates of each step that look at earlier sites, and `dials` what it is multiplied
    by. `gauge` holds the unit rows that later sites ask about, and `link` says whose readings
    those are.
    """

    units: Float[Tensor, "n_vec d_model"]
    gram: Float[Tensor, "n_vec n_vec"]
    steps: tuple[kernels.Step, ...]
    touched: Tensor | None
    far: tuple[tuple[FarGate, ...], ...] = ()
    dials: tuple[Dial | None, ...] = ()
    gauge: Float[Tensor, "n_asked d_model"] | None = None
    link: Link | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Coupled:
    """One intervention at the program's site: which of its vectors, and how they are coupled.

    `asks` gives its conditions, each with the place of its vector: among this program's, or among
    the gauges of the site it is read at.
    """

    what: Intervention
    index: tuple[int, ...]
    gram_inverse: Float[Tensor, "n_step n_step"] | None
    asks: tuple[tuple[Condition, int], ...] = ()
    dial: Dial | None = None


class SiteProgram:
    """All steps of one plan at one site, in declared order.

    Tensors are kept in float64 on the CPU and copied once to each device and dtype they meet.
    `trains_only` says that forwards without gradients are left as they are.
    """

    trains_only = False

    def __init__(
        self,
        site: Site,
        interventions: Sequence[Intervention],
        link: Link | None = None,
        dials: Sequence[Dial | None] | None = None,
    ) -> None:
        self.site, self.interventions, self._link = site, tuple(interventions), link
        dials = dials or [None] * len(interventions)
        here = [pair for pair in zip(interventions, dials, strict=True) if site in pair[0].sites]
        directions: list[Tensor] = []
        steps = [replace(self._couple(one, directions), dial=dial) for one, dial in here]
        self._steps = tuple(
            replace(one, asks=self._asks(one.what, interventions, directions)) for one in steps
        )
        gauges = gauges_at(interventions, site)
        self._asked = [place_of(gauge.direction, directions) for gauge in gauges]
        self._asking = {span for gauge in gauges for span in gauge.spans}
        self._raw = torch.stack(directions).double()
        self._norms = self._raw.norm(dim=1)
        self._only_adds = not gauges and all(
            isinstance(one, Add) and not one.when and dial is None for one, dial in here
        )
        self._placed: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def _couple(self, one: Intervention, directions: list[Tensor]) -> _Coupled:
        """Register the intervention's vectors, each direction once, and invert their Gram."""
        traits: dict[int, str] = {}
        index: list[int] = []
        for vector in one.vectors:
            index.append(place_of(vector.direction(self.site), directions))
            traits.setdefault(index[-1], vector.trait)
        if isinstance(one, Add):
            # Equal directions under two names are added twice; joint steps need distinct ones.
            return _Coupled(what=one, index=tuple(index), gram_inverse=None)
        rows = torch.stack([directions[k] for k in traits]).double()
        inverse, condition = kernels.joint_inverse(rows / rows.norm(dim=1, keepdim=True))
        if condition > MAX_CONDITION:
            raise PlanError(
                f"got a joint {type(one).__name__} at {self.site} over nearly dependent vectors "
                f"({', '.join(traits.values())}; condition {condition:.1e}, at most "
                f"{MAX_CONDITION:.0e}): leave one out, or use one step for each"
            )
        return _Coupled(what=one, index=tuple(traits), gram_inverse=inverse)

    def _asks(
        self, one: Intervention, plan: Sequence[Intervention], directions: list[Tensor]
    ) -> tuple[tuple[Condition, int], ...]:
        """The conditions with the places of their vectors, registered here where they are read."""
        asks = []
        for condition in one.when:
            at = condition.read_at(self.site)
            known = directions if at == self.site else [g.direction for g in gauges_at(plan, at)]
            asks.append((condition, place_of(condition.vector.direction(at), known)))
        return tuple(asks)

    def on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        key = (device, dtype)
        if key not in self._placed:
            units = self._raw / self._norms[:, None]
            tensors = {"raw": self._raw, "units": units, "gram": units @ units.mT}
            tensors["norms"] = self._norms
            self._placed[key] = {name: t.to(device, dtype) for name, t in tensors.items()}
        return self._placed[key]

    def apply(
        self, h: Float[Tensor, "batch pos d_model"], frame: Frame
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual after this program; rows of padding and outside the spans untouched."""
        if not frame.steady:
            move = self._resolve(h, frame)
        else:
            cache = frame.call.steady
            if self not in cache:
                cache[self] = self._resolve(h, frame)
            move = cache[self]
        return h if move is None else move(h)

    def settled(self, frame: Frame) -> Move | None:
        """What `apply` does in the decode steps after `frame`, one of them, which it acted in."""
        if self not in frame.call.steady:
            return lambda h: self.apply(h, frame)
        move: Move | None = frame.call.steady[self]
        return move

    def look(self, h: Float[Tensor, "batch pos d_model"], frame: Frame) -> None:
        """Read anew what later sites ask about: programs armed inside have acted since `apply`."""

    def _resolve(self, h: Tensor, frame: Frame) -> Move | None:
        found = self.resolve(h.device, h.dtype, frame)
        if found is None:
            return None
        touched = found.touched
        if isinstance(found, Shift):
            total = found.total
            return lambda h: kernels.add(h, total, touched)
        units, gram, steps = found.units, found.gram, found.steps
        if lands(steps, len(units), h.device, h.dtype) and not h.requires_grad:
            return landing(units, steps[0], frame.batch, frame.width, touched)
        return lambda h: kernels.intervene(h, units, gram, steps, touched)

    def resolve(
        self, device: torch.device, dtype: torch.dtype, frame: Frame
    ) -> Shift | Joint | None:
        """What to do to the residual of a frame, as numbers; None where no step reaches it."""
        chosen = [(step, frame.select(step.what.span)) for step in self._steps]
        steps = [step for step, selected in chosen if selected is not False]
        asked = any(frame.select(span) is not False for span in self._asking)
        if not steps and not asked:
            return None
        acc = accumulator(dtype)
        here = self.on(device, acc)
        masks = [
            selected[..., None].to(device) if isinstance(selected, Tensor) else None
            for _, selected in chosen
            if selected is not False
        ]
        real = [mask for mask in masks if mask is not None]
        touched = torch.stack(real).any(0) if real and len(real) == len(masks) else None
        if self._only_adds:
            return Shift(total=self._total_delta(steps, masks, here, frame), touched=touched)
        program = tuple(
            self._kernel_step(step, None if mask is None else mask.to(acc), here, frame)
            for step, mask in zip(steps, masks, strict=True)
        )
        return Joint(
            units=here["units"],
            gram=here["gram"],
            steps=program,
            touched=touched,
            far=tuple(self._far_gates(step, here["units"], frame) for step in steps),
            dials=tuple(step.dial for step in steps),
            gauge=here["units"][self._asked] if asked else None,
            link=self._link,
        )

    def _total_delta(
        self,
        steps: Sequence[_Coupled],
        masks: Sequence[Tensor | None],
        here: dict[str, Tensor],
        frame: Frame,
    ) -> Float[Tensor, "#batch #pos d_model"]:
        """What all adds together add; zero where an add's own span does not reach."""
        deltas = [self._delta(step, here, frame) for step in steps]
        if len({step.what.span for step in steps}) > 1:
            deltas = [d if m is None else d * m for d, m in zip(deltas, masks, strict=True)]
        return sum(deltas[1:], start=deltas[0])

    def _delta(
        self, step: _Coupled, here: dict[str, Tensor], frame: Frame
    ) -> Float[Tensor, "#batch 1 d_model"]:
        assert isinstance(step.what, Add)
        coeff = self._amount(step.what.coeff, here["raw"], frame)
        delta = coeff * here["raw"][step.index[0]]
        for k in step.index[1:]:
            delta = delta + coeff * here["raw"][k]
        return delta

    def _amount(self, amount: Amount, like: Tensor, frame: Frame) -> Float[Tensor, "#batch 1 1"]:
        rows = amount.at(self.site.layer)
        if isinstance(rows, float):
            return like.new_full((1, 1, 1), rows)
        return like.new_tensor(rows)[frame.call.rows.to(like.device)][:, None, None]

    def _kernel_step(
        self, step: _Coupled, mask: Tensor | None, here: dict[str, Tensor], frame: Frame
    ) -> kernels.Step:
        what, units = step.what, here["units"]
        gates = tuple(gate for at, gate in self._gates(step, units, frame) if at == self.site)
        if isinstance(what, Add):
            times = units.new_zeros(len(units))
            for k in step.index:
                times[k] += here["norms"][k]
            shift = times * self._amount(what.coeff, units, frame)
            return kernels.AddStep(shift=shift, mask=mask, gates=gates)
        assert step.gram_inverse is not None
        inverse = step.gram_inverse.to(units)
        if isinstance(what, Ablate):
            return kernels.AblateStep(
                index=step.index, gram_inverse=inverse, mask=mask, gates=gates
            )
        low, high = (
            None if bound is None else self._amount(bound, units, frame)
            for bound in (what.min, what.max)
        )
        return kernels.CapStep(
            index=step.index, gram_inverse=inverse, low=low, high=high, mask=mask, gates=gates
        )

    def _far_gates(self, step: _Coupled, like: Tensor, frame: Frame) -> tuple[FarGate, ...]:
        gates = self._gates(step, like, frame)
        return tuple(FarGate(site=at, gate=gate) for at, gate in gates if at != self.site)

    def _gates(
        self, step: _Coupled, like: Tensor, frame: Frame
    ) -> Iterator[tuple[Site, kernels.Gate]]:
        """The gates of a step, each with the site whose projections it looks at."""
        for condition, place in step.asks:
            sign = -1.0 if isinstance(condition, Below) else 1.0
            bound = self._amount(condition.threshold, like, frame)
            gate = kernels.Gate(index=place, sign=sign, bound=bound)
            yield condition.read_at(self.site), gate


class LinkedProgram(SiteProgram):
    """A program that depends on more than its own rows: what an earlier site showed, or dials.

    What later sites ask about is kept with the frame, where a block that checkpointing runs again
    finds it.
    """

    def apply(
        self, h: Float[Tensor, "batch pos d_model"], frame: Frame
    ) -> Float[Tensor, "batch pos d_model"]:
        if not frame.steady:
            found = self.resolve(h.device, h.dtype, frame)
        else:
            cache = frame.call.steady
            if self not in cache:
                cache[self] = self.resolve(h.device, h.dtype, frame)
            found = cache[self]
        if found is None or isinstance(found, Shift):
            return h if found is None else kernels.add(h, found.total, found.touched)
        moved = h
        steps = _acting(found, frame)
        if steps:
            moved = kernels.intervene(h, found.units, found.gram, steps, found.touched)
        if found.gauge is not None:
            frame.notes[found.link, self.site] = kernels.project(moved.detach(), found.gauge)
        return moved

    def look(self, h: Float[Tensor, "batch pos d_model"], frame: Frame) -> None:
        key = (self._link, self.site)
        if key in frame.notes:
            gauge = self.on(h.device, accumulator(h.dtype))["units"][self._asked]
            frame.notes[key] = kernels.project(h.detach(), gauge)

    def settled(self, frame: Frame) -> Move | None:
        """Dials and what earlier sites show are looked at in every step."""
        return lambda h: self.apply(h, frame)


def _acting(program: Joint, frame: Frame) -> list[kernels.Step]:
    """The steps whose dials are up, with masks of what their gates at earlier sites let through."""
    steps = []
    for step, far, dial in zip(program.steps, program.far, program.dials, strict=True):
        masks = [] if step.mask is None else [step.mask]
        if dial is not None:
            level = dial.mask(frame, program.units)
            if level is None:
                continue
            masks.append(level)
        for one in far:
            read = frame.notes[program.link, one.site].to(program.units)
            masks.append(kernels.opened([one.gate], read))
        steps.append(replace(step, mask=prod(masks[1:], start=masks[0])) if masks else step)
    return steps


def compile_programs(
    interventions: Iterable[Intervention], dials: Sequence[Dial | None] | None = None
) -> dict[Site, SiteProgram]:
    """One program for every site that the interventions touch or read.

    `dials`, one for each intervention or none, multiply what theirs changes.
    """
    steps, link = tuple(interventions), Link()
    return {
        site: (LinkedProgram if _is_linked(steps, dials, site) else SiteProgram)(
            site, steps, link, dials
        )
        for site in sites_of(steps)
    }


def _is_linked(
    interventions: Sequence[Intervention], dials: Sequence[Dial | None] | None, site: Site
) -> bool:
    turned = dials is not None and any(dial is not None for dial in dials)
    here = [condition for one in interventions if site in one.sites for condition in one.when]
    asked = bool(gauges_at(interventions, site))
    return turned or asked or any(one.read_at(site) != site for one in here)
