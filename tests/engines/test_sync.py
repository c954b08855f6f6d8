"""Weights on their way to an engine, and the proof that they have arrived."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cat_grpo.config import ModelConfig
from cat_grpo.engines import Engines, SyncError
from cat_grpo.engines.hf import HFEngine, load_model_and_tokenizer
from cat_grpo.engines.roles import open_engine
from cat_grpo.engines.scripted import ScriptedEngine
from cat_grpo.engines.sync import Probe, check_sync, make_probes, send_weights
from cat_grpo.learner.lora import ADAPTER_WEIGHTS, add_adapters
from cat_grpo.run import opening
from cat_grpo.run.observing import Observer
from cat_grpo.run.opening import open_loop
from cat_grpo.run.step import run_step
from cat_grpo.settings import load_config

PROBES = [Probe("one", (5, 6, 7), (8, 9)), Probe("two", (9, 8), (7, 6, 5))]


@pytest.fixture
def config(lab_model: Path) -> ModelConfig:
    return ModelConfig(path=str(lab_model), device="cpu")


def shaken(config: ModelConfig):
    """The lab's model, a little changed, and an engine that answers with it."""
    model, tokenizer = load_model_and_tokenizer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    return model, HFEngine(model, tokenizer, config)


async def test_weights_arrive_bit_for_bit(config: ModelConfig, tmp_path: Path):
    model, live = shaken(config)
    engine = open_engine(config, {})
    with pytest.raises(SyncError):
        await check_sync(live, engine, PROBES, 1e-3)
    await send_weights(model, engine, torch.float32, tmp_path / "weights")
    assert await check_sync(live, engine, PROBES, 1e-3) == 0.0
    assert not list(tmp_path.iterdir())  # by way of memory
    for one in (live, engine):
        await one.close()


async def test_weights_travel_in_the_engines_own_type(config: ModelConfig, tmp_path: Path):
    model, live = shaken(config)
    seen = []

    class Receiver(ScriptedEngine):
        async def load_weights(self, checkpoint: Path) -> None:
            seen.append(AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"))

    await send_weights(model, Receiver(lambda *_: ""), torch.bfloat16, tmp_path / "weights")
    (served,) = seen
    for name, weight in model.state_dict().items():
        assert torch.equal(served.state_dict()[name], weight.to(torch.bfloat16)), name
    assert model.dtype == torch.float32
    await live.close()


async def test_adapters_stay_where_a_server_that_starts_anew_finds_them(config: ModelConfig, tmp_path: Path):
    model, _ = load_model_and_tokenizer(config)
    add_adapters(model, 4, 8, seed=0)
    engine = ScriptedEngine(lambda *_: "")
    for _ in range(2):
        await send_weights(model, engine, torch.float32, tmp_path / "weights")
        assert engine.weights == tmp_path / "weights"
        assert (tmp_path / "weights" / ADAPTER_WEIGHTS).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


async def test_the_first_probe_that_is_off_is_named_with_its_gap():
    class Off(ScriptedEngine):
        async def logprobs(self, prompts, completions):
            exact = await super().logprobs(prompts, completions)
            return [exact[0], tuple(logprob - 0.25 for logprob in exact[1])]

    learner, engine = ScriptedEngine(lambda *_: ""), Off(lambda *_: "")
    with pytest.raises(SyncError, match=r"on two their logprobs are 0\.25 nats apart .* beyond 0\.1"):
        await check_sync(learner, engine, PROBES, 0.1)
    assert await check_sync(learner, engine, PROBES, 0.3) == pytest.approx(0.25)


async def test_a_gap_that_is_no_number_is_a_gap():
    class Lost(ScriptedEngine):
        async def logprobs(self, prompts, completions):
            return [(float("nan"),) * len(completion) for completion in completions]

    with pytest.raises(SyncError, match="on one"):
        await check_sync(ScriptedEngine(lambda *_: ""), Lost(lambda *_: ""), PROBES, 1.0)


def test_a_probe_is_a_prompt_in_two_halves():
    assert make_probes([("a", [1, 2, 3, 4, 5])]) == [Probe("a", (1, 2), (3, 4, 5))]


SETTINGS = ["train.problems_per_step=4", "train.steps=2", "learner.learning_rate=1e-3"]


def loop_with_an_engine_of_its_own(run: Path, monkeypatch, engine: HFEngine):
    async def roles(config, live, secrets) -> Engines:
        return Engines(engine, live, live)

    monkeypatch.setattr(opening, "open_roles", roles)
    return open_loop(load_config("lab-verifiable", None, SETTINGS), run)


async def test_every_update_reaches_the_policys_engine(tmp_path: Path, monkeypatch, config: ModelConfig):
    async with loop_with_an_engine_of_its_own(tmp_path, monkeypatch, HFEngine.open(config)) as loop:
        for step in range(2):
            metrics = await run_step(loop, step, Observer())
            assert metrics["policy/sync_gap"] == 0.0
            assert metrics["policy/sampler_gap"] < 1e-4  # the rollouts were the learner's


async def test_a_run_whose_engine_does_not_take_the_weights_stops(tmp_path, monkeypatch, config: ModelConfig):
    """And is resumed from its last checkpoint: the step is not recorded."""

    class Deaf(HFEngine):
        async def load_weights(self, checkpoint: Path) -> None: ...

    async with loop_with_an_engine_of_its_own(tmp_path, monkeypatch, Deaf.open(config)) as loop:
        with pytest.raises(SyncError, match="does not have the learner's weights: on the prompt of problem"):
            await run_step(loop, 0, Observer())
        assert loop.run.metrics() == [] and loop.next_step == 0


async def test_an_engine_that_never_had_the_weights_stops_the_run_at_its_start(tmp_path, monkeypatch, config):
    class Deaf(HFEngine):
        async def load_weights(self, checkpoint: Path) -> None: ...

    model, tokenizer = load_model_and_tokenizer(config)
    with torch.no_grad():
        model.get_input_embeddings().weight *= 1.1
    with pytest.raises(SyncError):
        async with loop_with_an_engine_of_its_own(tmp_path, monkeypatch, Deaf(model, tokenizer, config)):
            pass
