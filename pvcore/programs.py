"""Programs: interventions at one site, made ready to run on the rows of a frame."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

import pvcore_kernels as kernels
from pvcore.errors import PlanError
from pvcore.frames import Frame
from pvcore.interventions import Ablate, Add, Amount, Intervention, sites_of
from pvcore.sites import Site
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """A program that reads the projections: its unit rows, their Gram matrix and its steps."""

    units: Float[Tensor, "n_vec d_model"]
    gram: Float[Tensor, "n_vec n_vec"]
    steps: tuple[kernels.Step, ...]
    touched: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Coupled:
    """One intervention at the program's site: which of its vectors, and how they are coupled."""

    what: Intervention
    index: tuple[int, ...]
    gram_inverse: Float[Tensor, "n_step n_step"] | None


class SiteProgram:
    """All steps of one plan at one site, in declared order.

    Tensors are kept in float64 on the CPU and copied once to each device and dtype they meet.
    """

    def __init__(self, site: Site, interventions: Sequence[Intervention]) -> None:
        self.site = site
        here = [one for one in interventions if site in one.sites]
        directions: list[Tensor] = []
        self._steps = tuple(self._couple(one, directions) for one in here)
        self._raw = torch.stack(directions).double()
        self._norms = self._raw.norm(dim=1)
        self._only_adds = all(isinstance(one, Add) for one in here)
        self._placed: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def _couple(self, one: Intervention, directions: list[Tensor]) -> _Coupled:
        """Register the intervention's vectors, each direction once, and invert their Gram."""
        traits: dict[int, str] = {}
        index: list[int] = []
        for vector in one.vectors:
            direction = vector.direction(self.site)
            known = [k for k, other in enumerate(directions) if torch.equal(other, direction)]
            if not known:
                directions.append(direction)
            index.append(known[0] if known else len(directions) - 1)
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

    def _resolve(self, h: Tensor, frame: Frame) -> Move | None:
        found = self.resolve(h.device, h.dtype, frame)
        if found is None:
            return None
        touched = found.touched
        if isinstance(found, Shift):
            total = found.total
            return lambda h: kernels.add(h, total, touched)
        units, gram, steps = found.units, found.gram, found.steps
        return lambda h: kernels.intervene(h, units, gram, steps, touched)

    def resolve(
        self, device: torch.device, dtype: torch.dtype, frame: Frame
    ) -> Shift | Joint | None:
        """What to do to the residual of a frame, as numbers; None where no step reaches it."""
        chosen = [(step, frame.select(step.what.span)) for step in self._steps]
        steps = [step for step, selected in chosen if selected is not False]
        if not steps:
            return None
        acc = accumulator(dtype)
        here = self.on(device, acc)
        masks = [
            selected[..., None].to(device) if isinstance(selected, Tensor) else None
            for _, selected in chosen
            if selected is not False
        ]
        real = [mask for mask in masks if mask is not None]
        touched = torch.stack(real).any(0) if len(real) == len(masks) else None
        if self._only_adds:
            return Shift(total=self._total_delta(steps, masks, here, frame), touched=touched)
        program = tuple(
            self._kernel_step(step, None if mask is None else mask.to(acc), here, frame)
            for step, mask in zip(steps, masks, strict=True)
        )
        return Joint(units=here["units"], gram=here["gram"], steps=program, touched=touched)

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
        if isinstance(what, Add):
            times = units.new_zeros(len(units))
            for k in step.index:
                times[k] += here["norms"][k]
            return kernels.AddStep(shift=times * self._amount(what.coeff, units, frame), mask=mask)
        assert step.gram_inverse is not None
        inverse = step.gram_inverse.to(units)
        if isinstance(what, Ablate):
            return kernels.AblateStep(index=step.index, gram_inverse=inverse, mask=mask)
        low, high = (
            None if bound is None else self._amount(bound, units, frame)
            for bound in (what.min, what.max)
        )
        return kernels.CapStep(
            index=step.index, gram_inverse=inverse, low=low, high=high, mask=mask
        )


def compile_programs(interventions: Iterable[Intervention]) -> dict[Site, SiteProgram]:
    """One program for every site that the interventions touch."""
    steps = tuple(interventions)
    return {site: SiteProgram(site, steps) for site in sites_of(steps)}
