"""Prometheus: what a scrape finds, over HTTP, after replies and alarms."""

import socket
import sys
import urllib.request

import prometheus_client
import pytest

import pvcore as pv
from pvcore.errors import ExportError
from pvcore.prometheus import PrometheusExporter
from pvcore.stream import Step
from tests.test_exports import ALARM, transcript


def test_a_scrape_finds_replies_projections_and_alarms() -> None:
    exporter = PrometheusExporter(prometheus_client.CollectorRegistry(), buckets=(-1, 0, 1))
    one = transcript(cut=True)
    exporter.observe(one)
    exporter.observe(transcript(seed=5))
    step = Step(text=["x"], token_ids=one.replies[0].before.long()[0, :1], projections={})
    exporter.observe_step(step)
    server, thread = exporter.serve(0)
    try:
        address = f"http://127.0.0.1:{server.server_port}/metrics"
        with urllib.request.urlopen(address, timeout=10) as reply:
            text = reply.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert "pvcore_replies_total 2.0" in text
    place = '{site="resid_post.19",trait="evil"}'
    assert f"pvcore_alarms_total{place} 2.0" in text
    assert f"pvcore_reply_projection_count{place} 2.0" in text
    before = float(transcript(seed=5).replies[-1].before[0, 1])
    assert f"pvcore_projection_before_reply{place} {before}" in text
    means = [
        float(transcript(cut=c, seed=s).replies[-1].mean[0, 1]) for c, s in ((True, 0), (False, 5))
    ]
    for bound in (-1, 0, 1):
        labels = f'{{le="{bound:.1f}",site="resid_post.19",trait="evil"}}'
        count = sum(mean <= bound for mean in means)
        assert f"pvcore_reply_projection_bucket{labels} {count:.1f}" in text
    assert len({sum(mean <= bound for mean in means) for bound in (-1, 0, 1)}) > 1


def test_alarms_of_a_stream_count_as_they_ring() -> None:
    registry = prometheus_client.CollectorRegistry()
    exporter = PrometheusExporter(registry)
    ids = transcript().replies[0].before.long()[0, :1]
    for alarms in ((ALARM,), (), (ALARM, ALARM)):
        exporter.observe_step(Step(text=["x"], token_ids=ids, projections={}, alarms=alarms))
    labels = {"trait": "evil", "site": "resid_post.19"}
    assert registry.get_sample_value("pvcore_alarms_total", labels) == 3


def test_a_registry_holds_one_exporter_or_none_of_one() -> None:
    registry = prometheus_client.CollectorRegistry()
    with pytest.raises(ExportError, match="Buckets not in sorted order"):
        PrometheusExporter(registry, buckets=(4, 1))
    assert list(registry.collect()) == []
    prometheus_client.Gauge("pvcore_reply_projection", "somebody else's", registry=registry)
    with pytest.raises(ExportError, match="one exporter for a registry"):
        PrometheusExporter(registry)
    assert [metric.documentation for metric in registry.collect()] == ["somebody else's"]
    PrometheusExporter(registry := prometheus_client.CollectorRegistry()).observe(transcript())
    with pytest.raises(ExportError, match="Duplicated"):
        PrometheusExporter(registry)
    assert registry.get_sample_value("pvcore_replies_total") == 1


def test_a_port_that_is_taken_is_one_error() -> None:
    exporter = PrometheusExporter(prometheus_client.CollectorRegistry())
    refused = pytest.raises(ExportError, match="cannot be listened at")
    with socket.create_server(("127.0.0.1", 0)) as taken, refused:
        exporter.serve(taken.getsockname()[1])
    with pytest.raises(ExportError, match=r"127.0.0.1:70000, which cannot be listened at"):
        exporter.serve(70000)


def test_a_missing_package_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ExportError, match=r"pip install 'pvcore\[serve\]'"):
        PrometheusExporter()
    assert issubclass(ExportError, pv.PvcoreError)
