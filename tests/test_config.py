"""Every setting once: presets hold the paper's values, and what is wrong is one line with its key."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from cat_grpo.config import Config, ModelConfig
from cat_grpo.errors import BadInput
from cat_grpo.method.prompts import set_folder
from cat_grpo.settings import differences, load_config, may_change, preset_names, read_config


def at(config: BaseModel, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def error_of(*overrides: str, **sources) -> str:
    with pytest.raises(BadInput) as error:
        load_config(overrides=overrides, **sources)
    assert "\n" not in str(error.value)
    return str(error.value)


PAPER = {  # method.md, "The paper's settings"
    "rollout.group_size": 8,
    "learner.learning_rate": 5e-7,
    "learner.kl_coef": 1e-3,
    "learner.advantage_scale": "group",
    "learner.updates_per_step": 1,
    "train.steps": 1000,
    "reference.estimator": "synthesis",
    "reference.include_question": False,
    "reward.verifiable": {"agreement": 1.0},
    "reward.open": {"self_rubric": 1.0},
    "reward.min_criteria": 5,
    "judge": None,
    "prompts": "default",
    "model.path": "Qwen/Qwen3-4B",
    "model.chat_template_kwargs": {"enable_thinking": False},
    "rollout.temperature": 0.7,
    "rollout.top_k": 20,
    "rollout.top_p": 0.8,
}
MATH500 = PAPER | {
    "rollout.max_tokens": 1536,
    "data.kind": "verifiable",
    "reward.equivalence": "math",
    "reward.length_limit": None,
}
HEALTHBENCH = PAPER | {
    "rollout.max_tokens": 1024,
    "data.kind": "open",
    "reward.length_limit": 750,
    "reward.length_penalty": 1.0,
}


@pytest.mark.parametrize(
    ("preset", "key", "value"),
    [("math500", *item) for item in MATH500.items()]
    + [("healthbench", *item) for item in HEALTHBENCH.items()],
)
def test_presets_hold_the_values_of_the_paper(preset, key, value):
    assert at(load_config(preset), key) == value


@pytest.mark.parametrize("preset", ["math500", "healthbench"])
def test_an_update_is_made_of_256_rollouts(preset):
    config = load_config(preset)
    assert config.train.problems_per_step * config.rollout.group_size == 256


def test_the_presets_are_these():
    assert preset_names() == ["healthbench", "lab-open", "lab-verifiable", "math500"]


@pytest.mark.parametrize("preset", ["healthbench", "lab-open", "lab-verifiable", "math500"])
def test_presets_load_and_name_prompts_that_are_there(preset):
    config = load_config(preset)
    assert set_folder(config.prompts).is_dir()
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("kind", ["verifiable", "open"])
def test_the_presets_of_the_lab_run_on_what_ships(kind):
    config = load_config(f"lab-{kind}")
    assert (config.prompts, config.model.path, config.data.path) == ("lab", "lab", f"lab:{kind}")
    assert config.train.validation is None  # the demo chooses without labels


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.steps=7", 7),
        ("learner.learning_rate=1e-4", 1e-4),
        ("learner.learning_rate=0.5", 0.5),
        ("reference.include_question=true", True),
        ("reference.include_question=false", False),
        ("reference.estimator=mine:best_of", "mine:best_of"),
        ("train.patience=none", None),
        ("reward.length_limit=null", None),
        ("train.max_consensus=None", None),
        ("data.path=a/b c.jsonl", "a/b c.jsonl"),
        ("data.path=lab:open", "lab:open"),
        ("data.path=C:\\data\\x.csv", "C:\\data\\x.csv"),
        ('data.path="7"', "7"),
        ("data.path=a=b", "a=b"),
        ("data.path=", ""),
        ("data.kind=open", "open"),
        ("model.chat_template_kwargs.enable_thinking=false", {"enable_thinking": False}),
        ("model.chat_template_kwargs={stop = [1, 2]}", {"stop": [1, 2]}),
        ("model.chat_template_kwargs.stops=[1, 'a', true]", {"stops": [1, "a", True]}),
    ],
)
def test_an_override_is_read_as_what_it_looks_like(text, value):
    key = text.partition("=")[0]
    key = "model.chat_template_kwargs" if "kwargs" in key else key
    assert at(load_config(overrides=[text]), key) == value


def test_the_last_override_wins():
    assert load_config(overrides=["train.steps=7", "train.steps=8"]).train.steps == 8


def test_base_then_preset_then_file_then_override(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[rollout]\ntop_k = 3\ntemperature = 0.3\n")
    base = {"rollout": {"top_p": 0.1, "top_k": 1, "temperature": 0.1, "max_tokens": 1, "group_size": 3}}
    config = load_config("math500", file, ["rollout.temperature=0.4"], base)
    assert config.rollout.group_size == 3  # base alone
    assert config.rollout.top_p == 0.8  # preset over base
    assert config.rollout.top_k == 3  # file over preset
    assert config.rollout.temperature == 0.4  # override over file
    assert config.learner.kl_coef == 1e-3  # default
    assert base["rollout"]["temperature"] == 0.1  # and nothing is written back


def test_a_section_that_is_none_can_be_filled():
    assert load_config(base={"judge": None}).judge is None
    assert load_config(overrides=["judge=none", "judge.path=x"]).judge.path == "x"
    assert load_config(overrides=["judge.path=x", "judge=none"]).judge is None


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.stepz=3", "train.stepz"),
        ("trian.steps=3", "trian"),
        ("steps=3", "steps"),
        ("train.steps=many", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("train.steps=none", "train.steps"),
        ("train=3", "train"),
        ("prompts.folder=3", "prompts"),
        ("rollout.group_size=1", "rollout.group_size"),
        ("rollout.temperature=0", "rollout.temperature"),
        ("rollout.temperature=nan", "rollout.temperature"),
        ("rollout.top_p=1.1", "rollout.top_p"),
        ("learner.kl_coef=-1", "learner.kl_coef"),
        ("data.kind=closed", "data.kind"),
        ("data.path=7", "data.path"),
        ("reward.verdict=maybe", "reward.verdict"),
        ("reward.open={}", "reward.open"),
        ("reward.open.self_rubric=nan", "reward.open.self_rubric"),
        ("reward.verifiable.agreement=much", "reward.verifiable.agreement"),
        ("reference.aggregator=majority", "reference.aggregator"),
        ("model.device=tpu", "model.device"),
        ("judge.model=x", "judge.model"),
    ],
)
def test_a_bad_setting_is_named_by_its_key(override, key):
    assert error_of(override).startswith(f"config: {key}: ")


@pytest.mark.parametrize("override", ["train.steps", "=3", ""])
def test_an_override_without_key_or_value_is_named(override):
    assert error_of(override) == f"override {override!r}: expected section.key=value"


def test_an_unknown_preset_is_told_the_known_ones():
    assert error_of(preset="math") == (
        "unknown preset 'math': the presets are healthbench, lab-open, lab-verifiable, math500"
    )
    assert "unknown preset '../presets/math500'" in error_of(preset="../presets/math500")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[train\nsteps = 3", "(at line 1, column 7)"),
        (b"steps = 1\nsteps = 2\n", "(at line 2, column 10)"),
        (b"name = '\xff'", "utf-8"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, reason):
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    message = error_of(file=file)
    assert message.startswith(f"{file}: ")
    assert reason in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert error_of(file=tmp_path / "none.toml") == f"{tmp_path / 'none.toml'}: No such file or directory"
    assert error_of(file=tmp_path) == f"{tmp_path}: Is a directory"


def test_a_bad_key_of_a_file_is_named(tmp_path):
    (tmp_path / "mine.toml").write_text("[train]\nstepz = 3\n")
    assert error_of(file=tmp_path / "mine.toml").startswith("config: train.stepz: ")


def test_parts_of_a_reward_are_those_that_are_named_with_their_weights():
    config = load_config(overrides=["reward.verifiable={agreement = 0.9, 'mine:form' = 0.1}"])
    assert config.reward.parts("verifiable") == {"agreement": 0.9, "mine:form": 0.1}
    assert config.reward.parts("open") == {"self_rubric": 1.0}
    assert load_config(overrides=["reward.verifiable.agreement=0.5"]).reward.verifiable == {"agreement": 0.5}


def test_a_saved_config_is_read_as_it_was(tmp_path):
    config, path = load_config("lab-open", overrides=["train.steps=7"]), tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert read_config(path) == config
    path.write_text('{"train": {"steps": 7}}')  # of a version that had no other setting
    assert read_config(path) == load_config(overrides=["train.steps=7"])
    path.write_text('{"train": {"stepz": 7}}')
    with pytest.raises(BadInput, match=rf"^{path}: train\.stepz: "):
        read_config(path)


def test_differences_by_hand():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}}) == [
        ("a.c", 2, 4),
        ("d", 3, None),
    ]


MAY_CHANGE = {
    *("train.steps", "train.checkpoint_every", "train.validation", "train.validation_limit"),
    *("train.tracker", "train.patience", "train.max_consensus", "train.review_gate"),
    *("learner.micro_batch_tokens", "learner.gradient_checkpointing", "data.reviews"),
    *(
        f"{role}.{key}"
        for role in ("model", "anchor", "judge")
        for key in ("max_batch_tokens", "vllm", "server")
    ),
    "budget",
}


def test_what_a_resumed_run_may_set_anew():
    """More steps, less memory, other servers: what is in none of these sections and fields, it may not."""
    every = {path for path, _ in fields(Config)} | {f"judge.{path}" for path, _ in fields(ModelConfig)}
    every |= {f"anchor.{path}" for path, _ in fields(ModelConfig)}
    below = {path for path in every if any(path.startswith(f"{key}.") for key in MAY_CHANGE)}
    assert {path for path in every if may_change(path)} == MAY_CHANGE | below
    assert may_change("model.vllm.engine_args.tensor_parallel_size")
    assert not may_change("model.chat_template_kwargs.enable_thinking")
    assert not may_change("reward.open.self_rubric")


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ((), 32),
        (("train.problems_per_step=6",), 6),
        (("model.engine=vllm",), 1),
        (("model.engine=vllm", "judge.path=other", "judge.engine=vllm"), 1),
        (("model.engine=vllm", "judge.path=other", "judge.engine=hf"), 32),
        (("model.engine=vllm", "anchor.engine=hf"), 32),
        (("model.engine=vllm", "train.shard_size=4"), 4),
        (("train.shard_size=4",), 4),
    ],
)
def test_each_problem_walks_by_itself_unless_transformers_answers(overrides, size):
    assert load_config(overrides=overrides).shard_size == size


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.steps = 3


def fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield f"{path}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{path}{name}.")


def test_every_setting_explains_itself():
    # it is the help text of Prefect's run form
    silent = [path for path, field in fields(Config) if not (field.description or field.title)]
    assert silent == []
    leaves = [path for path, field in fields(Config) if "." in path and not field.description]
    assert leaves == []
    assert len(list(fields(Config))) > 40  # the walk has been through the sections


def test_the_explanations_reach_the_form():
    schema = Config.model_json_schema()
    assert schema["$defs"]["RolloutConfig"]["properties"]["group_size"]["description"].startswith(
        "G, the rollouts per problem"
    )
