"""The Hub: what is published and what is fetched, against a double of `HfApi` on a local folder."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled

import pvcore as pv
from pvcore import hub
from pvcore.errors import HubError

REPO = "someone/vectors"


class Folder:
    """The methods of `HfApi` that are used, on a folder; every call is noted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create_repo", (repo_id, private, exist_ok)))

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> Any:
        self.calls.append(("create_commit", (repo_id, commit_message)))
        for operation in operations:
            with operation.as_file() as file:
                (self.root / operation.path_in_repo).write_bytes(file.read())
        return SimpleNamespace(commit_url=f"hub://{repo_id}/commit/1")

    def list_repo_files(self, repo_id: str, *, revision: str | None) -> list[str]:
        self.calls.append(("list_repo_files", (repo_id, revision)))
        return [path.name for path in self.root.iterdir()]

    def hf_hub_download(self, repo_id: str, name: str, *, revision: str | None) -> str:
        self.calls.append(("hf_hub_download", (repo_id, name, revision)))
        return str(self.root / name)


@pytest.fixture
def api(tmp_path: Path) -> Any:
    return Folder(tmp_path)


def vector(trait: str = "evil", **changes: Any) -> pv.PersonaVector:
    settings: dict[str, Any] = {
        "model_id": "Qwen/Qwen2.5-7B-Instruct",
        "provenance": pv.Provenance(
            thresholds={"trait": 50.0},
            judge="gpt | four\n# not a heading",
            kept=940,
            dropped=60,
            seeds=(0, 1),
            note="made <b>here</b>",
        ),
    }
    sites = [pv.resid_post(layer) for layer in (15, 19)]
    return pv.PersonaVector(
        trait=trait, sites=sites, directions=3 * torch.eye(2, 8), **settings | changes
    )


def test_what_is_pushed_is_pulled(api: Any) -> None:
    given = [vector("evil"), vector("Dry humor")]
    assert hub.push(given, REPO, private=True, api=api) == f"hub://{REPO}/commit/1"
    assert api.calls == [
        ("create_repo", (REPO, True, True)),
        ("create_commit", (REPO, "Add evil, Dry humor")),
    ]
    files = {path.name for path in api.root.iterdir()}
    assert files == {"README.md", "evil.safetensors", "dry-humor.safetensors"}
    for one in given:
        assert hub.pull(REPO, trait=one.trait, revision="v1", api=api) == one
    assert api.calls[-2:] == [
        ("list_repo_files", (REPO, "v1")),
        ("hf_hub_download", (REPO, "dry-humor.safetensors", "v1")),
    ]


def test_one_vector_needs_no_name(api: Any) -> None:
    hub.push(vector(), REPO, api=api)
    assert hub.pull(REPO, api=api) == vector()


def test_the_card_says_where_the_vectors_come_from(api: Any) -> None:
    hub.push(
        [vector("evil"), vector("humor", model_id="", provenance=pv.Provenance())], REPO, api=api
    )
    text = (api.root / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["library_name"] == "pvcore"
    assert data["base_model"] == ["Qwen/Qwen2.5-7B-Instruct"]
    assert "arxiv:2507.21509" in data["tags"]
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    header, _, evil, humor = (re.split(r"(?<!\\)\|", line)[1:-1] for line in rows)
    assert len(header) == len(evil) == len(humor) == 8  # what was recorded stays in its cell
    cells = dict(zip(map(str.strip, header), map(str.strip, evil), strict=True))
    assert cells["sites"] == "resid_post.15, resid_post.19 (2, d_model 8)"
    assert cells["rollouts kept"] == "940, 60 dropped"
    assert cells["judge"] == r"gpt \| four # not a heading"
    assert cells["norm"] == "3.00"
    assert vector().content_hash[:12] in cells["file"]
    assert "on Qwen/Qwen2.5-7B-Instruct, seeds 0, 1" in cells["made"]
    assert "made &lt;b>here" in body
    assert "kept by trait 50.0" in body
    assert any("not recorded" in cell for cell in humor)


def test_the_cards_code_pulls_the_vector(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(vector(), REPO, api=api)
    (code,) = re.findall(r"```python\n(.*?)```", (api.root / "README.md").read_text(), re.DOTALL)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["vector"] == vector()


def test_which_vector_must_be_clear(api: Any) -> None:
    with pytest.raises(HubError, match=r"someone/vectors: got trait None; .*files none"):
        hub.pull(REPO, api=api)
    hub.push([vector("evil"), vector("humor")], REPO, api=api)
    for trait in (None, "apathy"):
        with pytest.raises(HubError, match=r"wanted one of the files evil\.safetensors, humor"):
            hub.pull(REPO, trait=trait, api=api)


def test_what_would_overwrite_itself_is_not_pushed(api: Any) -> None:
    for given in ([], [vector("evil"), vector("Evil")]):
        with pytest.raises(HubError, match="each file once"):
            hub.push(given, REPO, api=api)
    assert api.calls == []


def test_a_damaged_file_of_the_hub_is_one_error(api: Any) -> None:
    hub.push(vector(), REPO, api=api)
    path = api.root / "evil.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HubError, match=r"someone/vectors: .*evil\.safetensors: got bytes"):
        hub.pull(REPO, api=api)


@pytest.mark.parametrize("failure", [OfflineModeIsEnabled("offline"), ValueError("bad name")])
def test_a_client_that_fails_is_one_error_with_its_cause(
    api: Any, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(Folder, "create_repo", fail)
    monkeypatch.setattr(Folder, "list_repo_files", fail)
    for use in (lambda: hub.push(vector(), REPO, api=api), lambda: hub.pull(REPO, api=api)):
        with pytest.raises(
            HubError, match=rf"someone/vectors: .*{type(failure).__name__}"
        ) as raised:
            use()
        assert raised.value.__cause__ is failure
    assert list(api.root.iterdir()) == []


def test_the_real_client_takes_these_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double's signatures are those of the installed `HfApi`, which is offline here."""
    import inspect

    from huggingface_hub import HfApi

    for name in ("create_repo", "create_commit", "list_repo_files", "hf_hub_download"):
        real = inspect.signature(getattr(HfApi, name)).parameters
        ours = inspect.signature(getattr(Folder, name)).parameters
        for position, (ours_name, parameter) in enumerate(ours.items()):
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                assert ours_name in real
            else:
                assert list(real.values())[position].kind is parameter.kind
    with pytest.raises(HubError, match=r"someone/vectors: the Hub could not be used"):
        hub.pull(REPO)
