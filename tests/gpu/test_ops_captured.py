"""Every op that writes in place, captured into a CUDA graph and replayed on other rows."""

import pytest
import torch

from pvcore_kernels import ops
from tests.kernels.cases import same_bits
from tests.kernels.in_place import ARGUMENTS, run, writing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
LISTED = "project_layers_out"


@pytest.mark.parametrize("name", sorted(set(ARGUMENTS) - {LISTED}))
def test_a_replay_writes_what_a_call_writes(name):
    assert callable(ops.steer_)  # registers them all
    run(name, writing(name, "cuda"))  # compiled before it is captured
    torch.cuda.synchronize()
    held, graph = writing(name, "cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(name, held)
    for seed in (0, 20):
        wanted, fresh = (writing(name, "cuda", seed=seed) for _ in range(2))
        run(name, wanted)
        for key, one in held.given.items():
            if isinstance(one, torch.Tensor):
                one.copy_(fresh.given[key])
        graph.replay()
        torch.cuda.synchronize()
        for key in held.written:
            assert same_bits(held.given[key], wanted.given[key]), key
            assert not same_bits(held.given[key], fresh.given[key]), key


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_layers_that_are_listed_say_what_to_capture_instead():
    found, graph = writing(LISTED, "cuda"), torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="call project_stack_out"),
        torch.cuda.graph(graph),
    ):
        run(LISTED, found)
    run(LISTED, found)
    assert found.given["layer_scores"].isfinite().all()
