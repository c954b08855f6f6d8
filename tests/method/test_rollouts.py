"""Rollouts: what the policy is asked, and how."""

import pytest

from cat_grpo.engines import Sampling
from cat_grpo.engines.scripted import ScriptedEngine
from cat_grpo.method.rollouts import generate_rollouts
from cat_grpo.records import Problem
from scripting import Listener, problem, settings


async def test_each_problem_gets_its_group_in_order():
    policy = ScriptedEngine(lambda prompt, i: f"{prompt[:17]} {i}")
    problems = [problem(name=name) for name in ("a", "b", "c")]
    groups = await generate_rollouts(problems, policy, settings(rollout={"group_size": 3}), [1, 2, 3])
    assert [g.problem for g in groups] == problems
    assert [[r.text for r in g.rollouts] for g in groups] == [
        [f"The question of {name} {i}" for i in range(3)] for name in ("a", "b", "c")
    ]
    assert all(bytes(g.prompt_token_ids).decode() == p for g, p in zip(groups, policy.prompts, strict=True))


async def test_the_settings_of_sampling_and_the_seeds_are_handed_on():
    policy = Listener(lambda prompt, i: "")
    fields = {"group_size": 5, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_tokens": 33}
    await generate_rollouts([problem(), problem(name="q")], policy, settings(rollout=fields), [11, 22])
    ((_, sampling),) = policy.asked
    assert sampling == Sampling(max_tokens=33, n=5, temperature=0.7, top_p=0.8, top_k=20, seeds=[11, 22])


@pytest.mark.parametrize("kind", ["verifiable", "open"])
async def test_the_earlier_turns_of_a_chat_are_kept(kind):
    chat = (
        {"role": "system", "content": "Be brief. {{ 1 }}"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": "And then?"},
    )
    policy = Listener(lambda prompt, i: "")
    await generate_rollouts([Problem("p", chat, kind)], policy, settings(), [0])
    (((*earlier, last),), _) = policy.asked[0]
    assert earlier == list(chat[:3])
    assert last["role"] == "user"
    assert last["content"].startswith("And then?")
    assert ("boxed" in last["content"]) == (kind == "verifiable")
