"""A web server on the loopback with ranges, and with the faults that servers have."""

import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Handler(BaseHTTPRequestHandler):
    """/MODE/NAME is the file NAME, with the faults of the mode."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        server, (path, _, query) = self.server, self.path.partition("?")
        mode, _, name = path[1:].partition("/")
        asked = self.headers.get("Range", "")
        server.seen[self.command, path, asked] += 1
        server.queries.append(query)
        time.sleep(server.latency)
        get = self.command == "GET"
        if mode == "flaky" and get and server.seen[self.command, path, asked] <= 2:
            return self.send(500, b"")
        if mode == "redirect":
            return self.send(302, b"", {"Location": server.location})
        if mode.isdigit() or name not in server.files:
            return self.send(int(mode) if mode.isdigit() else 404, b"")
        if mode == "slow" and get:
            time.sleep(3)
        data, headers = server.files[name], {"ETag": f'"{zlib.crc32(server.files[name])}"'}
        if not asked or mode == "no-range":
            return self.send(200, data, headers)
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        last -= 10 * (mode == "short-range")
        part = data[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if mode == "gzip":
            headers["Content-Encoding"] = "gzip"
        return self.send(206, part[:-10] if mode == "short" else part, headers, cut=mode == "cut", drip=mode == "drip")

    def send(self, status, body, headers=None, cut=False, drip=False):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET" and drip:
            for at in range(20):
                self.wfile.write(body[at : at + 1])
                time.sleep(0.1)
            cut = True
        elif self.command == "GET":
            self.wfile.write(body[:-10] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """Serves `files`, {name: contents}, on the loopback, and counts what it is asked for."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.seen, self.queries = files, Counter(), []
        self.latency, self.location = 0.0, ""
        self.url = f"http://127.0.0.1:{self.server_port}/"
        Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *args):
        """A client that goes away is part of the tests."""

    def gets(self) -> int:
        return sum(count for (command, *_), count in self.seen.items() if command == "GET")
