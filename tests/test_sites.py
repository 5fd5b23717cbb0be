"""Sites: names, orders and the conversions between counting conventions."""

import pytest

import pvcore as pv
from pvcore.errors import SiteError
from pvcore.sites import as_sites


def test_written_and_read():
    site = pv.Site("resid_post", 20)
    assert str(site) == "resid_post.20"
    assert pv.Site.parse("resid_post.20") == site == pv.resid_post(20)
    assert {pv.resid_pre(3), pv.Site.parse("resid_pre.3")} == {pv.resid_pre(3)}


@pytest.mark.parametrize(
    "text", ["resid_post", "resid_post.-1", "resid_post.1.2", "mlp.3", "resid_post.x", "", "."]
)
def test_bad_text_is_refused(text):
    with pytest.raises(SiteError, match=r"wanted KIND\.LAYER"):
        pv.Site.parse(text)


@pytest.mark.parametrize("layer", [-1, True, 1.0, None])
def test_bad_layer_is_refused(layer):
    with pytest.raises((SiteError, TypeError)):
        pv.Site("resid_post", layer)


def test_negative_layer_says_what_to_do():
    with pytest.raises(SiteError, match="got layer -1; wanted a block number counted from 0"):
        pv.resid_post(-1)


def test_depth_orders_sites_as_a_forward_reaches_them():
    shuffled = [
        pv.resid_post(0),
        pv.resid_mid(1),
        pv.resid_pre(0),
        pv.resid_pre(1),
        pv.resid_mid(0),
    ]
    assert [str(site) for site in sorted(shuffled)] == [
        "resid_pre.0",
        "resid_mid.0",
        "resid_post.0",
        "resid_pre.1",
        "resid_mid.1",
    ]


def test_conversions_are_named():
    assert pv.Site.from_hidden_states_index(20) == pv.resid_post(19)
    assert pv.Site.from_hidden_states_index(0) == pv.resid_pre(0)
    assert pv.resid_post(19).hidden_states_index == pv.resid_pre(20).hidden_states_index == 20
    assert pv.Site.from_paper_layer(20) == pv.resid_post(19)
    assert pv.resid_post(19).paper_layer == 20
    assert pv.Site.from_gguf_layer(20) == pv.resid_post(20)
    assert pv.resid_post(20).gguf_layer == 20


def test_conversions_refuse_what_has_no_counterpart():
    with pytest.raises(SiteError, match="hidden_states holds no resid_mid"):
        _ = pv.resid_mid(2).hidden_states_index
    with pytest.raises(SiteError, match="the paper numbers block outputs"):
        _ = pv.resid_pre(2).paper_layer
    for site in (pv.resid_post(0), pv.resid_pre(2)):
        with pytest.raises(SiteError, match=r"block outputs from resid_post\.1 on"):
            _ = site.gguf_layer
    for wrong in (0, -1, True, 1.0):
        with pytest.raises((SiteError, TypeError), match=r"llama\.cpp never|from_gguf_layer"):
            pv.Site.from_gguf_layer(wrong)
    with pytest.raises(SiteError, match="wanted a whole number from 1"):
        pv.Site.from_paper_layer(0)
    with pytest.raises(SiteError, match="wanted a whole number from 0"):
        pv.Site.from_hidden_states_index(-1)


def test_layers_become_sites():
    assert as_sites([3, pv.resid_mid(1)]) == (pv.resid_post(3), pv.resid_mid(1))
    with pytest.raises(SiteError, match="name each site once"):
        as_sites([1, pv.resid_post(1)])
    with pytest.raises(SiteError, match="wanted at least one"):
        as_sites([])
