"""The run directory: seeds, whole files, and what a resumed run may not change."""

import hashlib
import itertools
import json
import shutil

import pytest

from cat_grpo.config import Config
from cat_grpo.errors import BadInput
from cat_grpo.files import seed_of, write_whole
from cat_grpo.method.prompts import set_folder, template_hashes
from cat_grpo.records import Completion, Group, Problem, Reference, RewardedGroup, RolloutReward
from cat_grpo.run import tables
from cat_grpo.run.rundir import RunDir
from cat_grpo.settings import load_config


def problems(n: int) -> list[Problem]:
    return [Problem(f"p{i}", ({"role": "user", "content": f"{i}?"},), "verifiable") for i in range(n)]


def ids(chosen: list[Problem]) -> list[str]:
    return [problem.id for problem in chosen]


def opened(path, *overrides: str, num_problems: int = 3) -> RunDir:
    return RunDir.open(path, load_config("lab-verifiable", overrides=overrides), problems(num_problems))


def rewarded_group(name: str, reward: float | None) -> RewardedGroup:
    group = Group(
        Problem(name, ({"role": "user", "content": "Q?"},), "verifiable"),
        (1,),
        (Completion("x", (2,), (-0.5,), "stop"),) * 2,
    )
    reference = Reference("x", prompt="prompt", num_tokens=1, finish_reason="stop", problem_id=name)
    return RewardedGroup(group, reference, None, (RolloutReward(reward),) * 2)


def write_rewarded(run: RunDir, step: int, shard: int, rewarded: list[RewardedGroup]) -> None:
    run.write_groups(step, shard, [s.group for s in rewarded])
    run.write_references(step, shard, [s.reference for s in rewarded])
    run.write_rewards(step, shard, rewarded)


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
    def half(table, path, **_: object) -> None:
        path.write_bytes(b"PAR1 and then the power went")
        raise KeyboardInterrupt

    run = opened(tmp_path / "run")
    monkeypatch.setattr(tables.pq, "write_table", half)
    with pytest.raises(KeyboardInterrupt):
        run.write_rewards(0, 0, [rewarded_group("p", 1.0)])
    assert not run.stage_file(0, "rewards", 0).exists()
    assert run.read_step(0) == []


def test_a_shard_comes_back_as_it_was_written(tmp_path):
    run = opened(tmp_path / "run")
    first, second = [rewarded_group("a", 1.0), rewarded_group("b", None)], [rewarded_group("c", 0.25)]
    write_rewarded(run, 12, 1, second)
    write_rewarded(run, 12, 0, first)
    assert run.read_rewarded(12, 1) == second
    assert run.read_step(12) == first + second
    assert sorted(path.name for path in (tmp_path / "run" / "steps" / "000012").iterdir()) == [
        *("references-00.parquet", "references-01.parquet", "rewards-00.parquet"),
        *("rewards-01.parquet", "rollouts-00.parquet", "rollouts-01.parquet"),
    ]


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path):
    run = opened(tmp_path / "run")
    shards = [[rewarded_group(f"p{i}", 1.0)] for i in range(102)]
    for i, shard in enumerate(shards):
        write_rewarded(run, 0, i, shard)
    assert run.read_step(0) == [group for shard in shards for group in shard]


def test_the_first_groups_are_read_from_as_few_shards_as_hold_them(tmp_path):
    run = opened(tmp_path / "run")
    size = run.config.shard_size
    shards = [[rewarded_group(f"{shard} {i}", 1.0) for i in range(size)] for shard in range(3)]
    for i, shard in enumerate(shards):
        write_rewarded(run, 0, i, shard)
    run.stage_file(0, "rewards", 2).write_bytes(b"not read")
    assert run.read_step(0, size + 1) == [*shards[0], shards[1][0]]
    assert run.read_step(0, 2 * size) == [*shards[0], *shards[1]]


def test_metrics_come_back_as_they_were(tmp_path):
    run = opened(tmp_path / "run")
    assert run.metrics() == []
    history = [{"step": 0.0, "reward/mean": 1 / 3}, {"step": 1.0, "reward/mean": 1e-300}]
    for metrics in history:
        run.add_metrics(metrics)
    assert run.metrics() == history


def test_a_line_more_leaves_the_others_where_they_are(tmp_path):
    """So the time that it takes does not grow with the history."""
    run = opened(tmp_path / "run")
    run.add_metrics({"step": 0.0})
    path = tmp_path / "run" / "metrics.jsonl"
    before, text = path.stat().st_ino, path.read_text()
    run.add_metrics({"step": 1.0})
    assert path.stat().st_ino == before
    assert path.read_text() == text + '{"step": 1.0}\n'


def test_the_lines_of_steps_that_are_done_again_are_dropped(tmp_path):
    run = opened(tmp_path / "run")
    assert run.cut_metrics(2) == []
    for step in range(4):
        run.add_metrics({"step": float(step)})
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4.0, "rew')  # a process was killed there
    kept = [{"step": 0.0}, {"step": 1.0}]
    assert run.cut_metrics(2) == kept
    assert run.metrics() == kept


# What a run is


def test_the_manifest_says_what_went_in(tmp_path):
    opened(tmp_path / "run", "train.seed=4")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["prompt_set"] == "lab"
    assert manifest["prompt_hashes"] == template_hashes("lab", ("solve_verifiable", "synthesize_verifiable"))
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
        ("reward.verifiable.agreement=0.5", "reward.verifiable.agreement: the run was started with 1.0"),
        ("reward.verifiable.format=0.1", "reward.verifiable.agreement: the run was started with 1.0"),
        ("prompts=default", 'prompts: the run was started with "lab"'),
        ("data.kind=open", "data.kind: the run was started with null"),
        ("reference.estimator=majority", 'reference.estimator: the run was started with "synthesis"'),
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
def test_a_run_is_not_resumed_under_other_settings(tmp_path, override, difference):
    opened(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(BadInput) as error:
        opened(tmp_path / "run", override)
    assert str(error.value).startswith(f"{tmp_path / 'run' / 'config.json'}: {difference}; ")
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_setting_that_the_run_does_not_have_yet_had_its_default(tmp_path):
    """So a release that adds one can resume every run."""
    opened(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    assert settings["rollout"].pop("top_k") == 0
    assert settings.pop("budget")
    path.write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=r"config\.json: rollout\.top_k: the run was started with 0"):
        opened(tmp_path / "run", "rollout.top_k=5")
    opened(tmp_path / "run")
    assert json.loads(path.read_text())["rollout"]["top_k"] == 0


def test_a_setting_that_is_none_of_this_release_is_named(tmp_path):
    opened(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    settings["rollout"]["beam_width"] = 4
    path.write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=r"run/config\.json: rollout\.beam_width: "):
        opened(tmp_path / "run")


@pytest.mark.parametrize(
    "override",
    [
        *("train.steps=7", "train.checkpoint_every=3", "train.patience=2", "train.max_consensus=none"),
        *("train.validation=held_out.jsonl", "train.validation_limit=5"),
    ],
)
def test_how_long_a_run_lasts_may_change(tmp_path, override):
    opened(tmp_path / "run")
    run = opened(tmp_path / "run", override)
    assert run.config == load_config("lab-verifiable", overrides=[override])
    assert RunDir(tmp_path / "run").config == run.config


def own_prompts(folder) -> str:
    shutil.copytree(set_folder("lab"), folder)
    return f"prompts={folder}"


def test_a_run_is_not_resumed_under_other_prompts(tmp_path):
    prompts = own_prompts(tmp_path / "prompts")
    opened(tmp_path / "run", prompts)
    (tmp_path / "prompts" / "synthesize_verifiable.txt").write_text("Other words.")
    with pytest.raises(BadInput, match=r"manifest\.json: synthesize_verifiable\.txt has changed"):
        opened(tmp_path / "run", prompts)


def test_templates_that_the_run_does_not_use_may_come_and_change_and_go(tmp_path):
    prompts = own_prompts(tmp_path / "prompts")
    opened(tmp_path / "run", prompts)
    (tmp_path / "prompts" / "rank.txt").write_text("A template of a later release.")
    (tmp_path / "prompts" / "judge_xml.txt").write_text("Other words.")
    (tmp_path / "prompts" / "propose_rubric.txt").unlink()
    opened(tmp_path / "run", prompts)


def test_a_template_that_the_run_has_not_used_yet_is_known_from_then_on(tmp_path):
    prompts = own_prompts(tmp_path / "prompts")
    opened(tmp_path / "run", prompts)
    manifest = tmp_path / "run" / "manifest.json"
    saved = json.loads(manifest.read_text())
    del saved["prompt_hashes"]["synthesize_verifiable"]  # as if an earlier release had not filled it in
    manifest.write_text(json.dumps(saved))
    opened(tmp_path / "run", prompts)
    (tmp_path / "prompts" / "synthesize_verifiable.txt").write_text("Other words.")
    with pytest.raises(BadInput, match=r"synthesize_verifiable\.txt has changed"):
        opened(tmp_path / "run", prompts)


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
