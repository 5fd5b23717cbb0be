"""The two optimizers of a training run and their common schedule."""

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

_MUON_LR = 0.01
_ADAM_LR = 3e-3
_WARM_UP = 30
_LAST_SHARE = 0.02  # of the peak learning rate
_NOISE_PEAK = 0.6  # of the peak learning rate
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: quintic, tuned for slope at 0
_NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: torch.optim.Muon in float32.

    torch's own casts to bfloat16, which CPUs without bfloat16 units emulate at a fortieth of the
    speed; there the optimizer would cost four times the model.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                nesterov = parameter.grad.lerp(momentum, group["momentum"])
                rows, columns = parameter.shape
                lr = group["lr"] * max(1.0, rows / columns) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalised(nesterov), alpha=-lr)


def orthogonalised(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """A matrix of the same singular vectors, all singular values brought close to 1."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / float(wide.norm() + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram: Tensor = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if tall else wide


class Optimizers:
    """Muon for the matrices inside the blocks, AdamW for the embedding, norms and biases."""

    def __init__(self, model: nn.Module, steps: int, noise_steps: int) -> None:
        inside = {n: p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
        rest = {n: p for n, p in model.named_parameters() if n not in inside}
        self.steps, self.noise_steps = steps, noise_steps
        self.peaks = (_MUON_LR, _ADAM_LR)
        self.pair: tuple[torch.optim.Optimizer, torch.optim.Optimizer] = (
            Muon(inside.values(), lr=_MUON_LR),
            torch.optim.AdamW(rest.values(), lr=_ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def step(self, at: int) -> None:
        """One update with the learning rates of step `at`; gradients are cleared."""
        share = schedule(at, self.steps, self.noise_steps)
        for optimizer, peak in zip(self.pair, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for a checkpoint."""
        return {
            f"{which}.{parameter}.{name}": value
            for which, optimizer in enumerate(self.pair)
            for parameter, state in optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back a state that `tensors` gave."""
        for which, optimizer in enumerate(self.pair):
            content = optimizer.state_dict()
            content["state"] = {}
            for key, value in tensors.items():
                place, parameter, name = key.split(".", 2)
                if int(place) == which:
                    content["state"].setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict(content)


def schedule(at: int, steps: int, noise_steps: int) -> float:
    """Share of the peak learning rate: warm-up, constant to half, then linear decay.

    The steps under noise are a second, lower cycle that decays from its start.
    """
    if at >= steps:
        done = (at - steps) / noise_steps
        return _NOISE_PEAK * min(1.0, (at - steps + 1) / _WARM_UP) * (1.0 - done)
    warm = min(1.0, (at + 1) / _WARM_UP)
    decay = max(0.0, (at - steps / 2) / (steps / 2))
    return warm * (1.0 - (1.0 - _LAST_SHARE) * decay)
