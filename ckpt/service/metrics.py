"""What Prometheus is told of a service; one registry for each application."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST


class ServiceMetrics:
    """The counters of one service. Labels come from bounded sets, never from callers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter(
            "ckpt_requests_total",
            "Requests by operation and status.",
            ("operation", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "ckpt_request_seconds",
            "Seconds until an answer was ended; event streams and long polls are left out.",
            ("operation",),
            registry=registry,
        )
        self.under_way = Gauge("ckpt_requests_under_way", "Requests now.", registry=registry)
        self.waiting = Gauge(
            "ckpt_waiting", "Long polls and event streams now.", ("root",), registry=registry
        )
        self.refused = Counter(
            "ckpt_refused_total", "Requests refused, by the reason.", ("reason",), registry=registry
        )
        self.sent_bytes = Counter(
            "ckpt_downloaded_bytes_total", "Bytes of files sent.", ("root",), registry=registry
        )
        self.looks = Counter(
            "ckpt_looks_total",
            "Looks for new versions, by their outcome.",
            ("root", "outcome"),
            registry=registry,
        )
        self.latest = Gauge(
            "ckpt_latest_version",
            "Number of the newest version that was seen.",
            ("root", "run_name"),
            registry=registry,
        )
        self.jobs = Counter(
            "ckpt_jobs_total", "Jobs that ended here.", ("root", "kind", "state"), registry=registry
        )
        self.jobs_running = Gauge("ckpt_jobs_running", "Jobs that run here.", registry=registry)
        self.store_up = Gauge(
            "ckpt_store_up", "Whether the store answered last time.", ("root",), registry=registry
        )

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
