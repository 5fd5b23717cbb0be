"""Sites: which tensor of the residual stream. Layers count decoder blocks from 0."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal, get_args

from pvcore.errors import SiteError

SiteKind = Literal["resid_pre", "resid_mid", "resid_post"]
KINDS: tuple[SiteKind, ...] = get_args(SiteKind)


@total_ordering
@dataclass(frozen=True, slots=True)
class Site:
    """One residual-stream tensor `[batch, pos, d_model]`: before, inside or after block `layer`.

    `resid_post.l` is the output of block `l` before the final norm, also at the last layer.
    Raises `SiteError` for an unknown kind and for layers that are not whole numbers from 0.
    """

    kind: SiteKind
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SiteError(f"got site kind {self.kind!r}; wanted one of {', '.join(KINDS)}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise SiteError(
                f"got layer {self.layer!r}; wanted a block number counted from 0. "
                "Negative layers are refused: write the block number itself"
            )

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"

    def __lt__(self, other: "Site") -> bool:
        """Order by depth: the order in which a forward pass reaches the sites."""
        return self.depth < other.depth

    @property
    def depth(self) -> int:
        """The rank of the site in a forward pass: a number that no other site has."""
        return len(KINDS) * self.layer + KINDS.index(self.kind)

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read `resid_post.20`, the form of files and of the command line."""
        kind, dot, layer = text.partition(".")
        if not dot or kind not in KINDS or not (layer.isascii() and layer.isdigit()):
            raise SiteError(f"got site {text!r}; wanted KIND.LAYER such as 'resid_post.20'")
        return cls(kind, int(layer))

    @classmethod
    def from_hidden_states_index(cls, index: int) -> "Site":
        """The site of `hidden_states[index]` in transformers; index 0 is the embedding.

        The last entry of `hidden_states` is post-norm and is no site: this conversion gives the
        block output it was computed from.
        """
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise SiteError(f"got hidden_states index {index!r}; wanted a whole number from 0")
        return cls("resid_pre", 0) if index == 0 else cls("resid_post", index - 1)

    @classmethod
    def from_paper_layer(cls, layer: int) -> "Site":
        """The site the paper (arXiv 2507.21509, B.4) calls `layer`, counted from 1."""
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise SiteError(f"got paper layer {layer!r}; wanted a whole number from 1")
        return cls("resid_post", layer - 1)

    @classmethod
    def from_gguf_layer(cls, layer: int) -> "Site":
        """The site at which llama.cpp and repeng add the tensor `direction.LAYER`.

        Both count blocks from 0 here, and llama.cpp holds no direction for block 0.
        """
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
            raise SiteError(
                f"got GGUF direction {layer!r}; wanted a whole number from 1: llama.cpp never adds "
                "to the output of block 0"
            )
        return cls("resid_post", layer)

    @property
    def hidden_states_index(self) -> int:
        """Where transformers' `hidden_states` holds this tensor (post-norm at the last layer)."""
        if self.kind == "resid_mid":
            raise SiteError(f"got {self}; hidden_states holds no resid_mid: read it with pvcore")
        return self.layer + (self.kind == "resid_post")

    @property
    def paper_layer(self) -> int:
        """The paper's 1-based layer number of a `resid_post` site."""
        if self.kind != "resid_post":
            raise SiteError(f"got {self}; the paper numbers block outputs: use a resid_post site")
        return self.layer + 1

    @property
    def gguf_layer(self) -> int:
        """The N of the tensor `direction.N` that llama.cpp and repeng add at this site."""
        if self.kind != "resid_post" or self.layer < 1:
            raise SiteError(
                f"got {self}; GGUF control vectors act on block outputs from resid_post.1 on: "
                "choose such sites with .at(...)"
            )
        return self.layer


def resid_pre(layer: int) -> Site:
    """The input of block `layer`."""
    return Site("resid_pre", layer)


def resid_mid(layer: int) -> Site:
    """The residual between attention and MLP of block `layer`."""
    return Site("resid_mid", layer)


def resid_post(layer: int) -> Site:
    """The output of block `layer`."""
    return Site("resid_post", layer)


def as_sites(layers: Iterable[int | Site]) -> tuple[Site, ...]:
    """Sites as given, and bare layer numbers as `resid_post`; duplicates are an error."""
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise SiteError(f"got {layers!r} for layers; wanted a list of layer numbers or Sites")
    sites = tuple(entry if isinstance(entry, Site) else resid_post(entry) for entry in layers)
    if not sites:
        raise SiteError("got no layers; wanted at least one layer number or Site")
    if len(set(sites)) != len(sites):
        raise SiteError(f"got a site twice in {', '.join(map(str, sites))}; name each site once")
    return sites
