"""The client of OpenAI-compatible servers, against servers that answer as they are told to."""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from asking import user
from cat_grpo.config import Config, ModelConfig, ServerConfig
from cat_grpo.engines import Sampling
from cat_grpo.engines.roles import open_engine, refuse_untrainable
from cat_grpo.errors import BadInput, Stopped
from cat_grpo.learner.lora import ADAPTER_WEIGHTS
from cat_grpo.method.rewards.judge import judge_criteria, refuse_silent_judge

Reply = tuple[int, Any]
"""A status, and what becomes JSON."""


class Scripted:
    """A server on a port of its own: `reply(path, body)` says what it answers, `asked` what it was asked."""

    def __init__(self, reply: Callable[[str, dict], Reply]) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.most_at_once = 0
        self.keys: set[str] = set()
        at_once, lock = [0], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.asked.append((handler.path, body))
                    self.keys.add(handler.headers["Authorization"])
                    at_once[0] += 1
                    self.most_at_once = max(self.most_at_once, at_once[0])
                status, answer = reply(handler.path, body)
                with lock:
                    at_once[0] -= 1
                content = json.dumps(answer).encode()
                handler.send_response(status)
                handler.send_header("Content-Type", "application/json")
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content)

            def log_message(handler, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            request_queue_size = 256  # by default 5 may knock at once, and the others are turned away

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@contextmanager
def scripted(*replies: Callable[[str, dict], Reply]) -> Iterator[list[Scripted]]:
    servers = [Scripted(reply) for reply in replies]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def chat(text: str, logprobs: dict[str, float] | None = None) -> Reply:
    """One answer of a chat; `logprobs` are the likeliest first tokens."""
    tops = [{"token": token, "logprob": value, "bytes": None} for token, value in (logprobs or {}).items()]
    told = {"content": [{**tops[0], "top_logprobs": tops}]} if tops else None
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": text},
        "logprobs": told,
    }
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def error(status: int, message: str = "no") -> Reply:
    return status, {"error": {"message": message}}


def model(*servers: Scripted | str, api: str = "chat", path: str = "m", **server: Any) -> ModelConfig:
    urls = tuple(one if isinstance(one, str) else one.url for one in servers)
    quick = {"max_retries": 0, "set_aside_s": 0.01} | server
    return ModelConfig(
        path=path, device="cpu", engine="openai", server=ServerConfig(urls=urls, api=api, **quick)
    )


ONE = Sampling(max_tokens=5, seeds=(3,))


async def test_text_comes_back_with_what_it_cost():
    with scripted(lambda *_: chat("hello")) as (server,):
        config = model(server, price_per_million_prompt_tokens=1e6, price_per_million_completion_tokens=2e6)
        engine = open_engine(config, {})
        (generation,) = await engine.generate([user("hi")], ONE)
        await engine.close()
    assert generation.completions[0].text == "hello"
    assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (7, 2)
    assert generation.usage.cost == 7 * 1 + 2 * 2
    ((path, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert (body["model"], body["seed"], body["max_completion_tokens"]) == ("m", 3, 5)
    assert server.keys == {"Bearer none"}  # not what the client finds in the environment by itself


async def test_a_server_that_fails_is_set_aside_and_nothing_is_lost(caplog):
    with scripted(lambda *_: error(500), lambda _, body: chat(body["messages"][0]["content"])) as servers:
        engine = open_engine(model(*servers, set_aside_s=600.0), {})
        generations = await engine.generate(
            [user(str(i)) for i in range(40)], Sampling(max_tokens=5, seeds=range(40))
        )
        await engine.close()
    assert [generation.completions[0].text for generation in generations] == [str(i) for i in range(40)]
    bad, good = servers
    assert len(good.asked) == 40
    assert sum(generation.usage.retries for generation in generations) == len(bad.asked)
    assert len([record for record in caplog.records if "is set aside" in record.message]) == 1


async def test_work_goes_to_the_least_busy():
    """One server holds each answer back until the other has given all the rest."""
    rest = threading.Semaphore(0)

    def slow(*_: Any) -> Reply:
        rest.acquire()
        return chat("slow")

    def fast(*_: Any) -> Reply:
        return chat("fast")

    with scripted(slow, fast) as servers:
        engine = open_engine(model(*servers), {})
        held = asyncio.ensure_future(engine.generate([user("held")], ONE))
        while not servers[0].asked:
            await asyncio.sleep(0)
        for _ in range(6):
            (generation,) = await engine.generate([user("rest")], ONE)
            assert generation.completions[0].text == "fast"
        rest.release()
        assert (await held)[0].completions[0].text == "slow"
        await engine.close()


async def test_a_server_comes_back():
    failures = iter([True, True])
    with scripted(lambda *_: error(500) if next(failures, False) else chat("back")) as (server,):
        engine = open_engine(model(server), {})
        (generation,) = await engine.generate([user("hi")], ONE)
        await engine.close()
    assert generation.completions[0].text == "back"
    assert generation.usage.retries == 2


async def test_the_clients_own_retries_are_counted():
    failures = iter([True])
    with scripted(lambda *_: error(429) if next(failures, False) else chat("back")) as (server,):
        engine = open_engine(model(server, max_retries=1), {})
        (generation,) = await engine.generate([user("hi")], ONE)
        await engine.close()
    assert generation.usage.retries == 1


async def test_servers_that_are_gone_for_good_are_an_error_and_no_answer():
    engine = open_engine(model("http://127.0.0.1:9/v1"), {})
    with pytest.raises(Stopped, match=r"127\.0\.0\.1:9"):
        await engine.generate([user("hi")], ONE)
    await engine.close()


async def test_a_refusal_is_one_line_without_the_key(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret-1")
    with scripted(lambda *_: error(401, "bad key sk-secret-1\nsee docs")) as (server,):
        engine = open_engine(model(server, api_key="env:SOME_KEY"), {})
        with pytest.raises(ValueError, match="bad key") as refusal:
            await engine.generate([user("hi")], ONE)
        await engine.close()
    assert server.keys == {"Bearer sk-secret-1"}
    assert len(server.asked) == 1  # it would be refused again
    assert "sk-secret" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_key_is_named_and_never_written(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for where in ("env:NO_SUCH_KEY", "prefect:none"):
        with pytest.raises(ValueError, match=f"server.api_key: {where}"):
            open_engine(model("http://x/v1", api_key=where), {})
    with pytest.raises(ValueError, match="api_key"):
        model("http://x/v1", api_key="sk-secret-1")


async def test_no_more_requests_at_once_than_allowed():
    with scripted(lambda *_: chat("x")) as (server,):
        engine = open_engine(model(server, max_concurrency=3), {})
        await engine.generate([user("hi")] * 30, Sampling(max_tokens=5))
        await engine.close()
    assert len(server.asked) == 30
    assert 1 <= server.most_at_once <= 3


async def test_labels_are_read_in_every_spelling():
    told = {"yes": math.log(0.5), " Yes": math.log(0.2), "NO": math.log(0.1), "perhaps": math.log(0.1)}
    with scripted(lambda *_: chat("yes", told)) as (server,):
        engine = open_engine(model(server), {})
        (read,) = await engine.read_labels([user("hi")], ("yes", "no"))
        await engine.close()
    assert read.probabilities == pytest.approx((0.7, 0.1))


@pytest.mark.parametrize("without", [chat("yes"), error(400, "logprobs: not here")])
async def test_a_judge_that_tells_no_logprobs_is_refused_when_it_is_opened(without):
    with scripted(lambda *_: without) as (server,):
        engine = open_engine(model(server), {})
        with pytest.raises(BadInput, match=r"^reward\.verdict: label needs a judge that tells probabilities"):
            await refuse_silent_judge(engine, Config())
        await engine.close()


async def test_one_reply_without_logprobs_is_one_abstention():
    told = {"yes": math.log(0.7), "no": math.log(0.1)}

    def reply(_: str, body: dict) -> Reply:
        return chat("yes") if "silent" in body["messages"][-1]["content"] else chat("yes", told)

    with scripted(reply) as (server,):
        engine = open_engine(model(server), {})
        questions = [("text", "criterion"), ("silent", "criterion"), ("text", "another")]
        verdicts = await judge_criteria(questions, engine, Config())
        await engine.close()
    assert [verdict.satisfied for verdict in verdicts] == [True, None, True]
    assert len(server.asked) == 3  # nothing is asked again in another way


async def test_adapters_are_loaded_once_and_the_ones_before_go(lab_model: Path, tmp_path: Path):
    """And again by a server that was started anew, which knows none."""
    known: set[str] = set()

    def reply(path: str, body: dict) -> Reply:
        if path == "/v1/load_lora_adapter":
            known.add(body["lora_name"])
            return 200, "ok"
        if path == "/v1/unload_lora_adapter":
            if body["lora_name"] not in known:
                return error(404, "no such adapter")
            known.discard(body["lora_name"])
            return 200, "ok"
        if body["model"] not in {*known, str(lab_model)}:
            return error(404, "no such model")
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "text": "",
            "token_ids": [5, 1],
            "logprobs": {"token_logprobs": [-1.0, -2.0]},
        }
        answer = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
        return 200, answer

    (tmp_path / ADAPTER_WEIGHTS).touch()
    with scripted(reply) as (server,):
        policy = open_engine(model(server, api="tokens", path=str(lab_model)), {})
        await policy.load_weights(tmp_path)
        (first,) = known
        await policy.load_weights(tmp_path)
        (second,) = known
        known.clear()  # the server was started anew, between two updates and before a request
        await policy.load_weights(tmp_path)
        (second,) = known
        known.clear()
        (generation,) = await policy.generate([user("hi")], ONE)
        await policy.without_adapters().generate([user("hi")], ONE)
        await policy.close()
    assert first != second
    assert known == {second}
    assert generation.completions[0].token_ids == (5, 1)
    assert generation.completions[0].logprobs == (-1.0, -2.0)
    assert server.asked[-1][1]["model"] == str(lab_model)  # without adapters


async def test_half_of_a_rollout_is_none(lab_model: Path):
    reasons = iter(["abort"])

    def reply(*_: Any) -> Reply:
        choice = {
            "index": 0,
            "finish_reason": next(reasons, "stop"),
            "text": "",
            "token_ids": [5, 1],
            "logprobs": {"token_logprobs": [-1.0, -2.0]},
        }
        return 200, {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}

    with scripted(reply) as (server,):
        engine = open_engine(model(server, api="tokens", path=str(lab_model)), {})
        (generation,) = await engine.generate([user("hi")], ONE)
        await engine.close()
    assert len(server.asked) == 2 and generation.usage.retries == 1


async def test_weights_that_are_no_adapters_are_refused(lab_model: Path):
    engine = open_engine(model("http://127.0.0.1:9/v1", api="tokens", path=str(lab_model)), {})
    with pytest.raises(ValueError, match="servers take adapters"):
        await engine.load_weights(lab_model)
    await engine.close()


@pytest.mark.parametrize(
    ("policy", "anchor", "learner", "match"),
    [
        ("chat", None, {"lora_rank": 8}, "token ids"),
        ("tokens", None, {}, "lora_rank"),
        ("tokens", "chat", {"lora_rank": 8}, "kl_coef"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(policy, anchor, learner, match):
    config = Config(
        model=model("http://x/v1", api=policy),
        anchor=anchor and model("http://x/v1", api=anchor),
        learner=learner,  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match=match):
        refuse_untrainable(config)
