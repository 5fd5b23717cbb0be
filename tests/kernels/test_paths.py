"""Which path an op takes, said without a GPU and without Triton being imported."""

import subprocess
import sys

import pytest
import torch

from pvcore_kernels import launch, paths
from pvcore_kernels.bank import bank
from pvcore_kernels.layout import aligned, block_d, block_k, is_aligned, require_aligned

CPU = torch.device("cpu")


def test_nothing_imports_triton_before_a_kernel_is_launched():
    script = """
import sys, torch, pvcore_kernels
from pvcore_kernels import ops
h, v = torch.ones(2, 16), torch.ones(3, 16)
assert ops.project(h, v).tolist() == [[16.0] * 3] * 2
print(pvcore_kernels.path_taken(h.device, dtype=h.dtype, n_vec=3))
assert "triton" not in sys.modules, "triton was imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "plain torch: cpu is no CUDA device"


def test_importing_the_kernels_registers_nothing():
    script = "import torch, pvcore_kernels; assert not hasattr(torch.ops.pvcore, 'project')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("dtype", "n_vec", "path"),
    [
        (torch.bfloat16, 1, "triton"),
        (torch.float32, 128, "triton"),
        (torch.float16, 129, "cublas"),
        (torch.float64, 1, "reference"),
    ],
)
def test_the_path_on_a_gpu_is_chosen_by_dtype_and_vectors(monkeypatch, dtype, n_vec, path):
    monkeypatch.setattr(paths, "crossover", lambda device: 128)
    monkeypatch.setattr(paths, "device_table", lambda device: "default")
    cuda = torch.device("cuda", 0)
    assert paths.path(cuda, dtype, n_vec) == path
    words = {"triton": "untuned", "cublas": "more than 128", "reference": "float64"}
    assert words[path] in paths.path_taken(cuda, dtype=dtype, n_vec=n_vec)
    assert paths.takes_kernels(cuda, dtype) == (path != "reference")
    engine = paths.engine_path(cuda, dtype=dtype)
    assert engine.startswith("plain torch" if path == "reference" else "kernels: ")
    assert not paths.takes_kernels(CPU, dtype)
    monkeypatch.setattr(paths, "triton_installed", lambda: False)
    assert paths.path(cuda, dtype, n_vec) == "reference"
    assert "not installed" in paths.path_taken(cuda, dtype=dtype, n_vec=n_vec)


def test_a_device_without_a_table_of_its_own_is_said_to_be_untuned(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    monkeypatch.setattr(paths, "crossover", lambda device: 128)
    monkeypatch.setattr(paths, "device_table", lambda device: "nvidia_h200")
    cuda = torch.device("cuda", 0)
    for words in ("(tuned/default.json, untuned)", "(tuned/nvidia_h200.json)"):
        assert words in paths.path_taken(cuda, dtype=torch.bfloat16, n_vec=7)
        (tmp_path / "nvidia_h200.json").write_text("{}")


@pytest.mark.parametrize("op", ["project", "steer", "steer_project", "steer_project_tokens"])
@pytest.mark.parametrize("width", ["low", "wide"])
def test_the_default_table_covers_every_class(op, width):
    for rows in (1, 16, 17, 256, 131072):
        for n_vec in (0, 1, 32, 33, 128):
            tile = launch.launch(op, CPU, width=width, rows=rows, n_vec=n_vec)
            assert tile.block_t & (tile.block_t - 1) == 0 < tile.block_t
            assert tile.block_d & (tile.block_d - 1) == 0 < tile.block_d
    assert launch.crossover(CPU) == 128
    assert "not tuned" in launch.table("default")["note"]


def test_a_device_table_stands_over_the_default(tmp_path, monkeypatch):
    default = (launch.TUNED / "default.json").read_text()
    (tmp_path / "default.json").write_text(default)
    (tmp_path / "nvidia_h200.json").write_text('{"crossover": 64, "ops": {}}')
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    launch.table.cache_clear()
    own, general = launch.table(launch.slug("NVIDIA H200")), launch.table("default")
    launch.table.cache_clear()
    assert (own["crossover"], general["crossover"]) == (64, 128)
    assert own["ops"] == general["ops"]


@pytest.mark.parametrize(
    ("width", "tile"),
    [(64, 64), (96, 32), (100, 128), (896, 128), (1000, 128), (3584, 128), (5120, 128), (3, 16)],
)
def test_columns_divide_the_width_or_are_masked(width, tile):
    assert block_d(width, 128) == tile


def test_vectors_are_a_power_of_two_of_at_least_16():
    assert [block_k(n) for n in (1, 16, 17, 128)] == [16, 16, 32, 128]
    assert block_k(128, 32) == 32


def test_askew_rows_are_copied_or_refused():
    h = torch.randn(4, 100)
    straight = aligned(h)
    assert not is_aligned(h)
    assert is_aligned(straight)
    assert torch.equal(straight, h)
    assert aligned(straight) is straight
    with pytest.raises(ValueError, match="call the functional op"):
        require_aligned(h, "h")
    with pytest.raises(ValueError, match="rows apart"):
        require_aligned(torch.randn(1, 64).expand(4, 64), "h")
    require_aligned(straight, "h")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bank_is_padded_aligned_and_keeps_the_norms(dtype):
    v = 5 * torch.randn(7, 100, dtype=torch.float64)
    made = bank(v, dtype=dtype)
    assert made.padded.shape == (16, 112)
    assert is_aligned(made.units)
    assert made.units.data_ptr() == made.padded.data_ptr()
    assert (made.padded[7:] == 0).all()
    assert (made.padded[:, 100:] == 0).all()
    assert torch.equal(made.units, (v / v.norm(dim=1, keepdim=True)).to(dtype))
    assert torch.allclose(made.norms.double(), v.norm(dim=1), rtol=1e-7)


def test_a_vector_without_direction_is_refused():
    v = torch.ones(3, 8)
    v[1], v[2, 0] = 0, torch.nan
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        bank(v)
    with pytest.raises(ValueError, match="n_vec, d_model"):
        bank(v[:0])
