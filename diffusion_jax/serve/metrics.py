"""The figures of /metrics, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from diffusion_jax.serve.engine import Engine

SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)


class Metrics:
    """The figures of one server.

    latency: seconds from a request to its last picture, by task.
    pictures: drawn.
    refused: requests that were not drawn, by HTTP status.
    """

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.latency = Histogram(
            "diffusion_request_seconds", "Time from a request to its last picture.", ["task"], None, buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.pictures = Counter("diffusion_pictures", "Pictures drawn.", registry=self.registry)
        self.refused = Counter("diffusion_refused", "Requests refused.", ["status"], registry=self.registry)
        for name, about, read in (
            ("diffusion_queue_requests", "Requests that wait.", lambda: len(engine.queue)),
            ("diffusion_queue_pictures", "Pictures that wait or are drawn.", lambda: engine.pictures_waiting),
            ("diffusion_programs_compiled", "Programs compiled by the worker.", lambda: engine.compiled.programs),
            ("diffusion_worker_restarts", "Times the worker was started again.", lambda: engine.restarts),
            ("diffusion_batch_seconds", "Mean time of a batch.", lambda: engine.seconds),
        ):
            Gauge(name, about, registry=self.registry).set_function(read)
