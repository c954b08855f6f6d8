"""References, with an anchor whose words are scripted: what it reads, and what is made of its answers."""

import pytest

from cat_grpo.engines import Sampling
from cat_grpo.engines.scripted import ScriptedEngine
from cat_grpo.method.answers import extract_answer
from cat_grpo.method.cat import estimate
from cat_grpo.method.prompts import fence
from cat_grpo.records import Group, Reference
from scripting import (
    HOSTILE,
    Listener,
    boxes,
    engines,
    group,
    never,
    problem,
    references_of,
    says,
    settings,
    tags,
    wrote,
)

# Synthesis


@pytest.mark.parametrize("kind", ["verifiable", "open"])
@pytest.mark.parametrize("prompt_set", ["default", "lab"])
async def test_the_anchor_reads_every_rollout_and_not_the_question(prompt_set, kind):
    anchor = ScriptedEngine(lambda prompt, i: r"\boxed{1}")
    texts = [f"Rollout number {i}." for i in range(16)]
    (one,) = await references_of(group(*texts, kind=kind), anchor=anchor, prompts=prompt_set)
    (prompt,) = anchor.prompts
    assert all(prompt.count(text) == 1 for text in texts)
    assert "The question of p?" not in prompt
    assert one.prompt == prompt
    assert one.text == r"\boxed{1}"
    assert one.estimator == "synthesis"


@pytest.mark.parametrize("kind", ["verifiable", "open"])
@pytest.mark.parametrize("prompt_set", ["default", "lab"])
async def test_the_anchor_reads_the_question_when_asked_to(prompt_set, kind):
    anchor = ScriptedEngine(lambda prompt, i: "")
    await references_of(group("one", kind=kind), anchor=anchor, prompts=prompt_set, include_question=True)
    assert anchor.prompts[0].count("The question of p?") == 1


async def test_each_group_gets_its_reference_in_order():
    anchor = ScriptedEngine(lambda prompt, i: rf"\boxed{{{extract_answer(prompt)}}}")
    groups = [group(*boxes(n), name=f"p{n}") for n in (5, 6, 7)]
    references = await references_of(*groups, anchor=anchor, prompts="lab")
    assert [(r.problem_id, r.text) for r in references] == [(f"p{n}", rf"\boxed{{{n}}}") for n in (5, 6, 7)]
    assert [r.answer for r in references] == ["5", "6", "7"]


async def test_the_anchor_is_asked_once_a_group_with_its_seed():
    anchor = Listener(lambda prompt, i: "")
    groups = [group("a"), group("b", name="q")]
    config = settings(reference={"temperature": 0.5, "max_tokens": 44})
    await estimate(groups, engines(anchor=anchor), config, [8, 9])
    ((prompts, sampling),) = anchor.asked
    assert len(prompts) == 2
    assert sampling == Sampling(max_tokens=44, n=1, temperature=0.5, seeds=[8, 9])


async def test_a_synthesis_keeps_what_the_anchor_read_and_wrote():
    anchor = says(r"It is \boxed{4}.")
    (one,) = await references_of(group(*boxes(3, 4, 3)), anchor=anchor)
    assert one == Reference(
        text=r"It is \boxed{4}.",
        answer="4",
        token_ids=(*rb"It is \boxed{4}.", ScriptedEngine.END),
        written=r"It is \boxed{4}.",
        prompt=anchor.prompts[0],
        num_tokens=17,  # 16 letters and the end
        finish_reason="stop",
        problem_id="p",
        estimator="synthesis",
        majority="3",
        num_votes=2,
    )


@pytest.mark.parametrize(
    "garbage",
    ["", " \n", "no answer here", r"\boxed{12", r"\boxed{}", "<rollout>12</rollout>", "12", "\x00\ufffd"],
)
async def test_a_synthesis_without_an_answer_is_no_reference(garbage):
    (one,) = await references_of(group(*boxes(1, 1)), anchor=says(garbage))
    assert (one.text, one.answer) == (None, None)
    assert one.written == garbage  # still there to look at
    assert one.refused == ("it has no final answer" if garbage.strip() else "the anchor wrote nothing")
    assert one.num_tokens == len(garbage.encode()) + 1
    assert (one.majority, one.num_votes) == ("1", 2)


@pytest.mark.parametrize("garbage", ["", " \n\t"])
async def test_an_empty_synthesis_of_an_open_problem_is_no_reference(garbage):
    (one,) = await references_of(group("a", "b", kind="open"), anchor=says(garbage))
    assert (one.text, one.refused, one.written) == (None, "the anchor wrote nothing", garbage)


async def test_an_open_reference_needs_no_box():
    (one,) = await references_of(group("a", "b", kind="open"), anchor=says("Rest. "))
    assert (one.text, one.majority, one.num_votes) == ("Rest. ", None, 0)
    assert (one.answer, one.refused) == (None, None)


async def test_a_box_in_an_open_reference_is_no_final_answer():
    (one,) = await references_of(group(*boxes(1, 1), kind="open"), anchor=says(r"\boxed{1}"))
    assert (one.text, one.answer, one.majority) == (r"\boxed{1}", None, None)


@pytest.mark.parametrize("kind", ["verifiable", "open"])
async def test_a_reference_that_was_cut_off_is_no_reference(kind):
    anchor = says(r"\boxed{1} and so on and on")
    (one,) = await references_of(group(*boxes(1), kind=kind), anchor=anchor, max_tokens=12)
    assert (one.text, one.finish_reason, one.num_tokens) == (None, "length", 12)
    assert (one.answer, one.refused) == (None, "it was cut off at reference.max_tokens")
    assert one.written == r"\boxed{1} an"
    assert one.token_ids == tuple(rb"\boxed{1} an")
    (whole,) = await references_of(group(*boxes(1), kind=kind), anchor=anchor, max_tokens=27)
    assert (whole.finish_reason, whole.num_tokens) == ("stop", 27)
    assert whole.text is not None
    assert whole.refused is None


async def test_what_was_cut_off_before_its_first_word_was_cut_off():
    (one,) = await references_of(group("a", kind="open"), anchor=says("    Rest."), max_tokens=3)
    assert (one.text, one.refused) == (None, "it was cut off at reference.max_tokens")


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("prompt_set", ["default", "lab"])
async def test_a_hostile_rollout_is_data_to_the_anchor(prompt_set, attack):
    anchor = ScriptedEngine(lambda prompt, i: "")
    harmless, hostile = group("a", "HARMLESS", kind="open"), group("a", attack, kind="open")
    await references_of(harmless, hostile, anchor=anchor, prompts=prompt_set)
    plain, attacked = anchor.prompts
    assert attacked == plain.replace("HARMLESS", fence(attack, "rollout"))
    assert tags(attacked) == tags(plain)


async def test_an_anchor_that_raises_is_heard():
    def broken(prompt: str, i: int) -> str:
        raise ConnectionError("the anchor is gone")

    with pytest.raises(ConnectionError, match="the anchor is gone"):
        await references_of(group("a"), anchor=ScriptedEngine(broken))


# The majority


async def voted(one: Group) -> Reference:
    (reference,) = await references_of(one, anchor=ScriptedEngine(never), estimator="majority")
    return reference


async def majority_of(*texts: str) -> tuple[str | None, str | None, int]:
    one = await voted(group(*texts))
    return one.text, one.majority, one.num_votes


async def test_the_majority_is_a_vote_over_equal_answers():
    assert await majority_of(*boxes(7, "1, 2", "1,2", 7, "1,  2")) == (r"\boxed{1, 2}", "1, 2", 3)


async def test_what_was_not_parsed_does_not_vote():
    assert await majority_of("7", "7", "", "", *boxes(3)) == (r"\boxed{3}", "3", 1)


async def test_nothing_parsed_has_no_majority():
    assert await majority_of("", "7", r"\boxed{7", "") == (None, None, 0)
    one = await voted(group("", "7"))
    assert (one.refused, one.chosen, one.token_ids) == ("no rollout has a final answer", None, ())


async def test_a_rollout_that_was_cut_off_has_no_vote():
    cut = tuple(wrote(text, "length") for text in boxes(9, 9))
    one = await voted(Group(problem(), (1,), (*cut, wrote(r"\boxed{4}"))))
    assert (one.majority, one.num_votes) == ("4", 1)
    assert (one.answer, one.chosen) == ("4", 2)


async def test_the_majority_is_the_first_rollout_that_has_it():
    texts = [*boxes(7), r"By sums: \boxed{1, 2}", "unread", *boxes("1,2")]
    one = await voted(group(*texts))
    assert one == Reference(
        text=r"\boxed{1, 2}",
        answer="1, 2",
        token_ids=tuple(texts[1].encode()),  # of the whole rollout
        chosen=1,
        problem_id="p",
        estimator="majority",
        majority="1, 2",
        num_votes=2,
    )


async def test_a_tie_goes_to_the_answer_that_came_first():
    one = await voted(group(*boxes(5, 6, 6, 5)))
    assert (one.answer, one.chosen, one.num_votes) == ("5", 0, 2)
