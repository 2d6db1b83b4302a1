"""The line that every process of a run holds to its lead (process 0): a roll call at the start, then news of who has ended.

JAX's own service notices an absent or dead process too, but minutes later, in a C++ stack trace that names nobody; a TCP
connection is closed by the system the moment a process dies. Messages are JSON objects, one to a line.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from seqpe_jax.errors import Failure, InputError
from seqpe_jax.files import parse_json

HELLO = "seqpe_jax"
HELLO_SECONDS = 10.0  # for a stranger who connects and says nothing
ODD_SECONDS = 5.0  # after the first process that does not fit: others that do not are named with it
GRACE_SECONDS = 3.0  # between a member's failure and its report: the lead often finds the same one, and tells it itself
LEAVE_SECONDS = 5.0  # for members to leave before the lead does
ANSWER_SECONDS = 15.0  # for the lead to end a member that failed
MESSAGE_BYTES = 1 << 20
SHOWN = 5  # fields that differ

Facts = dict[str, str]
LOST = "was killed or has lost its machine; start the same command again: it goes on from the last checkpoint"


def ranges(numbers: Iterable[int]) -> str:
    """Returns numbers in few words: 1, 3-5."""
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
      hosts: by process; the hosts of each value are named, too.
    """

    def on(who: list[int]) -> str:
        names = list(dict.fromkeys((hosts or {}).get(process, "?") for process in who))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return f" on {', '.join(names[:SHOWN])}{more}" if hosts else ""

    lines = []
    for name in sorted({name for own in facts.values() for name in own}):
        values: dict[str, list[int]] = {}
        for process in sorted(facts):
            values.setdefault(facts[process].get(name, "absent"), []).append(process)
        if len(values) > 1:
            told = (f"{value} (process {ranges(who)}{on(who)})" for value, who in values.items())
            lines.append(f"{name}: {', '.join(told)}")
    return lines


def exit_process(code: int) -> NoReturn:
    """Ends this process from any thread, at once: other threads may wait for a process that is not there any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Connection:
    """A socket that carries messages; what is sent to somebody who is gone is lost, and `read` says so."""

    def __init__(self, connected: socket.socket):
        self.process, self.host = -1, "?"
        self.closed = threading.Event()
        self._socket, self._file = connected, connected.makefile("rb")
        # A machine that vanishes closes nothing: ask after 10 s of silence, and give it up after 20 s more.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, kind: str, **values: Any) -> None:
        with contextlib.suppress(OSError):  # whoever reads from it is told that it is gone
            self._socket.sendall(json.dumps({"kind": kind} | values).encode() + b"\n")

    def read(self, seconds: float | None = None) -> dict[str, Any] | None:
        """Returns the next message, or None: the other end is gone, silent for too long, or no process of ours."""
        self._socket.settimeout(seconds)
        try:
            line = self._file.readline(MESSAGE_BYTES)
            message = parse_json(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            message = None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self.closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Coordinator:
    """The lead's end: it hears everybody and tells everybody.

    Args:
      address: (host, port) that members connect to; count: processes of the run.

    Raises:
      InputError: the port is taken.
    """

    def __init__(self, address: tuple[str, int], count: int):
        self._address, self._count = address, count
        self._server = listen(*address)
        self._news: queue.SimpleQueue[tuple[str, _Connection, dict[str, Any]]] = queue.SimpleQueue()
        self._members: dict[int, _Connection] = {}
        self._here, self._all_here = 0, threading.Semaphore(0)
        self._facts: dict[int, Facts] = {}
        self._ending, self._over = threading.Lock(), False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connected, _ = self._server.accept()
            threading.Thread(target=self._hear, args=(_Connection(connected),), daemon=True).start()

    def _hear(self, connection: _Connection) -> None:
        hello = connection.read(HELLO_SECONDS)
        if hello is not None and hello.get("hello") == HELLO:
            connection.process, connection.host = int(hello["process"]), str(hello["host"])
            self._news.put(("hello", connection, hello))
            while (message := connection.read()) is not None:
                self._news.put((message["kind"], connection, message))
            self._news.put(("gone", connection, {}))
        connection.close()

    def gather(self, facts: Facts, seconds: float) -> None:
        """Waits for all members, and lets them go when their facts are the lead's.

        Raises:
          InputError: processes differ; it says in what.
          Failure: some did not come in time; it names them.
        """
        deadline, known, twice = time.monotonic() + seconds, {0: facts}, []
        while (missing := set(range(self._count)) - known.keys()) or twice:
            try:
                kind, connection, message = self._news.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            process = connection.process
            if kind != "hello":
                if self._members.get(process) is connection:  # it has left again; another may come in its place
                    del self._members[process], known[process]
                continue
            if process in known:
                first = self._members[process].host if process else socket.gethostname()
                twice.append(f"two processes say that they are process {process} (on {first} and {connection.host})")
                self._members[-len(twice)] = connection  # to be told of the end too
            else:
                known[process], self._members[process] = message["facts"], connection
            if twice or differences(known):
                deadline = min(deadline, time.monotonic() + ODD_SECONDS)
        found = twice + differences(known)
        if found:
            more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            raise InputError(
                f"the processes of this run differ in {'; '.join(found[:SHOWN])}{more}. Start the same command, of the "
                "same installation, on every host"
            )
        if missing:
            came = "; ".join(f"{process} on {at.host}" for process, at in sorted(self._members.items())[:SHOWN])
            host, port = self._address
            raise Failure(
                f"process {ranges(missing)} of {self._count} did not come within {seconds:g} s (came: 0 on "
                f"{socket.gethostname()}{'; ' + came if came else ''}): look at the output there, whether {host} can be "
                f"reached at port {port}, or wait longer with --start-timeout"
            )
        for connection in self._members.values():
            connection.send("go")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            kind, connection, message = self._news.get()
            who = f"process {connection.process} (on {connection.host})"
            if kind == "hello":
                connection.send("end", code=1, words=f"{who} came to a run that is on already: stop that first")
            elif kind == "end":
                time.sleep(GRACE_SECONDS)
                self.abort(message["code"], f"{who}: {message['words']}")
            elif kind == "here":
                self._facts[connection.process] = message.get("facts", {})
                self._here += 1
                if self._here % (self._count - 1) == 0:  # nobody comes to the next place before all have left this one
                    self._all_here.release()
            elif kind == "gone" and not self._over and connection is self._members.get(connection.process):
                self.abort(1, f"{who} {LOST}")

    def abort(self, code: int, words: str) -> NoReturn:
        """Says why the run ends, and ends all of its processes."""
        self._ending.acquire()  # for good: the first who comes says why
        print(words, file=sys.stderr, flush=True)
        members = list(self._members.values())
        for connection in members:
            connection.send("end", code=code)
        deadline = time.monotonic() + LEAVE_SECONDS  # JAX would abort those that are still there when its service goes
        for connection in members:
            connection.closed.wait(max(0.0, deadline - time.monotonic()))
        exit_process(code)

    def barrier(self, last: bool = False, facts: Facts | None = None) -> None:
        """Waits until everybody is here.

        Args:
          last: nobody is missed afterwards.
          facts: what all must share here; each gives its own.

        Raises:
          InputError: they differ.
        """
        self._all_here.acquire()
        if facts is not None:
            at = {0: socket.gethostname()} | {process: one.host for process, one in self._members.items()}
            if found := differences({0: facts} | self._facts, at):
                raise InputError(
                    f"the processes of this run differ in {'; '.join(found[:SHOWN])}. Give every host the same files"
                )
        self._over = last
        for connection in self._members.values():
            connection.send("on")


class Worker:
    """Another process's end: it answers the roll call, and ends when it is told to or the lead is gone.

    Raises:
      Failure: nobody leads at the address.
    """

    def __init__(self, address: tuple[str, int], process: int, facts: Facts, seconds: float):
        self._process, self._lead = process, f"{address[0]}:{address[1]}"
        self._on, self._printing = threading.Semaphore(0), threading.Lock()
        self._last = self._over = False
        deadline = time.monotonic() + seconds
        while True:
            try:
                connected = socket.create_connection(address, timeout=5.0)
                if connected.getsockname() != connected.getpeername():  # on one machine a port can reach itself
                    break
                connected.close()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Failure(
                        f"process {process} waited {seconds:g} s for process 0, the lead, which did not come to "
                        f"{self._lead} ({error.strerror or error}): look at its output, or wait longer with --start-timeout"
                    ) from error
                time.sleep(0.2)
        self._connection = _Connection(connected)
        self._connection.send("hello", hello=HELLO, process=process, host=socket.gethostname(), facts=facts)
        answer = self._connection.read(seconds + 2 * ODD_SECONDS)
        if answer is None or answer["kind"] != "go":
            self._end_as_told(answer)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while (message := self._connection.read()) is not None and message["kind"] == "on":
            self._over = self._last
            self._on.release()
        if not self._over:
            self._end_as_told(message)

    def _end_as_told(self, message: dict[str, Any] | None) -> NoReturn:
        if message is None:
            self._say(f"process {self._process}: process 0, the lead (at {self._lead}), {LOST}")
            exit_process(1)
        if "words" in message:
            self._say(message["words"])
        exit_process(message["code"])

    def _say(self, words: str) -> None:
        self._printing.acquire()  # for good: this process has one last word
        os.write(2, f"{words}\n".encode())  # not through Python's buffers: JAX may abort this process at any moment

    def abort(self, code: int, words: str) -> NoReturn:
        """Tells the lead why this process ends; the lead says it and ends them all."""
        self._connection.send("end", code=code, words=words)
        time.sleep(ANSWER_SECONDS)  # the watch ends this process meanwhile
        self._say(words)
        exit_process(code)

    def barrier(self, last: bool = False, facts: Facts | None = None) -> None:
        """Waits until everybody is here; `last`: nobody is missed afterwards; `facts`: what all must share here."""
        self._last = last
        self._connection.send("here", facts=facts or {})
        self._on.acquire()


def listen(host: str, port: int) -> socket.socket:
    """Returns a server socket on all interfaces, or on the loopback one if that is the host. Raises: InputError: taken."""
    local = host in ("localhost", "127.0.0.1", "::1")
    try:
        if socket.has_dualstack_ipv6() and not local:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server((host if local else "", port), backlog=1024)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"the lead cannot listen at port {port} ({error}): give another port with --coordinator={host}:PORT, where "
            "PORT and PORT - 1 are free"
        ) from error
