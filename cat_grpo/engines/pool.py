"""Equal servers of one model. The least busy gets the request; one that fails is set aside for a while."""

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
"""The errors after which another server is tried."""

T = TypeVar("T")

LIVES = 3
"""A request is given up after this many failures per server of the pool."""


@dataclass(eq=False, slots=True)
class Server:
    """One server of the pool. Its client retries, with growing delays, before the server counts as failed."""

    client: AsyncOpenAI
    slots: asyncio.Semaphore
    asked: int = 0
    """Requests that it is answering or that wait for it."""
    away_until: float = 0.0
    adapter: str = ""
    """The name of the adapter that it has loaded for us."""
    loads: int = 0
    """How often it has loaded one."""
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
        """Returns a server's answer and the number of failures before it.

        Raises Stopped when the servers failed too often, and BadInput when one refuses the request itself.
        """
        failures = 0
        while True:
            server = await self._least_busy()
            server.asked += 1
            try:
                async with server.slots:
                    if self._is_away(server):  # it failed while this request waited for it
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
        """Returns the least busy server that is not set aside. When all are, waits for the first back."""
        there = [server for server in self.servers if not self._is_away(server)]
        if there:
            return min(there, key=lambda server: server.asked)
        first = min(self.servers, key=lambda server: server.away_until)
        await asyncio.sleep(max(0.0, first.away_until - _now()))
        return first

    def _is_away(self, server: Server) -> bool:
        return server.away_until > _now()

    def said(self, error: Exception) -> str:
        """The error's first line, without the API key, which some servers repeat."""
        return str(error).replace(self._api_key, "***").strip().partition("\n")[0]


def _now() -> float:
    return asyncio.get_running_loop().time()
