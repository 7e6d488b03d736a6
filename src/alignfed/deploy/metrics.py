"""Figures of a server for Prometheus, read at each scrape from what its processes leave on disk.

So they are there while the ServerApp is down, too. The endpoint has no lock of its own and listens
on loopback unless told otherwise.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from alignfed.deploy.directory import ServerDirectory
from alignfed.deploy.settings import ServerSettings
from alignfed.deploy.status import server_picture
from alignfed.errors import DeploymentError

_GAUGES = {
    "version": ("alignfed_server_version", "Server versions published."),
    "in_flight": ("alignfed_tasks_in_flight", "Tasks under way."),
    "buffered": ("alignfed_uploads_buffered", "Accepted uploads that wait for a flush."),
    "staleness_mean": ("alignfed_staleness_mean", "Mean staleness of the last flush."),
    "staleness_max": ("alignfed_staleness_max", "Greatest staleness of the last flush."),
    "loss": ("alignfed_evaluation_loss_nats", "Loss of the last evaluation."),
    "score": ("alignfed_evaluation_score", "Score of the last evaluation."),
    "evaluating": ("alignfed_evaluations_waiting", "Versions that wait to be scored."),
    "age_s": ("alignfed_status_age_seconds", "Age of the ServerApp's own figures."),
}
_COUNTERS = {
    "received": ("alignfed_uploads_received", "Answers to tasks, accepted or refused."),
    "accepted": ("alignfed_uploads_accepted", "Uploads accepted."),
    "sent_bytes": ("alignfed_sent_bytes", "Bytes sent to devices."),
    "received_bytes": ("alignfed_received_bytes", "Bytes received from devices."),
}
_OF_DEVICES = {
    "received": ("alignfed_device_uploads", "Uploads received from a device."),
    "refused": ("alignfed_device_uploads_refused", "Uploads of a device that were refused."),
    "failures": ("alignfed_device_failures", "Tasks of a device that ended without an upload."),
}


class FilesCollector(Collector):
    """Makes metrics of a server's files."""

    def __init__(
        self,
        directory: ServerDirectory,
        settings: ServerSettings,
        now: Callable[[], datetime.datetime],
    ) -> None:
        """Read the files of ``directory`` whenever asked; ``now`` has a time zone."""
        self._directory = directory
        self._settings = settings
        self._now = now

    def describe(self) -> Iterator[Metric]:
        """Yield nothing, so that registering does not read the files."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Yield the present figures."""
        picture = server_picture(self._directory, self._settings, self._now())
        run = picture["run"] or {}
        for key, (name, words) in _GAUGES.items():
            if run.get(key) is not None:
                yield GaugeMetricFamily(name, words, value=float(run[key]))
        for key, (name, words) in _COUNTERS.items():
            if run.get(key) is not None:
                yield CounterMetricFamily(name, words, value=float(run[key]))
        yield _counter(
            "alignfed_uploads_refused", "Refused uploads.", "reason", picture["refusals"]
        )
        yield _counter(
            "alignfed_proxy_requests", "Requests at the proxy.", "outcome", picture["proxy"]
        )
        yield from self._of_processes(picture["processes"])
        yield from self._of_devices(picture["devices"])
        left = GaugeMetricFamily(
            "alignfed_certificate_days_left", "Days until a certificate ends.", labels=["name"]
        )
        for name, days in picture["certificate_days"].items():
            left.add_metric([name], days)
        yield left

    def _of_processes(self, processes: Mapping[str, Any]) -> Iterator[Metric]:
        up = GaugeMetricFamily("alignfed_process_up", "Whether it runs.", labels=["process"])
        restarts = CounterMetricFamily(
            "alignfed_process_restarts", "Starts after the first.", labels=["process"]
        )
        for name, one in processes.items():
            up.add_metric([name], float(one["pid"] is not None))
            restarts.add_metric([name], float(one["restarts"]))
        yield up
        yield restarts

    def _of_devices(self, devices: list[dict[str, Any]]) -> Iterator[Metric]:
        online = GaugeMetricFamily(
            "alignfed_device_online", "Whether it can be reached.", labels=["device"]
        )
        present = [one for one in devices if one["state"] != "revoked"]
        for one in present:
            online.add_metric([one["name"]], float(one["state"] == "online"))
        yield online
        for key, (name, words) in _OF_DEVICES.items():
            family = CounterMetricFamily(name, words, labels=["device"])
            for one in present:
                family.add_metric([one["name"]], float(one.get(key, 0)))
            yield family


class Endpoint:
    """A running Prometheus endpoint."""

    def __init__(self, directory: ServerDirectory, settings: ServerSettings) -> None:
        """Listen where the settings say.

        Raises:
            DeploymentError: the port is taken.
        """
        registry = CollectorRegistry()
        registry.register(
            FilesCollector(directory, settings, lambda: datetime.datetime.now(datetime.UTC))
        )
        try:
            self._server, self._thread = start_http_server(
                settings.metrics_port, settings.metrics_bind, registry
            )
        except OSError as error:
            raise DeploymentError(
                f"{settings.metrics_bind}:{settings.metrics_port} cannot be listened on:"
                f" {error.strerror}; change metrics_port in {directory.settings}, or set it to 0",
                port=settings.metrics_port,
            ) from error

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def _counter(name: str, words: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, words, labels=[label])
    for value, number in counts.items():
        family.add_metric([value], float(number))
    return family
