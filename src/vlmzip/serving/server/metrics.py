"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vlmzip.serving.server.progress import Progress, Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vlmzip_requests",
            "Answered requests; status 499: the client had gone",
            ["path", "status"],
            registry=registry,
        )
        self.broken_streams = Counter(
            "vlmzip_broken_streams", "Streams that ended early, by reason", ["reason"], registry=registry
        )
        self.visual = Counter(
            "vlmzip_visual_tokens", "Visual tokens, before and after compression", ["method", "when"], registry=registry
        )
        self.text = Counter("vlmzip_text_tokens", "Text tokens of prompts", registry=registry)
        self.generated = Counter("vlmzip_generated_tokens", "Tokens of answers", registry=registry)
        self.first = Histogram(
            "vlmzip_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.wait = Histogram(
            "vlmzip_queue_wait_seconds",
            "Seconds from a request's arrival to the start of its batch",
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "vlmzip_batch_size", "Requests of a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.queue = Gauge("vlmzip_queue_length", "Requests that wait for the model", registry=registry)

    def count_answer(self, method: str, progress: Progress, usage: Usage) -> None:
        """Count the tokens and times of an answer, complete or not. `method` is a name without settings."""
        self.visual.labels(method, "before").inc(usage.visual.before)
        self.visual.labels(method, "after").inc(usage.visual.after)
        self.text.inc(usage.text_tokens)
        self.generated.inc(usage.new_tokens)
        if progress.first is not None:
            self.first.observe(progress.first - progress.arrived)
        if progress.started is not None:
            self.wait.observe(progress.started - progress.arrived)

    def text_format(self) -> bytes:
        return generate_latest(self.registry)
