"""Equal servers of one model: the least busy is asked, and one that fails is set aside for a while."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from cat_grpo.config import ServerConfig
from cat_grpo.errors import BadInput, Stopped

try:
    from aiolimiter import AsyncLimiter
    from openai import (
        APIConnectionError,
        APIStatusError,
        AsyncOpenAI,
        InternalServerError,
        NotFoundError,
        RateLimitError,
    )
except ImportError as error:
    raise BadInput("engine openai needs its client: pip install -e '.[openai]' in a checkout") from error

log = logging.getLogger(__name__)

__all__ = ["UNREACHABLE", "APIConnectionError", "APIStatusError", "NotFoundError", "Pool", "Server"]

UNREACHABLE = (APIConnectionError, InternalServerError, RateLimitError)
"""What another server may do better."""

T = TypeVar("T")

LIVES = 3
"""A request is given up once as many servers as there are, times this, have failed it."""


@dataclass(eq=False, slots=True)
class Server:
    """One of the pool. Its client tries again by itself, ever later, before it counts as failed."""

    client: AsyncOpenAI
    slots: asyncio.Semaphore
    asked: int = 0
    """Requests that it has, or that wait for it."""
    away_until: float = 0.0
    adapter: str = ""
    """The one that it has loaded for us."""
    loads: int = 0
    """How often it was given one."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def url(self) -> str:
        return str(self.client.base_url)


class Pool:
    """The servers of a config."""

    def __init__(self, config: ServerConfig, api_key: str) -> None:
        self._config = config
        self._api_key = api_key
        self._limit = AsyncLimiter(config.requests_per_minute, 60) if config.requests_per_minute else None
        self.servers = [
            Server(
                AsyncOpenAI(
                    base_url=url, api_key=api_key, timeout=config.timeout_s, max_retries=config.max_retries
                ),
                asyncio.Semaphore(config.max_concurrency),
            )
            for url in config.urls
        ]

    async def ask(self, request: Callable[[Server], Awaitable[T]]) -> tuple[T, int]:
        """What a server answers, and how many have failed before it.

        Raises Stopped when none could be had, BadInput when one refuses the request as such.
        """
        failures = 0
        while True:
            server = await self._least_busy()
            server.asked += 1
            try:
                async with server.slots:
                    if self._is_away(server):  # since this request has waited for it
                        continue
                    if self._limit:
                        await self._limit.acquire()
                    return await request(server), failures
            except UNREACHABLE as error:
                failures += 1
                self.set_aside(server, error)
                if failures >= LIVES * len(self.servers):
                    raise Stopped(f"{server.url}: {self.said(error)}") from None
            except APIStatusError as error:
                raise BadInput(f"{server.url}: {self.said(error)}") from None
            finally:
                server.asked -= 1

    def set_aside(self, server: Server, error: Exception) -> None:
        if not self._is_away(server):
            log.warning(
                "%s is set aside for %g s: %s", server.url, self._config.set_aside_s, self.said(error)
            )
        server.away_until = _now() + self._config.set_aside_s

    async def close(self) -> None:
        for server in self.servers:
            await server.client.close()

    async def _least_busy(self) -> Server:
        """Of those that are not set aside; where all are, the first that comes back."""
        there = [server for server in self.servers if not self._is_away(server)]
        if there:
            return min(there, key=lambda server: server.asked)
        first = min(self.servers, key=lambda server: server.away_until)
        await asyncio.sleep(max(0.0, first.away_until - _now()))
        return first

    def _is_away(self, server: Server) -> bool:
        return server.away_until > _now()

    def said(self, error: Exception) -> str:
        """One line, without the key, which some servers repeat."""
        return str(error).replace(self._api_key, "***").strip().partition("\n")[0]


def _now() -> float:
    return asyncio.get_running_loop().time()
