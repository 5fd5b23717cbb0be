"""TransformerLens: names, caches and a bridge on a copy of the model.

The only module that imports transformer_lens, and only when one of its objects is asked for.
"""

import copy
import re
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from pvcore.errors import LensError
from pvcore.sites import KINDS, Site, SiteKind

# The bridge's own names for a block's ends, of which hook_resid_pre and _post are aliases.
_BLOCK_ENDS: dict[str, SiteKind] = {"hook_in": "resid_pre", "hook_out": "resid_post"}
_KIND_OF_HOOK: dict[str, SiteKind] = {**{f"hook_{kind}": kind for kind in KINDS}, **_BLOCK_ENDS}


@runtime_checkable
class Readings(Protocol):
    """What `model.read(...)` returns."""

    @property
    def values(self) -> Tensor | None: ...

    @property
    def sites(self) -> tuple[Site, ...]: ...


def to_hook_name(site: Site) -> str:
    """TransformerLens's name of a site: `resid_post.20` is `blocks.20.hook_resid_post`."""
    return f"blocks.{site.layer}.hook_{site.kind}"


def from_hook_name(name: str) -> Site:
    """The site that TransformerLens calls `name`; `LensError` for any other kind of hook."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name, flags=re.ASCII)
    kind = _KIND_OF_HOOK.get(match[2]) if match else None
    if match is None or kind is None:
        raise LensError(
            f"got hook {name!r}; wanted one on the residual stream, such as "
            f"'blocks.20.hook_resid_post' (known hooks: {', '.join(_KIND_OF_HOOK)})"
        )
    return Site(kind, int(match[1]))


def boot(hf: nn.Module, tokenizer: Any) -> Any:
    """A `TransformerBridge` over a full copy of a model, on its device and in its dtype.

    TransformerLens rebuilds the model it is given, folds weights in place and changes the
    tokenizer, so both are copied: the weights take their memory twice. Nothing is downloaded.
    Raises `LensError` for models that TransformerLens cannot rebuild.
    """
    if tokenizer is None:
        raise LensError(
            "got no tokenizer, which TransformerLens would try to download; give it the model's own"
        )
    from transformer_lens.model_bridge import TransformerBridge

    twin: Any = copy.deepcopy(hf)
    name = type(hf).__name__
    try:
        twin.config.architectures = [name]
        return TransformerBridge.boot_transformers(
            getattr(twin.config, "name_or_path", "") or name,
            hf_model=twin,
            tokenizer=_resident(tokenizer),
            device=str(twin.device),
            dtype=twin.dtype,
        )
    except Exception as error:
        raise LensError(
            f"got a {name} that TransformerLens cannot boot ({error}); read it with "
            "model.read(...) and pass the activations to activation_cache(...)"
        ) from error


def _resident(tokenizer: Any) -> Any:
    """A copy that TransformerLens takes as it is.

    It would load a tokenizer again, by name, to have it write the BOS token; one that claims to do
    so already it leaves alone, and finds out by itself what its `to_tokens` has to prepend.
    """
    twin = copy.deepcopy(tokenizer)
    twin.init_kwargs = {"name_or_path": "", **twin.init_kwargs, "add_bos_token": True}
    return twin


def activation_cache(activations: Readings, *, bridge: Any = None) -> Any:
    """A `transformer_lens.ActivationCache` of what `model.read(..., reduce="none")` gave.

    `cache["resid_post", 20]` is `[chat, pos, d_model]`, NaN past the end of a chat's own span.
    `bridge` is what the cache's own methods work on, and may be left out to look values up.
    """
    values = activations.values
    if values is None or values.ndim != 4:
        raise LensError(
            "got activations without a position axis; wanted one row per token: "
            'read them with reduce="none"'
        )
    from transformer_lens import ActivationCache

    residuals = {to_hook_name(site): h for site, h in zip(activations.sites, values, strict=True)}
    return ActivationCache(residuals, bridge)
