"""Persona vectors and banks: what they refuse, what they copy, and the laws of their algebra."""

import copy
import dataclasses
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pvcore.errors import SiteError, VectorError
from pvcore.sites import Site, resid_mid, resid_post, resid_pre
from pvcore.vectors import PersonaVector, Provenance, VectorBank

SITES = (resid_post(3), resid_post(4), resid_post(5))


def numbers(n_sites=3, d_model=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_sites, d_model, generator=generator)


def vector(trait="evil", *, seed=0, sites=SITES, d_model=7, **kwargs):
    directions = kwargs.pop("directions", numbers(len(sites), d_model, seed))
    return PersonaVector(trait=trait, sites=sites, directions=directions, **kwargs)


def measured(trait="evil", **kwargs):
    return vector(
        trait,
        model_id="org/model",
        revision="r1",
        provenance=Provenance(thresholds={"trait": 50.0}, kept=9, dropped=1, seeds=(1, 2)),
        statistics={"auc": torch.tensor([0.7, 0.8, 0.9]), "rms": torch.tensor([1.0, 2.0, 3.0])},
        calibration={"resid_post.3": {"p50": 0.5}, "resid_post.5": {"p50": 1.5}, "n": 12},
        **kwargs,
    )


def refused(text, call):
    """The call raises one `VectorError`, and its text holds `text`."""
    with pytest.raises(VectorError, match=re.escape(text)):
        call()


def unchecked(cls, **values):
    """Construct as a program does, where no checker of annotations speaks before pvcore."""
    made = object.__new__(cls)
    for entry in dataclasses.fields(cls):
        if entry.name not in values:
            factory = entry.default_factory
            is_plain = factory is dataclasses.MISSING
            values[entry.name] = entry.default if is_plain else factory()
        object.__setattr__(made, entry.name, values[entry.name])
    made.__post_init__()
    return made


# construction


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_directions_become_a_float32_copy_of_their_own(dtype):
    given_rows = numbers().to(dtype)
    made = vector(directions=given_rows)
    assert made.directions.dtype == torch.float32
    assert torch.equal(made.directions, given_rows.float())
    before = made.directions.clone()
    given_rows.zero_()
    assert torch.equal(made.directions, before)
    assert before.abs().sum() > 0


def test_directions_are_contiguous_and_detached_whatever_is_given():
    transposed = numbers(7, 3).T.requires_grad_()
    assert not transposed.is_contiguous()
    made = vector(directions=transposed)
    assert made.directions.is_contiguous()
    assert not made.directions.requires_grad
    assert torch.equal(made.directions, transposed.detach())
    parameter = vector(directions=torch.nn.Parameter(numbers()))
    assert type(parameter.directions) is torch.Tensor


def test_a_row_repeated_without_copying_becomes_rows_of_its_own():
    made = vector(directions=numbers(1, 7).expand(3, 7))
    made.directions[0] = 0
    assert made.directions[1].abs().sum() > 0


def test_vectors_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        made = vector(directions=numbers())
    weight = torch.ones(3, 7, requires_grad=True)
    (weight * made.directions).sum().backward()
    assert torch.equal(weight.grad, made.directions)


def test_sites_keep_the_order_given():
    made = vector(sites=[resid_post(5), resid_mid(4), resid_pre(0)])
    assert made.sites == (resid_post(5), resid_mid(4), resid_pre(0))


def nan_at(row, value=math.nan):
    rows = numbers()
    rows[row, 2] = value
    return rows


CONSTRUCTIONS = {
    "rank 1": ({"directions": torch.ones(7)}, "of shape [7] for 3 sites; wanted [3, d_model]"),
    "rank 3": ({"directions": torch.ones(1, 3, 7)}, "of shape [1, 3, 7] for 3 sites"),
    "scalar": ({"directions": torch.tensor(1.0)}, "of shape [] for 3 sites"),
    "count": ({"directions": torch.ones(2, 7)}, "of shape [2, 7] for 3 sites"),
    "no width": ({"directions": torch.ones(3, 0)}, "of shape [3, 0] for 3 sites"),
    "nan": (
        {"directions": nan_at(1)},
        "directions of 'evil' that are NaN or infinite at resid_post.4",
    ),
    "inf": ({"directions": nan_at(2, -math.inf)}, "NaN or infinite at resid_post.5; wanted finite"),
    "f64 nan": ({"directions": nan_at(0).double()}, "NaN or infinite at resid_post.3"),
    "f64 range": ({"directions": torch.ones(3, 7).double() * 1e39}, "beyond the range of float32"),
    "norm range": (
        {"directions": torch.full((3, 7), 3e38)},
        "norm is beyond float32 at resid_post.3",
    ),
    "zero": (
        {"directions": numbers() * torch.tensor([[1.0], [0.0], [1.0]])},
        "got a direction of 'evil' of norm zero at resid_post.4; wanted",
    ),
    "f64 underflow": (
        {"directions": torch.ones(3, 7).double() * 1e-60},
        "norm zero at resid_post.3",
    ),
    "int": ({"directions": torch.ones(3, 7, dtype=torch.int64)}, "torch.int64"),
    "complex": ({"directions": torch.ones(3, 7, dtype=torch.complex64)}, "torch.complex64"),
    "bool": ({"directions": torch.ones(3, 7, dtype=torch.bool)}, "floating-point tensor"),
    "meta": ({"directions": torch.ones(3, 7, device="meta")}, "meta); wanted a dense"),
    "sparse": ({"directions": torch.ones(3, 7).to_sparse()}, "torch.sparse_coo"),
    "numpy": ({"directions": np.ones((3, 7))}, "as ndarray; wanted a torch tensor"),
    "no sites": ({"sites": ()}, "sites of 'evil': got no layers"),
    "site twice": ({"sites": (*SITES[:2], SITES[0])}, "sites of 'evil': got a site twice"),
    "bare layers": ({"sites": (3, 4, 5)}, "got sites (3, 4, 5); wanted a tuple of Sites"),
    "sites no list": ({"sites": 3}, "got sites 3; wanted a tuple of Sites"),
    "trait empty": ({"trait": ""}, "got trait ''; wanted a name"),
    "trait blank": ({"trait": " "}, "got trait ' '; wanted a name"),
    "trait slash": ({"trait": "a/b"}, "got trait 'a/b'; wanted a name such as 'evil', without '/'"),
    "trait newline": ({"trait": "a\nb"}, "got trait 'a\\nb'"),
    "trait surrogate": ({"trait": "a\ud800"}, "got trait 'a\\ud800'"),
    "trait number": ({"trait": 5}, "got trait 5; wanted a name"),
    "model id": ({"model_id": None}, "got model_id None; wanted text"),
    "revision": ({"revision": 3}, "got revision 3; wanted text or None"),
    "variant": (
        {"variant": "mean"},
        "got variant 'mean'; wanted one of response_mean, prompt_mean",
    ),
    "provenance": ({"provenance": {}}, "got provenance {}; wanted a Provenance"),
    "statistics": ({"statistics": [1.0]}, "got statistics [1.0]; wanted a mapping"),
    "statistic name": ({"statistics": {"": torch.ones(3)}}, "got statistic ''; wanted a name"),
    "statistic list": ({"statistics": {"auc": [1.0] * 3}}, "statistic 'auc' of 'evil' as list"),
    "statistic shape": (
        {"statistics": {"auc": torch.ones(2)}},
        "got statistic 'auc' of 'evil' of shape [2]; wanted [3]: give one number per site",
    ),
    "statistic nan": (
        {"statistics": {"auc": torch.tensor([1.0, math.nan, 1.0])}},
        "statistic 'auc' of 'evil' that are NaN or infinite at resid_post.4",
    ),
    "calibration": ({"calibration": 3}, "got calibration 3; wanted a mapping that JSON can hold"),
    "calibration key": ({"calibration": {3: 1}}, "got key in calibration 3; wanted text"),
    "calibration nan": (
        {"calibration": {"resid_post.3": {"p50": [1.0, math.nan]}}},
        "got calibration['resid_post.3']['p50'][1] nan; wanted text, a finite number",
    ),
    "calibration huge": ({"calibration": {"n": 10**400}}, "got calibration['n'] 1000000"),
    "calibration tensor": ({"calibration": {"p": torch.ones(1)}}, "got calibration['p'] tensor"),
}


@pytest.mark.parametrize(("change", "text"), CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_construction_refuses(change, text):
    good = {"trait": "evil", "sites": SITES, "directions": numbers()}
    assert unchecked(PersonaVector, **good) == PersonaVector(**good)
    refused(text, lambda: unchecked(PersonaVector, **{**good, **change}))


def test_a_circular_calibration_is_refused():
    circle = {}
    circle["again"] = circle
    refused("wanted at most 16 levels", lambda: vector(calibration=circle))


@pytest.mark.parametrize("trait", ["evil", "evil - humor", "Über-ich", "好奇心", "👩‍🔬", "x" * 500])
def test_users_name_their_own_traits(trait):
    assert vector(trait).trait == trait


PROVENANCES = {
    "judge": ({"judge": 3}, "got judge 3; wanted text"),
    "prompt_hash": ({"prompt_hash": None}, "got prompt_hash None; wanted text"),
    "note": ({"note": []}, "got note []; wanted text"),
    "kept": ({"kept": -1}, "got kept -1; wanted a count from 0, or None"),
    "kept bool": ({"kept": True}, "got kept True; wanted a count from 0, or None"),
    "dropped": ({"dropped": 1.5}, "got dropped 1.5; wanted a count from 0, or None"),
    "seeds": ({"seeds": 3}, "got seeds 3; wanted a tuple of whole numbers"),
    "seed": ({"seeds": (1, "2")}, "got seeds (1, '2'); wanted a tuple of whole numbers"),
    "thresholds": ({"thresholds": 50}, "got thresholds 50; wanted a finite number for each name"),
    "threshold": ({"thresholds": {"trait": math.inf}}, "got thresholds {'trait': inf}; wanted"),
}


@pytest.mark.parametrize(("change", "text"), PROVENANCES.values(), ids=PROVENANCES)
def test_provenance_refuses(change, text):
    refused(text, lambda: unchecked(Provenance, **change))


def test_provenance_is_a_value():
    made = unchecked(Provenance, thresholds={"trait": 50, "coherence": 60}, seeds=[3])
    assert made.seeds == (3,)
    assert made.thresholds == {"trait": 50.0, "coherence": 60.0}
    same = Provenance(thresholds={"coherence": 60, "trait": 50}, seeds=(3,))
    assert made == same
    assert hash(made) == hash(same)
    assert made.noting("a").noting("b").note == "a; b"
    assert made != made.noting("a")


def test_given_mappings_are_copied():
    given_calibration = {"resid_post.3": {"p50": (1, 2)}}
    auc = torch.tensor([0.7, 0.8, 0.9])
    made = vector(statistics={"auc": auc}, calibration=given_calibration)
    given_calibration["resid_post.3"]["p50"] = None
    auc.zero_()
    assert made.calibration == {"resid_post.3": {"p50": [1, 2]}}
    assert made.statistics["auc"].tolist() == pytest.approx([0.7, 0.8, 0.9])


# reading


def test_a_vector_is_frozen_and_has_no_room_for_typos():
    made = vector()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.trait = "humor"
    # A frozen slotted dataclass reports an unknown name as TypeError on Python 3.11.
    with pytest.raises((AttributeError, TypeError)):
        made.triat = "humor"


def test_at_chooses_rows_statistics_and_calibration_together():
    chosen = measured().at([5, Site("resid_post", 3)])
    assert chosen.sites == (resid_post(5), resid_post(3))
    assert torch.equal(chosen.directions, numbers()[[2, 0]])
    assert chosen.statistics["rms"].tolist() == [3.0, 1.0]
    assert set(measured().at(5).calibration) == {"resid_post.5", "n"}
    assert chosen.model_id == "org/model"
    assert chosen.provenance == measured().provenance


def test_direction_is_one_row_and_may_be_changed():
    made = vector()
    row = made.direction(4)
    assert torch.equal(row, numbers()[1])
    assert torch.equal(made.direction(resid_post(4)), row)
    row.zero_()
    assert made.direction(4).abs().sum() > 0


def test_missing_sites_are_named_with_those_there_are():
    text = (
        "got no direction of 'evil' at resid_post.9, resid_mid.3; it has resid_post.3, "
        "resid_post.4, resid_post.5: choose among these"
    )
    refused(text, lambda: vector().at([3, 9, resid_mid(3)]))
    refused("at resid_post.0; it has", lambda: vector().direction(0))
    with pytest.raises(SiteError, match="got a site twice"):
        vector().at([3, 3])
    with pytest.raises(SiteError, match="got no layers"):
        vector().at([])


def test_norms_and_units_agree_with_float64():
    rows = numbers().double().numpy()
    lengths = np.sqrt((rows**2).sum(axis=1))
    np.testing.assert_allclose(vector().norms.numpy(), lengths, rtol=2**-23)
    unit = vector().unit()
    np.testing.assert_allclose(unit.directions.numpy(), rows / lengths[:, None], rtol=2**-23)
    assert not np.allclose(lengths, 1, rtol=0.1)
    assert unit.provenance.note == "scaled to norm 1"


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_lengths_survive_where_squares_leave_float32(size):
    made = vector(directions=torch.full((3, 7), size))
    np.testing.assert_allclose(made.norms.numpy(), size * math.sqrt(7), rtol=1e-6)
    np.testing.assert_allclose(made.unit().norms.numpy(), 1, rtol=1e-6)
    np.testing.assert_allclose(made.cosine(made).numpy(), 1, rtol=1e-6)


def test_cosine_covers_the_shared_sites_in_order():
    ours = vector()
    theirs = vector("humor", seed=1, sites=(resid_post(5), resid_post(3), resid_post(8)))
    a, b = numbers()[[0, 2]].double().numpy(), numbers(seed=1)[[1, 0]].double().numpy()
    wanted = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(ours.cosine(theirs).numpy(), wanted, rtol=1e-6)
    assert abs(wanted[0] - wanted[1]) > 0.01
    assert ours.cosine(-ours).tolist() == pytest.approx([-1.0] * 3)


def test_cosine_compares_two_models_but_not_two_widths():
    base, tuned = vector(model_id="base"), vector(seed=1, model_id="tuned")
    assert base.cosine(tuned).shape == (3,)
    refused("wanted one d_model: choose vectors", lambda: base.cosine(vector(d_model=8)))
    refused("without a site in common", lambda: base.at(3).cosine(tuned.at(5)))


def test_layer_incremental_adds_up_to_the_vector():
    made = measured(sites=(resid_post(5), resid_post(3), resid_post(4)))
    steps = made.layer_incremental()
    rows = numbers()[[1, 2, 0]]
    assert steps.sites == SITES
    assert torch.equal(steps.direction(3), rows[0])
    assert torch.equal(steps.direction(4), rows[1] - rows[0])
    torch.testing.assert_close(steps.directions.sum(0), rows[2])
    assert steps.trait == "evil"
    assert not steps.statistics
    assert not steps.calibration
    assert steps.provenance.note == "layer-incremental: each layer minus the one below"
    assert torch.equal(made.at(4).layer_incremental().directions, made.at(4).directions)


def test_layer_incremental_needs_neighbouring_block_outputs():
    text = "wanted resid_post of neighbouring layers without a gap: choose them with .at("
    refused(text, lambda: vector().at([3, 5]).layer_incremental())
    refused(text, lambda: vector(sites=(resid_mid(3), *SITES[1:])).layer_incremental())
    refused(
        text, lambda: vector(sites=(resid_pre(4), resid_mid(4), resid_post(4))).layer_incremental()
    )
    refused(
        "norm zero at resid_post.4", lambda: vector(directions=torch.ones(3, 7)).layer_incremental()
    )


# algebra


def test_algebra_is_row_by_row_and_names_its_results():
    a, b, c = vector("evil"), vector("humor", seed=1), vector("apathy", seed=2)
    x, y = numbers(), numbers(seed=1)
    results = {
        "evil + humor": (a + b, x + y),
        "evil - humor": (a - b, x - y),
        "-evil": (-a, -x),
        "evil": (2 * a, 2 * x),
    }
    for name, (made, rows) in results.items():
        assert made.trait == name
        assert torch.equal(made.directions, rows)
        assert not torch.equal(made.directions, x)
    assert (a / 2).trait == "evil"
    assert torch.equal((a / 2).directions, x / 2)
    assert (a * 2) == (2 * a)
    assert (-(a - b)).trait == "-(evil - humor)"
    assert (a - (b + c)).trait == "evil - (humor + apathy)"
    assert (a + (-b)).trait == "evil + (-humor)"
    assert (a + b + c).trait == "evil + humor + apathy"
    negative, negative_sum = -a, -(a + b)
    assert (-negative).trait == "evil"
    assert (-negative_sum).trait == "-(-(evil + humor))"
    assert (-a.rename("-")).trait == "-(-)"
    assert a.rename("malice").trait == "malice"
    assert torch.equal(a.rename("malice").directions, x)


def test_algebra_keeps_what_still_holds_and_drops_the_rest():
    made = measured()
    grown, turned, negated = 2 * made, -2 * made, -made
    assert grown.statistics.keys() == {"auc", "rms"}
    assert grown.calibration == made.calibration
    assert grown.provenance.note == "multiplied by 2.0"
    assert (made / 4).provenance.note == "divided by 4.0"
    assert (made / 4).provenance.kept == 9
    for other in (turned, negated, made + measured("humor", seed=1)):
        assert not other.statistics
        assert not other.calibration
    assert turned.provenance.note == "multiplied by -2.0"
    assert negated.provenance == made.provenance.noting("multiplied by -1")
    humor = measured("humor", seed=1)
    hashes = f"content hashes {made.content_hash[:12]} - {humor.content_hash[:12]}"
    assert (made - humor).provenance == Provenance(note=hashes)
    assert (made - humor).revision == "r1"


def test_sums_take_rows_by_site_not_by_position():
    ours, theirs = vector(), vector("humor", seed=1, sites=tuple(reversed(SITES)))
    assert torch.equal((ours + theirs).directions, numbers() + numbers(seed=1).flip(0))
    assert (ours + theirs).sites == SITES


def test_sums_take_the_one_model_that_is_named():
    named = vector("humor", seed=1, model_id="org/model", revision="r1")
    assert (vector() + named).model_id == "org/model"
    assert (vector() + named).revision is None


SUMS = {
    "width": (vector("humor", d_model=8), "wanted one d_model: choose vectors of one model"),
    "sites": (vector("humor").at([3, 4]), "wanted two vectors of the same sites and variant"),
    "variant": (
        vector("humor", variant="prompt_last"),
        "'humor' (d_model 7, model '', prompt_last",
    ),
    "model": (vector("humor", model_id="b"), "wanted vectors of one model"),
    "nothing left": (
        vector("humor"),
        "got a direction of 'evil - humor' of norm zero at resid_post.3",
    ),
}


@pytest.mark.parametrize(("other", "text"), SUMS.values(), ids=SUMS)
def test_sums_refuse(other, text):
    refused(text, lambda: vector(model_id="a") - other)


@pytest.mark.parametrize("factor", [0, 0.0, -0.0, math.nan, math.inf, -math.inf, 10**400])
def test_factors_that_leave_no_vector_are_refused(factor):
    text = f"got 'evil' scaled by {factor!r:.60}; wanted a finite number other than zero"
    refused(text, lambda: vector() * factor)
    refused(text, lambda: factor * vector())
    refused(text, lambda: vector() / factor)


def test_factors_that_leave_float32_are_refused():
    refused("NaN or infinite at resid_post.3", lambda: vector() * 1e300)
    refused("norm zero at resid_post.3", lambda: vector() / 1e300)


def test_other_operands_are_refused():
    # The checker of annotations raises a TypeError too; without it pvcore's own error comes.
    for call in (lambda: vector() + 3, lambda: vector() * "2", lambda: vector() * vector()):
        with pytest.raises((VectorError, TypeError)):
            call()


rows_of_numbers = st.lists(
    st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), min_size=2, max_size=2
)
factors = st.floats(0.01, 100).flatmap(lambda size: st.sampled_from([size, -size]))


def drawn(trait, rows):
    directions = torch.tensor(rows)
    assume(bool((directions.abs().amax(dim=1) > 1e-3).all()))
    return PersonaVector(trait=trait, sites=(resid_post(0), resid_post(1)), directions=directions)


def apart(a, b, sign):
    """Whether `a + sign * b` is safely no zero vector."""
    return bool(((a.directions + sign * b.directions).norm(dim=1) > 1e-3).all())


@given(rows_of_numbers, rows_of_numbers, factors)
def test_scaling_is_linear(x, y, factor):
    a, b = drawn("a", x), drawn("b", y)
    assume(apart(a, b, 1))
    # Each side rounds three times, each by half a unit of the largest term, which is below 2e4.
    bound = 3 * 2**-24 * 200 * abs(factor)
    left, right = (factor * (a + b)).directions, (factor * a + factor * b).directions
    torch.testing.assert_close(left, right, rtol=0, atol=bound)
    assert not torch.equal(left, torch.zeros_like(left))


@given(rows_of_numbers, rows_of_numbers)
def test_signs_flip_exactly(x, y):
    a, b = drawn("a", x), drawn("b", y)
    assume(apart(a, b, -1))
    assert torch.equal((-(a - b)).directions, (b - a).directions)
    assert torch.equal((a - b).directions, (a + -b).directions)
    negative = -a
    assert (-negative).content_hash == a.content_hash
    assert (-a).content_hash != a.content_hash
    assert torch.equal((-a).norms, a.norms)
    assert torch.equal((-a).unit().directions, -a.unit().directions)


@given(rows_of_numbers, rows_of_numbers, factors, factors)
def test_cosine_knows_no_length(x, y, f, g):
    a, b = drawn("a", x), drawn("b", y)
    cosine = a.cosine(b)
    torch.testing.assert_close(b.cosine(a), cosine)
    # Scaling rounds each number by 2**-24 of itself, so a cosine moves by at most two of these.
    scaled = (f * a).cosine(g * b) * math.copysign(1, f * g)
    torch.testing.assert_close(scaled, cosine, rtol=0, atol=2**-22)
    assert cosine.abs().max() <= 1 + 2**-23


@given(rows_of_numbers, factors)
def test_a_factor_scales_norms_and_leaves_units(x, factor):
    a = drawn("a", x)
    torch.testing.assert_close((factor * a).norms, abs(factor) * a.norms)
    sign = math.copysign(1, factor)
    torch.testing.assert_close((factor * a).unit().directions, sign * a.unit().directions)
    torch.testing.assert_close(a.unit().norms, torch.ones(2))


# identity


def test_content_hash_is_of_what_acts():
    made = measured()
    same = PersonaVector(
        trait="evil", sites=SITES, directions=numbers().double(), model_id="org/model"
    )
    assert made.content_hash == same.content_hash
    assert re.fullmatch("[0-9a-f]{64}", made.content_hash)
    nudged = numbers()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(9.0))
    others = [
        dataclasses.replace(made, trait="humor"),
        dataclasses.replace(made, model_id="org/other"),
        dataclasses.replace(made, sites=(resid_post(3), resid_post(4), resid_post(6))),
        dataclasses.replace(made, variant="prompt_mean"),
        dataclasses.replace(made, directions=nudged),
        vector(sites=(resid_post(3),), directions=torch.ones(1, 6)),
        vector(sites=(resid_post(3),), directions=torch.ones(1, 3)),
    ]
    assert len({made.content_hash, *(other.content_hash for other in others)}) == 8


def test_content_hash_never_changes():
    made = vector(directions=torch.arange(1.0, 22.0).reshape(3, 7), model_id="org/model")
    assert made.content_hash == PINNED_HASH


PINNED_HASH = "640585358faecf85a088e237dd687a0fc2a5df4c0bc55bc029e514d4e12760b6"


def test_equality_is_by_value_and_never_raises():
    made = measured()
    assert made == measured()
    assert hash(made) == hash(measured())
    assert made != "evil"
    assert made != made.at([3])
    assert made != dataclasses.replace(made, statistics={})
    assert made != dataclasses.replace(made, revision="r2")
    assert made != dataclasses.replace(made, provenance=made.provenance.noting("x"))
    assert len({made, measured(), -made}) == 2
    turned = Provenance(thresholds={"b": 1.0, "a": 2.0})
    straight = Provenance(thresholds={"a": 2.0, "b": 1.0})
    assert vector(provenance=turned) == vector(provenance=straight)


def test_repr_is_short():
    assert repr(vector(d_model=7)) == (
        "PersonaVector('evil', 3 sites: resid_post.3, resid_post.4, resid_post.5, d_model=7, "
        f"model_id='', variant='response_mean', content_hash={vector().content_hash[:12]!r})"
    )
    many = vector(sites=tuple(map(resid_post, range(30))))
    assert "30 sites: resid_post.0, ..., resid_post.29," in repr(many)


def test_vectors_and_banks_travel_between_processes():
    made = measured()
    bank = VectorBank([made, vector("humor", seed=1)], layers=[4])
    for travel in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert travel(made) == made
        assert travel(made) is not made
        assert travel(bank) == bank
        assert torch.equal(travel(bank).directions, bank.directions)


# banks


def test_a_bank_stacks_by_depth():
    evil = vector("evil", sites=(resid_post(5), resid_post(3), resid_mid(5)))
    humor = vector("humor", seed=1, sites=(resid_mid(5), resid_post(3), resid_post(5)))
    bank = VectorBank([evil, humor])
    assert bank.sites == (resid_post(3), resid_mid(5), resid_post(5))
    assert bank.traits == ("evil", "humor")
    wanted = torch.stack([numbers()[[1, 2, 0]], numbers(seed=1)[[1, 0, 2]]], dim=1)
    assert torch.equal(bank.directions, wanted)
    assert bank.directions.is_contiguous()
    assert bank.d_model == 7
    lengths = wanted.double().norm(dim=2)
    torch.testing.assert_close(bank.norms, lengths.float())
    torch.testing.assert_close(bank.units, (wanted.double() / lengths.unsqueeze(2)).float())


def test_a_bank_holds_the_sites_asked_for_or_those_shared():
    evil, humor = (
        vector("evil"),
        vector("humor", sites=(resid_post(4), resid_post(5), resid_pre(0))),
    )
    assert VectorBank([evil, humor]).sites == (resid_post(4), resid_post(5))
    assert VectorBank([evil, humor], layers=[resid_post(5)]).sites == (resid_post(5),)
    assert VectorBank([evil, humor], layers=5).sites == (resid_post(5),)
    assert VectorBank(evil, layers=(5, 3)).sites == (resid_post(3), resid_post(5))
    assert VectorBank(evil).directions.shape == (3, 1, 7)
    assert VectorBank(VectorBank([evil, humor])) == VectorBank([evil, humor])
    assert VectorBank(v for v in (evil, humor)).traits == ("evil", "humor")


def test_a_bank_is_a_collection_of_vectors_by_name():
    evil, humor = vector("evil"), vector("humor", seed=1)
    bank = VectorBank([evil, humor])
    assert bank["humor"] == humor
    assert len(bank) == 2
    assert list(bank) == [evil, humor]
    assert "evil" in bank
    assert evil in bank
    assert "malice" not in bank
    assert -evil not in bank
    assert bank == VectorBank([vector("evil"), humor])
    assert hash(bank) == hash(VectorBank([vector("evil"), humor]))
    assert bank != VectorBank([humor, evil])
    assert bank != VectorBank([evil, humor], layers=[3])
    with pytest.raises(dataclasses.FrozenInstanceError):
        bank.sites = ()


def test_an_unknown_trait_is_answered_with_the_nearest():
    bank = VectorBank([vector("evil"), vector("sycophancy", seed=1)])
    refused(
        "got trait 'sycophantic'; this bank has evil, sycophancy: did you mean 'sycophancy'?",
        lambda: bank["sycophantic"],
    )
    refused("got trait 'humor'; this bank has evil, sycophancy: choose one", lambda: bank["humor"])


def test_the_model_of_a_bank_is_the_one_named():
    assert VectorBank(vector()).model_id == ""
    named = vector("humor", model_id="org/model")
    assert VectorBank([vector(), named]).model_id == "org/model"


BANKS = {
    "empty": ([], {}, "got vectors (); wanted persona vectors: one at least"),
    "same name": (
        [vector(), vector(seed=1)],
        {},
        "got two vectors named 'evil'; wanted one of each name: give one another with .rename",
    ),
    "widths": ([vector(), vector("humor", d_model=8)], {}, "'humor' (d_model 8, model ''"),
    "models": (
        [vector(model_id="a"), vector("humor", model_id="b")],
        {},
        "wanted vectors of one model: extract them on the same one",
    ),
    "none shared": ([vector().at(3), vector("humor").at(4)], {}, "without a site in common"),
    "missing": (
        [vector(), vector("humor").at(4)],
        {"layers": [3, 4]},
        "got no direction of 'humor' at resid_post.3; it has resid_post.4",
    ),
}


@pytest.mark.parametrize(("vectors", "kwargs", "text"), BANKS.values(), ids=BANKS)
def test_banks_refuse(vectors, kwargs, text):
    refused(text, lambda: VectorBank(vectors, **kwargs))
