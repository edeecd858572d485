"""LLM judges by alias, their API keys and their prices. Every Inspect AI model string ("provider/model") is a judge.

This module reads names and environment variables; it makes no call.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from steerback.errors import SteerbackError
from steerback.readers import LARGEST_SETTINGS, read_address, read_text


@dataclass(frozen=True, slots=True)
class JudgeModel:
    """A judge in the listing of `steerback judges`; `price` in USD per million input and output tokens, if known."""

    alias: str
    model: str
    note: str
    price: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits and settings of the calls to a model. Call and cost limits apply to one transport; None means no limit."""

    max_calls: int | None = None
    max_cost: float | None = None  # USD
    price: tuple[float, float] | None = None  # USD per million input and output tokens, for models not in ALIASES
    batch: bool = False  # whether to use the provider's batch API
    concurrency: int = 64
    max_tokens: int = 4096
    max_retries: int = 4
    attempt_timeout: int = 120  # seconds
    first_wait: float = 3.0  # seconds before the first retry; doubles with each retry
    estimate_only: bool = False  # no question will be sent, so no key is needed
    ask_again: int = 0  # how often a question is repeated if nothing in the reply can be parsed

    def __post_init__(self) -> None:
        prices = [("--judge-price", price) for price in self.price or ()]
        for option, amount in (*prices, ("--max-judge-cost", self.max_cost or 0.0)):
            if not 0 <= amount < float("inf"):
                raise SteerbackError(f"{option} {amount} is not an amount of money; give a number of USD, 0 or more")


ALIASES = (
    JudgeModel("sonnet-4.5", "anthropic/claude-sonnet-4-5-20250929", "the specification's primary judge", (3.0, 15.0)),
    JudgeModel("haiku-4.5", "anthropic/claude-haiku-4-5-20251001", "cross-judge; in the authors' plots", (1.0, 5.0)),
    JudgeModel("gpt-5-mini", "openrouter/openai/gpt-5-mini", "cross-judge; takes no temperature", (0.25, 2.0)),
    JudgeModel("qwen3-32b", "openrouter/qwen/qwen3-32b", "cross-judge", (0.1, 0.45)),
    JudgeModel("gemini-2.5-flash", "google/gemini-2.5-flash", "cross-judge", (0.3, 2.5)),
)
"""List prices of late 2025, for estimates only; `--judge-price IN OUT` overrides them. The batch API costs half."""

KEYS: Mapping[str, tuple[str, ...]] = {
    "anthropic": ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"),
    "openai": ("OPENAI_API_KEY",),
    "openrouter": ("OPENROUTER_API_KEY",),
    "google": ("GOOGLE_API_KEY", "GEMINI_API_KEY"),
    "mistral": ("MISTRAL_API_KEY",),
    "groq": ("GROQ_API_KEY",),
    "grok": ("XAI_API_KEY",),
    "together": ("TOGETHER_API_KEY",),
    "fireworks": ("FIREWORKS_API_KEY",),
    "deepseek": ("DEEPSEEK_API_KEY",),
    "perplexity": ("PERPLEXITY_API_KEY",),
}
"""Environment variables of each provider's key, of which one must be set; providers not listed are not checked."""

_SECRET = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD)$")
SHORTEST_SECRET = 8  # characters; a shorter value is a placeholder, and redacting it would damage replies
_NO_TEMPERATURE = re.compile(r"(?:^|/)(?:gpt-5|o\d)")


def model_string(name: str) -> str | None:
    """Return the Inspect model string of an alias, of a model string itself, or of the NAME in NAME+RUBRIC.

    None if `name` is none of these.
    """
    name = name.partition("+")[0]
    known = {entry.alias: entry.model for entry in ALIASES}
    return known.get(name, name if "/" in name else None)


def price(model: str) -> tuple[float, float] | None:
    """Return the price in USD per million input and output tokens, None if unknown."""
    return next((entry.price for entry in ALIASES if entry.model == model), None)


def default_temperature(model: str) -> float | None:
    """Return 0, or None for model families that reject a temperature."""
    return None if _NO_TEMPERATURE.search(model) else 0.0


def read_dotenv(path: Path = Path(".env"), environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the keys (`*_API_KEY`) of a .env file that are not set yet.

    Lines have the form NAME=value; quotes and `export` are allowed. Other variables are ignored: a downloaded folder
    could otherwise set an address that then receives the user's keys.
    """
    if not path.is_file():
        return
    try:
        text = read_text(path, "file", LARGEST_SETTINGS)
    except SteerbackError as error:
        raise SteerbackError(f"{error}; write NAME_API_KEY=... lines into it") from None
    for line in text.splitlines():
        if match := re.match(r"\s*(?:export\s+)?([A-Za-z_]\w*_API_KEY)\s*=\s*(.*?)\s*$", line):
            environment.setdefault(match[1], match[2].strip("\"'"))


def check_key(model: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise SteerbackError if the key that `model` needs is missing; the message names the environment variable."""
    provider, wanted = model.partition("/")[0], KEYS.get(model.partition("/")[0], ())
    if provider == "openai-api":
        service = _service(model)
        wanted = (f"{service}_API_KEY",)
        address = environment.get(f"{service}_BASE_URL")
        if not address:
            raise SteerbackError(f"judge {model}: set {service}_BASE_URL to the address of the service")
        if is_near(address):
            return
    if wanted and not any(environment.get(name) for name in wanted):
        others = f" (or {', '.join(wanted[1:])})" if len(wanted) > 1 else ""
        raise SteerbackError(
            f"judge {model}: no key; set {wanted[0]}{others} in the environment or a .env file, or use --judge offline"
        )


def check_address(model: str, base_url: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Raise SteerbackError if the service address of `model` (`base_url`, or NAME_BASE_URL) is no valid address."""
    provider = model.partition("/")[0]
    name = f"{_service(model) if provider == 'openai-api' else re.sub(r'[^A-Z]', '_', provider.upper())}_BASE_URL"
    if address := base_url or environment.get(name):
        read_address(address, f"judge {model}, {'base_url' if base_url else name}")


def placeholder_key(model: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return a dummy key for a nearby server without authentication, because clients require a key.

    None if the environment has a key, or if the server is not on this machine or a private network.
    """
    if not model.startswith("openai-api/") or environment.get(f"{_service(model)}_API_KEY"):
        return None
    address = environment.get(f"{_service(model)}_BASE_URL")
    return "none" if address and is_near(address) else None


def is_near(address: str) -> bool:
    """Return whether a URL points to this machine or a private network, whose servers need no key."""
    host = read_address(address, "address of the judge").hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return bool(host) and ("." not in host or host.endswith(".local"))


def _service(model: str) -> str:
    """Return the prefix of the environment variables of "openai-api/NAME/model": NAME in capitals."""
    return re.sub(r"\W", "_", model.split("/")[1]).upper()


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Replace every key, token and password of the environment in a text by the name of its variable."""
    secrets = {value: name for name, value in environment.items() if _SECRET.search(name)}
    for value in sorted(secrets, key=len, reverse=True):  # longest first: one key may contain another
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, f"[{secrets[value]}]")
    return text
