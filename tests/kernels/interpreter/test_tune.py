"""The tuner: right tiles only, the fastest of them, and a table that launches are made from."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benches import gpu_trials, gpu_tune
from benches.gpu_trials import LAUNCH, Place, candidates, error, inputs
from pvcore_kernels import launch
from pvcore_kernels.launch import Launch
from pvcore_kernels.tiled import layers

CPU = torch.device("cpu")
TILE = Launch(block_t=16, block_k=16, block_d=32, num_warps=4, num_stages=2)
PLACE = Place(op="project", t=16, k=7, rows=torch.float32, bank=torch.float32, d=64)


def other(block_d: int) -> Launch:
    return Launch(block_t=16, block_k=16, block_d=block_d, num_warps=4, num_stages=2)


def clock_of(times: dict[int, float]) -> Callable[[Any], float]:
    """A clock that runs the calls and says what it is told about their tile."""

    def clock(calls: list[Callable[[], object]]) -> float:
        for call in calls:
            call()
        tile = launch.launch("project", CPU, width="wide", rows=16, n_vec=7)
        return times[tile.block_d]

    return clock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", LAUNCH)
def test_a_launch_is_right_and_a_missing_one_is_found(
    op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(op=op, t=19, k=5, rows=dtype, bank=dtype, d=64)
    x = inputs(place, device=CPU)
    assert error(place, x) <= 1.0
    monkeypatch.setitem(gpu_trials.LAUNCH, op, lambda _: None)
    assert error(place, x) > 1.0


def test_a_launch_copies_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(op="project_layers", t=2, k=3, rows=torch.float32, bank=torch.float32, d=64)
    x = inputs(place, device=CPU)
    monkeypatch.setattr(layers, "capturing", lambda _: True)
    assert error(place, x) <= 1.0  # a launch that had to make its table would refuse


def test_the_fastest_tile_is_chosen_and_noise_is_not() -> None:
    tiles = [TILE, other(16), other(64)]
    for times, wanted, us in (
        ({32: 10.0, 16: 5.0, 64: 7.0}, 16, 5.0),
        ({32: 10.0, 16: 9.9, 64: 9.81}, 32, 10.0),
    ):
        found = gpu_tune.best(PLACE, TILE, tiles, device=CPU, clock=clock_of(times), copies=2)
        assert (found.tile.block_d, found.us, found.before_us) == (wanted, us, 10.0)
    assert launch._TRIED == {}


def test_a_wrong_tile_is_not_chosen_however_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LAUNCH["project"]

    def broken(x: gpu_trials.Inputs) -> None:
        right(x)
        if launch.launch("project", CPU, width="wide", rows=16, n_vec=7).block_d == 16:
            x["scores"].add_(1e-3)

    monkeypatch.setitem(gpu_trials.LAUNCH, "project", broken)
    clock = clock_of({32: 10.0, 16: 1.0, 64: 4.0})
    found = gpu_tune.best(PLACE, TILE, [other(16), other(64)], device=CPU, clock=clock, copies=1)
    assert found.tile == other(64)
    with pytest.raises(RuntimeError, match="got a wrong result from the tile in the table"):
        gpu_tune.best(PLACE, other(16), [], device=CPU, clock=clock, copies=1)


def test_a_table_is_written_and_launched_from(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = launch.table("default")
    small = {
        op: [entry | {"rows": 16, "n_vec": 16} for entry in entries[:1]]
        for op, entries in default["ops"].items()
    }
    found = gpu_tune.tuned(
        {"ops": small},
        device=CPU,
        clock=lambda calls: [call() for call in calls] and 3.0,
        tiles=lambda _: [],
        d=64,
    )
    assert {op: len(entries) for op, entries in found["ops"].items()} == dict.fromkeys(small, 1)
    chosen = found["ops"]["project"][0]
    assert chosen["us"] == chosen["default_us"] == 3.0
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    (tmp_path / "default.json").write_text(json.dumps(default))
    found["ops"]["project"][0]["block_d"] = 16
    path = gpu_tune.write({"note": "a test", "crossover": 7} | found, "some_gpu", tmp_path)
    assert json.loads(path.read_text())["crossover"] == 7
    width = chosen["width"]
    assert launch._find("some_gpu", "project", width, 16, 16).block_d == 16
    assert (
        launch._find("default", "project", width, 16, 16).block_d
        == default["ops"]["project"][0]["block_d"]
    )
    assert launch.table("some_gpu")["crossover"] == 7
    monkeypatch.undo()
    launch.table.cache_clear()
    launch._find.cache_clear()


def test_the_crossover_is_the_last_that_triton_wins() -> None:
    for lost_from, wanted in ((32, 0), (256, 128), (4096, 1024)):
        seen: list[int] = []

        def clock(calls: Any, lost_from: int = lost_from, seen: list[int] = seen) -> float:
            ours = len(seen) % 2 == 0
            seen.append(0)
            k = gpu_tune.CROSSOVERS[(len(seen) - 1) // 2]
            return 2.0 if ours and k >= lost_from else 1.5 if not ours else 1.0

        assert gpu_tune.crossover(CPU, clock, t=2, d=64) == wanted


def test_every_place_of_the_table_has_tiles_to_try() -> None:
    for op, entries in launch.table("default")["ops"].items():
        for entry in entries:
            tiles = list(candidates(Place.of(op, entry)))
            assert len(tiles) == len(set(tiles)) > 8
            assert all(tile.block_k == 0 for tile in tiles) == (op in ("steer", "segment_mean"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="another version: a GPU is here")
def test_without_a_gpu_nothing_is_tuned(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    with pytest.raises(typer.Exit):
        gpu_tune.main(seconds=1, out=tmp_path)
    assert "got no GPU" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
