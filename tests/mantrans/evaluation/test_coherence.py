"""Coherence scoring through the real anthropic SDK, against a small HTTP server on this machine.

The server plays back prepared answers, so that the SDK's retries, timeouts and errors are its own.
Retries are quick because the server asks for it (`retry-after-ms: 1`), as the real service may.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mantrans.evaluation import coherence
from mantrans.evaluation.coherence import SAMPLES_PER_REQUEST, score_samples

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("anthropic") is None, reason="the tests drive the real SDK"
)

MODEL = "claude-haiku-4-5"
STORIES = ["Tom had a red ball. He lost it. Mia found it.", "The cat the cat the cat."]
Answer = tuple[int, dict[str, str], bytes, float | None]  # status, headers, body, seconds before it


def scores_for(*marks: tuple[int, int, int]) -> dict[str, Any]:
    names = ("grammar", "coherence", "plot")
    entries = [dict(zip(names, m, strict=True)) | {"sample": i} for i, m in enumerate(marks, 1)]
    return {"scores": entries}


def message(text: str, stop_reason: str = "end_turn", delay: float | None = 0.0) -> Answer:
    body = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": text}],
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }
    return 200, {"content-type": "application/json"}, json.dumps(body).encode(), delay


def failure(status: int, kind: str, **headers: str) -> Answer:
    body = {"type": "error", "error": {"type": kind, "message": "no"}}
    headers = {"retry-after-ms": "1", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return status, {"content-type": "application/json", **headers}, json.dumps(body).encode(), 0.0


class Service:
    """The prepared answers of one test, the requests they met, and what the user was told."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[Answer] = []
        self.requests: list[dict[str, Any]] = []
        self.said: list[str] = []

    def next_answer(self, path: str, body: bytes) -> Answer:
        self.requests.append({"path": path, **json.loads(body)})
        return self.answers[min(len(self.requests), len(self.answers)) - 1]  # the last one stays

    def score(self, samples: list[str], *answers: Answer, **options: Any) -> dict[str, Any] | None:
        self.answers = list(answers)
        options = {"timeout": 5.0, "max_retries": 1, **options}
        return score_samples(samples, MODEL, base_url=self.url, say=self.said.append, **options)

    def refuses(self, *answers: Answer, **options: Any) -> str:
        """Score STORIES, which must fail with exactly one line; returns it."""
        assert self.score(STORIES, *answers, **options) is None
        [line] = self.said
        assert line.startswith("coherence not scored: ") and "\n" not in line
        return line


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not-a-real-key")
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = self.rfile.read(int(self.headers["content-length"]))
            status, headers, body, delay = service.next_answer(self.path, request)
            released.wait(delay)
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client lost patience, which is what the slow test is about

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service = Service(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield service
    released.set()
    server.shutdown()
    thread.join()
    server.server_close()


GOOD = message(json.dumps(scores_for((5, 4, 3), (2, 1, 1))))


def test_scores_and_means(service: Service) -> None:
    result = service.score(STORIES, GOOD)
    assert result == {
        "model": MODEL,
        "grammar": 3.5,
        "coherence": 2.5,
        "plot": 2.0,
        "scores": [
            {"grammar": 5, "coherence": 4, "plot": 3},
            {"grammar": 2, "coherence": 1, "plot": 1},
        ],
    }
    assert service.said == []


def test_request_schema(service: Service) -> None:
    """One request carries all samples and the schema."""
    service.score(STORIES, GOOD)
    [request] = service.requests
    assert request["path"] == "/v1/messages"
    assert request["model"] == MODEL
    sent = json.loads(request["messages"][0]["content"])
    assert [entry["text"] for entry in sent] == STORIES
    schema = request["output_config"]["format"]["schema"]
    entry_schema = schema["properties"]["scores"]["items"]["properties"]
    assert entry_schema["plot"]["enum"] == [1, 2, 3, 4, 5]


def test_requests_many_samples(service: Service) -> None:
    """Many samples are spread over requests."""
    n = SAMPLES_PER_REQUEST + 2
    full = message(json.dumps(scores_for(*[(5, 5, 5)] * SAMPLES_PER_REQUEST)))
    rest = message(json.dumps(scores_for((1, 1, 1), (1, 1, 1))))
    result = service.score([f"Story {i}." for i in range(n)], full, rest)
    assert result is not None
    assert len(service.requests) == 2
    assert len(result["scores"]) == n
    assert result["plot"] == pytest.approx((5 * SAMPLES_PER_REQUEST + 2) / n)


def test_request_no_samples(service: Service) -> None:
    assert service.score([], GOOD) is None
    assert service.requests == [] and service.said == []


def test_key_absent(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key nothing is sent."""
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    assert "ANTHROPIC_API_KEY is not set" in service.refuses(GOOD)
    assert service.requests == []


def test_sdk_absent(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anthropic", None)  # makes the import fail
    assert "pip install anthropic" in service.refuses(GOOD)


def test_service_absent(service: Service) -> None:
    service.url = "http://127.0.0.1:1"  # a reserved port: refused at once
    assert "cannot be reached" in service.refuses(GOOD, max_retries=0)


def test_key_refused(service: Service) -> None:
    assert "refused the key" in service.refuses(failure(401, "authentication_error"))
    assert len(service.requests) == 1


def test_model_unknown(service: Service) -> None:
    """Unknown model names the field."""
    line = service.refuses(failure(404, "not_found_error"))
    assert "evaluation.coherence_model" in line and MODEL in line


def test_rate_limit_persists(service: Service) -> None:
    """It is retried, then given up."""
    line = service.refuses(failure(429, "rate_limit_error"))
    assert "429 after 2 tries" in line
    assert len(service.requests) == 2


def test_rate_limit_once(service: Service) -> None:
    """It is retried, then passes."""
    result = service.score(STORIES, failure(429, "rate_limit_error"), GOOD)
    assert result is not None and result["grammar"] == 3.5
    assert len(service.requests) == 2 and service.said == []


def test_rate_limit_hours(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait of hours is not slept through."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    answer = failure(429, "rate_limit_error", retry_after_ms="", retry_after="7200")
    assert "429" in service.refuses(answer)
    assert len(service.requests) == 1 and sum(slept) < 5


@pytest.mark.parametrize("status", [500, 529])
def test_server_error_persists(service: Service, status: int) -> None:
    assert f"the service failed ({status} after 2 tries)" in service.refuses(
        failure(status, "api_error")
    )
    assert len(service.requests) == 2


def test_server_error_once(service: Service) -> None:
    """It is retried, then passes."""
    assert service.score(STORIES, failure(500, "api_error"), GOOD) is not None
    assert service.said == []


def test_service_slow(service: Service) -> None:
    """Its answer never comes."""
    slow = message(json.dumps(scores_for((5, 4, 3), (2, 1, 1))), delay=None)
    assert "no answer within 0.2 s" in service.refuses(slow, timeout=0.2, max_retries=0)


def without(answer: dict[str, Any], name: str) -> dict[str, Any]:
    del answer["scores"][0][name]
    return answer


def changed(name: str, value: object) -> dict[str, Any]:
    answer = scores_for((5, 4, 3), (2, 1, 1))
    answer["scores"][1][name] = value
    return answer


MALFORMED: dict[str, tuple[Callable[[], object], str]] = {
    "too few": (lambda: scores_for((5, 4, 3)), "expected 2 scores, got 1"),
    "too many": (lambda: scores_for(*[(5, 4, 3)] * 3), "expected 2 scores, got 3"),
    "zero": (
        lambda: changed("plot", 0),
        "plot of sample 2: expected an integer from 1 to 5, got 0",
    ),
    "six": (
        lambda: changed("grammar", 6),
        "grammar of sample 2: expected an integer from 1 to 5, got 6",
    ),
    "half": (
        lambda: changed("grammar", 4.5),
        "grammar of sample 2: expected an integer from 1 to 5, got 4.5",
    ),
    "word": (
        lambda: changed("grammar", "good"),
        "grammar of sample 2: expected an integer from 1 to 5, got 'good'",
    ),
    "truth": (
        lambda: changed("coherence", True),
        "coherence of sample 2: expected an integer from 1 to 5, got True",
    ),
    "absent": (lambda: without(scores_for((5, 4, 3), (1, 1, 1)), "plot"), "plot of sample 1"),
    "other order": (lambda: changed("sample", 1), "expected sample 2"),
    "entry is a number": (lambda: {"scores": [1, 2]}, "expected sample 1"),
    "scores is a number": (lambda: {"scores": 3}, "no list of scores"),
    "a list": (lambda: [1, 2], "no list of scores"),
}


@pytest.mark.parametrize(("make", "reason"), MALFORMED.values(), ids=MALFORMED.keys())
def test_answer_malformed_scores(service: Service, make: Callable[[], object], reason: str) -> None:
    line = service.refuses(message(json.dumps(make())))
    assert "malformed answer" in line and reason in line


def test_answer_prose(service: Service) -> None:
    assert "not JSON" in service.refuses(message("I would give them all a four."))


def test_answer_cut_off(service: Service) -> None:
    assert "'max_tokens'" in service.refuses(message('{"scores": [', stop_reason="max_tokens"))


@pytest.mark.parametrize(
    ("kind", "body", "reason"),
    [
        ("text/html", b"<html>captive portal</html>", "no text in it"),
        ("application/json", b"{ this is not JSON", "answer is an error"),
        ("application/json", b'{"content": 7}', "no text in it"),
        ("application/json", b"{}", "no text in it"),
        ("application/json", b"[]", "no text in it"),
    ],
)
def test_answer_not_a_message(service: Service, kind: str, body: bytes, reason: str) -> None:
    assert reason in service.refuses((200, {"content-type": kind}, body, 0.0))


def test_environment_base_url(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names the service."""
    monkeypatch.setenv("ANTHROPIC_BASE_URL", service.url)
    service.answers = [GOOD]
    assert coherence.score_samples(STORIES, MODEL, say=service.said.append) is not None
    assert len(service.requests) == 1
