"""A hub of data sets on this machine, which answers as huggingface.co answers `huggingface_hub`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

CONVERTED = "refs/convert/parquet"
COMMIT = "0123456789" * 4


class Hub(ThreadingHTTPServer):
    """`sets`: {repository: {branch: {file: content}}}; `asked`: the files that were downloaded;
    `breaks`: {file: bytes after which its next download breaks off}; `down`: nothing is answered;
    `rewritten`: the revision that was listed is gone; `refusal`: (status, code) of all answers;
    `lists`: how often the files were asked for.
    """

    daemon_threads = True

    def __init__(self, sets: dict[str, dict[str, dict[str, bytes]]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sets = sets
        self.asked: list[str] = []
        self.breaks: dict[str, int] = {}
        self.down = self.rewritten = False
        self.refusal: tuple[int, str] | None = None
        self.lists = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, with_content: bool) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        if self.server.down:
            self.close_connection = True
            return
        if self.server.refusal:
            status, code = self.server.refusal
            return self.send(status, b"{}", {"X-Error-Code": code})
        listed = re.fullmatch(r"/api/datasets/(.+?)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/datasets/(.+)/resolve/([0-9]{40})/(.+)", path)
        found = listed or file
        name, branch = found.groups()[:2] if found else (None, None)
        branches = self.server.sets.get(name or "")
        if branches is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if branch == COMMIT and self.server.rewritten:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if branch == COMMIT:  # the branch that was listed
            branch = CONVERTED if CONVERTED in branches else "main"
        files = branches.get(branch or "main")
        if files is None:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if listed:
            self.server.lists += 1
            siblings = [{"rfilename": f, "size": len(c)} for f, c in files.items()]
            card = {"id": name, "sha": COMMIT, "siblings": siblings}
            return self.send(200, json.dumps(card).encode(), {"Content-Type": "application/json"})
        assert file is not None
        if not files.get(file[3]):
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        self.send_file(file[3], files[file[3]], with_content)

    def send_file(self, name: str, content: bytes, with_content: bool) -> None:
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        first = re.fullmatch(r"bytes=([0-9]+)-.*", self.headers.get("Range", ""))
        start = int(first[1]) if first else 0
        if with_content:
            self.server.asked.append(name)
        stop = self.server.breaks.pop(name, None) if with_content else None
        if first:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(206 if first else 200, content[start:], headers, with_content, stop)
        if stop is not None:
            self.server.down = True

    def send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str],
        with_content: bool = True,
        stop: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content and self.command == "GET":
            self.wfile.write(content[:stop])
        self.close_connection = stop is not None

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(sets: dict[str, dict[str, dict[str, bytes]]]) -> Iterator[Hub]:
    with Hub(sets) as hub:
        thread = Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
