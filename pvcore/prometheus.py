"""Prometheus: projections and alarms as metrics of a process (extra `serve`)."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from pvcore.errors import ExportError
from pvcore.numerals import Number
from pvcore.stream import Step
from pvcore.transcripts import Transcript


class PrometheusExporter:
    """Metrics in a registry of one's own, or in prometheus_client's.

    `pvcore_replies_total`, `pvcore_alarms_total{trait, site}`, and by trait and site the histogram
    `pvcore_reply_projection` (mean over each reply) and the gauge `pvcore_projection_before_reply`
    (at the newest reply's last prompt token). `buckets` are bounds in units of the residual; with
    one below 0 the histogram has no sum, because Prometheus' sums never fall. `ExportError` for
    buckets out of order and for a registry that has such metrics, and it stays as it was.
    """

    def __init__(
        self,
        registry: Any = None,
        *,
        buckets: Sequence[Number] = (-16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16),
    ) -> None:
        try:
            import prometheus_client as client
        except ImportError as error:
            raise ExportError(
                "got no prometheus_client; install it with pip install 'pvcore[serve]'"
            ) from error
        self._client = client
        self.registry = client.REGISTRY if registry is None else registry
        try:
            self._make(buckets)
        except ValueError as error:
            raise ExportError(
                f"got metrics that cannot be made ({error}); wanted buckets in rising order, and "
                "one exporter for a registry: share it, or give registry=CollectorRegistry()"
            ) from error

    def _make(self, buckets: Sequence[Number]) -> None:
        client, place = self._client, ("trait", "site")
        of_one = {"labelnames": place, "registry": None}
        self._replies = client.Counter(
            "pvcore_replies", "Replies that were watched.", registry=None
        )
        self._alarms = client.Counter("pvcore_alarms", "Alarms that rang.", **of_one)
        self._mean = client.Histogram(
            "pvcore_reply_projection",
            "Mean projection over a reply, in units of the residual.",
            buckets=tuple(buckets),
            **of_one,
        )
        self._before = client.Gauge(
            "pvcore_projection_before_reply",
            "Projection at the last prompt token, in units of the residual.",
            **of_one,
        )
        with ExitStack() as undo:
            for metric in (self._replies, self._alarms, self._mean, self._before):
                self.registry.register(metric)
                undo.callback(self.registry.unregister, metric)
            undo.pop_all()

    def observe(self, transcript: Transcript) -> None:
        """Count the last reply of a conversation and the alarms that rang in it."""
        if not transcript.replies:
            return
        reply = transcript.replies[-1]
        self._replies.inc()
        for k, trait in enumerate(transcript.traits):
            for place, site in enumerate(transcript.sites):
                mean = float(reply.mean[k, place])
                if mean == mean:
                    self._mean.labels(trait, str(site)).observe(mean)
                self._before.labels(trait, str(site)).set(float(reply.before[k, place]))
        for alarm in transcript.alarms_of(reply):
            self._alarms.labels(alarm.trait, str(alarm.site)).inc()

    def observe_step(self, step: Step) -> None:
        """Count the alarms of one step of a stream, as they ring."""
        for alarm in step.alarms:
            self._alarms.labels(alarm.trait, str(alarm.site)).inc()

    def serve(self, port: int, address: str = "127.0.0.1") -> tuple[Any, Any]:
        """Answer scrapes over HTTP; the server and its thread, to be shut down by the caller.

        `ExportError` for an address and port that cannot be had.
        """
        try:
            server: tuple[Any, Any] = self._client.start_http_server(
                port, addr=address, registry=self.registry
            )
        except (OSError, OverflowError) as error:
            raise ExportError(
                f"got {address}:{port}, which cannot be listened at ({error}); wanted a free port "
                "of this machine"
            ) from error
        return server
