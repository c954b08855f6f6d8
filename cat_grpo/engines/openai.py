"""OpenAI-compatible servers. vLLM's servers take and return token ids; any other server takes messages."""

import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from cat_grpo.config import ModelConfig
from cat_grpo.engines import NoLogprobsError, Sampling, together
from cat_grpo.engines.pool import UNREACHABLE, APIConnectionError, APIStatusError, NotFoundError, Pool, Server
from cat_grpo.engines.tokens import ChatTokens
from cat_grpo.errors import BadInput
from cat_grpo.learner.lora import ADAPTER_WEIGHTS
from cat_grpo.records import Completion, Generation, LabelRead, Messages, Usage

TOP_LOGPROBS = 20
"""The most logprobs per token that OpenAI's API returns."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter of the policy, in a folder that the servers can read."""

    name: str
    folder: Path


def open_servers(config: ModelConfig, api_key: str) -> "TokenServers | ChatServers":
    """The engine for the config's servers. It contacts them only when the first request is made."""
    pool = Pool(config.server, api_key)
    if config.server.api == "chat":
        return ChatServers(pool, config)
    return TokenServers(pool, config, ChatTokens.of_model(config))


class _Servers:
    def __init__(self, pool: Pool, config: ModelConfig) -> None:
        self._pool = pool
        self._config = config
        self._model = config.server.model or config.path

    async def close(self) -> None:
        await self._pool.close()

    def _usage(self, answer: Any, retries: int) -> Usage:
        told, prices = answer.usage, self._config.server
        if told is None:
            return Usage(retries=retries)
        cached = getattr(getattr(told, "prompt_tokens_details", None), "cached_tokens", None)
        cost = (
            told.prompt_tokens * prices.price_per_million_prompt_tokens
            + told.completion_tokens * prices.price_per_million_completion_tokens
        )
        return Usage(told.prompt_tokens, cached or 0, told.completion_tokens, retries, cost / 1e6)


class TokenServers(_Servers):
    """vLLM servers, for every role: prompts go as ids, and ids and logprobs come back.

    With top-p, top-k or a temperature, the logprobs are the policy's own only if the server was started with
    `--logprobs-mode processed_logprobs`, which `cat_grpo.engines.vllm` sets. A server loads the policy's
    adapters only if it was started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and can read the run's directory.
    """

    def __init__(self, pool: Pool, config: ModelConfig, tokens: ChatTokens) -> None:
        super().__init__(pool, config)
        self._tokens = tokens
        self._adapter: Adapter | None = None

    def without_adapters(self) -> "TokenServers":
        """Returns an engine for the bare weights on the same servers."""
        return type(self)(self._pool, self._config, self._tokens)

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        ids = [self._tokens.encode(messages) for messages in prompts]
        seeds = sampling.bounded_seeds(len(ids))
        return await together(
            self._generate(row, seed, sampling) for row, seed in zip(ids, seeds, strict=True)
        )

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        label_ids = self._tokens.label_ids(labels)
        return await together(
            self._read_label(self._tokens.encode(messages), label_ids) for messages in prompts
        )

    async def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        return await together(self._logprobs(*row) for row in zip(prompts, completions, strict=True))

    async def load_weights(self, checkpoint: Path) -> None:
        if not (checkpoint / ADAPTER_WEIGHTS).exists():
            raise ValueError(f"{checkpoint}: servers take adapters, and this checkpoint has none")
        self._adapter = Adapter(f"cat-grpo-{uuid4().hex}", checkpoint.resolve())
        await together(self._load_if_there(server) for server in self._pool.servers)

    async def _generate(self, ids: list[int], seed: int | None, sampling: Sampling) -> Generation:
        answer, retries = await self._complete(
            ids,
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            logprobs=0,
            extra_body={"top_k": sampling.top_k, "stop_token_ids": self._tokens.end_ids},
        )
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        completions = tuple(
            self._tokens.completion(choice.token_ids, choice.logprobs.token_logprobs) for choice in choices
        )
        return Generation(tuple(ids), completions, self._usage(answer, retries))

    async def _read_label(self, ids: list[int], label_ids: Sequence[Sequence[int]]) -> LabelRead:
        flat = [token for spellings in label_ids for token in spellings]
        extra = {"logprob_token_ids": flat, "return_tokens_as_token_ids": True}
        answer, retries = await self._complete(
            ids, max_tokens=1, temperature=0.0, logprobs=len(flat), extra_body=extra
        )
        told = answer.choices[0].logprobs.top_logprobs[0]
        probabilities = tuple(
            sum(math.exp(told[f"token_id:{token}"]) for token in spellings) for spellings in label_ids
        )
        return LabelRead(probabilities, self._usage(answer, retries))

    async def _logprobs(self, prompt: Sequence[int], completion: Sequence[int]) -> tuple[float, ...]:
        answer, _ = await self._complete(
            [*prompt, *completion], max_tokens=1, temperature=0.0, extra_body={"prompt_logprobs": 0}
        )
        told = answer.choices[0].prompt_logprobs[len(prompt) :]
        return tuple(at[str(token)]["logprob"] for at, token in zip(told, completion, strict=True))

    async def _complete(
        self, ids: list[int], extra_body: dict[str, Any], **arguments: Any
    ) -> tuple[Any, int]:
        """The answer of one server, and the retries it took."""
        extra_body = {"return_token_ids": True, **extra_body}

        async def request(server: Server) -> tuple[Any, int]:
            raw = await server.client.completions.with_raw_response.create(
                model=await self._model_on(server), prompt=ids, extra_body=extra_body, **arguments
            )
            answer = raw.parse()
            if any(choice.finish_reason not in ("stop", "length") for choice in answer.choices):
                # Half a completion is useless, so another server is asked.
                raise APIConnectionError(message="the completion was cut short", request=raw.http_request)
            return answer, raw.retries_taken

        (answer, retries), failures = await self._pool.ask(self._anew_where_lost(request))
        return answer, retries + failures

    def _anew_where_lost(
        self, request: Callable[[Server], Awaitable[tuple[Any, int]]]
    ) -> Callable[[Server], Awaitable[tuple[Any, int]]]:
        """Loads the adapter again, and repeats the request, when a restarted server has lost it."""

        async def asked(server: Server) -> tuple[Any, int]:
            known = server.loads
            try:
                return await request(server)
            except NotFoundError:
                if not server.adapter:
                    raise
                if server.loads == known:  # otherwise another request has loaded it again
                    server.adapter = ""
                return await request(server)

        return asked

    async def _model_on(self, server: Server) -> str:
        """Returns the bare model's name, or the adapter's after loading it on a server that lacks it."""
        adapter = self._adapter
        if adapter is None:
            return self._model
        async with server.loading:
            if server.adapter != adapter.name:
                body = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
                await server.client.post("/load_lora_adapter", body=body, cast_to=str)
                before, server.adapter = server.adapter, adapter.name
                server.loads += 1
                if before:
                    with suppress(NotFoundError):  # a restarted server does not have it
                        await server.client.post(
                            "/unload_lora_adapter", body={"lora_name": before}, cast_to=str
                        )
        return adapter.name

    async def _load_if_there(self, server: Server) -> None:
        """Loads the adapter on the server. A server that is down gets it with its next request."""
        try:
            await self._model_on(server)
        except UNREACHABLE as error:
            self._pool.set_aside(server, error)
        except APIStatusError as error:
            raise BadInput(
                f"{server.url}: {self._pool.said(error)} (adapters need VLLM_ALLOW_RUNTIME_LORA_UPDATING=1,"
                " --enable-lora, and access to the run's directory)"
            ) from None


class ChatServers(_Servers):
    """Any server, for an anchor or a judge: messages go as text, and text comes back."""

    def without_adapters(self) -> "ChatServers":
        return self

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        seeds = sampling.bounded_seeds(len(prompts))
        return await together(
            self._generate(messages, seed, sampling) for messages, seed in zip(prompts, seeds, strict=True)
        )

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        return await together(self._read_label(messages, labels) for messages in prompts)

    async def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        raise ValueError("server.api: chat: a chat server returns no logprobs of given tokens")

    async def load_weights(self, checkpoint: Path) -> None:
        raise ValueError("server.api: chat: a chat server takes no weights")

    async def _generate(self, messages: Messages, seed: int | None, sampling: Sampling) -> Generation:
        answer, retries = await self._chat(
            messages,
            {"top_k": sampling.top_k} if sampling.top_k else {},
            n=sampling.n,
            max_completion_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            **({} if seed is None else {"seed": seed}),
        )
        choices = sorted(answer.choices, key=lambda choice: choice.index)
        completions = tuple(
            Completion(
                choice.message.content or "", (), (), "stop" if choice.finish_reason == "stop" else "length"
            )
            for choice in choices
        )
        return Generation((), completions, self._usage(answer, retries))

    async def _read_label(self, messages: Messages, labels: Sequence[str]) -> LabelRead:
        try:
            answer, retries = await self._chat(
                messages,
                {},
                max_completion_tokens=1,
                temperature=0.0,
                logprobs=True,
                top_logprobs=TOP_LOGPROBS,
            )
        except BadInput as error:
            if "logprobs" in str(error):
                raise NoLogprobsError(str(error)) from error
            raise
        told = answer.choices[0].logprobs
        tops = told.content[0].top_logprobs if told and told.content else ()
        probabilities = tuple(
            sum(math.exp(top.logprob) for top in tops if top.token.strip().lower() == label)
            for label in labels
        )
        return LabelRead(probabilities, self._usage(answer, retries), is_told=bool(tops))

    async def _chat(
        self, messages: Messages, extra_body: dict[str, Any], **arguments: Any
    ) -> tuple[Any, int]:
        if self._config.chat_template_kwargs:
            extra_body = {**extra_body, "chat_template_kwargs": self._config.chat_template_kwargs}

        async def request(server: Server) -> tuple[Any, int]:
            turns: Any = list(messages)
            raw = await server.client.chat.completions.with_raw_response.create(
                model=self._model, messages=turns, extra_body=extra_body, **arguments
            )
            return raw.parse(), raw.retries_taken

        (answer, retries), failures = await self._pool.ask(request)
        return answer, retries + failures
