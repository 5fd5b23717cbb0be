"""What the engine calls, on the kernels' way: shapes that hold nothing too."""

import pytest
import torch

from pvcore_kernels import paths, routes
from tests.kernels.cases import assert_scores, unit_rows


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0,), (2, 3), (1, 2, 3)])
def test_scores_have_the_axes_of_their_rows(shape, monkeypatch):
    monkeypatch.setattr(paths, "takes_kernels", lambda device, dtype: True)
    h, units = torch.randn(*shape, 64), unit_rows(3, 64, torch.float32)
    scores = routes.project(h, units)
    assert scores.shape == (*shape, 3)
    assert_scores(scores.reshape(-1, 3), h.reshape(-1, 64), units)
