"""Send many questions to an LLM through Inspect AI, within a budget; a failed question gives a reply with a reason.

Inspect provides the providers' clients, retries with back-off, adaptive concurrency and provider batches. This module
limits the number of questions in flight and counts tokens and money. It knows nothing about rubrics or responses.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steerback.errors import SteerbackError
from steerback.judging.models import (
    KEYS,
    Limits,
    check_address,
    check_key,
    default_temperature,
    placeholder_key,
    price,
    read_dotenv,
    redact,
)
from steerback.judging.prompt import Query
from steerback.records import Spend

if TYPE_CHECKING:
    from inspect_ai.model import Model, ModelOutput

CHARACTERS_PER_TOKEN = 4.0
"""Used for estimates; the actual spend comes from the provider's token counts."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's reply. `reason` says why it is unusable; `over_budget` marks a question that was never sent."""

    text: str
    reason: str = ""
    over_budget: bool = False


@dataclass(slots=True)
class Client:
    """An open connection. `running` counts questions in flight; `changed` is done when the next of them ends."""

    model: Model
    changed: asyncio.Future[None]
    running: int = 0
    users: int = 0


@dataclass
class Transport:
    """Connection to one model. `temperature` None uses the provider's default; `describe` returns the value sent.

    `missing` names what a transport made for estimates would still need to send a question, such as a key.
    """

    model: str
    limits: Limits = field(default_factory=Limits)
    temperature: float | None = 0.0
    base_url: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.missing = ""
        try:
            read_dotenv()
            if not self.base_url or not self.model_args.get("api_key"):
                check_key(self.model)
            require_inspect(self.model)
        except SteerbackError as error:
            if not self.limits.estimate_only:
                raise
            self.missing = str(error)
        check_provider(self.model)
        check_address(self.model, self.base_url)
        if default_temperature(self.model) is None:  # such models fail if a temperature is sent
            self.temperature = None
        self._price = self.limits.price or price(self.model)
        if self.limits.max_cost is not None and self._price is None:
            raise SteerbackError(
                f"judge {self.model}: its price is unknown, so --max-judge-cost cannot be enforced; "
                "give --judge-price IN OUT (USD per million tokens) or use --max-judge-calls"
            )
        self._spent = Spend(cost=0.0 if self._price else None)
        self._drained = self._spent
        self._sent: object = "nothing asked yet"
        self._takes_temperature = True
        self._asked = 0
        self._reserved = 0.0
        self._clients: dict[asyncio.AbstractEventLoop, Client] = {}

    def spend(self) -> Spend:
        """Return the spend so far, by the provider's token counts."""
        return self._spent

    def drain(self) -> Spend:
        """Return the spend since the last call of this method."""
        spent, self._drained = self._spent - self._drained, self._spent
        return spent

    def estimate(self, questions: Iterable[Query], output_tokens: int = 150) -> Spend:
        """Estimate calls, tokens and cost of asking `questions`, from their lengths."""
        total = Spend(cost=0.0 if self._price else None)
        for question in questions:
            total = self._add(total, _tokens(question), output_tokens)
        return total

    def describe(self) -> dict[str, object]:
        """Return everything that shaped the replies, as JSON-able values without secrets."""
        return {
            "model": self.model,
            "temperature asked for": self.temperature,
            "temperature sent": self._sent,
            "max_tokens": self.limits.max_tokens,
            "base_url": self.base_url,
            "provider batch": self.limits.batch,
        }

    async def ask(self, questions: Iterable[tuple[str, Query]]) -> AsyncGenerator[tuple[str, Reply]]:
        """Yield (key, reply) in order of completion; each question is answered exactly once."""
        waiting = deque(questions)
        running: dict[asyncio.Task[Reply], str] = {}
        async with self._shared() as client:
            try:
                while True:
                    running.update(self._start(client, waiting))
                    if not running and not waiting:
                        return
                    awaited: list[asyncio.Future[Any]] = [*running, *([client.changed] if waiting else [])]
                    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                    for task in [task for task in running if task.done()]:
                        yield running.pop(task), _result(task)
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _start(self, client: Client, waiting: deque[tuple[str, Query]]) -> Iterator[tuple[asyncio.Task[Reply], str]]:
        while waiting and client.running < self.limits.concurrency:
            key, question = waiting[0]
            refused = self._over_budget(question)
            if refused and client.running:
                return  # questions in flight may cost less than was reserved for them
            waiting.popleft()
            task = asyncio.create_task(self._one(client.model, question, refused))
            if not refused:
                self._asked += 1
                self._reserve(client, task, self._expected(question))
            yield task, key

    def _reserve(self, client: Client, task: asyncio.Task[Reply], cost: float) -> None:
        """Reserve a place in flight and the expected cost of a question until its reply arrives."""

        def release(task: asyncio.Task[Reply]) -> None:
            client.running -= 1
            self._reserved = max(self._reserved - cost, 0.0)
            client.changed.set_result(None)
            client.changed = asyncio.get_running_loop().create_future()

        client.running += 1
        self._reserved += cost
        task.add_done_callback(release)

    def _expected(self, question: Query) -> float:
        return self._cost(_tokens(question), 150)

    async def _one(self, model: Model, question: Query, refused: str) -> Reply:
        if refused:
            return Reply("", refused, over_budget=True)
        output = await self._generate(model, question)
        usage = output.usage
        if usage is not None:
            cached = (usage.input_tokens_cache_read or 0) + (usage.input_tokens_cache_write or 0)
            self._spent = self._add(self._spent, usage.input_tokens + cached, usage.output_tokens)
        else:
            self._spent = self._add(self._spent, _tokens(question), int(len(output.completion) / CHARACTERS_PER_TOKEN))
        text = redact(output.completion)
        if output.error:
            return Reply(text, f"the provider reported: {_line(output.error)}")
        if output.stop_reason == "content_filter":
            return Reply(text, "the model refused (content filter)")
        if output.stop_reason in ("max_tokens", "model_length"):
            return Reply(text, f"the reply was cut off ({output.stop_reason})")
        return Reply(text)

    async def _generate(self, model: Model, question: Query) -> ModelOutput:
        from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser, GenerateConfig

        messages: list[ChatMessage] = [
            ChatMessageSystem(content=question.system),
            ChatMessageUser(content=question.user),
        ]
        temperature = self.temperature if self._takes_temperature else None
        try:
            return await model.generate(messages, config=GenerateConfig(temperature=temperature))
        except Exception as error:  # providers have no common exception for a rejected temperature
            if temperature is None or "temperature" not in str(error).lower():
                raise
        self._takes_temperature = False  # later questions to this model carry no temperature
        return await model.generate(messages, config=GenerateConfig(temperature=None))

    @contextlib.asynccontextmanager
    async def _shared(self) -> AsyncGenerator[Client]:
        """Share one client between the concurrent calls of an event loop; the last one closes it.

        The limit of questions in flight is that of all calls together.
        """
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients[loop] = Client(self._open(), loop.create_future())
        client = self._clients[loop]
        client.users += 1
        try:
            yield client
        finally:
            client.users -= 1
            if not client.users:
                del self._clients[loop]
                async with client.model:
                    """Closed at the end of this block."""

    def _open(self) -> Model:
        """Open a client of the provider."""
        from inspect_ai.model import GenerateConfig, get_model
        from tenacity import wait_exponential_jitter

        limits = self.limits
        config = GenerateConfig(
            max_tokens=limits.max_tokens,
            max_retries=limits.max_retries,
            attempt_timeout=limits.attempt_timeout,
            batch=True if limits.batch else None,
        )
        key = {"api_key": placeholder} if (placeholder := placeholder_key(self.model)) else {}
        arguments = {**key, **self.model_args}
        model = get_model(self.model, config=config, base_url=self.base_url, memoize=False, **arguments)
        waits = wait_exponential_jitter(initial=limits.first_wait, max=60.0, jitter=limits.first_wait)
        api: Any = model.api  # Inspect has no option for the first wait or for the observation of requests
        api.retry_wait = lambda: waits
        api.generate = self._observed(api.generate)
        return model

    def _observed(self, generate: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        """Wrap the provider's call to record the temperature of the request: some providers drop it silently."""

        async def call(*args: object, **kwargs: object) -> object:
            result = await generate(*args, **kwargs)
            request = getattr(result[1], "request", None) if isinstance(result, tuple) else None
            if isinstance(request, dict) and request:
                self._sent = _search(request, "temperature")
            return result

        return call

    def _over_budget(self, question: Query) -> str:
        limits = self.limits
        if limits.max_calls is not None and self._asked >= limits.max_calls:
            return f"budget spent: --max-judge-calls {limits.max_calls}"
        spent = (self._spent.cost or 0.0) + self._reserved + self._expected(question)
        if limits.max_cost is not None and spent > limits.max_cost:
            return f"budget spent: --max-judge-cost {limits.max_cost:g}"
        return ""

    def _cost(self, input_tokens: int, output_tokens: int) -> float:
        if self._price is None:
            return 0.0
        dollars = (input_tokens * self._price[0] + output_tokens * self._price[1]) / 1e6
        return dollars / 2 if self.limits.batch else dollars

    def _add(self, spend: Spend, input_tokens: int, output_tokens: int) -> Spend:
        cost = None if self._price is None else self._cost(input_tokens, output_tokens)
        return spend + Spend(1, input_tokens, output_tokens, cost)


def require_inspect(model: str) -> None:
    """Raise SteerbackError if the extra `judges` is not installed."""
    from importlib.util import find_spec

    if find_spec("inspect_ai") is None:
        raise SteerbackError(f"judge {model} needs the extra 'judges': pip install 'steerback[judges]'")


def check_provider(model: str) -> None:
    """Raise SteerbackError that lists the known providers if Inspect AI lacks the provider of `model`."""
    from importlib.util import find_spec

    provider = model.partition("/")[0]
    if provider in KEYS or provider == "openai-api" or find_spec("inspect_ai") is None:
        return  # known without the slow import below, or Inspect is not installed
    import inspect_ai.model  # noqa: F401  registers the providers
    from inspect_ai._util.registry import registry_find, registry_info, registry_unqualified_name

    def name_of(api: object) -> str:
        return registry_unqualified_name(registry_info(api))

    if not registry_find(lambda info: info.type == "modelapi" and registry_unqualified_name(info) == provider):
        known = sorted({name_of(api) for api in registry_find(lambda info: info.type == "modelapi")})
        raise SteerbackError(f"unknown provider of judge {model!r}; choose one of: {', '.join(known)}")


def _search(value: object, name: str) -> object:
    """Return the value of the first key `name` in nested dicts, or None."""
    if not isinstance(value, dict):
        return None
    if name in value:
        return value[name]
    return next((match for v in value.values() if (match := _search(v, name)) is not None), None)


def _tokens(question: Query) -> int:
    return int((len(question.system) + len(question.user)) / CHARACTERS_PER_TOKEN) + 1


def _result(task: asyncio.Task[Reply]) -> Reply:
    if task.cancelled():
        return Reply("", "the call was cancelled")
    error = task.exception()
    if error is None:
        return task.result()
    if not isinstance(error, Exception):
        raise error
    cause = _cause(error)
    return Reply("", f"the call failed: {type(cause).__name__}: {_line(str(cause))}")


def _cause(error: BaseException) -> BaseException:
    """Return the provider's error inside the wrapper that the retry library raises."""
    last = getattr(error, "last_attempt", None)
    if last is not None and last.done() and not last.cancelled() and last.exception() is not None:
        return _cause(last.exception())
    return error


def _line(text: str) -> str:
    return redact(" ".join(text.split()))[:300]
