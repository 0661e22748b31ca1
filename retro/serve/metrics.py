"""What a server counts, for Prometheus. The only importer of prometheus_client."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters and histograms of one server; times in seconds."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("retro_requests_total", "Answered requests.", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "retro_request_seconds", "From a request to its last byte.", ["route"], buckets=_SLOW, registry=registry
        )
        self.encoding = Histogram(
            "retro_encoding_seconds", "Encoding of the queries of one search.", buckets=_QUICK, registry=registry
        )
        self.searching = Histogram(
            "retro_search_seconds", "Search by encoded queries or words.", buckets=_QUICK, registry=registry
        )
        self.retrieval = Histogram(
            "retro_retrieval_seconds",
            "From a question to its passages, waiting included.",
            buckets=_QUICK,
            registry=registry,
        )
        self.step = Histogram(
            "retro_step_seconds", "One step of decoding, for all sequences together.", buckets=_QUICK, registry=registry
        )
        self.decoding = Histogram(
            "retro_decoding_seconds",
            "From a prompt to its last token, waiting included.",
            buckets=_SLOW,
            registry=registry,
        )
        self.first_token = Histogram(
            "retro_first_token_seconds", "From a prompt to its first token.", buckets=_SLOW, registry=registry
        )
        self.prompt_tokens = Counter("retro_prompt_tokens_total", "Tokens of prompts.", registry=registry)
        self.tokens = Counter("retro_generated_tokens_total", "Tokens that were generated.", registry=registry)
        self.waiting = Gauge("retro_queue_length", "Sequences that wait for a place.", registry=registry)
        self.running = Gauge("retro_running_sequences", "Sequences that are decoded.", registry=registry)
        self.documents = Gauge("retro_index_documents", "Documents of the index.", registry=registry)

    def exposition(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
