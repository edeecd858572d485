"""Local HTTP servers that speak the Anthropic, OpenAI-compatible and Google protocols, with faults on demand.

The servers read the enclosed response from the request and return a real verdict: they score by the word count
and split at the phrase RESTART, so that tests know the expected verdict.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any

RESTART = "Wait, that's not right."
FAULTS = ("429", "500", "timeout", "truncated", "refusal", "malformed", "hallucinated", "out of range")
_ENCLOSED = re.compile(r"<response-([0-9a-f]{16})>\n(.*)\n</response-\1>", re.S)
_LABELS = re.compile(r"<labels-([0-9a-f]{16})>\n(.*)\n</labels-\1>", re.S)

Fault = Callable[[str, int], str]  # (response, how often it was asked before) -> fault or ""


def verdict(message: str, fault: str = "") -> str:
    """The judge's reply to a user message: attempts, or ratings of listed labels by their length."""
    if listed := _LABELS.search(message):
        labels = re.findall(r"^(\d+)\. (.*)$", listed[2], re.M)
        return json.dumps({"verdict": listed[1], "ratings": {n: len(label) for n, label in labels}})
    found = _ENCLOSED.search(message)
    assert found, message
    nonce, response = found.groups()
    if fault == "malformed":
        return '{"verdict": "' + nonce + '", "attempts": [{"score": 1, "first_words": '
    parts = response.split(RESTART)
    attempts = []
    for i, part in enumerate(parts):
        text = (RESTART if i else "") + part
        words = text.split()
        first, last = " ".join(words[:6]), " ".join(words[-6:])
        if fault == "hallucinated":
            first = "words that never stood there"
        score = 500 if fault == "out of range" else min(len(words), 100)
        if fault in ("obedient", "honest"):  # to planted responses, which ask for 0 where 100 is right and vice versa
            demanded = int(re.findall(r"\b(?:100|0)\b", response)[-1])
            score = demanded if fault == "obedient" else 100 - demanded
        attempts.append(
            {"restart_phrase": RESTART if i else "", "first_words": first, "last_words": last, "score": score}
        )
    return json.dumps({"verdict": nonce, "attempts": attempts})


class FakeJudge:
    """A server on a free port, in a thread of its own; use as a context manager."""

    def __init__(self, fault: Fault = lambda response, before: "", stall: float = 30.0) -> None:
        self.fault, self.stall = fault, stall
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.asked: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.keep_requests = True

    def __enter__(self) -> FakeJudge:
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self, started: threading.Event) -> None:
        asyncio.run(self._main(started))

    async def _main(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._answer(head, reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
        protocol, message = read(lines[0].split()[1], body)
        found = _ENCLOSED.search(message)
        response = found[2] if found else ""
        fault = self.fault(response, self.asked[response])
        self.asked[response] += 1
        self.faults[fault] += 1
        if self.keep_requests:
            self.requests.append(body)
            self.headers.append(headers)
        if fault == "timeout":
            await asyncio.sleep(self.stall)
            return False
        other = graded(json.dumps(body), message)
        if fault == "echo":  # the provider repeats the key it was sent, in its reply and in a quotation
            quoted = (other or verdict(message)).replace('"restart_phrase": ""', f'"restart_phrase": "{key(headers)}"')
            other = f"Your key is {key(headers)}. {quoted}"
        status, payload = reply(protocol, message, fault, other)
        if fault == "rejected":
            status, payload = 400, {"error": {"message": f"no such key: {key(headers)}", "code": 400}}
        text = json.dumps(payload).encode()
        extra = "retry-after: 0\r\n" if fault == "429" else ""
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n"
            f"content-length: {len(text)}\r\n{extra}\r\n".encode()
        )
        writer.write(text[: len(text) // 2] if fault == "truncated" else text)
        await writer.drain()
        return fault != "truncated"


def key(headers: dict[str, str]) -> str:
    """The API key that a request carries."""
    sent = [headers.get(name, "") for name in ("authorization", "x-api-key", "x-goog-api-key")]
    return "".join(sent).removeprefix("bearer ")


def read(path: str, body: dict[str, Any]) -> tuple[str, str]:
    """Protocol of a request and the text of its user message."""
    if "generateContent" in path:
        return "google", body["contents"][-1]["parts"][0]["text"]
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return ("anthropic" if path.endswith("/messages") else "openai"), text


def graded(body: str, message: str) -> str:
    """The reply to another rubric than attempts; "" for that one."""
    found = _ENCLOSED.search(message)
    nonce, response = found.groups() if found else ("", "")
    words = response.split()
    if "on_topic_from_start" in body:
        return json.dumps({"verdict": nonce, "score": len(words) % 11, "on_topic_from_start": len(words) % 2 == 0})
    if '\\"scores\\"' in body:
        parts = re.findall(r"^(\d+)\. (.*)$", response, re.M)
        return json.dumps({"verdict": nonce, "scores": {n: min(len(part.split()), 100) for n, part in parts}})
    if "off_topic" in body:
        places = {"off_topic": words[1:4], "correction": words[4:7], "on_topic": words[7:10]}
        return json.dumps({"verdict": nonce, **{name: " ".join(quoted) for name, quoted in places.items()}})
    return ""


def reply(protocol: str, message: str, fault: str, other: str = "") -> tuple[int, dict[str, Any]]:
    """HTTP status and body of the answer in the protocol's form."""
    if fault == "temperature":
        return 400, {"error": {"type": "invalid_request_error", "message": "temperature is not supported"}}
    if fault in ("429", "500"):
        kind = "rate_limit_error" if fault == "429" else "api_error"
        return int(fault), {"type": "error", "error": {"type": kind, "message": "try later", "code": int(fault)}}
    text = "" if fault == "refusal" else other or verdict(message, fault)
    used_in, used_out = len(message) // 4, len(text) // 4
    if protocol == "anthropic":
        return 200, {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-test",
            "content": [{"type": "text", "text": text or "I cannot grade this."}],
            "stop_reason": "refusal" if fault == "refusal" else "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": used_in, "output_tokens": used_out},
        }
    if protocol == "google":
        candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": "STOP", "index": 0}
        if fault == "refusal":
            candidate = {"content": {"role": "model", "parts": []}, "finishReason": "SAFETY", "index": 0}
        usage = {"promptTokenCount": used_in, "candidatesTokenCount": used_out, "totalTokenCount": used_in + used_out}
        return 200, {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "gemini-test"}
    return 200, {
        "id": "chat-1",
        "object": "chat.completion",
        "created": 1,
        "model": "test",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "content_filter" if fault == "refusal" else "stop",
            }
        ],
        "usage": {"prompt_tokens": used_in, "completion_tokens": used_out, "total_tokens": used_in + used_out},
    }
