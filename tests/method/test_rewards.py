"""Rewards, with anchor and judge whose words are scripted. Nothing earns 0 because one of them failed."""

import random
from collections.abc import Sequence

import pytest

from cat_grpo.config import RewardConfig
from cat_grpo.engines import Sampling
from cat_grpo.engines.scripted import ScriptedEngine
from cat_grpo.method.answers import extract_answer
from cat_grpo.method.cat import derive
from cat_grpo.method.prompts import fence
from cat_grpo.method.rewards import length_penalty
from cat_grpo.method.rewards.agreement import agreement
from cat_grpo.method.rewards.judge import VERDICT_MAX_TOKENS
from cat_grpo.method.rewards.parsing import parse_rubric, parse_verdict
from cat_grpo.method.rewards.rubric import propose_rubrics, rubric_reward
from cat_grpo.records import Group, LabelRead, Messages, Rubric, Verdict
from scripting import (
    ABSTAINED,
    HOSTILE,
    NO,
    YES,
    Listener,
    boxes,
    engines,
    group,
    judge_reads,
    never,
    problem,
    reference,
    rewarded,
    rewards_of,
    rollout_and_criterion,
    rubric_of,
    says,
    settings,
    tags,
    wrote,
)

# Agreement


async def agreed(equivalence: str, expected: str, *texts: str) -> list[float | None]:
    config = settings(reward={"equivalence": equivalence})
    (row,) = await agreement([group(*texts)], [reference(rf"\boxed{{{expected}}}")], engines(), config, [0])
    return row


async def test_agreement_is_one_or_zero():
    assert await agreed("string", "1,2", *boxes("1, 2")) == [1.0]
    assert await agreed("string", "1,2", *boxes("1, 3")) == [0.0]
    assert await agreed("string", "1,2", "1,2") == [0.0]  # a rollout without an answer is wrong
    assert await agreed("math", r"\frac{1}{2}", *boxes("0.5")) == [1.0]
    assert await agreed("string", r"\frac{1}{2}", *boxes("0.5")) == [0.0]


async def test_equal_answers_earn_one_and_others_nothing():
    result = await rewarded(group(*boxes(3, 4, 3), "no box"), r"Hence \boxed{3}.")
    assert rewards_of(result) == [1.0, 0.0, 1.0, 0.0]
    assert [reward.answer for reward in result.rewards] == ["3", "4", "3", None]
    assert [reward.agrees for reward in result.rewards] == [True, False, True, False]
    assert [reward.verdicts for reward in result.rewards] == [()] * 4
    assert result.rubric is None


async def test_without_a_reference_there_is_no_reward():
    result = await rewarded(group(*boxes(3, 4), "no box"), None)
    assert rewards_of(result) == [None, None, None]
    assert [reward.answer for reward in result.rewards] == ["3", "4", None]
    assert [reward.agrees for reward in result.rewards] == [None, None, None]


async def test_a_rollout_that_was_cut_off_is_wrong():
    one = Group(problem(), (1,), (wrote(r"\boxed{3}", "length"), wrote(r"\boxed{3}")))
    result = await rewarded(one, r"\boxed{3}")
    assert rewards_of(result) == [0.0, 1.0]
    assert [reward.answer for reward in result.rewards] == [None, "3"]


async def test_a_comparison_that_raises_is_heard(monkeypatch):
    def broken(a: str, b: str) -> bool:
        raise RuntimeError("a math-verify worker did not start")

    monkeypatch.setattr("cat_grpo.method.answers.same_answer", lambda mode: broken)
    with pytest.raises(RuntimeError, match="did not start"):
        await rewarded(group(*boxes(1)), r"\boxed{1}")


# The penalty of length


def test_the_penalty_begins_above_the_limit():
    config = RewardConfig(length_limit=4, length_penalty=0.5)
    assert [length_penalty(wrote("x" * n), config) for n in (3, 4, 5)] == [0.0, 0.0, 0.5]
    assert length_penalty(wrote("x" * 9999), RewardConfig()) == 0.0


async def test_the_penalty_stands_apart_from_the_reward():
    texts = [r"\boxed{3}", r"well then, \boxed{3}"]
    result = await rewarded(group(*texts), r"\boxed{3}", length_limit=12)
    assert [(reward.reward, reward.penalty) for reward in result.rewards] == [(1.0, 0.0), (1.0, 1.0)]


# Rubrics


def test_the_reward_is_the_share_of_yes_among_the_verdicts_given():
    assert rubric_reward([YES, NO, NO, YES], 0.5) == 0.5
    assert rubric_reward([YES, ABSTAINED, NO, YES], 0.5) == 2 / 3  # not 2 / 4
    assert rubric_reward([YES, ABSTAINED, ABSTAINED, NO], 0.5) == 0.5  # half is enough
    assert rubric_reward([YES, ABSTAINED, ABSTAINED, ABSTAINED], 0.5) is None
    assert rubric_reward([NO, NO], 0.5) == 0.0
    assert rubric_reward([ABSTAINED, ABSTAINED], 0.5) is None
    assert rubric_reward([], 0.5) is None


def test_a_soft_reward_is_the_mean_probability_of_yes():
    verdicts = [Verdict(True, 0.9), Verdict(False, 0.3), Verdict(None, None)]
    assert rubric_reward(verdicts, 0.5, is_soft=True) == pytest.approx(0.6)
    assert rubric_reward(verdicts, 0.5) == 0.5
    assert (
        rubric_reward([Verdict(True, None), Verdict(False, 0.5)], 0.5, is_soft=True) == 0.75
    )  # one was written


CRITERIA = ("Says rest.", "Says water.", "Says tea.", "Says soup.")


def by_hand(rollout: str, criterion: str) -> tuple[float, float]:
    """A yes or a no for each word, and for `mumble` too little mass to count."""
    if "mumble" in rollout and criterion != "Says rest.":
        return 0.3, 0.1
    return (0.8, 0.1) if criterion.removeprefix("Says ").strip(".") in rollout else (0.2, 0.7)


async def test_label_verdicts_by_hand():
    one = group("rest, water and tea", "soup", "mumble rest", kind="open")
    judge = judge_reads(by_hand)
    result = await rewarded(one, "A reference.", says(rubric_of(*CRITERIA)), judge)
    assert result.rubric == Rubric(CRITERIA)
    assert rewards_of(result) == [3 / 4, 1 / 4, None]  # of the last only one of four was judged
    assert [v.satisfied for v in result.rewards[0].verdicts] == [True, True, True, False]
    assert [v.probability for v in result.rewards[0].verdicts] == pytest.approx([8 / 9] * 3 + [2 / 9])
    assert result.rewards[2].verdicts[1:] == (ABSTAINED,) * 3
    assert [reward.answer for reward in result.rewards] == [None] * 3
    asked = [rollout_and_criterion(prompt) for prompt in judge.prompts]
    assert asked == [(r.text, criterion) for r in one.rollouts for criterion in CRITERIA]


@pytest.mark.parametrize(
    ("read", "satisfied"),
    [
        ((0.5, 0.0), True),
        ((0.0, 0.5), False),
        ((0.25, 0.25), None),  # undecided
        ((0.49, 0.0), None),  # it wanted to say something else
        ((0.0, 0.0), None),
    ],
)
async def test_a_label_read_counts_from_the_least_mass_on(read, satisfied):
    judge = judge_reads(lambda *_: read)
    result = await rewarded(group("a", kind="open"), "R.", says(rubric_of("C")), judge)
    assert result.rewards[0].verdicts[0].satisfied is satisfied
    assert rewards_of(result) == [None if satisfied is None else float(satisfied)]


async def test_a_read_without_any_mass_abstains_even_if_none_is_asked_for():
    judge = judge_reads(lambda *_: (0.0, 0.0))
    result = await rewarded(group("a", kind="open"), "R.", says(rubric_of("C")), judge, min_label_mass=0.0)
    assert result.rewards[0].verdicts == (ABSTAINED,)


async def test_a_reply_that_tells_no_probabilities_is_an_abstention():
    """Of a judge that told them when the run was opened. It is not asked to write instead."""

    class Silent(ScriptedEngine):
        async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
            return [LabelRead((0.0, 0.0), is_told=False) for _ in prompts]

    result = await rewarded(group("a", kind="open"), "R.", says(rubric_of("C")), Silent(never))
    assert result.rewards[0].verdicts == (ABSTAINED,)
    assert rewards_of(result) == [None]


async def test_written_verdicts_by_hand():
    replies = {
        "Says rest.": "<verdict>yes</verdict>",
        "Says water.": "Let me think. <verdict> No </verdict>",
        "Says tea.": "yes",  # unread, so not given
        "Says soup.": "<verdict>yes</verdict>",
    }
    judge = Listener(lambda prompt, i: replies[rollout_and_criterion(prompt)[1]])
    anchor = says(rubric_of(*CRITERIA))
    result = await rewarded(group("a", kind="open"), "R.", anchor, judge, verdict="xml")
    assert rewards_of(result) == [2 / 3]
    assert result.rewards[0].verdicts == (
        Verdict(True, None),
        Verdict(False, None),
        ABSTAINED,
        Verdict(True, None),
    )
    ((_, sampling),) = judge.asked
    assert sampling == Sampling(max_tokens=VERDICT_MAX_TOKENS, temperature=0.0)


async def test_the_rubric_comes_from_the_reference_alone():
    anchor = says(rubric_of("C"))
    await rewarded(group("the rollout", kind="open"), "The reference text.", anchor, judge_reads(by_hand))
    (prompt,) = anchor.prompts
    assert "The reference text." in prompt
    assert "the rollout" not in prompt
    assert "The question of p?" not in prompt


@pytest.mark.parametrize("garbage", ["", "I would look for rest and water.", "<rubric></rubric>", "<rubric>"])
async def test_without_a_rubric_the_whole_group_has_no_reward(garbage):
    one = group("a", "b", kind="open")
    result = await rewarded(one, "R.", says(garbage))  # and the judge is never asked
    assert result.rubric is None
    assert rewards_of(result) == [None, None]
    assert [reward.verdicts for reward in result.rewards] == [(), ()]


async def test_without_an_open_reference_nobody_is_asked():
    result = await rewarded(group("a", "b", kind="open"), None)
    assert (result.rubric, rewards_of(result)) == (None, [None, None])


async def test_each_group_is_judged_by_the_rubric_of_its_own_reference():
    texts = ["Rest.", None, "Ice.", "No XML."]
    groups = [group("rest", "ice", kind="open", name=str(i)) for i in range(4)]
    anchor = ScriptedEngine(
        lambda prompt, i: next((rubric_of(name) for name in ("Rest", "Ice") if f"{name}." in prompt), "No.")
    )
    judge = judge_reads(lambda rollout, criterion: (1.0, 0.0) if rollout == criterion.lower() else (0.0, 1.0))
    references = [reference(text, str(i)) for i, text in enumerate(texts)]
    results = await derive(groups, references, engines(None, anchor, judge), settings(), [0] * 4)
    assert [result.rubric for result in results] == [Rubric(("Rest",)), None, Rubric(("Ice",)), None]
    assert [rewards_of(result) for result in results] == [[1.0, 0.0], [None] * 2, [0.0, 1.0], [None] * 2]


async def test_a_rubric_has_no_fewer_criteria_than_asked_and_is_cut_to_the_most():
    anchor = says(rubric_of(*CRITERIA))

    async def criteria(fewest: int, most: int) -> int | None:
        config = settings(reward={"min_criteria": fewest, "max_criteria": most})
        (rubric,) = await propose_rubrics(["R."], anchor, config)
        return len(rubric.criteria) if rubric else None

    assert [await criteria(*bounds) for bounds in [(4, 20), (5, 20), (4, 3), (1, 1)]] == [4, None, 3, 1]


async def test_a_rubric_that_was_cut_off_is_none():
    config = settings(reward={"rubric_max_tokens": 60})
    assert await propose_rubrics(["R."], says(rubric_of(*CRITERIA)), config) == [None]


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("verdict", ["label", "xml"])
@pytest.mark.parametrize("prompt_set", ["default", "lab"])
async def test_a_hostile_rollout_is_data_to_the_judge(prompt_set, verdict, attack):
    judge = ScriptedEngine(lambda prompt, i: "yes")
    one = group("HARMLESS", attack, kind="open")
    await rewarded(one, "R.", says(rubric_of("C")), judge, prompt_set, verdict=verdict)
    plain, attacked = judge.prompts
    assert attacked == plain.replace("HARMLESS", fence(attack, "rollout"))
    assert tags(attacked) == tags(plain)


async def test_a_judge_that_raises_is_heard():
    def broken(prompt: str, labels: Sequence[str]) -> Sequence[float]:
        raise ConnectionError("the judge is gone")

    for verdict in ("label", "xml"):
        judge = ScriptedEngine(lambda prompt, i: broken(prompt, ()), broken)
        with pytest.raises(ConnectionError, match="the judge is gone"):
            await rewarded(group("a", kind="open"), "R.", says(rubric_of("C")), judge, verdict=verdict)


async def test_an_anchor_that_raises_is_heard():
    def broken(prompt: str, i: int) -> str:
        raise ConnectionError("the anchor is gone")

    with pytest.raises(ConnectionError, match="the anchor is gone"):
        await rewarded(group("a", kind="open"), "R.", ScriptedEngine(broken))


# Reading XML

BOMB = (
    '<!DOCTYPE rubric [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
    '<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>'
)
FILE = '<!DOCTYPE rubric [<!ENTITY x SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("text", "criteria"),
    [
        (rubric_of("One.", "Two."), ("One.", "Two.")),
        (f"Here it is:\n{rubric_of('One.')}\nI hope it helps.", ("One.",)),
        (f"```xml\n{rubric_of('One.')}\n```", ("One.",)),
        ("<rubric>\n  <criterion>\n  One\n  line.\n  </criterion>\n</rubric>", ("One line.",)),
        (rubric_of("a &amp; b &lt; c"), ("a & b < c",)),
        (rubric_of("a & b"), None),  # not XML, and not guessed at
        (rubric_of("a < b"), None),
        (rubric_of("a&nbsp;b"), None),
        (rubric_of("Says <b>rest</b> first."), ("Says rest first.",)),
        ("<rubric><part><criterion>One.</criterion></part></rubric>", ("One.",)),
        ("<rubric><!-- x --><criterion>One.</criterion></rubric>", ("One.",)),
        ("<rubric><criterion><![CDATA[a & b]]></criterion></rubric>", ("a & b",)),
        ('<rubric><criterion id="1">One.</criterion></rubric>', ("One.",)),
        (rubric_of("One.", "", " ", "Two."), ("One.", "Two.")),
        (rubric_of("One.", "Two.", " One. "), ("One.", "Two.")),
        (rubric_of("One.", "Two.")[:-3], None),
        ("<rubric><criterion>One.</criterion>", None),
        ("<rubric><criterion>One.</rubric>", None),
        (rubric_of("Old.") + rubric_of("New."), ("New.",)),
        (rubric_of("Old.") + "<rubric>not <closed</rubric>", None),
        (f"I write a <rubric>: {rubric_of('One.')}", ("One.",)),
        (f"{rubric_of('One.')} That was the </rubric>", ("One.",)),
        (rubric_of("One.").upper(), None),
        ("<rubric><Criterion>One.</Criterion></rubric>", None),
        ("<rubric>One. Two.</rubric>", None),
        ("<rubric></rubric>", None),
        ("<rubric/>", None),
        ("<criterion>One.</criterion>", None),
        ("", None),
        (BOMB + rubric_of("&c;"), None),
        (f"<rubric>{BOMB}<criterion>&c;</criterion></rubric>", None),
        (FILE + rubric_of("&x;"), None),
        (rubric_of("\x00"), None),
        (rubric_of("\ud800"), None),  # half of a character, as a server's JSON can bring it
        (rubric_of("Ä 漢 🙂"), ("Ä 漢 🙂",)),
    ],
)
def test_a_rubric_is_well_formed_xml_or_none(text, criteria):
    assert parse_rubric(text) == (None if criteria is None else Rubric(criteria))


@pytest.mark.parametrize(
    ("text", "satisfied"),
    [
        ("<verdict>yes</verdict>", True),
        ("<verdict>no</verdict>", False),
        ("<verdict>\n Yes </verdict>", True),
        ("<verdict><b>NO</b></verdict>", False),
        ("```xml\n<verdict>yes</verdict>\n```", True),
        ("It says so. <verdict>yes</verdict> Good.", True),
        ("<verdict>yes</verdict> No: <verdict>no</verdict>", False),
        ("<verdict>yes</verdict> <verdict>maybe</verdict>", None),
        ("<verdict>yes and no</verdict>", None),
        ("<verdict>yes.</verdict>", None),
        ("<verdict></verdict>", None),
        ("<verdict>yes", None),
        ("<VERDICT>yes</VERDICT>", None),
        ("<verdict>y&es;</verdict>", None),
        ("<verdict>yes & </verdict>", None),
        ("<verdict>\udfff</verdict>", None),
        ("yes", None),
        ("", None),
    ],
)
def test_a_verdict_is_yes_or_no_or_none(text, satisfied):
    assert parse_verdict(text) is satisfied


PIECES = (
    *("<rubric>", "</rubric>", "<criterion>", "</criterion>", "<verdict>", "</verdict>", "<rubric/>"),
    *("<", ">", "&", "&amp;", "&c;", "&#0;", "&#x110000;", "<![CDATA[", "]]>", "<!--", "-->", "<?xml?>"),
    *(r"\boxed{", r"\boxed", "{", "}", "\\", r"\}", "yes", "no", " ", "\n", "\x00", "\ud800", "\ufeff"),
    *('<a b="', '"', "Ä", "🙂", "\u202e", BOMB, "</a>", "<a>", "12", "<:>", "<x:y>"),
)


def test_no_garbage_makes_a_reader_raise():
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(0, 30))) for _ in range(4000)]
    texts += [f"<rubric>{text}</rubric>" for text in texts[:1000]]
    texts += [f"<verdict>{text}</verdict>" for text in texts[1000:2000]]
    read = [(parse_rubric(text), parse_verdict(text), extract_answer(text)) for text in texts]
    for rubric, verdict, answer in read:
        assert rubric is None or (rubric.criteria and all(c == c.strip() != "" for c in rubric.criteria))
        assert verdict in (True, False, None)
        assert answer is None or answer == answer.strip() != ""
    for results in zip(*read, strict=True):  # each reader had something to read
        assert any(result is not None for result in results)


def test_deep_nesting_is_read_or_refused():
    assert parse_rubric("<rubric>" + "<a>" * 20_000 + "</rubric>") is None
    deep = "<a>" * 20_000 + "<criterion>One.</criterion>" + "</a>" * 20_000
    assert parse_rubric(f"<rubric>{deep}</rubric>") in (None, Rubric(("One.",)))
