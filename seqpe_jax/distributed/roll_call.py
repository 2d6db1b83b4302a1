"""Open TCP connections between the coordinator (process 0) and the workers: roll call, exchanges, status, aborts.

The roll call names processes that are missing or were started differently, and a connection that closes names the process
that died, within a second. JAX's own service notices both only minutes later, in a C++ stack trace without a name. Messages
are JSON objects, one per line.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from seqpe_jax.errors import Failure, InputError
from seqpe_jax.files import parse_json

HELLO = "seqpe_jax"
HELLO_SECONDS = 10.0  # for a new connection to identify itself
MISMATCH_SECONDS = 5.0  # after the first process that does not match, to name others that do not together with it
GRACE_SECONDS = 3.0  # between a worker's failure and its report: the coordinator often fails likewise, and reports that
EXIT_SECONDS = 5.0  # for workers to exit before the coordinator does
ABORT_SECONDS = 15.0  # for the coordinator to answer a worker that fails
ANSWER_SECONDS = 20.0  # for another process to say what it does, on a busy machine too
MAX_MESSAGE_BYTES = 1 << 24
MAX_SHOWN = 5  # differences in a message
BARRIER = "barrier"  # key of an exchange

Facts = dict[str, str]
Status = dict[str, Any]  # what a process does, in JSON
Reduce = Callable[[list[Any]], Any]  # values by process -> one value for all
LOST = "was killed or has lost its machine; start the same command again: it resumes from the last checkpoint"


def format_ranges(numbers: Iterable[int]) -> str:
    """Returns numbers as ranges: "1, 3-5"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def differences(facts: dict[int, Facts], hosts: Mapping[int, str] | None = None) -> list[str]:
    """Returns `name: value (process 0), other value (process 1-3)` for each fact that processes do not share.

    Args:
      facts: facts of each process.
      hosts: host names by process, to be named with each value.
    """

    def on(processes: list[int]) -> str:
        if not hosts:
            return ""
        names = list(dict.fromkeys(hosts.get(process, "?") for process in processes))
        more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
        return f" on {', '.join(names[:MAX_SHOWN])}{more}"

    lines = []
    for name in sorted({name for own in facts.values() for name in own}):
        values: dict[str, list[int]] = {}
        for process in sorted(facts):
            values.setdefault(facts[process].get(name, "absent"), []).append(process)
        if len(values) > 1:
            parts = (f"{value} (process {format_ranges(who)}{on(who)})" for value, who in values.items())
            lines.append(f"{name}: {', '.join(parts)}")
    return lines


def exit_process(code: int) -> NoReturn:
    """Exits at once, from any thread: other threads may wait for a process that no longer exists."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk, or a closed pipe, changes no exit code
            stream.flush()
    os._exit(code)


class _Connection:
    """A socket that carries messages.

    Attributes:
      process: the process at the other end; -1 until it has said so.
      host: its host name.
      closed: set when the connection is closed.
    """

    def __init__(self, connected: socket.socket):
        self.process = -1
        self.host = "?"
        self.closed = threading.Event()
        self._socket, self._file = connected, connected.makefile("rb")
        self._sending = threading.Lock()
        # A machine that vanishes closes nothing: probe after 10 s of silence, and give up 20 s later.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, kind: str, **values: Any) -> None:
        """Sends a message; without effect if the other end is gone, which `receive` reports."""
        with contextlib.suppress(OSError), self._sending:
            self._socket.sendall(json.dumps({"kind": kind} | values).encode() + b"\n")

    def receive(self, seconds: float | None = None) -> dict[str, Any] | None:
        """Returns the next message; None if the other end is gone, silent for so long, or not one of ours."""
        self._socket.settimeout(seconds)
        try:
            line = self._file.readline(MAX_MESSAGE_BYTES)
            message = parse_json(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            message = None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        """Closes the connection."""
        self.closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Coordinator:
    """Process 0's end of the connections.

    Args:
      address: (host, port) that workers connect to.
      count: processes of the run.

    Raises:
      InputError: the port is taken.
    """

    def __init__(self, address: tuple[str, int], count: int):
        self._address, self._count = address, count
        self._server = listen(*address)
        self._messages: queue.SimpleQueue[tuple[str, _Connection, dict[str, Any]]] = queue.SimpleQueue()
        self._workers: dict[int, _Connection] = {}
        self._changed = threading.Condition()  # guards the next three
        self._exchanges: dict[str, dict[int, Any]] = {}  # key -> values by process
        self._statuses: dict[int, Status] = {}
        self._answers: dict[int, Status] = {}
        self.check: Callable[[Status], object] = lambda status: None  # called when a worker reports a stall
        self._aborting, self._is_over = threading.Lock(), False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connected, _ = self._server.accept()
            threading.Thread(target=self._receive, args=(_Connection(connected),), daemon=True).start()

    def _receive(self, connection: _Connection) -> None:
        hello = connection.receive(HELLO_SECONDS)
        if hello is not None and hello.get("hello") == HELLO:
            connection.process, connection.host = int(hello["process"]), str(hello["host"])
            self._messages.put(("hello", connection, hello))
            while (message := connection.receive()) is not None:
                self._messages.put((message["kind"], connection, message))
            self._messages.put(("disconnected", connection, {}))
        connection.close()

    def gather(self, facts: Facts, seconds: float) -> None:
        """Waits for all workers, and lets them start if their facts equal the coordinator's.

        Args:
          facts: facts about the coordinator.
          seconds: seconds to wait.

        Raises:
          InputError: processes differ; names the differences.
          Failure: some did not connect in time; names them.
        """
        deadline = time.monotonic() + seconds
        known, duplicates = {0: facts}, []
        while (missing := set(range(self._count)) - known.keys()) or duplicates:
            try:
                kind, connection, message = self._messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            process = connection.process
            if kind != "hello":
                if self._workers.get(process) is connection:  # it has left again; another may take its place
                    del self._workers[process], known[process]
                continue
            if process in known:
                first = self._workers[process].host if process else socket.gethostname()
                duplicates.append(
                    f"two processes say that they are process {process} (on {first} and {connection.host})"
                )
                self._workers[-len(duplicates)] = connection  # so that it is aborted too
            else:
                known[process], self._workers[process] = message["facts"], connection
            if duplicates or differences(known):
                deadline = min(deadline, time.monotonic() + MISMATCH_SECONDS)
        if found := duplicates + differences(known):
            more = f"; and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
            raise InputError(
                f"the processes of this run differ in {'; '.join(found[:MAX_SHOWN])}{more}. Start the same command, of the "
                "same installation, on every host"
            )
        if missing:
            raise Failure(self._missing_message(missing, seconds))
        for connection in self._workers.values():
            connection.send("start")
        threading.Thread(target=self._watch, daemon=True).start()

    def _missing_message(self, missing: set[int], seconds: float) -> str:
        present = "; ".join(f"{process} on {at.host}" for process, at in sorted(self._workers.items())[:MAX_SHOWN])
        host, port = self._address
        return (
            f"process {format_ranges(missing)} of {self._count} did not come within {seconds:g} s (came: 0 on "
            f"{socket.gethostname()}{'; ' + present if present else ''}): look at the output there, whether {host} can be "
            f"reached at port {port}, or wait longer with --start-timeout"
        )

    def _watch(self) -> None:
        while True:
            kind, connection, message = self._messages.get()
            who = f"process {connection.process} (on {connection.host})"
            if kind == "hello":
                reason = f"{who} came to a run that is on already: stop that first"
                connection.send("abort", code=1, reason=reason)
            elif kind == "abort":
                time.sleep(GRACE_SECONDS)
                self.abort(message["code"], f"{who}: {message['reason']}")
            elif kind in ("exchange", "status", "answer"):
                self._store(kind, connection.process, message)
            elif kind == "stalled":  # in a thread: it asks all workers what they do, and their answers come here
                connection.send("noted")
                threading.Thread(target=self.check, args=(message["status"],), daemon=True).start()
            elif kind == "disconnected" and not self._is_over and connection is self._workers.get(connection.process):
                self.abort(1, f"{who} {LOST}")

    def _store(self, kind: str, process: int, message: dict[str, Any]) -> None:
        with self._changed:
            if kind == "exchange":
                self._exchanges.setdefault(message["key"], {})[process] = message["value"]
            else:
                (self._statuses if kind == "status" else self._answers)[process] = message["status"]
            self._changed.notify_all()

    def share_status(self, status: Status) -> dict[int, Status]:
        """Records the coordinator's status, and returns the last one of each process that has sent one."""
        with self._changed:
            self._statuses[0] = status
            return dict(self._statuses)

    def ask_all(self, with_stacks: bool) -> dict[int, Status | None]:
        """Asks all workers what they do; returns the answers, None of those that do not answer in `ANSWER_SECONDS`.

        Args:
          with_stacks: they write their stacks too.
        """
        with self._changed:
            self._answers.clear()
        for connection in self._workers.values():
            connection.send("ask", stacks=with_stacks)
        with self._changed:
            self._changed.wait_for(lambda: len(self._answers) == len(self._workers), ANSWER_SECONDS)
            return {process: self._answers.get(process) for process in self._workers}

    @property
    def hosts(self) -> dict[int, str]:
        """Host names by process."""
        return {0: socket.gethostname()} | {process: worker.host for process, worker in self._workers.items()}

    def abort(self, code: int, reason: str) -> NoReturn:
        """Prints the reason, and exits all processes of the run."""
        self._aborting.acquire()  # never released: the first reason is printed
        print(reason, file=sys.stderr, flush=True)
        workers = list(self._workers.values())
        for connection in workers:
            connection.send("abort", code=code)
        deadline = time.monotonic() + EXIT_SECONDS  # JAX would kill workers that still run when its service goes
        for connection in workers:
            connection.closed.wait(max(0.0, deadline - time.monotonic()))
        exit_process(code)

    def exchange(self, key: str, value: Any, reduce: Reduce) -> Any:
        """Waits until all processes have called this with the key, and returns the same to all.

        Threads may do so at the same time under different keys.

        Args:
          key: name of the meeting point; free again afterwards.
          value: this process's value, in JSON.
          reduce: function of the values by process, whose result, in JSON, all get; called on the coordinator, where it may
            raise.
        """
        with self._changed:
            values = self._exchanges.setdefault(key, {})
            values[0] = value
            self._changed.wait_for(lambda: len(values) == self._count)
            del self._exchanges[key]
        result = reduce([values[process] for process in range(self._count)])
        for connection in self._workers.values():
            connection.send("result", key=key, value=result)
        return result

    def barrier(self, last: bool = False, facts: Facts | None = None) -> None:
        """Waits until all processes are here.

        Args:
          last: processes may end afterwards.
          facts: this process's values of what all must share here.

        Raises:
          InputError: the processes' facts differ.
        """

        def compare(values: list[Facts | None]) -> None:
            found = differences({process: own or {} for process, own in enumerate(values)}, self.hosts)
            if facts is not None and found:
                raise InputError(
                    f"the processes of this run differ in {'; '.join(found[:MAX_SHOWN])}. Give every host the same files"
                )
            self._is_over = last

        self.exchange(BARRIER, facts, compare)


class Worker:
    """A worker's end of its connection; it exits when the coordinator says so or is gone.

    Args:
      address: (host, port) of the coordinator.
      process: number of this process.
      facts: facts about this process, which must equal the coordinator's.
      seconds: seconds to wait for the coordinator.

    Raises:
      Failure: there is no coordinator at the address.
    """

    def __init__(self, address: tuple[str, int], process: int, facts: Facts, seconds: float):
        self._process, self._coordinator = process, f"{address[0]}:{address[1]}"
        self._changed, self._printing = threading.Condition(), threading.Lock()
        self._results: dict[str, Any] = {}  # of exchanges by key
        self._is_last_barrier = self._is_over = False
        self._noted = threading.Event()
        # (whether to write stacks) -> what this process does; called when the coordinator asks.
        self.answer: Callable[[bool], Status] = lambda with_stacks: {}
        self._connection = _Connection(self._connect(address, seconds))
        self._connection.send("hello", hello=HELLO, process=process, host=socket.gethostname(), facts=facts)
        answer = self._connection.receive(seconds + 2 * MISMATCH_SECONDS)
        if answer is None or answer["kind"] != "start":
            self._exit(answer)
        threading.Thread(target=self._watch, daemon=True).start()

    def _connect(self, address: tuple[str, int], seconds: float) -> socket.socket:
        deadline = time.monotonic() + seconds
        while True:
            try:
                connected = socket.create_connection(address, timeout=5.0)
                if connected.getsockname() != connected.getpeername():  # on one machine a port can connect to itself
                    return connected
                connected.close()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Failure(
                        f"process {self._process} waited {seconds:g} s for process 0, the coordinator, which did not come "
                        f"to {self._coordinator} ({error.strerror or error}): look at its output, or wait longer with "
                        "--start-timeout"
                    ) from error
                time.sleep(0.2)

    def _watch(self) -> None:
        while (message := self._connection.receive()) is not None and message["kind"] in ("result", "ask", "noted"):
            if message["kind"] == "ask":
                threading.Thread(target=self._answer, args=(message["stacks"],), daemon=True).start()
                continue
            if message["kind"] == "noted":
                self._noted.set()
                continue
            with self._changed:
                self._is_over = self._is_last_barrier and message["key"] == BARRIER
                self._results[message["key"]] = message["value"]
                self._changed.notify_all()
        if not self._is_over:
            self._exit(message)

    def _answer(self, with_stacks: bool) -> None:
        self._connection.send("answer", status=self.answer(with_stacks))

    def _exit(self, message: dict[str, Any] | None) -> NoReturn:
        if message is None:
            self._print(f"process {self._process}: process 0, the coordinator (at {self._coordinator}), {LOST}")
            exit_process(1)
        if "reason" in message:
            self._print(message["reason"])
        exit_process(message["code"])

    def _print(self, reason: str) -> None:
        self._printing.acquire()  # never released: only one reason is printed
        os.write(2, f"{reason}\n".encode())  # not through Python's buffers: JAX may kill this process at any moment

    def abort(self, code: int, reason: str) -> NoReturn:
        """Sends the reason to the coordinator, which prints it and exits all processes of the run."""
        self._connection.send("abort", code=code, reason=reason)
        time.sleep(ABORT_SECONDS)  # the watching thread exits meanwhile
        self._print(reason)
        exit_process(code)

    def exchange(self, key: str, value: Any, reduce: Reduce) -> Any:
        """Waits until all processes are here, and returns what the coordinator's `reduce` returned."""
        self._connection.send("exchange", key=key, value=value)
        with self._changed:
            self._changed.wait_for(lambda: key in self._results)
            return self._results.pop(key)

    def barrier(self, last: bool = False, facts: Facts | None = None) -> None:
        """Waits until all processes are here (`Coordinator.barrier`)."""
        self._is_last_barrier = last
        self.exchange(BARRIER, facts, lambda values: None)

    def share_status(self, status: Status) -> dict[int, Status]:
        """Sends this process's status to the coordinator, which alone knows those of all."""
        self._connection.send("status", status=status)
        return {}

    def report_stall(self, status: Status) -> bool:
        """Reports that this process makes no progress; returns whether the coordinator answers in `ANSWER_SECONDS`."""
        self._noted.clear()
        self._connection.send("stalled", status=status)
        return self._noted.wait(ANSWER_SECONDS)


def listen(host: str, port: int) -> socket.socket:
    """Returns a server socket on all interfaces, or on the loopback one if that is the host. Raises: InputError: taken."""
    is_local = host in ("localhost", "127.0.0.1", "::1")
    try:
        if socket.has_dualstack_ipv6() and not is_local:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server((host if is_local else "", port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"the coordinator cannot listen at port {port} ({error}): give another port with --coordinator={host}:PORT, "
            "where PORT and PORT - 1 are free"
        ) from error
