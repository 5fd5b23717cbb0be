"""Which of the three ways an op is computed: plain torch, Triton, or cuBLAS and a Triton add."""

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from pvcore_kernels.launch import crossover, device_table, measured

Path = Literal["reference", "triton", "cublas"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def triton_installed() -> bool:
    return find_spec("triton") is not None


def takes_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """The switch: whether rows of a dtype go to kernels, in every op and in whoever asks here."""
    return device.type == "cuda" and dtype in DTYPES and triton_installed()


def path(device: torch.device, dtype: torch.dtype, n_vec: int) -> Path:
    """`dtype` is that of the rows; ops that project on nothing have `n_vec` 0."""
    if not takes_kernels(device, dtype):
        return "reference"
    return "triton" if n_vec <= crossover(device) else "cublas"


def path_taken(device: torch.device, *, dtype: torch.dtype, n_vec: int) -> str:
    """In words, for a user: the path, and why it is that one."""
    name = str(dtype).removeprefix("torch.")
    match path(device, dtype, n_vec):
        case "triton":
            own = device_table(device)
            tuned = f"tuned/{own}.json" if measured(own) else "tuned/default.json, untuned"
            return f"Triton ({tuned}): {n_vec} vectors of {name} on {device}"
        case "cublas":
            return f"cuBLAS and a Triton add: {n_vec} vectors are more than {crossover(device)}"
    if device.type != "cuda":
        return f"plain torch: {device} is no CUDA device"
    if not triton_installed():
        return "plain torch: Triton is not installed"
    return f"plain torch: no kernel is written for {name}"


def engine_path(device: torch.device, *, dtype: torch.dtype) -> str:
    """In words, for a user: what pvcore's engines leave to the ops on a device."""
    if takes_kernels(device, dtype):
        return (
            "kernels: prompts and means as they come, all layers of a decode step in one launch, "
            "and in the graph engine a joint step in one"
        )
    return f"plain torch for rows of {str(dtype).removeprefix('torch.')} on {device}"
