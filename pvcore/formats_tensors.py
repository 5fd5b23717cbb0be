"""Vectors that other tools keep in `torch.save` files: the paper, assistant-axis, steering-vectors.

Each function takes or gives what such a file holds once it is unpickled.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pvcore.errors import FormatError
from pvcore.formats_pickle import matrix, row
from pvcore.sites import Site, resid_post, resid_pre
from pvcore.vectors import PersonaVector, Provenance, Variant

PAPER_NAME = re.compile(
    r"(?P<trait>.+)_(?P<variant>prompt_avg|prompt_last|response_avg)_diff", re.DOTALL
)
PAPER_VARIANTS: dict[str, Variant] = {
    "prompt_avg": "prompt_mean",
    "prompt_last": "prompt_last",
    "response_avg": "response_mean",
}
BLOCK = "decoder_block"


def paper_name(stem: str) -> tuple[str, Variant] | None:
    """Trait and variant of a file named as the paper's are, `evil_response_avg_diff`."""
    match = PAPER_NAME.fullmatch(stem)
    return (match["trait"], PAPER_VARIANTS[match["variant"]]) if match else None


def from_paper(value: object, *, trait: str, variant: Variant) -> PersonaVector:
    """The paper's `[L + 1, d_model]`: row l is the output of layer l, counted from 1 (B.4).

    Row 0 (embeddings) and row L are left out. `hidden_states[L]`, of which row L was made, comes
    after the final norm: added to a residual it would be a direction of another space.
    """
    rows = matrix(value, "the tensor")
    last = rows.shape[0] - 1
    if last < 2:
        raise FormatError(
            f"got the tensor of shape {list(rows.shape)}; wanted [layers + 1, d_model] with two "
            "layers or more: the first row is the embedding's, the last comes after the final norm"
        )
    return PersonaVector(
        trait=trait,
        variant=variant,
        sites=[Site.from_paper_layer(layer) for layer in range(1, last)],
        directions=rows[1:last],
        provenance=Provenance(
            note=f"from a file of the paper's format; left out: row 0 (embeddings) and row {last} "
            "(made after the final norm, so no direction of the residual stream)"
        ),
    )


def to_paper(vector: PersonaVector, *, n_layers: int) -> Float[Tensor, "rows d_model"]:
    """`[n_layers + 1, d_model]`; NaN in row 0 and row L where the vector has no direction.

    Row L is the output of the last block before the final norm: what the paper's code adds it to.
    """
    sites = {resid_pre(0): 0} | {resid_post(layer): layer + 1 for layer in range(n_layers)}
    unknown = [str(site) for site in vector.sites if site not in sites]
    inner = range(n_layers - 1)
    missing = [str(resid_post(layer)) for layer in inner if resid_post(layer) not in vector.sites]
    if unknown or missing:
        raise FormatError(
            f"got {vector.trait!r} without {', '.join(missing[:3]) or 'a gap'} and with "
            f"{', '.join(unknown[:3]) or 'nothing else'}; the paper's file of {n_layers} layers "
            f"holds resid_post.0 to resid_post.{n_layers - 1}: extract all of them, or choose sites"
        )
    rows = torch.full((n_layers + 1, vector.d_model), torch.nan)
    for site, direction in zip(vector.sites, vector.directions, strict=True):
        rows[sites[site]] = direction
    return rows


def is_axis(value: object) -> bool:
    """Whether this is a dict of assistant-axis's pipeline: of an axis or of one role's vector."""
    return isinstance(value, Mapping) and bool({"axis", "vector"} & value.keys())


def from_axis(value: object, *, trait: str) -> PersonaVector:
    """assistant-axis: `[L, d_model]` of block outputs counted from 0, alone or in a dict."""
    field = "the tensor"
    if isinstance(value, Mapping):
        name = "axis" if "axis" in value else "vector"
        field, value = f"field {name!r}", value.get(name)
    rows = matrix(value, field)
    return PersonaVector(
        trait=trait,
        sites=list(map(resid_post, range(rows.shape[0]))),
        directions=rows,
        provenance=Provenance(note="from a file of assistant-axis"),
    )


def to_axis(vector: PersonaVector) -> Float[Tensor, "layers d_model"]:
    """`[L, d_model]` for a vector of all block outputs from 0 on."""
    ordered = vector.at(sorted(vector.sites))
    wanted = tuple(map(resid_post, range(len(vector.sites))))
    if ordered.sites != wanted:
        raise FormatError(
            f"got {vector.trait!r} at {_shown(vector)}; an assistant-axis file numbers its rows "
            "from block 0 without a gap: extract resid_post of every layer"
        )
    return ordered.directions


def is_steering_vector(value: object) -> bool:
    return isinstance(value, Mapping) and "layer_activations" in value


def from_steering_vector(value: object, *, trait: str) -> PersonaVector:
    """steering-vectors: `{layer_activations: {block from 0: [d_model]}, layer_type}`."""
    if not isinstance(value, Mapping) or not isinstance(value.get("layer_activations"), Mapping):
        raise FormatError("got no mapping layer_activations; wanted one from layer to tensor")
    kind = value.get("layer_type", BLOCK)
    if kind != BLOCK:
        raise FormatError(
            f"got layer_type {str(kind)[:60]!r}; wanted {BLOCK!r}: other layers are not the "
            "residual stream"
        )
    rows: dict[Site, Tensor] = {}
    for layer, direction in value["layer_activations"].items():
        if type(layer) is not int or layer < 0:
            raise FormatError(
                f"got layer {str(layer)[:60]!r} in layer_activations; wanted a block from 0"
            )
        rows[resid_post(layer)] = row(direction, f"layer_activations[{layer}]")
    _require_one_width(rows)
    sites = sorted(rows)
    return PersonaVector(
        trait=trait,
        sites=sites,
        directions=torch.stack([rows[site] for site in sites]),
        provenance=Provenance(note="from a file of steering-vectors"),
    )


def to_steering_vector(vector: PersonaVector) -> dict[str, Any]:
    """What `SteeringVector(**torch.load(path))` of steering-vectors takes."""
    if any(site.kind != "resid_post" for site in vector.sites):
        raise FormatError(
            f"got {vector.trait!r} at {_shown(vector)}; steering-vectors adds to block outputs: "
            "choose resid_post sites with .at(...)"
        )
    pairs = zip(vector.sites, vector.directions, strict=True)
    return {
        "layer_activations": {site.layer: direction.clone() for site, direction in pairs},
        "layer_type": BLOCK,
    }


def _require_one_width(rows: Mapping[Site, Tensor]) -> None:
    widths = {site: direction.shape[0] for site, direction in rows.items()}
    if len(set(widths.values())) != 1:
        shown = ", ".join(f"{width} at {site}" for site, width in list(widths.items())[:4])
        raise FormatError(f"got directions of width {shown or 'none'}; wanted some, of one width")


def _shown(vector: PersonaVector) -> str:
    sites = list(map(str, vector.sites))
    return ", ".join(sites if len(sites) < 4 else [sites[0], "...", sites[-1]])
