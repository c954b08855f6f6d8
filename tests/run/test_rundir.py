"""The run directory: seeds, whole files, and what a resumed run may not change."""

import hashlib
import itertools
import json

import pytest

from cat_grpo import rundir
from cat_grpo.config import Config
from cat_grpo.settings import load_config
from cat_grpo.method.prompts import prompt_hashes
from cat_grpo.records import Completion, Group, Problem, Reference, RolloutScore, ScoredGroup
from cat_grpo.run.rundir import RunDir, seed_of, write_whole


def problems(n: int) -> list[Problem]:
    return [Problem(f"p{i}", ({"role": "user", "content": f"{i}?"},), "verifiable") for i in range(n)]


def ids(chosen: list[Problem]) -> list[str]:
    return [problem.id for problem in chosen]


def opened(path, *overrides: str, num_problems: int = 3) -> RunDir:
    return RunDir.open(path, load_config("lab-verifiable", overrides=overrides), problems(num_problems))


def scored_group(name: str, reward: float | None) -> ScoredGroup:
    group = Group(
        Problem(name, ({"role": "user", "content": "Q?"},), "verifiable"),
        (1,),
        (Completion("x", (2,), (-0.5,), "stop"),) * 2,
    )
    reference = Reference(name, "x", "synthesis", "prompt", 1, "stop", None, 0)
    return ScoredGroup(group, reference, None, (RolloutScore(reward, 0.0, None, ()),) * 2)


def write_scored(run: RunDir, step: int, shard: int, scored: list[ScoredGroup]) -> None:
    run.write_groups(step, shard, [s.group for s in scored])
    run.write_references(step, shard, [s.reference for s in scored])
    run.write_scores(step, shard, scored)


# Seeds


def test_a_seed_depends_on_each_of_its_four_parts():
    parts = itertools.product((0, 1, 11), (0, 1, 11), ("rollouts", "references"), ("p", "q", "1 p"))
    seeds = [seed_of(*part) for part in parts]
    assert len(set(seeds)) == len(seeds) == 54
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_on_every_machine():
    digest = hashlib.sha256(b"3 12 rollouts p7").digest()
    assert seed_of(3, 12, "rollouts", "p7") == int.from_bytes(digest[:8], "big") // 2


def test_a_run_seeds_by_its_own_seed(tmp_path):
    run = opened(tmp_path / "a", "train.seed=5")
    assert run.seed(1, "rollouts", "p") == seed_of(5, 1, "rollouts", "p")


# Files


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new " * 100_000 + "\ud800")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_table_that_fails_half_way_is_not_there(tmp_path, monkeypatch):
    def half(rows, schema, path) -> None:
        path.write_bytes(b"PAR1 and then the power went")
        raise KeyboardInterrupt

    run = opened(tmp_path / "run")
    monkeypatch.setattr(rundir, "write_table", half)
    with pytest.raises(KeyboardInterrupt):
        run.write_scores(0, 0, [scored_group("p", 1.0)])
    assert not run.stage_file(0, "scores", 0).exists()
    assert run.read_step(0) == []


def test_a_shard_comes_back_as_it_was_written(tmp_path):
    run = opened(tmp_path / "run")
    first, second = [scored_group("a", 1.0), scored_group("b", None)], [scored_group("c", 0.25)]
    write_scored(run, 12, 1, second)
    write_scored(run, 12, 0, first)
    assert run.read_scored(12, 1) == second
    assert run.read_step(12) == first + second
    assert sorted(path.name for path in (tmp_path / "run" / "steps" / "000012").iterdir()) == [
        *("references-00.parquet", "references-01.parquet", "rollouts-00.parquet"),
        *("rollouts-01.parquet", "scores-00.parquet", "scores-01.parquet"),
    ]


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    run = opened(tmp_path / "run")
    shards = [[scored_group(f"p{i}", 1.0)] for i in range(102)]
    for i, shard in enumerate(shards):
        write_scored(run, 0, i, shard)
    assert run.read_step(0) == [group for shard in shards for group in shard]


def test_the_first_groups_are_read_from_as_few_shards_as_hold_them(tmp_path):
    run = opened(tmp_path / "run")
    size = run.config.shard_size
    shards = [[scored_group(f"{shard} {i}", 1.0) for i in range(size)] for shard in range(3)]
    for i, shard in enumerate(shards):
        write_scored(run, 0, i, shard)
    run.stage_file(0, "scores", 2).write_bytes(b"not read")
    assert run.read_step(0, size + 1) == [*shards[0], shards[1][0]]
    assert run.read_step(0, 2 * size) == [*shards[0], *shards[1]]


def test_metrics_come_back_as_they_were(tmp_path):
    run = opened(tmp_path / "run")
    assert run.metrics() == []
    history = [{"step": 0.0, "reward/mean": 1 / 3}, {"step": 1.0, "reward/mean": 1e-300}]
    run.write_metrics(history)
    assert run.metrics() == history
    run.write_metrics([history[0], {"step": 1.0}])  # a step that is done again
    assert run.metrics() == [history[0], {"step": 1.0}]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


# What a run is


def test_the_manifest_says_what_went_in(tmp_path):
    opened(tmp_path / "run", "train.seed=4")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["prompt_set"] == "lab"
    assert manifest["prompt_hashes"] == prompt_hashes("lab")
    assert manifest["num_problems"] == 3
    assert manifest["seed"] == 4
    assert {"python", "torch", "transformers", "prefect"} <= set(manifest["versions"])
    assert manifest["versions"]["torch"]


def fingerprint(path, data: list[Problem]) -> str:
    RunDir.open(path, Config(), data)
    return json.loads((path / "manifest.json").read_text())["data_fingerprint"]


def test_the_fingerprint_follows_the_data(tmp_path):
    a, b = problems(2)
    data = [
        [a, b],
        [b, a],
        [a],
        [a, Problem("p1", b.messages, "open")],
        [a, Problem("p9", b.messages, "verifiable")],
        [a, Problem("p1", a.messages, "verifiable")],
    ]
    fingerprints = [fingerprint(tmp_path / str(i), chosen) for i, chosen in enumerate(data)]
    assert len(set(fingerprints)) == len(data)
    assert fingerprint(tmp_path / "again", [a, b]) == fingerprints[0]


def test_the_config_is_kept_whole(tmp_path):
    run = opened(tmp_path / "run", "train.seed=4", "judge.path=other")
    assert run.config == load_config("lab-verifiable", overrides=["train.seed=4", "judge.path=other"])


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("learner.learning_rate=1e-3", "learner.learning_rate: the run was started with 0.0001"),
        ("rollout.temperature=0.5", "rollout.temperature: the run was started with 1.0"),
        ("model.path=other", 'model.path: the run was started with "lab"'),
        ("judge.path=other", "judge.path: the run was started with null"),
        ("prompts=default", 'prompts: the run was started with "lab"'),
        ("data.kind=open", "data.kind: the run was started with null"),
        ("reference.aggregator=majority", 'reference.aggregator: the run was started with "synthesis"'),
        ("reward.equivalence=math", 'reward.equivalence: the run was started with "string"'),
        ("train.seed=1", "train.seed: the run was started with 0"),
        ("train.problems_per_step=8", "train.problems_per_step: the run was started with 32"),
        ("train.shard_size=16", "train.shard_size: the run was started with null"),
        (
            "model.chat_template_kwargs={enable_thinking=false}",
            "model.chat_template_kwargs: the run was started with {}",
        ),
    ],
)
def test_a_run_is_not_gone_on_with_under_other_settings(tmp_path, override, difference):
    opened(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError) as error:
        opened(tmp_path / "run", override)
    assert str(error.value).startswith(f"{tmp_path / 'run' / 'config.json'}: {difference}; ")
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_setting_that_the_run_does_not_have_is_another_even_as_none(tmp_path):
    opened(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    assert settings["data"].pop("kind") is None
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json: data: the run was started with \{"):
        opened(tmp_path / "run")


@pytest.mark.parametrize(
    "override",
    [
        *("train.steps=7", "train.checkpoint_every=3", "train.patience=2", "train.max_consensus=none"),
        *("train.validation=held_out.jsonl", "train.validation_limit=5"),
    ],
)
def test_how_long_a_run_goes_on_may_change(tmp_path, override):
    opened(tmp_path / "run")
    run = opened(tmp_path / "run", override)
    assert run.config == load_config("lab-verifiable", overrides=[override])
    assert RunDir(tmp_path / "run").config == run.config


def test_a_run_is_not_gone_on_with_under_other_prompts(tmp_path, monkeypatch):
    opened(tmp_path / "run")
    monkeypatch.setattr("cat_grpo.run.rundir.prompt_hashes", lambda prompt_set: {"judge_label": "another"})
    with pytest.raises(ValueError, match=r"manifest\.json: prompt_hashes: "):
        opened(tmp_path / "run")


def test_the_data_may_grow(tmp_path):
    opened(tmp_path / "run", num_problems=3)
    opened(tmp_path / "run", num_problems=4)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["num_problems"] == 4


# What a person decided


def test_a_decision_is_read_again_and_a_step_without_one_has_none(tmp_path):
    run = opened(tmp_path / "run")
    (run.step_folder(3)).mkdir(parents=True)
    assert run.read_decision(3) is None
    run.write_decision(3, accepted=False, note="the sums are wrong: Ω")
    assert run.read_decision(3) is False
    assert run.read_decision(4) is None
    run.write_decision(3, accepted=True, note="")
    assert RunDir(run.path).read_decision(3) is True


def test_a_gate_may_be_put_up_and_taken_down_again(tmp_path):
    opened(tmp_path / "run")
    assert opened(tmp_path / "run", "train.review_gate=true").config.train.review_gate
