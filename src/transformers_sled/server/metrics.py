"""Figures of the service for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class ServiceMetrics:
    """What the service counts and times, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("sled_requests", "Requests answered", ["protocol", "status"], registry=self.registry)
        self.streams = Gauge("sled_active_streams", "Texts being spoken", ["model"], registry=self.registry)
        self.queue = Gauge("sled_queued_streams", "Texts waiting for their turn", ["model"], registry=self.registry)
        self.connections = Gauge("sled_websockets", "Open WebSockets", registry=self.registry)
        self.cancellations = Counter(
            "sled_cancellations", "Texts given up before they were spoken", ["model"], registry=self.registry
        )
        self.speech_seconds = Counter("sled_speech_seconds", "Speech made", ["model"], registry=self.registry)
        self.underrun_seconds = Counter(
            "sled_underrun_seconds",
            "Time in which a listener who plays speech as it comes waited for more",
            ["model"],
            registry=self.registry,
        )
        self.time_to_first_audio = Histogram(
            "sled_time_to_first_audio_seconds",
            "From the text, or the first of it, to the first audio",
            ["model"],
            buckets=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30),
            registry=self.registry,
        )
        self.real_time_factor = Histogram(
            "sled_real_time_factor",
            "Time from the first audio to the end over the duration of the speech",
            ["model"],
            buckets=(0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 5),
            registry=self.registry,
        )
