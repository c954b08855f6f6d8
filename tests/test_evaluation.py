"""Gold answers: what evaluation makes of them, worked out by hand, and that training can never hold one."""

import csv
import dataclasses
import json
import math
import typing
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_house import imports, room, sources

from cat_grpo import records
from cat_grpo.config import Config, DataConfig, ModelConfig
from cat_grpo.data import load_problems
from cat_grpo.engines import Engines, Sampling
from cat_grpo.engines.scripted import ScriptedEngine
from cat_grpo.errors import BadInput
from cat_grpo.evaluation import LabelledProblem, evaluate, load_labelled, measure, points_f1
from cat_grpo.learner import batches
from cat_grpo.models import CARD
from cat_grpo.records import Generation, Group, LabelRead, Messages, Problem
from cat_grpo.settings import load_config
from cat_grpo.shipped import shipped
from scripting import never

# Verifiable problems


def settings(*overrides: str) -> Config:
    return load_config(
        overrides=["reward.equivalence=string", "rollout.group_size=4", "reward.min_criteria=1", *overrides]
    )


def labelled(question: str, answer: str | None, *points: str) -> LabelledProblem:
    kind = "open" if answer is None else "verifiable"
    return LabelledProblem(Problem(question, ({"role": "user", "content": question},), kind), answer, points)


def box(answer: object) -> str:
    return rf"\boxed{{{answer}}}"


SUMS = {"One?": ["5", "5", "6", None], "Two?": ["1", "2", "3", "3"], "Three?": ["9", "8", "8", "8"]}
GOLD = {"One?": "5", "Two?": "7", "Three?": "9"}
LABELLED = [labelled(question, GOLD[question]) for question in SUMS]


class Policy(ScriptedEngine):
    """Writes the answers above, and keeps how it was asked."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.sampled: list[Sampling] = []

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        self.sampled.append(sampling)
        return await super().generate(prompts, sampling)

    def _answer(self, prompt: str, i: int) -> str:
        answer = SUMS[prompt.partition("\n")[0]][i]
        return "I do not know." if answer is None else box(answer)


def reconcile(prompt: str, i: int) -> str:
    """Right about the first, right about the second where no rollout is, and silent about the third."""
    if box(6) in prompt:
        return box(5)
    return box(7) if box(3) in prompt else "They differ."


def engines(policy: ScriptedEngine | None = None) -> Engines:
    return Engines(policy or Policy(), ScriptedEngine(reconcile), ScriptedEngine(never))


async def test_verifiable_figures_by_hand():
    figures = await measure(LABELLED, engines(), settings())
    assert figures == pytest.approx(
        {
            "num_problems": 3.0,
            "pass@1": (2 / 4 + 0 + 1 / 4) / 3,
            "pass@1_se": math.sqrt((1 / 16 + 1 / 16 + 0) / 2 / 3),  # deviations 1/4, -1/4, 0
            "maj@4": 1 / 3,
            "maj@4_se": 1 / 3,  # of 1, 0, 0: variance (4/9 + 1/9 + 1/9) / 2 = 1/3, over 3, its root
            "pass@4": 2 / 3,
            "pass@4_se": 1 / 3,
            "reference_accuracy": 2 / 3,  # no reference is a wrong one
            "reference_accuracy_se": 1 / 3,
            "reference_right_all_wrong": 1 / 3,
            "reference_right_all_wrong_se": 1 / 3,
        }
    )


async def test_one_problem_has_a_standard_error_of_zero():
    figures = await measure(LABELLED[:1], engines(), settings())
    assert (figures["pass@1"], figures["pass@1_se"]) == (0.5, 0.0)


async def test_answers_are_compared_as_the_config_says():
    policy = ScriptedEngine(lambda prompt, i: box(r"\frac{1}{2}"))
    half = [labelled("Half?", "0.5")]
    for equivalence, right in (("string", 0.0), ("math", 1.0)):
        config = settings(f"reward.equivalence={equivalence}")
        figures = await measure(half, Engines(policy, policy, policy), config)
        assert figures["pass@1"] == figures["maj@4"] == figures["reference_accuracy"] == right


async def test_a_rollout_that_was_cut_off_is_wrong():
    policy = ScriptedEngine(lambda prompt, i: box(5) + " and more")
    config = settings("rollout.max_tokens=10")
    figures = await measure(LABELLED[:1], engines(policy), config)
    assert figures["pass@1"] == figures["pass@4"] == figures["maj@4"] == 0.0


async def test_evaluation_samples_as_training_does_and_by_its_seed():
    config = settings("rollout.temperature=0.7", "rollout.top_k=20", "rollout.max_tokens=77")
    policy = Policy()
    for seed in (0, 0, 1):
        await measure(LABELLED, engines(policy), config, seed)
    first, again, other = policy.sampled
    assert first == again
    assert (first.temperature, first.top_k, first.max_tokens, first.n) == (0.7, 20, 77, 4)
    assert len(set(first.seeds)) == 3
    assert not set(first.seeds) & set(other.seeds)


async def test_a_problem_keeps_its_seed_whatever_stands_beside_it():
    policy = Policy()
    await measure(LABELLED, engines(policy), settings())
    await measure(LABELLED[1:], engines(policy), settings())
    assert policy.sampled[0].seeds[1:] == policy.sampled[1].seeds


# Open problems


@pytest.mark.parametrize(
    ("text", "f1"),
    [
        ("Rest well. Drink water.", 1.0),
        ("First, REST WELL! Then drink water?", 1.0),
        ("Rest well.", 2 * 1 * (1 / 2) / (1 + 1 / 2)),  # precision 1, recall 1/2
        ("Rest well. Run.", 1 / 2),  # 1/2 and 1/2
        ("Rest well. Drink water. Run.", 2 * (2 / 3) / (2 / 3 + 1)),
        ("Drink water. Rest well. Rest well.", 2 * (2 / 3) / (2 / 3 + 1)),  # said twice
        ("Rest well and drink water.", 1.0),  # precision is never over 1
        ("Rest well. Drink water. Run. Jump.", 2 * (1 / 2) / (1 / 2 + 1)),
        ("Rest\nwell.", 0.0),  # a line is a sentence
        ("Rest. Well.", 0.0),
        ("Run.", 0.0),
        ("...", 0.0),
        ("", 0.0),
    ],
)
def test_points_f1_by_hand(text, f1):
    assert points_f1(text, ["rest well", "Drink water"]) == pytest.approx(f1)


NOTES = {"Cough?": ["Rest. Run.", "Rest."], "Burn?": ["Ice. Aloe.", "Nothing."]}
CARE = [labelled("Cough?", None, "rest", "tea"), labelled("Burn?", None, "ice", "aloe")]


def judge(prompt: str, labels: Sequence[str]) -> tuple[float, float]:
    """Yes to `Rest` and `Ice` where they are said; abstains on the note that says nothing."""
    if "Nothing" in prompt:
        return 0.1, 0.1
    criterion = prompt.partition("<criterion>\n")[2].partition("\n")[0]
    return (0.9, 0.0) if criterion in prompt.partition("<criterion>\n")[0] else (0.0, 0.9)


def anchor(prompt: str, i: int) -> str:
    if "rubric" in prompt:
        names = ("Rest", "Tea") if "Tea" in prompt else ("Ice", "Aloe", "Sun")
        return f"<rubric>{''.join(f'<criterion>{name}</criterion>' for name in names)}</rubric>"
    return "Rest. Tea." if "Rest" in prompt else "Ice. Sun."


def open_engines(reply=anchor) -> Engines:
    policy = ScriptedEngine(lambda prompt, i: NOTES[prompt][i])
    return Engines(policy, ScriptedEngine(reply), ScriptedEngine(never, judge))


async def test_open_figures_by_hand():
    figures = await measure(CARE, open_engines(), settings("rollout.group_size=2"))
    # Cough: 1/2 (one of two sentences, one of two points) and 2/3. Burn: 1 and 0.
    f1 = [(1 / 2 + 2 / 3) / 2, 1 / 2]
    reference_f1 = [1.0, 1 / 2]
    # Cough: 1/2 and 1/2. Burn: 2 of 3 criteria, and a note that was not judged.
    reward = [1 / 2, 2 / 3]

    def error(a: float, b: float) -> float:
        return abs(a - b) / 2  # of two values: |a - b| / sqrt(2), over sqrt(2)

    assert figures == pytest.approx(
        {
            "num_problems": 2.0,
            "points_f1": sum(f1) / 2,
            "points_f1_se": error(*f1),
            "reference_points_f1": sum(reference_f1) / 2,
            "reference_points_f1_se": error(*reference_f1),
            "rubric_reward": sum(reward) / 2,
            "rubric_reward_se": error(*reward),
        }
    )


async def test_what_was_never_judged_has_no_figure():
    def no_rubric(prompt: str, i: int) -> str:
        return "I cannot." if "rubric" in prompt else anchor(prompt, i)

    figures = await measure(CARE, open_engines(no_rubric), settings("rollout.group_size=2"))
    assert "rubric_reward" not in figures
    assert "rubric_reward_se" not in figures
    assert figures["reference_points_f1"] == 3 / 4
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


async def test_no_reference_makes_no_points():
    figures = await measure(CARE, open_engines(lambda prompt, i: ""), settings("rollout.group_size=2"))
    assert figures["reference_points_f1"] == 0.0
    assert figures["points_f1"] == pytest.approx((7 / 12 + 1 / 2) / 2)


async def test_kinds_can_be_mixed():
    def mixed(prompt: str, i: int) -> str:
        question = prompt.partition("\n")[0]
        return NOTES[question][i] if question in NOTES else box(SUMS[question][i])

    both = Engines(
        ScriptedEngine(mixed),
        ScriptedEngine(lambda prompt, i: reconcile(prompt, i) if "boxed" in prompt else anchor(prompt, i)),
        ScriptedEngine(never, judge),
    )
    figures = await measure([CARE[0], LABELLED[2], CARE[1]], both, settings("rollout.group_size=2"))
    assert figures["num_problems"] == 3.0
    assert figures["pass@1"] == 1 / 2
    assert figures["points_f1"] == pytest.approx((7 / 12 + 1 / 2) / 2)


# The engines of an evaluation


class Opened:
    """Stands for the opening of engines: keeps which models were asked for, and who was closed."""

    def __init__(self, judge: ScriptedEngine | None = None) -> None:
        self.models: list[list[ModelConfig]] = []
        self.closed: list[str] = []
        self._judge = judge or ScriptedEngine(never)

    async def __call__(self, models: Sequence[ModelConfig], secrets: object) -> list[ScriptedEngine]:
        self.models.append(list(models))
        opened = [Policy(), ScriptedEngine(reconcile), self._judge]
        for role, engine in zip(("policy", "anchor", "judge"), opened, strict=True):
            engine.close = self._closing(role)  # type: ignore[method-assign]
        return opened

    def _closing(self, role: str):
        async def close() -> None:
            self.closed.append(role)

        return close


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    opened = Opened()
    monkeypatch.setattr("cat_grpo.engines.roles.open_engines", opened)
    return opened


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """The verifiable problems above as a labelled file."""
    rows = [{"id": q, "kind": "verifiable", "prompt": q, "answer": gold} for q, gold in GOLD.items()]
    return jsonl(tmp_path / "sums.jsonl", *rows)


class Silent(ScriptedEngine):
    """A judge whose server tells no probabilities."""

    def __init__(self) -> None:
        super().__init__(never)

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        return [LabelRead((0.0, 0.0), is_told=False) for _ in prompts]


async def test_an_evaluation_opens_its_engines_measures_and_closes_them(opened: Opened, sums: Path):
    assert await evaluate(settings(), sums) == await measure(load_labelled(sums), engines(), settings())
    assert opened.closed == ["judge", "anchor", "policy"]
    figures = await evaluate(settings(), sums, limit=1)
    assert (figures["num_problems"], figures["pass@1"]) == (1.0, 0.5)


async def test_engines_are_closed_when_the_measuring_fails(opened: Opened, sums: Path):
    jsonl(sums, {"id": "?", "kind": "verifiable", "prompt": "Unknown to the policy?", "answer": "1"})
    with pytest.raises(KeyError, match="Unknown to the policy"):
        await evaluate(settings(), sums)
    assert opened.closed == ["judge", "anchor", "policy"]


async def test_the_anchor_is_what_a_checkpoint_was_trained_with(opened: Opened, sums: Path, tmp_path: Path):
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    (ours / CARD).write_text(json.dumps({"anchor": "the base"}))
    config = settings("model.path=mine", "judge.path=a judge")
    paths = [
        await evaluated(opened, config, sums, model=model, anchor=anchor)
        for model, anchor in [(None, None), (str(other), None), (str(ours), None), (str(ours), "another")]
    ]
    assert paths == [
        ["mine", "mine", "a judge"],
        [str(other), str(other), "a judge"],
        [str(ours), "the base", "a judge"],
        [str(ours), "another", "a judge"],
    ]
    assert await evaluated(opened, settings("model.path=mine"), sums) == ["mine", "mine", "mine"]
    config = settings("model.path=mine", "anchor.path=x", "anchor.dtype=float32")
    await evaluate(config, sums)
    assert [(m.path, m.dtype) for m in opened.models[-1]] == [("mine", "auto"), *[("mine", "float32")] * 2]


async def evaluated(opened: Opened, *arguments, **named) -> list[str]:
    """The paths of policy, anchor and judge."""
    await evaluate(*arguments, **named)
    return [model.path for model in opened.models[-1]]


async def test_servers_of_one_name_cannot_stand_for_another_model(opened: Opened, sums: Path):
    server = ["model.engine=openai", 'model.server.urls=["http://a/v1"]', "model.server.model=served"]
    config = settings("model.path=mine", *server)
    await evaluate(config, sums)
    with pytest.raises(BadInput, match=r"server\.model: served cannot stand for other, too: leave it empty"):
        await evaluate(config, sums, model="other")


async def test_what_cannot_be_used_is_refused_before_an_engine_is_opened(opened: Opened, tmp_path: Path):
    open_problems = jsonl(tmp_path / "open.jsonl", NOTE)
    with pytest.raises(BadInput, match=r"reference\.estimator: 'majority': is for verifiable problems"):
        await evaluate(settings("reference.estimator=majority"), open_problems)
    with pytest.raises(BadInput, match="no such file"):
        await evaluate(settings(), tmp_path / "none.jsonl")
    assert opened.models == []


async def test_engines_are_closed_when_the_judge_is_refused(monkeypatch, tmp_path: Path):
    opened = Opened(Silent())
    monkeypatch.setattr("cat_grpo.engines.roles.open_engines", opened)
    with pytest.raises(BadInput, match=r"reward\.verdict: label needs a judge that tells probabilities"):
        await evaluate(settings(), jsonl(tmp_path / "open.jsonl", NOTE))
    assert opened.closed == ["judge", "anchor", "policy"]


# Labelled files


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


SUM = {"id": "a", "kind": "verifiable", "prompt": "1 + 1?", "answer": "2"}
NOTE = {"id": "b", "kind": "open", "prompt": "Cough?", "points": ["rest", "tea"]}
BOTH = [labelled("1 + 1?", "2"), labelled("Cough?", None, "rest", "tea")]


def without_ids(items: Sequence[LabelledProblem]) -> list[tuple]:
    return [(item.problem.messages, item.problem.kind, item.answer, item.points) for item in items]


def test_gold_is_read_from_every_format(tmp_path):
    jsonl(tmp_path / "rows.jsonl", SUM, NOTE)
    pq.write_table(pa.Table.from_pylist([SUM | {"points": None}, NOTE]), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "kind", "prompt", "answer", "points"])
        writer.writeheader()
        writer.writerows([SUM, NOTE | {"points": json.dumps(NOTE["points"])}])  # and empty cells
    for path in tmp_path.iterdir():
        assert without_ids(load_labelled(path)) == without_ids(BOTH), path


def test_at_most_the_first_so_many_are_asked(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", SUM, NOTE)
    assert [item.problem.id for item in load_labelled(path)] == ["a", "b"]
    assert [item.problem.id for item in load_labelled(path, 1)] == ["a"]
    assert len(load_labelled(path, 9)) == 2


ANSWER = "answer: a verifiable problem needs its gold answer as text"
POINTS = "points: an open problem needs a list of the points that a good text makes"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SUM | {"answer": None}, ANSWER),
        (SUM | {"answer": 2}, ANSWER),
        (SUM | {"answer": " "}, ANSWER),
        ({"id": "a", "kind": "verifiable", "prompt": "?"}, ANSWER),
        (NOTE | {"points": []}, POINTS),
        (NOTE | {"points": [1]}, POINTS),
        (NOTE | {"points": ["rest", ""]}, POINTS),
        (NOTE | {"points": "rest, tea"}, POINTS),
        (NOTE | {"points": '"rest"'}, POINTS),
        (NOTE | {"points": {"rest": 1}}, POINTS),
        (NOTE | {"points": None}, POINTS),
        (SUM | {"kind": "closed"}, "kind: expected verifiable or open"),
        (SUM | {"prompt": None}, "prompt: expected text"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_key(tmp_path, row, message):
    path = jsonl(tmp_path / "rows.jsonl", SUM, NOTE, row)
    with pytest.raises(BadInput) as error:
        load_labelled(path)
    assert str(error.value).startswith(f"{path}:3: {message}")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"none\.jsonl: no such file"):
        load_labelled(tmp_path / "none.jsonl")


# Reference-free, as a property of the types

GOLD_COLUMNS = {"answer": "GOLD", "points": ["GOLD"], "gold": "GOLD", "solution": "GOLD"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_problem_with_gold_beside_it_equals_the_one_without(tmp_path, suffix):
    rows = [{"id": "a", "kind": "verifiable", "prompt": "1?"}, {"id": "b", "kind": "open", "prompt": "2?"}]
    loaded = []
    for name, extra in (("bare", {}), ("gold", GOLD_COLUMNS)):
        path = tmp_path / f"{name}.{suffix}"
        write_rows(path, [row | extra for row in rows])
        loaded.append(load_problems(DataConfig(path=str(path))))
    bare, gold = loaded
    assert bare == gold
    assert "GOLD" not in repr(gold)


def write_rows(path: Path, rows: list[dict]) -> None:
    match path.suffix:
        case ".jsonl":
            jsonl(path, *rows)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)


def test_a_problem_has_no_place_for_a_gold_answer():
    assert [field.name for field in dataclasses.fields(Problem)] == ["id", "messages", "kind"]
    problem = Problem("p", ({"role": "user", "content": "?"},), "open")
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(problem, "answer", "42")  # frozen or not: there is no such slot


TRAINED_ON = [
    *(records.Problem, records.Group, records.Reference, records.RewardedGroup, records.RolloutReward),
    *(batches.TrainingRow, batches.Batch, batches.MicroBatch),
]


def held_types(root: type) -> set[type]:
    """All dataclasses that a record of this type can hold, itself among them."""
    found: set[type] = set()

    def visit(annotation: object) -> None:
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) and annotation not in found:
            found.add(annotation)
            for hint in typing.get_type_hints(annotation).values():
                visit(hint)
        for argument in typing.get_args(annotation):
            visit(argument)

    visit(root)
    return found


@pytest.mark.parametrize("record", TRAINED_ON)
def test_no_record_of_training_can_hold_a_labelled_problem(record):
    assert LabelledProblem not in held_types(record)
    assert not record.__dataclass_fields__.keys() & {"gold", "label", "points", "gold_answer"}


def test_the_walk_over_types_finds_what_is_held():
    assert {Problem, Group, records.Verdict, records.Rubric} <= held_types(records.RewardedGroup)
    assert Problem in held_types(LabelledProblem)


READERS_OF_GOLD = {"evaluation", "run.opening", "run.step", "library", "cli"}  # a run validates on a file
MAY_LACK_RECORDS = {
    *("learner.attention", "learner.checkpointing", "learner.grpo", "learner.lm_head", "learner.lora"),
    "method.equivalence",
}


def imported_rooms() -> dict[str, set[str]]:
    """What each room of cat_grpo imports of cat_grpo, inside functions too, and the folders around that."""
    return {
        room(path): {
            name
            for wanted in imports(path)
            if wanted.module.startswith("cat_grpo.")
            for name in with_folders(wanted.module.removeprefix("cat_grpo."))
        }
        for path in sources()
    }


def with_folders(name: str) -> list[str]:
    """A module's name and those of its packages, which are imported with it."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


TRAINING_ROOMS = [name for name in imported_rooms() if name.split(".")[0] in ("data", "method", "learner")]


@pytest.mark.parametrize("stage", TRAINING_ROOMS)
def test_no_stage_of_training_can_reach_the_reader_of_gold(stage):
    graph, reached, ahead = imported_rooms(), set(), [stage]
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead += graph.get(name, ())
    assert not reached & READERS_OF_GOLD
    assert "records" in reached or stage in MAY_LACK_RECORDS


def test_all_stages_of_training_are_among_those():
    stages = {"rollouts", "cat", "references.synthesis", "references.selection"}
    stages |= {"rewards.agreement", "rewards.rubric", "rewards.judge"}
    assert {f"method.{stage}" for stage in stages} <= set(TRAINING_ROOMS)
    assert {"data", "learner.batches", "learner.learner", "learner.sharded"} <= set(TRAINING_ROOMS)


def test_only_they_know_the_reader_of_gold():
    knowing = {name for name, known in imported_rooms().items() if "evaluation" in known}
    assert knowing <= READERS_OF_GOLD
    assert "run.step" in knowing


def test_the_labs_held_out_files_have_names():
    assert {item.problem.kind for item in load_labelled(Path("lab:verifiable"))} == {"verifiable"}
    assert load_labelled(Path("lab:open"), 3) == load_labelled(
        shipped("data", "lab", "open", "heldout.jsonl"), 3
    )
