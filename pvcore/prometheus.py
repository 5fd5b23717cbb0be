"""Prometheus: projections and alarms as metrics of a process (extra `serve`)."""

from collections.abc import Sequence
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
    one below 0 the histogram has no sum, because Prometheus' sums never fall.
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
        place = ("trait", "site")
        self._replies = client.Counter(
            "pvcore_replies", "Replies that were watched.", registry=self.registry
        )
        self._alarms = client.Counter(
            "pvcore_alarms", "Alarms that rang.", place, registry=self.registry
        )
        self._mean = client.Histogram(
            "pvcore_reply_projection",
            "Mean projection over a reply, in units of the residual.",
            place,
            buckets=tuple(buckets),
            registry=self.registry,
        )
        self._before = client.Gauge(
            "pvcore_projection_before_reply",
            "Projection at the last prompt token, in units of the residual.",
            place,
            registry=self.registry,
        )

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
        """Answer scrapes over HTTP; the server and its thread, to be shut down by the caller."""
        server: tuple[Any, Any] = self._client.start_http_server(
            port, addr=address, registry=self.registry
        )
        return server
