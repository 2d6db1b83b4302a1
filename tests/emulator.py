"""Google Cloud Storage as its emulator serves it, in a process of its own; what fails on purpose, fails there."""

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
    """An emulator with one bucket.

    Args:
      directory: a folder of this machine that holds the objects; None = memory.

    Attributes:
      environment: the variables by which the libraries find it; folder: an address for the test that runs.
    """

    folder = f"gs://{BUCKET}"

    def __init__(self, directory: pathlib.Path | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks at each turn, in vain, which kind of bucket it is
        }
        root = pathlib.Path(__file__).resolve().parents[1]
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.emulator", str(port), str(directory or "")],
            cwd=root,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                self._ask("/")
                return
            except OSError:
                assert time.monotonic() < deadline and self._server.poll() is None, "the emulator does not start"
                time.sleep(0.05)

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
    asked = {"status": 0, "requests": 0, "seconds": 0.0, "about": "", "failed": 0}

    class Handler(server.RequestHandler):
        def _answer(self, status: int, content: bytes) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _route(self, handle) -> None:
            parts = self.path.strip("/").split("/")
            if parts[0] == "fail":
                about = "".join(parts[4:])
                asked.update(
                    status=int(parts[1]), requests=int(parts[2]), seconds=float(parts[3]), about=about, failed=0
                )
                self._answer(200, b"")
            elif parts[0] == "failed":
                self._answer(200, json.dumps(asked["failed"]).encode())
            elif asked["status"] and asked["requests"] and asked["about"] in self.path:
                asked["requests"] -= 1
                asked["failed"] += 1
                time.sleep(asked["seconds"])
                reason = {"error": {"code": asked["status"], "message": "failed on purpose"}}
                self._answer(asked["status"], json.dumps(reason).encode())
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
    parent = os.getppid()
    while os.getppid() == parent:  # ends with the test that started it, however that ends
        time.sleep(1)
    with one_at_a_time:  # what is directory is whole
        os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
