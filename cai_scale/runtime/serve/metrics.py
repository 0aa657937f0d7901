"""What the server counts, for Prometheus."""

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["CONTENT_TYPE", "Metrics"]

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "cai_scale_requests",
            "Requests, by route and HTTP status (499: the client left).",
            ["route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "cai_scale_request_seconds",
            "From a request's first line to the end of its response.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "cai_scale_first_token_seconds",
            "From an accepted request to the first token of its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter("cai_scale_tokens", "Tokens of finished answers.", registry=registry)
        self.queue = Gauge("cai_scale_queue", "Answers that wait for a row.", registry=registry)
        self.rows = Gauge("cai_scale_rows", "Answers being written.", registry=registry)

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
