"""The Hugging Face Hub: push vectors with a model card made of their provenance, and pull them.

A repository holds native vector files, one a trait, and one card about all of them.
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pvcore.errors import HubError, PvcoreError
from pvcore.numerals import number
from pvcore.vectors import PersonaVector

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SUFFIX = ".safetensors"
CARD = "README.md"
TAGS = ["persona-vectors", "activation-steering", "arxiv:2507.21509"]
COLUMNS = ("trait", "file", "sites", "variant", "norm", "rollouts kept", "judge", "made")


def push(
    vectors: PersonaVector | Sequence[PersonaVector],
    repo_id: str,
    *,
    private: bool = False,
    api: "HfApi | None" = None,
) -> str:
    """Publish vectors and a card about them in one commit; returns the commit's address.

    Push all vectors of a repository together: the card is about those of one call. The repository
    is made if it is not there; other files in it stay. `api` is a `huggingface_hub.HfApi` with a
    token or an endpoint of its own. Raises `HubError`.
    """
    given = [vectors] if isinstance(vectors, PersonaVector) else list(vectors)
    names = [file_name(vector.trait) for vector in given]
    if not names or len(set(names)) < len(names):
        raise HubError(
            f"got vectors for the files {', '.join(names) or 'none'}; wanted one at least, and "
            "each file once: give one another name with .rename(trait)"
        )
    with _blaming(repo_id), tempfile.TemporaryDirectory() as folder:
        from huggingface_hub import CommitOperationAdd, HfApi

        client = api or HfApi()
        additions = [CommitOperationAdd(CARD, card(given, repo_id).encode())]
        for name, vector in zip(names, given, strict=True):
            vector.save(Path(folder, name))
            additions.append(CommitOperationAdd(name, Path(folder, name)))
        client.create_repo(repo_id, private=private, exist_ok=True)
        message = f"Add {', '.join(vector.trait for vector in given)}"
        return str(client.create_commit(repo_id, additions, commit_message=message).commit_url)


def pull(
    repo_id: str,
    *,
    trait: str | None = None,
    revision: str | None = None,
    api: "HfApi | None" = None,
) -> PersonaVector:
    """The vector of a trait; `trait` may be left out where a repository has one only.

    What arrives is checked as any vector file is. Raises `HubError` that names the repository.
    """
    with _blaming(repo_id):
        from huggingface_hub import HfApi

        client = api or HfApi()
        listed = client.list_repo_files(repo_id, revision=revision)
        names = sorted(name for name in listed if name.endswith(SUFFIX))
        wanted = names[0] if trait is None and len(names) == 1 else file_name(trait or "")
        if wanted not in names:
            raise HubError(
                f"got trait {trait!r}; wanted one of the files {', '.join(names)[:300] or 'none'}: "
                "say which with trait="
            )
        return PersonaVector.load(client.hf_hub_download(repo_id, wanted, revision=revision))


def file_name(trait: str) -> str:
    """The file of a trait: its name in lower case, other signs than letters and digits as one -."""
    return (re.sub(r"[^a-z0-9_]+", "-", trait.casefold()).strip("-") or "vector") + SUFFIX


def card(vectors: Sequence[PersonaVector], repo_id: str) -> str:
    """The model card as Markdown: what each vector is, where it comes from, how to load it."""
    from huggingface_hub import ModelCardData

    models = sorted({vector.model_id for vector in vectors} - {""})
    data = ModelCardData(library_name="pvcore", base_model=models or None, tags=TAGS)
    first = vectors[0]
    loading = ["import pvcore as pv", "from pvcore import hub", ""]
    loading.append(f"vector = hub.pull({repo_id!r}, trait={first.trait!r})")
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# Persona vectors: {', '.join(_cell(vector.trait) for vector in vectors)}\n",
            "Directions of the residual stream, raw (unnormalised) differences of means, as in "
            "*Persona Vectors* (arXiv 2507.21509). Sites count blocks from 0; `resid_post` of the "
            "last block comes before the final norm.\n",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + " --- |" * len(COLUMNS),
            *("| " + " | ".join(map(_cell, _columns(vector))) + " |" for vector in vectors),
            "",
            *_remarks(vectors),
            "```python",
            *loading,
            "```\n",
        ]
    )


def _columns(vector: PersonaVector) -> tuple[str, ...]:
    sites = list(map(str, vector.sites))
    shown = sites if len(sites) < 4 else [sites[0], "...", sites[-1]]
    low, high = vector.norms.min().item(), vector.norms.max().item()
    made = vector.provenance
    counts = [number(made.kept), number(made.dropped)]
    return (
        vector.trait,
        f"{file_name(vector.trait)}, `{vector.content_hash[:12]}`",
        f"{', '.join(shown)} ({len(sites)}, d_model {vector.d_model})",
        vector.variant,
        number(low) if low == high else f"{number(low)} to {number(high)}",
        f"{counts[0]}, {counts[1]} dropped",
        made.judge or "not recorded",
        f"on {vector.model_id or 'a model not recorded'}, seeds "
        f"{', '.join(map(str, made.seeds)) or 'not recorded'}",
    )


def _remarks(vectors: Sequence[PersonaVector]) -> Iterator[str]:
    for vector in vectors:
        thresholds = vector.provenance.thresholds
        filters = ", ".join(f"{name} {number(value)}" for name, value in thresholds.items())
        remarks = [filters and f"kept by {filters}", vector.provenance.note]
        if any(remarks):
            yield f"* {_cell(vector.trait)}: {_cell('; '.join(filter(None, remarks)))}\n"


def _cell(text: str) -> str:
    """Text that stays within its cell and its line, whatever was recorded."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


@contextmanager
def _blaming(repo_id: str) -> Iterator[None]:
    try:
        yield
    except PvcoreError as error:
        raise HubError(f"{repo_id}: {error}") from None
    # A client of a network fails in dozens of types; which one is said, and kept as the cause.
    except Exception as error:
        raise HubError(
            f"{repo_id}: the Hub could not be used ({type(error).__name__}: {str(error)[:200]}); "
            "wanted a repository you may use: check its name, the network and `hf auth login`"
        ) from error
