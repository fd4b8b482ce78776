"""Every metric udbad exports: one table, the counters behind it, and the text Prometheus reads.

The table METRICS is what docs/metrics.md, dashboard, rules and tests are checked against. A mount process fills
`Samples` (metric name to label values and numbers) from plain counters at scrape time and sends them as
JSON; whoever serves HTTP turns the samples of all mounts into metric families, each with the label
`mount` in front. Only this module imports prometheus_client, and only when something is to be served, so
a mount process without metrics= never loads it.

Invariants: nothing here is on the path of a request but `Counts.observe`; a metric that is not in the
table is never exported; label values come from closed sets, from the configuration, or from errno(3);
names of hosts come from these, a bounded number.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client.core import Metric as Family

DEPTH_BUCKETS: Final = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48)
REQUEST_BUCKETS: Final = (
    0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0,
)  # fmt: skip
COPYUP_BUCKETS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0,
)  # fmt: skip
INVALIDATION_BUCKETS: Final = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0)
PAUSE_BUCKETS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

REQUEST_RESULTS: Final = ("ok", "error", "bug")
COHERENCE_STATES: Final = ("healthy", "silent", "limited", "degraded")
EVENT_KINDS: Final = ("names", "content", "attributes", "gone")
LOOKUP_OUTCOMES: Final = ("found", "negative", "whiteout")

Value = float | Sequence[float]
"""A number; of a histogram the counts of each bucket, of what is above the last one, and the sum."""
Samples = dict[str, list[tuple[Sequence[str], Value]]]
"""Metric name to (values of its labels without `mount`, value)."""


class Counts:
    """A histogram of plain numbers. No locking: each instance has one writer at a time."""

    __slots__ = ("bounds", "buckets", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """bounds: upper bounds of the buckets, ascending, in the unit of what is observed."""
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.buckets[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def value(self) -> list[float]:
        """As a `Value`: buckets, then the sum."""
        return [*self.buckets, self.sum]


class Metric(NamedTuple):
    """One row of the table. labels: beside `mount`. origin: who knows it (see `Reading`)."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    why: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    origin: Literal["mount", "keeper", "proc"] = "mount"


METRICS: Final = (
    Metric("udbad_mount_up", "gauge", "1 when the mount process answered this scrape, else 0.",
           "Users of a mount that is down get errors or hang.", origin="keeper"),
    Metric("udbad_mount_restarts_total", "counter", "Times another process was started for the mount.",
           "A restart loop looks healthy between two crashes.", origin="keeper"),
    Metric("udbad_takeover_duration_seconds", "histogram",
           "Time from the end of a mount process until another one has gone on with its mount.",
           "How long its users have waited; they have met no error.", (), PAUSE_BUCKETS),
    Metric("udbad_requests_resent_total", "counter",
           "Requests that the kernel has sent once more, to another process than the one that ended.",
           "What was under way at the ends of processes."),
    Metric("udbad_requests_recovered_total", "counter",
           "Of those, changes that had been begun: decided by what is on the branches, or answered as it was noted.",
           "What would have been done twice.", ("how",)),
    Metric("udbad_requests_refused_total", "counter",
           "Requests that were answered EIO because every process died of them, or of others that asked for the same.",
           "Must stay 0; the log names the first of each kind."),
    Metric("udbad_state_bytes", "gauge", "Memory that keeps what another process needs to go on with the mount; "
           "0: nobody can.", "Grows with the inodes that the kernel knows."),
    Metric("udbad_config_last_reload_success", "gauge", "1 when the configuration was read without an error, else 0.",
           "After a failed reload the old configuration goes on.", origin="keeper"),
    Metric("udbad_config_last_reload_timestamp_seconds", "gauge",
           "When the configuration in use was read, in seconds since 1970.",
           "Shows whether a change has arrived.", origin="keeper"),
    Metric("udbad_mount_info", "gauge", "Always 1; what the mount is.",
           "Which coherence promise and policies the other numbers belong to.",
           ("mode", "mount_point", "create", "copyup")),
    Metric("udbad_build_info", "gauge", "Always 1; what the mount process runs.",
           "A process that was not restarted after an upgrade.", ("version", "python", "kernel")),
    Metric("udbad_requests_total", "counter",
           "Requests of the kernel answered: ok, error (with an errno, ENOENT included) or bug (EIO for our fault).",
           "What the load is; bug must stay 0.", ("op", "result")),
    Metric("udbad_request_duration_seconds", "histogram", "Time from a request to its answer.",
           "What users wait for.", ("op",), REQUEST_BUCKETS),
    Metric("udbad_lookup_depth", "histogram",
           "Branches asked for one name (0: the merged view knew; 63: 63 or more).",
           "The price of many branches, and what the views save.", ("outcome",), DEPTH_BUCKETS),
    Metric("udbad_copyup_duration_seconds", "histogram", "Time of the copy-up of a regular file.",
           "The first write to a lower file waits this long.", ("trigger", "method"), COPYUP_BUCKETS),
    Metric("udbad_copyup_bytes_total", "counter", "Bytes written by copy-ups; none for a reflink.",
           "Space and bandwidth that copy-ups take."),
    Metric("udbad_copyups_in_flight", "gauge", "Copy-ups under way in the background.",
           "One that stays is stuck on a slow branch."),
    Metric("udbad_copyup_failures_total", "counter",
           "Copy-ups that failed; ESTALE and EEXIST (a direct change was faster) are tried again.",
           "ENOSPC and EIO here are errors users have seen.", ("errno",)),
    Metric("udbad_coherence_events_total", "counter",
           "Events of branch directories: names, content, attributes, gone (the directory itself).",
           "Who changes the branches directly, and how much.", ("branch", "kind")),
    Metric("udbad_coherence_echoes_total", "counter", "Events of what the kernel had been told already.",
           "Mostly our own changes coming back; they cost no invalidation."),
    Metric("udbad_coherence_overflows_total", "counter", "Times the event queue overflowed; all caches were dropped.",
           "Right but slow; raise fs.inotify.max_queued_events."),
    Metric("udbad_redirects_unusable_total", "counter",
           "Redirects of renamed directories that were met and lead nowhere for what they say.",
           "Such a directory shows what it has above only; the log names it, and `udbad fsck` removes the redirect."),
    Metric("udbad_coherence_lag_seconds", "gauge", "Age of the oldest event that the kernel was not told of yet.",
           "How old an answer from the kernel's cache can be."),
    Metric("udbad_coherence_state", "gauge",
           "1 for the state a branch is in: healthy, silent (its file system sends no events), "
           "limited (no more watches), degraded (no events at all); all but healthy are served as reval.",
           "The mode asked for is not the one in use.", ("branch", "state")),
    Metric("udbad_invalidations_total", "counter",
           "Notifications to the kernel: entry (a name), expire (a name to be asked for again), attributes, "
           "data (pages), epoch (all names).",
           "Caches that were dropped; a storm makes everything slow.", ("kind",)),
    Metric("udbad_invalidation_latency_seconds", "histogram", "Time from reading an event until the kernel was told.",
           "The window in which a cached answer is old.", (), INVALIDATION_BUCKETS),
    Metric("udbad_replayed_events_total", "counter",
           "Direct changes that watchers of the union were shown: create, delete, rename, attributes, content.",
           "What the helper of `replay` is busy with.", ("kind",)),
    Metric("udbad_replays_dropped_total", "counter",
           "Direct changes that `replay` was to show and did not: too many at once, or refused by the kernel.",
           "Watchers have missed an event; caches are right all the same."),
    Metric("udbad_hosts_believed", "gauge",
           "Of a branch whose changes other hosts tell: 1 while it is believed, 0 while it is served as reval.",
           "The mode asked for is not the one in use.", ("branch",)),
    Metric("udbad_hosts_lag_seconds", "gauge",
           "Seconds since the moment up to which a host has told everything that changed on the branch.",
           "A few seconds are usual; more than `bound`, and the branch is not believed.", ("branch", "host")),
    Metric("udbad_hosts_heartbeat_seconds", "gauge", "Seconds since anything was heard of the branch's other hosts.",
           "The bus, the network or the file server's `udbad watch` is away.", ("branch",)),
    Metric("udbad_hosts_gaps_total", "counter",
           "Times that a message may have been missed; the first one is the beginning.",
           "From then on the branch is served as reval for a while.", ("branch",)),
    Metric("udbad_hosts_hints_total", "counter", "Paths of the branch that other hosts told the mount to look at.",
           "What they change, and how much.", ("branch",)),
    Metric("udbad_watches", "gauge", "Watches this mount holds.", "Memory of the kernel, about 1 KiB each."),
    Metric("udbad_watch_limit", "gauge", "fs.inotify.max_user_watches.",
           "At the limit directories are served as reval."),
    Metric("udbad_inodes", "gauge", "Inodes of the mount that the kernel or we know.", "Memory of the process."),
    Metric("udbad_directory_views", "gauge", "Directories whose merged names are in memory.",
           "Lookups in them ask no branch."),
    Metric("udbad_open_handles", "gauge", "Open files and directories of the mount.", "Who keeps it busy."),
    Metric("udbad_branch_up", "gauge", "1 when the branch answers and its directory still exists, else 0.",
           "What only it has is EIO until it answers again.", ("branch",)),
    Metric("udbad_branch_writable", "gauge", "1 when the mount writes to the branch, else 0.",
           "Only there does free space matter; read-only media are always full.", ("branch",)),
    Metric("udbad_branch_free_bytes", "gauge", "Bytes available to users on the file system of the branch.",
           "Writes and copy-ups fail with ENOSPC.", ("branch",)),
    Metric("udbad_branch_size_bytes", "gauge", "Size of the file system of the branch.",
           "What the free bytes are to be compared with.", ("branch",)),
    Metric("process_cpu_seconds_total", "counter", "User and system CPU time of the mount process.",
           "One process serves one mount on one core.", origin="proc"),
    Metric("process_resident_memory_bytes", "gauge", "Resident memory of the mount process.",
           "Grows with the inodes that the kernel knows.", origin="proc"),
    Metric("process_virtual_memory_bytes", "gauge", "Virtual memory of the mount process.",
           "Compare with resident memory.", origin="proc"),
    Metric("process_start_time_seconds", "gauge", "When the mount process started, in seconds since 1970.",
           "Restarts that nobody counted.", origin="proc"),
    Metric("process_open_fds", "gauge", "Descriptors of the mount process, a few for each directory known.",
           "EMFILE is near when this is near process_max_fds.", origin="proc"),
    Metric("process_max_fds", "gauge", "Descriptors that the mount process may have.",
           "What process_open_fds is to be compared with.", origin="proc"),
)  # fmt: skip
"""Every metric, in the order of the page. Conventions: base units, _total for counters."""

BY_NAME: Final = {metric.name: metric for metric in METRICS}


class Reading(NamedTuple):
    """What is known of one mount at a scrape.

    samples: what the mount process says, None when it did not answer in time. pid: that process, None when
    there is none. keeper: what whoever keeps the process knows (metrics of origin keeper but mount_up).
    """

    samples: Samples | None
    pid: int | None
    keeper: Samples


Source = Callable[[], Mapping[str, Reading]]
"""Reads every mount, by name, from any thread; takes a bounded time and does not fail."""


class Server:
    """The HTTP endpoint, in threads of its own. port: where it listens, also when 0 was asked for."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        self.port = server.server_port

    def close(self) -> None:
        """Stop listening; scrapes under way end by themselves."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


PATH: Final = "/metrics"
"""Of the page; there is no other."""
CLIENT_SECONDS: Final = 10.0
"""How long a client may keep a thread by being silent."""


def serve(host: str, port: int, source: Source, tls: Mapping[str, str] | None = None) -> Server:
    """Serve http://host:port/metrics, text or OpenMetrics, gzip when the client takes it; 404 elsewhere.

    port: 0 takes a free one. tls: certfile, keyfile, and for client certificates client_cafile or client_capath;
    clients must then have one. Raises OSError when it cannot listen or the certificate cannot be read.
    """
    import ssl

    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(_Collector(source))
    options: dict[str, Any] = dict(tls or {})
    if options.keys() & {"client_cafile", "client_capath"}:
        options["client_auth_required"] = True
    if options:
        # Looked at first: the library would leave its socket open when this fails.
        ssl.create_default_context().load_cert_chain(options["certfile"], options["keyfile"])
    server, thread = start_http_server(port, addr=host, registry=registry, **options)
    if isinstance(server.socket, ssl.SSLSocket):
        # Else accept() would wait for the handshake of a silent client, and everybody with it.
        server.socket.do_handshake_on_connect = False  # type: ignore[attr-defined]  # typeshed leaves it out
    metrics: Callable[..., Iterable[bytes]] = server.get_app()  # type: ignore[assignment]  # it has one by now

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == PATH:
            return metrics(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"metrics are at {PATH}\n".encode()]

    server.set_app(app)
    plain = server.RequestHandlerClass

    class Handler(plain):  # type: ignore[misc, valid-type]  # the library's class is private
        timeout = CLIENT_SECONDS

        def handle(self) -> None:
            try:
                super().handle()
            except (TimeoutError, ConnectionError, ssl.SSLError):
                pass  # the client's affair

    server.RequestHandlerClass = Handler
    return Server(server, thread)


def page(source: Source) -> str:
    """What a scrape of `source` gets, as text (without OpenMetrics)."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Collector(source))
    return generate_latest(registry).decode()


class _Collector:
    """What prometheus_client asks at each scrape, from the thread of that scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def describe(self) -> Iterable[Family]:
        return families({})

    def collect(self) -> Iterable[Family]:
        return families(self._source())


def families(readings: Mapping[str, Reading]) -> Iterator[Family]:
    """The metric families of all mounts, in the order of the table."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    known = {mount: _all_samples(reading) for mount, reading in readings.items()}
    for metric in METRICS:
        labels = ("mount", *metric.labels)
        if metric.type == "histogram":
            histogram = HistogramMetricFamily(metric.name, metric.help, labels=labels)
            for values, value in _of(known, metric):
                histogram.add_metric(values, _cumulative(metric.buckets, value), value[-1])
            yield histogram
        else:
            kind = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
            family = kind(metric.name, metric.help, labels=labels)
            for values, value in _of(known, metric):
                family.add_metric(values, value)
            yield family


def _of(known: Mapping[str, Samples], metric: Metric) -> Iterator[tuple[list[str], Any]]:
    """Label values and value of each series. A mount process from before an upgrade may have another table:
    what does not fit into ours is left out."""
    numbers = len(metric.buckets) + 2 if metric.buckets else None
    for mount, samples in known.items():
        for labels, value in samples.get(metric.name, ()):
            if len(labels) == len(metric.labels) and (len(value) if isinstance(value, Sequence) else None) == numbers:
                yield [mount, *labels], value


def _all_samples(reading: Reading) -> Samples:
    up: Samples = {"udbad_mount_up": [((), 0 if reading.samples is None else 1)]}
    process = {} if reading.pid is None else _process(reading.pid)
    return {**(reading.samples or {}), **reading.keeper, **up, **process}


def _process(pid: int) -> Samples:
    """What proc(5) says of a process; nothing when it has ended."""
    from prometheus_client import ProcessCollector

    collected = ProcessCollector(pid=lambda: pid, registry=None).collect()
    return {sample.name: [((), sample.value)] for family in collected for sample in family.samples}


def _cumulative(bounds: Sequence[float], value: Sequence[float]) -> list[tuple[str, float]]:
    """prometheus_client wants (upper bound, number of observations up to it), ending with +Inf."""
    total = 0.0
    result = []
    for bound, count in zip([repr(float(bound)) for bound in bounds] + ["+Inf"], value, strict=False):  # last: the sum
        total += count
        result.append((bound, total))
    return result


def markdown_table() -> str:
    """The table of docs/metrics.md (settings/reference.py puts it there)."""
    lines = ["| metric | type | labels beside `mount` | what it says | why it matters |", "|---|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.type} | {labels} | {metric.help} | {metric.why} |")
    return "\n".join(lines) + "\n"
