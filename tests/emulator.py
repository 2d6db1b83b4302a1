"""Object stores as emulators serve them, each in a process of its own; what fails on purpose, fails there."""

import http.server
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

BUCKET = "runs"
OBJECT = re.compile(rf"(?:/download)?/storage/v1/b/{BUCKET}/o/([^/]+)")
NAME = re.compile(rb'"name": *("(?:[^"\\]|\\.)*")')  # in the first part of an upload


class Store:
    """An emulator of Google Cloud Storage with one bucket.

    Args:
      directory: a folder of this machine that holds the objects; None = memory.

    Attributes:
      environment: the variables by which the libraries find it; folder: an address for the test that runs.
    """

    scheme = "gs://"

    def __init__(self, directory: pathlib.Path | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.folder = f"http://127.0.0.1:{port}", f"{self.scheme}{BUCKET}"
        self.environment = self._environment()
        root = pathlib.Path(__file__).resolve().parents[1]
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.emulator", self.scheme, str(port), str(directory or "")],
            cwd=root,
            env=os.environ | self.environment,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                self.failed()
                return
            except OSError:
                assert time.monotonic() < deadline and self._server.poll() is None, "the emulator does not start"
                time.sleep(0.05)

    def _environment(self) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks at each turn, in vain, which kind of bucket it is
        }

    def _ask(self, path: str) -> bytes:
        with urllib.request.urlopen(self.address + path, timeout=10) as answer:
            return answer.read()

    def fail(self, status: int, requests: int = 10**9, seconds: float = 0.0, about: str = "") -> None:
        """Lets so many of the next requests whose address holds `about` be answered with a status, after some seconds.

        Status 0: all are answered as they should be.
        """
        self._ask(f"/fail/{status}/{requests}/{seconds}/{about}")

    def failed(self) -> int:
        """Returns how many requests were answered so."""
        return json.loads(self._ask("/failed"))

    def close(self) -> None:
        self._server.kill()
        self._server.wait()


class S3Store(Store):
    """An emulator of S3 with one bucket, in memory."""

    scheme = "s3://"

    def _environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "a-test",
            "AWS_SECRET_ACCESS_KEY": "a-test",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class Failures:
    """Which of the next requests fail on purpose."""

    def __init__(self) -> None:
        self._status, self._left, self._seconds, self._about, self._failed = 0, 0, 0.0, "", 0

    def control(self, path: str) -> bytes | None:
        """Returns the answer to a request of the tests themselves; None for another."""
        parts = path.strip("/").split("/")
        if parts[0] == "fail":
            self._status, self._left, self._seconds = int(parts[1]), int(parts[2]), float(parts[3])
            self._about, self._failed = "".join(parts[4:]), 0
            return b""
        return json.dumps(self._failed).encode() if parts[0] == "failed" else None

    def status(self, address: str) -> int:
        """Returns the status of a request that fails, after its time; 0 = it does not fail."""
        if not (self._status and self._left and self._about in address):
            return 0
        self._left -= 1
        self._failed += 1
        time.sleep(self._seconds)
        return self._status


def files_of(directory: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the objects of a `Store(directory)`, as files."""
    return directory / ".cloudstorage" / BUCKET


def serve(port: int, directory: str) -> None:
    """Runs the emulator, with a thread for each connection, of which libraries keep several open at once."""
    import logging

    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound

    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: it ends with who started it, between two requests
    one_at_a_time = threading.Lock()
    failures = Failures()

    class Handler(server.RequestHandler):
        def _answer(self, status: int, content: bytes) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _route(self, handle) -> None:
            answer = failures.control(self.path)
            if answer is not None:
                self._answer(200, answer)
            elif status := failures.status(self.path):
                reason = {"error": {"code": status, "message": "failed on purpose"}}
                self._answer(status, json.dumps(reason).encode())
            else:
                with one_at_a_time:  # its storage in memory is not made for threads
                    if self._fits():
                        handle()
                    else:
                        self._answer(412, b"{}")

        def _stored(self, name: str) -> str:
            """The generation of an object; "0" where there is none."""
            try:
                return self.storage.get_file_obj(BUCKET, name)["generation"]
            except NotFound:
                return "0"

        def _fits(self) -> bool:
            """Whether an object that is uploaded has the generation that must be there; the emulator does not ask."""
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            if self.command != "POST" or "ifGenerationMatch" not in query:
                return True
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.rfile = io.BytesIO(content)
            name = query["name"][0] if "name" in query else json.loads(NAME.search(content)[1])
            return self._stored(name) == query["ifGenerationMatch"][0]

        def end_headers(self) -> None:
            """Adds what the store says of an object that is read, and the emulator does not: its generation."""
            if self.command == "GET" and (read := OBJECT.fullmatch(urllib.parse.urlsplit(self.path).path)):
                self.send_header("X-Goog-Generation", self._stored(urllib.parse.unquote(read[1])))
            super().end_headers()

        def do_GET(self) -> None:
            self._route(super().do_GET)

        def do_POST(self) -> None:
            self._route(super().do_POST)

        def do_PUT(self) -> None:
            self._route(super().do_PUT)

        def do_DELETE(self) -> None:
            self._route(super().do_DELETE)

        def do_PATCH(self) -> None:
            self._route(super().do_PATCH)

    class Threads(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address) -> None:
            """Libraries hang up on what they do not need any more."""

    server.RequestHandler = Handler
    http.server.HTTPServer = Threads
    made = server.create_server(
        "127.0.0.1", port, in_memory=not directory, default_bucket=BUCKET, data_dir=directory or None
    )
    made._storage.buckets[BUCKET]["softDeletePolicy"] = {"retentionDurationSeconds": 0}  # what is removed is gone
    made.start()
    _await_parent()
    with one_at_a_time:  # what is directory is whole
        os._exit(0)


def serve_s3(port: int) -> None:
    """Runs moto's server, with a thread for each connection."""
    import logging

    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(BUCKET, "us-east-1")
    emulated, failures = DomainDispatcherApplication(create_backend_app), Failures()

    def serve(environ, start_response):
        path = environ["PATH_INFO"]
        address = f"{path}?{environ['QUERY_STRING']}&{environ['REQUEST_METHOD']}"
        answer = failures.control(path)
        if answer is not None:
            start_response("200 OK", [("Content-Length", str(len(answer)))])
            return [answer]
        if status := failures.status(address):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            name = {401: "InvalidToken", 403: "AccessDenied", 503: "ServiceUnavailable"}.get(status, "InternalError")
            reason = f"<Error><Code>{name}</Code><Message>failed on purpose</Message></Error>".encode()
            start_response(f"{status} {name}", [("Content-Length", str(len(reason))), ("Content-Type", "text/xml")])
            return [reason]
        return emulated(environ, start_response)

    server = make_server("127.0.0.1", port, serve, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _await_parent()
    os._exit(0)


def _await_parent() -> None:
    """Returns when the test that started this process is gone, however it ended."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)


if __name__ == "__main__":
    if sys.argv[1] == S3Store.scheme:
        serve_s3(int(sys.argv[2]))
    else:
        serve(int(sys.argv[2]), sys.argv[3])
