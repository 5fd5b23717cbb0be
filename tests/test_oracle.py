"""The oracle itself against plain transformers: what the matrices measure with must be true."""

import pytest
import torch

from tests.families import D_MODEL, FAMILIES, N_LAYERS, build
from tests.oracle import MODES, Edit, Oracle, covers, padded

LENGTHS, NEW = (13, 9, 11), 5
WIDTH = max(LENGTHS)


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 100, (length,), generator=generator) for length in LENGTHS]


def edits(oracle: Oracle) -> list[Edit]:
    """An addition, an ablation and a cap, each at one kind of site, over the reply."""
    generator = torch.Generator().manual_seed(2)
    where = covers("response", LENGTHS, WIDTH, WIDTH + NEW)
    kinds = {"resid_pre": "add", "resid_mid": "ablate", "resid_post": "cap"}
    return [
        Edit(
            kind=kinds[point[0]],  # type: ignore[arg-type]
            point=point,
            vectors=torch.randn(2, D_MODEL, generator=generator),
            where=where,
            coeff=torch.tensor([0.5, 0.0, -0.5]),
            lower=torch.tensor([-0.1, -0.2, -0.3]),
            upper=torch.tensor([0.1, 0.2, 0.3]),
        )
        for point in oracle.points
    ]


def alone(edit: Edit, row: int) -> Edit:
    """The edit of one row, as it stands when that row runs without padding."""
    return Edit(
        kind=edit.kind,
        point=edit.point,
        vectors=edit.vectors,
        where=edit.where[row : row + 1, WIDTH - LENGTHS[row] :],
        coeff=edit.coeff[row : row + 1],  # type: ignore[index]
        lower=edit.lower[row : row + 1],  # type: ignore[index]
        upper=edit.upper[row : row + 1],  # type: ignore[index]
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_residuals_are_those_transformers_reports(name: str) -> None:
    oracle = Oracle(build(name), FAMILIES[name])
    ids = torch.stack([row[:9] for row in prompts()])
    with torch.no_grad():
        reported = build(name)(ids, output_hidden_states=True)
    logits, tape = oracle.forward(ids)
    assert torch.equal(logits, reported.logits)
    residuals = tape.frames[0].residuals
    for layer in range(N_LAYERS):
        assert torch.equal(residuals["resid_pre", layer], reported.hidden_states[layer])
        if layer + 1 < N_LAYERS:
            assert torch.equal(residuals["resid_post", layer], reported.hidden_states[layer + 1])
    last = residuals["resid_post", N_LAYERS - 1]
    assert torch.equal(oracle.final_norm(last), reported.hidden_states[-1])
    assert (last - reported.hidden_states[-1]).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].attention])
def test_the_residual_between_attention_and_mlp_is_what_the_mlp_norm_reads(name: str) -> None:
    oracle = Oracle(build(name), FAMILIES[name])
    norms = {"gpt2": "ln_2", "opt": "final_layer_norm"}
    gemma = dict.fromkeys(("gemma2", "gemma3"), "pre_feedforward_layernorm")
    norm = {**norms, **gemma}.get(name, "post_attention_layernorm")
    read: list[torch.Tensor] = []
    for block in oracle.blocks:
        block.get_submodule(norm).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    _, tape = oracle.forward(prompts()[0][None])
    for layer, seen in enumerate(read):
        mid = tape.frames[0].residuals["resid_mid", layer]
        assert torch.equal(mid, seen.reshape(mid.shape))
        assert (mid - tape.frames[0].residuals["resid_pre", layer]).abs().max() > 0.1


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_equals_one_forward_of_each_row_alone(name: str, steered: bool) -> None:
    """Every mode, replayed without cache, padding or batch mates; at most 1e-5 off (7.7e-6 seen).

    The bound is absolute: residuals are of order one to ten in all families.
    """
    oracle = Oracle(build(name), FAMILIES[name])
    rows, steps = prompts(), edits(oracle) if steered else []
    ids, mask = padded(rows, side="left")
    for mode in MODES:
        out = oracle.generate(ids, mask, steps, mode=mode, max_new_tokens=NEW)
        for row, prompt in enumerate(rows):
            whole = torch.cat([prompt, out.tokens[row]])[None]
            _, replay = oracle.forward(whole, None, [alone(edit, row) for edit in steps])
            for point in oracle.points:
                wanted = replay.frames[0].residuals[point][0, len(prompt) - 1 :]
                for step in range(NEW):
                    got = out.tape.step(point, WIDTH, step)[out.rows[row, step]]
                    assert (got - wanted[step]).abs().max() < 1e-5, (mode, row, point, step)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_edit_lands_where_it_says(name: str) -> None:
    oracle = Oracle(build(name), FAMILIES[name])
    ids, mask = padded(prompts(), side="left")
    _, base = oracle.forward(ids, mask)
    for edit in edits(oracle):
        _, tape = oracle.forward(ids, mask, [edit])
        before, after = (run.frames[0].residuals[edit.point].double() for run in (base, tape))
        untouched = ~edit.where[:, :WIDTH]
        assert torch.equal(before[untouched], after[untouched])
        units = edit.vectors.double() / edit.vectors.double().norm(dim=-1, keepdim=True)
        scores, was = after[:, -1] @ units.T, before[:, -1] @ units.T
        if edit.kind == "ablate":
            assert scores.abs().max() < 1e-6 < was.abs().max()
        elif edit.kind == "cap":
            low, high = (x.double()[:, None] for x in (edit.lower, edit.upper))  # type: ignore[union-attr]
            wanted = was.clamp(low, high)
            assert (scores - wanted).abs().max() < 1e-6 < (was - wanted).abs().max()
        else:
            shift = edit.coeff.double()[:, None] * edit.vectors.double().sum(0)  # type: ignore[union-attr]
            assert (after[:, -1] - before[:, -1] - shift).abs().max() < 2e-6
