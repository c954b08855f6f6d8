"""Explore, estimate, derive: what holds for every estimator and every reward, a user's own among them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cat_grpo.config import Config
from cat_grpo.engines import NoLogprobsError
from cat_grpo.engines.scripted import ScriptedEngine
from cat_grpo.errors import BadInput
from cat_grpo.method import needs
from cat_grpo.method.cat import derive, estimate, explore, refuse_unfit, refuse_unusable, templates
from cat_grpo.method.references import ESTIMATORS
from cat_grpo.method.rewards import REWARDS
from cat_grpo.method.rewards.judge import refuse_silent_judge
from cat_grpo.records import LabelRead, Messages, Reference, RewardedGroup, Rubric
from cat_grpo.settings import load_config
from scripting import (
    ABSTAINED,
    YES,
    Listener,
    boxes,
    engines,
    group,
    judge_reads,
    never,
    problem,
    reference,
    rewards_of,
    rubric_of,
    settings,
)

Module = Callable[..., str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """Writes a module of the user's, on the import path, and gives its name."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "mine")])
    known = set(sys.modules)
    (tmp_path / "mine").mkdir()

    def write(code: str, folder: str = "mine", name: str = "my_method") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.py").write_text(code)
        return name

    yield write
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def assert_one_line(error: pytest.ExceptionInfo[BadInput], line: str) -> None:
    assert str(error.value) == line
    assert "\n" not in line


def by_estimator(name: str) -> Config:
    return settings(reference={"estimator": name})


def by_parts(parts: dict[str, float], kind: str = "verifiable", **fields) -> Config:
    return settings(reward={kind: parts, **fields})


# Exploration


async def test_the_policy_explores():
    policy = Listener(lambda prompt, i: "")
    problems = [problem(name="a"), problem(name="b")]
    groups = await explore(problems, engines(policy), settings(rollout={"group_size": 2}), [5, 6])
    assert [(one.problem, len(one.rollouts)) for one in groups] == [(p, 2) for p in problems]
    assert policy.asked[0][1].seeds == [5, 6]


# Estimation


GROUPS = [
    group(*boxes(1, 2, 2), name="a"),
    group("x", "y", "z", kind="open", name="b"),
    group(*boxes(3, 3, 3), name="c"),
]
ECHO = """
from cat_grpo.records import Reference

async def estimator(groups, engines, config, seeds):
    return [Reference(f"{group.problem.id}, {seed}: " + group.rollouts[0].text)
            for group, seed in zip(groups, seeds, strict=True)]
"""


async def test_a_users_estimator_is_found_by_its_import_path(module: Module):
    config = by_estimator(f"{module(ECHO)}:estimator")
    references = await estimate(GROUPS, engines(), config, [7, 8, 9])
    assert [one.text for one in references] == [
        r"a, 7: So it is \boxed{1}.",
        "b, 8: x",
        r"c, 9: So it is \boxed{3}.",
    ]


async def test_what_holds_for_every_estimator_is_added(module: Module):
    name = f"{module(ECHO)}:estimator"
    references = await estimate(GROUPS, engines(), by_estimator(name), [7, 8, 9])
    assert [(one.problem_id, one.estimator) for one in references] == [(p, name) for p in ("a", "b", "c")]
    assert [one.answer for one in references] == ["1", None, "3"]
    assert [(one.majority, one.num_votes) for one in references] == [("2", 2), (None, 0), ("3", 3)]
    assert [one.refused for one in references] == [None, None, None]
    assert [(one.written, one.prompt, one.num_tokens) for one in references] == [("", "", 0)] * 3


async def test_what_an_estimator_knows_is_kept(module: Module):
    code = r"""
from cat_grpo.records import Reference

def estimator(groups, engines, config, seeds):
    return [Reference(r"\boxed{2}", token_ids=(4, 5), chosen=1, written="W", prompt="P", num_tokens=2,
                      finish_reason="stop")] * len(groups)
"""
    (one,) = await estimate(GROUPS[:1], engines(), by_estimator(f"{module(code)}:estimator"), [0])
    assert one == Reference(
        r"\boxed{2}",
        answer="2",
        token_ids=(4, 5),
        chosen=1,
        written="W",
        prompt="P",
        num_tokens=2,
        finish_reason="stop",
        problem_id="a",
        estimator="my_method:estimator",
        majority="2",
        num_votes=2,
    )


async def test_a_text_without_the_final_answer_that_is_needed_is_refused(module: Module):
    code = """
from cat_grpo.records import Reference

def estimator(groups, engines, config, seeds):
    return [Reference("I think so.", written="I think so.") for _ in groups]
"""
    references = await estimate(GROUPS[:2], engines(), by_estimator(f"{module(code)}:estimator"), [0, 0])
    assert [one.text for one in references] == [None, "I think so."]
    assert [one.refused for one in references] == ["it has no final answer", None]
    assert [one.written for one in references] == ["I think so."] * 2


async def test_a_reason_of_the_estimators_own_is_kept(module: Module):
    code = """
from cat_grpo.records import Reference

def estimator(groups, engines, config, seeds):
    return [Reference(None, refused="not today") for _ in groups]
"""
    references = await estimate(GROUPS, engines(), by_estimator(f"{module(code)}:estimator"), [0] * 3)
    assert [(one.text, one.answer, one.refused) for one in references] == [(None, None, "not today")] * 3
    assert [one.majority for one in references] == ["2", None, "3"]  # still there to compare with


async def test_as_many_references_as_groups_are_needed(module: Module):
    module("def estimator(groups, engines, config, seeds): return []")
    with pytest.raises(BadInput) as error:
        await estimate(GROUPS, engines(), by_estimator("my_method:estimator"), [0] * 3)
    assert_one_line(error, "reference.estimator: 'my_method:estimator': gave 0 results for 3")


# Derivation


async def derived(config: Config, *names: str) -> list[RewardedGroup]:
    """Of the groups a, b and c: a's reference says 2, b has one, and c has none."""
    references = [reference(r"\boxed{2}", "a"), reference("R.", "b"), reference(None, "c")]
    return await derive(GROUPS, references, engines(), config, [7, 8, 9])


BY_HAND = """
def by_place(groups, references, engines, config, seeds):
    return [[float(i) for i, _ in enumerate(group.rollouts)] for group in groups]

async def half(groups, references, engines, config, seeds):
    return [[0.5] * len(group.rollouts) for group in groups]

def seed(groups, references, engines, config, seeds):
    return [[float(seed)] * len(group.rollouts) for group, seed in zip(groups, seeds, strict=True)]

def known(groups, references, engines, config, seeds):
    return [[float(group.problem.id == reference.problem_id)] * len(group.rollouts)
            for group, reference in zip(groups, references, strict=True)]

def not_the_second(groups, references, engines, config, seeds):
    return [[1.0, None, 1.0] for _ in groups]
"""


async def test_the_order_of_the_groups_is_kept_when_kinds_are_mixed():
    groups = [group("Rest.", kind="open", name="a"), group(*boxes(1), name="b"), group("Run.", kind="open")]
    anchor = ScriptedEngine(lambda prompt, i: rubric_of("Rest" if "Sleep" in prompt else "Run"))
    judge = judge_reads(lambda rollout, criterion: (1.0, 0.0) if criterion in rollout else (0.0, 1.0))
    references = [reference("Sleep.", "a"), reference(r"\boxed{2}", "b"), reference("Move.")]
    results = await derive(groups, references, engines(None, anchor, judge), settings(), [0, 0, 0])
    assert [rewards_of(result) for result in results] == [[1.0], [0.0], [1.0]]
    assert [result.group for result in results] == groups
    assert [result.reference for result in results] == references
    assert [result.rubric for result in results] == [Rubric(("Rest",)), None, Rubric(("Run",))]
    assert [list(result.rewards[0].parts) for result in results] == [
        ["self_rubric"],
        ["agreement"],
        ["self_rubric"],
    ]


async def test_each_group_comes_with_its_own_reference_and_seed(module: Module):
    name = module(BY_HAND)
    parts = {f"{name}:seed": 1.0, f"{name}:known": 100.0}
    results = await derived(settings(reward={"verifiable": parts, "open": parts}))
    assert [rewards_of(result) for result in results] == [[107.0] * 3, [108.0] * 3, [109.0] * 3]


async def test_parts_are_added_by_their_weights(module: Module):
    name = module(BY_HAND)
    config = by_parts(
        {"agreement": 0.9, f"{name}:by_place": 0.1, f"{name}:half": -2.0}, open={f"{name}:half": 3}
    )
    first, second, third = await derived(config)
    # Answers 1, 2, 2 against 2; by place 0, 1, 2; always a half.
    assert rewards_of(first) == pytest.approx([-1.0, 0.9 + 0.1 - 1.0, 0.9 + 0.2 - 1.0])
    assert rewards_of(second) == [1.5] * 3
    assert rewards_of(third) == [None] * 3  # nothing to agree with
    assert [reward.parts for reward in first.rewards] == [  # each as it was before its weight
        {"agreement": agrees, f"{name}:by_place": place, f"{name}:half": 0.5}
        for agrees, place in ((0.0, 0.0), (1.0, 1.0), (1.0, 2.0))
    ]
    assert third.rewards[2].parts == {"agreement": None, f"{name}:by_place": 2.0, f"{name}:half": 0.5}


async def test_a_part_with_weight_that_could_not_be_judged_leaves_no_reward(module: Module):
    name = f"{module(BY_HAND)}:not_the_second"
    first, *_ = await derived(by_parts({"agreement": 1.0, name: 0.1}, open={name: 1.0}))
    assert rewards_of(first) == [0.1, None, 1.1]
    first, *_ = await derived(by_parts({"agreement": 1.0, name: 0.0}, open={name: 1.0}))
    assert rewards_of(first) == [0.0, 1.0, 1.0]  # without weight it is only looked at
    assert first.rewards[1].parts == {"agreement": 1.0, name: None}


async def test_agreement_is_known_whatever_the_parts_are(module: Module):
    name = f"{module(BY_HAND)}:half"
    first, second, third = await derived(by_parts({name: 1.0}, open={name: 1.0}))
    assert [reward.agrees for reward in first.rewards] == [False, True, True]
    assert [reward.answer for reward in first.rewards] == ["1", "2", "2"]
    assert [reward.agrees for reward in (*second.rewards, *third.rewards)] == [None] * 6
    assert rewards_of(third) == [0.5] * 3  # this reward asks for no reference


async def test_the_verdicts_are_those_of_the_part_with_a_rubric(module: Module):
    code = """
from cat_grpo.records import PartReward, Rubric, Verdict

def plain(groups, references, engines, config, seeds):
    return [PartReward((0.5,) * 2) for _ in groups]

def by_rubric(groups, references, engines, config, seeds):
    verdicts = ((Verdict(True, 0.9),), (Verdict(None, None),))
    return [PartReward((1.0, None), Rubric(("Mine",)), verdicts) for _ in groups]
"""
    name = module(code)
    config = by_parts({f"{name}:plain": 1.0, f"{name}:by_rubric": 1.0})
    (result,) = await derive([group(*boxes(1, 1))], [reference(r"\boxed{1}")], engines(), config, [0])
    assert result.rubric == Rubric(("Mine",))
    assert [reward.verdicts for reward in result.rewards] == [(YES,), (ABSTAINED,)]
    assert rewards_of(result) == [1.5, None]


async def test_a_length_is_penalised_whatever_the_parts_are(module: Module):
    name = f"{module(BY_HAND)}:half"
    limit = {"length_limit": len(boxes(1)[0]) - 1, "length_penalty": 0.25}
    first, second, _ = await derived(by_parts({name: 1.0}, open={name: 1.0}, **limit))
    assert [reward.penalty for reward in first.rewards] == [0.25] * 3
    assert [reward.penalty for reward in second.rewards] == [0.0] * 3
    assert rewards_of(first) == [0.5] * 3


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("[[1.0] * 3]", "gave 1 results for 2"),
        ("[[1.0] * 3] * 3", "gave 3 results for 2"),
        ("[[1.0] * 3, [1.0] * 2]", "gave 2 results for 3"),
        ("[PartReward((1.0,) * 4)] * 2", "gave 4 results for 3"),
        ("[[1.0, float('nan'), 0.0]] * 2", "gave a reward that is not finite; None stands for none"),
        ("[[1.0, float('-inf'), 0.0]] * 2", "gave a reward that is not finite; None stands for none"),
        (
            "[PartReward((1.0, float('inf'), None))] * 2",
            "gave a reward that is not finite; None stands for none",
        ),
    ],
)
async def test_what_a_users_reward_gives_is_checked(module: Module, code: str, line: str):
    module(f"from cat_grpo.records import PartReward\ndef reward(*asked): return {code}")
    with pytest.raises(BadInput) as error:  # of the two verifiable groups, of three rollouts each
        await derived(by_parts({"my_method:reward": 1.0}, open={"my_method:reward": 1.0}))
    assert_one_line(error, f"reward.verifiable: 'my_method:reward': {line}")


async def test_the_setting_that_is_named_is_that_of_the_kind(module: Module):
    module("def reward(*asked): return []")
    with pytest.raises(BadInput) as error:
        await derived(by_parts({"my_method:reward": 1.0}, kind="open"))
    assert_one_line(error, "reward.open: 'my_method:reward': gave 0 results for 1")


async def test_a_users_function_that_raises_is_heard(module: Module):
    module("def fails(*asked): raise ZeroDivisionError('a bug of the user')")
    with pytest.raises(ZeroDivisionError, match="a bug of the user"):
        await estimate(GROUPS, engines(), by_estimator("my_method:fails"), [0] * 3)
    with pytest.raises(ZeroDivisionError, match="a bug of the user"):
        await derived(by_parts({"my_method:fails": 1.0}))


# Names


async def test_a_module_is_looked_for_in_the_current_folder_too(module: Module, tmp_path: Path, monkeypatch):
    """An installed command has no current folder on its import path."""
    name = module(BY_HAND, folder="elsewhere", name="in_my_folder")
    config = by_parts({f"{name}:by_place": 1.0}, open={f"{name}:half": 1.0})
    with pytest.raises(BadInput, match="there is no module 'in_my_folder'"):
        refuse_unusable(config, ["verifiable"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    refuse_unusable(config, ["verifiable", "open"])
    first, second, _ = await derived(config)
    assert (rewards_of(first), rewards_of(second)) == ([0.0, 1.0, 2.0], [0.5] * 3)


async def test_what_is_on_the_import_path_goes_before_the_current_folder(
    module: Module, tmp_path, monkeypatch
):
    module("def reward(groups, *_): return [[1.0] * 3] * len(groups)")
    module("def reward(groups, *_): return [[0.0] * 3] * len(groups)", folder="elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    first, *_ = await derived(by_parts({"my_method:reward": 1.0}, open={"my_method:reward": 1.0}))
    assert rewards_of(first) == [1.0] * 3


OWN = "or module:function of your own"


def test_references_alone_need_no_template_of_a_reward(tmp_path):
    for name in ("solve_open", "synthesize_open"):
        (tmp_path / f"{name}.txt").write_text("Words.")
    config = load_config(overrides=[f"prompts={tmp_path}"])
    refuse_unusable(config, ["open"], with_rewards=False)
    with pytest.raises(BadInput, match=r"has no propose_rubric\.txt"):
        refuse_unusable(config, ["open"])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("votes", f"expected one of synthesis, majority, {OWN}"),
        ("", f"expected one of synthesis, majority, {OWN}"),
        ("my_method", f"expected one of synthesis, majority, {OWN}"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("no_such.inner:f", "there is no module 'no_such'"),
        ("my_method.inner:f", "there is no module 'my_method.inner'"),
        ("my_method:f", "module 'my_method' has no attribute 'f'"),
        ("my_method:", "expected one of synthesis, majority, or module:function of your own"),
        (":f", "expected one of synthesis, majority, or module:function of your own"),
        (".my_method:f", "expected one of synthesis, majority, or module:function of your own"),
        ("my_method:__name__", "is no function"),
    ],
)
def test_an_estimator_that_is_not_there_is_named(module: Module, name: str, line: str):
    module("")
    with pytest.raises(BadInput) as error:
        refuse_unusable(by_estimator(name), ["open"])
    assert_one_line(error, f"reference.estimator: {name!r}: {line}")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("format", f"expected one of agreement, self_rubric, {OWN}"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("my_method:f", "module 'my_method' has no attribute 'f'"),
    ],
)
@pytest.mark.parametrize("kind", ["verifiable", "open"])
def test_a_reward_that_is_not_there_is_named(module: Module, name: str, line: str, kind):
    module("")
    with pytest.raises(BadInput) as error:
        refuse_unusable(by_parts({"self_rubric": 1.0, name: 0.5}, kind), [kind])
    assert_one_line(error, f"reward.{kind}: {name!r}: {line}")


def test_what_the_data_does_not_need_is_not_looked_for():
    config = by_parts({"no_such_module:f": 1.0}, kind="open")
    refuse_unusable(config, ["verifiable"])
    with pytest.raises(BadInput, match="no_such_module"):
        refuse_unusable(config, ["verifiable", "open"])


def test_a_module_that_lacks_another_is_no_unknown_name(module: Module):
    """To say that the user's module is not there would be wrong."""
    module("import another_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="another_that_is_not_there"):
        refuse_unusable(by_estimator("my_method:f"), ["open"])


# What a run needs


def test_the_majority_of_open_problems_is_refused():
    with pytest.raises(BadInput) as error:
        refuse_unusable(by_estimator("majority"), ["verifiable", "open"])
    assert_one_line(
        error, "reference.estimator: 'majority': is for verifiable problems, and the data has open ones"
    )
    refuse_unusable(by_estimator("majority"), ["verifiable"])


def test_agreement_on_open_problems_is_refused():
    with pytest.raises(BadInput) as error:
        refuse_unusable(by_parts({"self_rubric": 1.0, "agreement": 0.1}, kind="open"), ["open"])
    assert_one_line(error, "reward.open: 'agreement': is for verifiable problems, and the data has open ones")


def test_what_a_users_function_is_for_stands_on_it(module: Module):
    module("""
from cat_grpo.method import needs

@needs("propose_rubric", kinds=("open",))
def reward(*asked): ...

def anything(*asked): ...
""")
    with pytest.raises(BadInput) as error:
        refuse_unusable(by_parts({"my_method:reward": 1.0}), ["verifiable"])
    assert_one_line(
        error, "reward.verifiable: 'my_method:reward': is for open problems, and the data has verifiable ones"
    )
    both = {"my_method:reward": 1.0, "my_method:anything": 1.0}
    refuse_unusable(by_parts(both, kind="open"), ["open"])
    assert templates(by_parts(both, kind="open"), ["open"]) == [
        "solve_open",
        "synthesize_open",
        "propose_rubric",
    ]


@pytest.mark.parametrize(
    ("config", "kinds", "names"),
    [
        (settings(), ["verifiable"], ["solve_verifiable", "synthesize_verifiable"]),
        (settings(), ["open"], ["solve_open", "synthesize_open", "propose_rubric", "judge_label"]),
        (by_estimator("majority"), ["verifiable"], ["solve_verifiable"]),
        (
            settings(reward={"verdict": "xml"}),
            ["verifiable", "open"],
            [
                *("solve_verifiable", "synthesize_verifiable"),
                *("solve_open", "synthesize_open", "propose_rubric", "judge_xml"),
            ],
        ),
        (
            by_parts({"agreement": 1.0, "self_rubric": 1.0}),
            ["verifiable"],
            ["solve_verifiable", "synthesize_verifiable", "propose_rubric", "judge_label"],
        ),
    ],
)
def test_a_run_needs_the_templates_that_it_fills_in(tmp_path: Path, config: Config, kinds, names: list[str]):
    assert templates(config, kinds) == names
    own = config.model_copy(update={"prompts": str(tmp_path)})
    for name in names:
        with pytest.raises(BadInput, match=rf"has no {name}\.txt"):
            refuse_unusable(own, kinds)
        (tmp_path / f"{name}.txt").write_text("words")
    refuse_unusable(own, kinds)


@pytest.mark.parametrize("prompt_set", ["default", "lab"])
@pytest.mark.parametrize("verdict", ["label", "xml"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("reward", REWARDS)
def test_the_shipped_sets_have_what_all_that_ships_needs(prompt_set: str, verdict, estimator, reward):
    parts = {"verifiable": {reward: 1.0}, "open": {reward: 1.0}}
    config = settings(prompt_set, reference={"estimator": estimator}, reward={"verdict": verdict, **parts})
    able = set(ESTIMATORS[estimator].kinds) & set(REWARDS[reward].kinds)
    assert able
    refuse_unusable(config, sorted(able))


def test_needs_says_all_kinds_unless_told():
    assert needs("x")(lambda: None).kinds == ("verifiable", "open")


class Silent(ScriptedEngine):
    """A judge whose server tells no probabilities, in one of two ways."""

    def __init__(self, refuses: bool) -> None:
        super().__init__(never)
        self.refuses = refuses

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        if self.refuses:
            raise NoLogprobsError("logprobs are not supported")
        return [LabelRead((0.0, 0.0), is_told=False) for _ in prompts]


NEEDED = "reward.verdict: label needs a judge that tells probabilities of tokens; xml does not"


@pytest.mark.parametrize(
    ("refuses", "reason"), [(True, "logprobs are not supported"), (False, "none came back")]
)
async def test_a_judge_that_tells_no_probabilities_is_refused(refuses: bool, reason: str):
    with pytest.raises(BadInput) as error:
        await refuse_unfit(engines(judge=Silent(refuses)), settings(), ["open"])
    assert_one_line(error, f"{NEEDED}: {reason}")
    with pytest.raises(BadInput):
        await refuse_silent_judge(Silent(refuses), settings())


async def test_a_judge_that_tells_them_is_asked_once():
    judge = judge_reads(lambda *_: (0.0, 0.0))  # neither yes nor no is likely, but that was told
    await refuse_unfit(engines(judge=judge), settings(), ["verifiable", "open"])
    assert len(judge.prompts) == 1


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (settings(reward={"verdict": "xml"}), ["open"]),
        (settings(), ["verifiable"]),
    ],
)
async def test_a_judge_that_need_not_tell_any_is_not_asked(config: Config, kinds):
    await refuse_unfit(engines(), config, kinds)
