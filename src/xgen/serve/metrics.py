"""What the server and its engine did, in the text format that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.exposition import generate_latest

from xgen.infer.statistics import Histogram, Statistics

__all__ = ["CONTENT_TYPE", "exposition"]

GAUGES = {
    "slots": "Rows that can be under way at once.",
    "running": "Requests that hold a slot.",
    "waiting": "Requests that wait for one.",
    "pages_total": "Pages of the key-value cache.",
    "pages_used": "Pages held by rows.",
    "pages_cached": "Pages held by the prefix cache alone.",
}
COUNTERS = {
    "prompt_tokens": "Tokens of prompts that came into the cache, the cached ones included.",
    "cached_tokens": "Tokens of prompts that were there from an earlier request.",
    "output_tokens": "Tokens drawn.",
    "rejected": "Requests refused because the queue was full.",
    "preemptions": "Rows put back into the queue for want of pages.",
    "steps": "Steps of the engine.",
    "prefill_calls": "Calls of prefill programs.",
    "computed_tokens": "Tokens that went through them, recomputed ones included.",
    "prefill_seconds": "Time in them.",
    "decode_calls": "Calls of decode programs.",
    "decoded_rows": "Rows that went through them.",
    "decode_seconds": "Time in them.",
}
HISTOGRAMS = {
    "queue_seconds": "From a request's arrival to its slot.",
    "first_token_seconds": "From a request's arrival to its first token.",
    "token_seconds": "Between the tokens of a request, on average.",
    "request_seconds": "From a request's arrival to its end.",
}


class _Collector:
    def __init__(self, statistics: Statistics | None, answered: Mapping[tuple[str, int], int], under_way: int) -> None:
        self._statistics, self._answered, self._under_way = statistics, answered, under_way

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("xgen_http_requests_under_way", "HTTP requests not yet answered.", self._under_way)
        answered = CounterMetricFamily(
            "xgen_http_requests", "HTTP requests answered; 499: the asker went away.", labels=["path", "status"]
        )
        for (path, status), count in sorted(self._answered.items()):
            answered.add_metric([path, str(status)], count)
        yield answered
        yield GaugeMetricFamily("xgen_ready", "Whether the model is loaded.", float(self._statistics is not None))
        if self._statistics is not None:
            yield from _engine(self._statistics)


def _engine(statistics: Statistics) -> Iterator[Metric]:
    for name, told in GAUGES.items():
        yield GaugeMetricFamily(f"xgen_{name}", told, getattr(statistics, name))
    for name, told in COUNTERS.items():
        yield CounterMetricFamily(f"xgen_{name}", told, getattr(statistics, name))
    finished = CounterMetricFamily("xgen_requests", "Requests by how they ended.", labels=["finished"])
    for reason, count in sorted(statistics.finished.items()):
        finished.add_metric([reason], count)
    yield finished
    for name, told in HISTOGRAMS.items():
        yield _histogram(f"xgen_{name}", told, getattr(statistics, name))


def _histogram(name: str, told: str, histogram: Histogram) -> Metric:
    buckets, count = [], 0
    for bound, within in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        count += within
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(count)))
    return HistogramMetricFamily(name, told, buckets=buckets, sum_value=histogram.total)


def exposition(statistics: Statistics | None, answered: Mapping[tuple[str, int], int], under_way: int) -> bytes:
    """The metrics as text. `statistics` are None before the model is loaded; `answered` counts requests by path and
    status."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(statistics, answered, under_way))
    return generate_latest(registry)
