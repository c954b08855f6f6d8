"""The learner against an implementation that has no padding, no batches and no cleverness."""

import copy
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from cat_grpo.config import LearnerConfig
from cat_grpo.errors import BadInput, Stopped
from cat_grpo.learner.attention import packed
from cat_grpo.learner.batches import Batch, TrainingRow, micro_batches
from cat_grpo.learner.checkpointing import kept_bytes
from cat_grpo.learner.learner import OPTIMIZER, Learner, NotFiniteError, set_aside
from cat_grpo.learner.lm_head import head_bytes, head_loss

VOCAB, TEMPERATURE = 23, 0.7
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
NO_CLIP = 1e9
"""A gradient norm that is never reached."""


def tiny_model() -> LlamaForCausalLM:
    """Random weights, wide enough that predictions differ clearly from uniform ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def learner_of(model: LlamaForCausalLM, **settings) -> Learner:
    settings = {"learning_rate": 1e-3, "max_grad_norm": NO_CLIP, **settings}
    return Learner(model, LearnerConfig(**settings), TEMPERATURE)


def logprobs_of(model: LlamaForCausalLM, row: TrainingRow) -> Tensor:
    """log pi of the row's completion by one forward pass over the row alone, by log_softmax."""
    ids = torch.tensor([row.prompt_token_ids + row.token_ids])
    start, end = len(row.prompt_token_ids), ids.shape[1]
    logits = model(ids, use_cache=False).logits[0, start - 1 : end - 1] / TEMPERATURE
    return logits.log_softmax(-1)[torch.arange(end - start), ids[0, start:]]


def batch_of(model: LlamaForCausalLM, advantages: Sequence[float], seed: int = 0) -> Batch:
    """A row of random tokens and lengths per advantage, with the model's own logprobs."""
    rng = random.Random(seed)
    rows = []
    for advantage in advantages:
        prompt = tuple(rng.choices(range(1, VOCAB), k=rng.randint(1, 9)))
        completion = tuple(rng.choices(range(1, VOCAB), k=rng.randint(1, 7)))
        weight = 1 / len(completion) / len(advantages)  # GRPO's
        row = TrainingRow(prompt, completion, (0.0,) * len(completion), advantage, weight)
        with torch.no_grad():
            rows.append(replace(row, logprobs=tuple(logprobs_of(model, row).tolist())))
    return Batch(tuple(rows))


def shared_prompts(batch: Batch) -> Batch:
    """The same completions in groups of three behind one prompt."""
    rows = batch.rows
    return Batch(
        tuple(replace(r, prompt_token_ids=rows[i // 3].prompt_token_ids) for i, r in enumerate(rows))
    )


def off_policy(batch: Batch) -> Batch:
    """The same rows, their sampler half a nat off in every token."""
    return Batch(tuple(replace(r, logprobs=tuple(p + 0.5 for p in r.logprobs)) for r in batch.rows))


@pytest.fixture
def gradients() -> Iterator[list[list[Tensor]]]:
    """The gradients that optimizers were given while the test ran, one list of tensors per update."""
    seen: list[list[Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_) -> None:
        seen.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(keep)
    yield seen
    handle.remove()


def weights_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def state_of(learner: Learner) -> dict:
    """The optimizer's, as a checkpoint has it."""
    with tempfile.TemporaryDirectory() as folder:
        learner.save(Path(folder))
        return torch.load(Path(folder) / OPTIMIZER)


def assert_same_bits(model: LlamaForCausalLM, weights: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_close(tensor, weights[name], rtol=0, atol=0, equal_nan=True, msg=name)


ADVANTAGES = (1.5, -0.5, 0.0, -0.5, -0.5, 0.7, 0.0, -0.7, 0.3)


def test_the_gradient_is_that_of_a_plain_loop(gradients):
    """On policy nothing is clipped: the sum over rows of -A / (rows * tokens) * d log pi, row by row."""
    model = tiny_model()
    plain = copy.deepcopy(model)
    batch = batch_of(model, ADVANTAGES)
    for row in batch.rows:
        (-row.advantage * logprobs_of(plain, row).mean() / len(batch.rows)).backward()
    learner_of(model, micro_batch_tokens=64).update(batch)
    assert len(gradients) == 1
    expected = [p.grad for p in plain.parameters()]
    assert_close(gradients[0], expected, atol=1e-6, rtol=0)
    assert max(g.abs().max().item() for g in gradients[0]) > 1e-2  # so 1e-6 is four digits at least


def test_the_gradient_does_not_depend_on_the_micro_batches(gradients):
    numbers = []
    for micro_batch_tokens in (64, 100, 16384):
        model = tiny_model()
        batch = batch_of(model, ADVANTAGES * 3)
        numbers.append(len(list(micro_batches(batch.with_signal, micro_batch_tokens))))
        learner_of(model, micro_batch_tokens=micro_batch_tokens).update(batch)
    assert numbers[0] > numbers[1] > numbers[2] == 1
    for other in gradients[1:]:
        assert_close(other, gradients[0], atol=1e-6, rtol=0)


def test_in_double_precision_the_gradient_is_the_plain_one_to_ten_digits(gradients):
    # GPT-2, because the norms of later models compute in float32 whatever they are given.
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
    )
    model = GPT2LMHeadModel(config).eval().double()
    plain = copy.deepcopy(model)
    batch = shared_prompts(batch_of(model, ADVANTAGES * 4))
    assert len(list(micro_batches(batch.with_signal, 64))) > 1
    for row in batch.rows:
        (-row.weight * row.advantage * logprobs_of(plain, row).sum()).backward()
    learner_of(model, micro_batch_tokens=64).update(batch)
    expected = [p.grad for p in plain.parameters()]
    assert_close(gradients[0], expected, atol=1e-10, rtol=0)
    assert max(g.abs().max().item() for g in gradients[0]) > 1e-2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: MambaForCausalLM(MambaConfig(**SIZES)),
            "of type mamba: its logprobs are .* off when packed",
        ),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)), "caps its logits"),
        (
            lambda: CohereForCausalLM(CohereConfig(**SIZES, num_attention_heads=4, eos_token_id=1)),
            "of type cohere: .* off when packed",
        ),
    ],
)
def test_a_model_that_predicts_otherwise_in_a_pack_is_refused(model, message: str):
    torch.manual_seed(0)
    with pytest.raises(BadInput, match=message):
        learner_of(model().eval())


def test_rows_without_signal_are_left_out(gradients):
    model = tiny_model()
    batch, idle = batch_of(model, [1.0, -1.0]), batch_of(model, [0.0, 0.0], seed=1)
    for rows in (batch.rows, (*idle.rows, *batch.rows)):
        metrics = learner_of(copy.deepcopy(model)).update(Batch(rows))
        assert metrics["tokens"] == sum(len(row.token_ids) for row in batch.rows)
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_one_update_raises_what_was_good_and_lowers_what_was_bad():
    model = tiny_model()
    batch = batch_of(model, [1.0, -1.0, 1.0, -1.0])
    before = [logprobs_of(model, row).sum().item() for row in batch.rows]
    learner_of(model, learning_rate=1e-4).update(batch)
    after = [logprobs_of(model, row).sum().item() for row in batch.rows]
    assert [b > a for a, b in zip(before, after, strict=True)] == [True, False, True, False]


def test_without_signal_nothing_moves_at_all():
    advantages = [0.0, 0.0, 0.0]
    model = tiny_model()
    learner = learner_of(model, weight_decay=0.1)
    learner.update(batch_of(model, [1.0, -1.0]))  # AdamW has momentum from now on
    weights, state = weights_of(model), state_of(learner)
    metrics = learner.update(batch_of(model, advantages))
    assert metrics == {"rows": len(advantages), "rows_with_signal": 0.0}
    assert_same_bits(model, weights)
    assert_close(state_of(learner)["state"], state["state"], rtol=0, atol=0)


def test_a_second_update_is_clipped_against_the_policy_before_the_first(gradients):
    """The same two updates by hand: the ratio of the second is to the logprobs before the first."""
    model = tiny_model()
    plain, batch = copy.deepcopy(model), off_policy(batch_of(model, [1.5, -0.5, 0.7, -0.7] * 5))
    low, high, learning_rate = 0.1, 0.3, 3e-3
    settings = {"clip_low": low, "clip_high": high, "learning_rate": learning_rate}
    metrics = learner_of(model, updates_per_step=2, micro_batch_tokens=64, **settings).update(batch)

    old = [logprobs_of(plain, row).detach() for row in batch.rows]
    optimizer = torch.optim.AdamW(plain.parameters(), lr=learning_rate, weight_decay=0.0)
    clipped, losses, num_tokens = 0, [], sum(len(row.token_ids) for row in batch.rows)
    for _ in range(2):
        losses.append(0.0)
        for row, before in zip(batch.rows, old, strict=True):
            surrogates = []
            for ratio in (logprobs_of(plain, row) - before).exp():
                gain, limited = ratio * row.advantage, ratio.clamp(1 - low, 1 + high) * row.advantage
                clipped += bool(limited < gain)
                surrogates.append(limited if limited < gain else gain)
            loss = -sum(surrogates, torch.zeros(())) / len(surrogates) / len(batch.rows)
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()

    ours, by_hand = gradients[:2], gradients[2:]
    assert_close(ours[0], by_hand[0], atol=1e-6, rtol=0)
    assert_close(ours[1], by_hand[1], atol=1e-5, rtol=0)  # AdamW has made more of the first one's rounding
    assert clipped > 0.1 * num_tokens
    assert metrics["clip_frac"] == pytest.approx(clipped / 2 / num_tokens)
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, abs=1e-6)
    assert losses[1] < -0.01  # the second update sees what the first has gained


def plain_objective(logprobs: Tensor, old: Tensor, row: TrainingRow, settings: dict) -> Tensor:
    """What a row adds to the objective, written down from the papers."""
    ratio = (logprobs - old).exp()
    if settings.get("ratio") == "sequence":
        ratio = (logprobs - old).mean().exp().expand(len(old))
    if settings.get("surrogate") == "cispo":
        gains = ratio.detach().clamp(max=1.3) * row.advantage * logprobs
    else:
        gains = torch.minimum(ratio * row.advantage, ratio.clamp(0.9, 1.3) * row.advantage)
    engine = (old - torch.tensor(row.logprobs)).detach()
    if settings.get("importance") == "token":
        gains = engine.exp().clamp(max=0.7) * gains
    if settings.get("importance") == "sequence":
        gains = engine.sum().exp().clamp(max=0.7) * gains
    if settings.get("kl_in") == "loss":
        gap = torch.tensor(row.anchor_logprobs) - logprobs
        gains = gains - 0.2 * (gap.exp() - 1 - gap if settings["kl_estimator"] == "k3" else gap.square() / 2)
    return row.weight * gains.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ratio": "sequence"},
        {"surrogate": "cispo"},
        {"importance": "token"},
        {"importance": "sequence"},
        {"kl_in": "loss", "kl_estimator": "k3"},
        {"kl_in": "loss", "kl_estimator": "k2", "ratio": "sequence", "importance": "token"},
    ],
    ids=lambda settings: ", ".join(settings.values()) or "GRPO",
)
def test_every_objective_is_that_of_a_plain_loop_over_two_updates(settings: dict, gradients):
    model = tiny_model()
    plain, rows = copy.deepcopy(model), off_policy(batch_of(model, [1.5, -0.5, 0.7, -0.7] * 3)).rows
    if "kl_in" in settings:
        rows = tuple(replace(r, anchor_logprobs=tuple(x - 0.3 for x in r.logprobs)) for r in rows)
    fixed = {"clip_low": 0.1, "clip_high": 0.3, "importance_cap": 0.7, "kl_coef": 0.2}
    learner_of(model, updates_per_step=2, micro_batch_tokens=64, **fixed, **settings).update(Batch(rows))

    old = [logprobs_of(plain, row).detach() for row in rows]
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        for row, before in zip(rows, old, strict=True):
            (-plain_objective(logprobs_of(plain, row), before, row, settings)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(gradients[0], gradients[2], atol=1e-6, rtol=0)
    assert_close(gradients[1], gradients[3], atol=1e-5, rtol=0)


def test_with_one_update_the_policy_is_its_own_past():
    model = tiny_model()
    batch = off_policy(batch_of(model, [1.0, -1.0]))
    metrics = learner_of(model).update(batch)  # the sampler's logprobs are compared and not trained on
    assert metrics["clip_frac"] == 0.0
    assert metrics["loss"] == pytest.approx(0.0, abs=1e-7)  # -(1 - 1) / 2


@pytest.mark.parametrize(
    ("advantage", "breaks_gradient", "message"),
    [
        (math.nan, False, "the loss is nan"),
        (math.inf, False, "the loss is (nan|-?inf)"),
        (3e38, False, "the gradient's norm is inf"),  # the loss fits into float32, the norm's squares do not
        (1.0, True, "the gradient's norm is nan"),
    ],
)
def test_what_is_not_finite_stops_before_the_step_and_leaves_no_trace(
    advantage, breaks_gradient, message, tmp_path
):
    model = tiny_model()
    batch = batch_of(model, ADVANTAGES * 3)
    learner = learner_of(model, micro_batch_tokens=64)
    learner.update(batch)
    undisturbed = copy.deepcopy(model)
    other = learner_of(undisturbed, micro_batch_tokens=64)
    learner.save(tmp_path)
    other.restore(tmp_path)
    weights, state = weights_of(model), state_of(learner)

    poison = TrainingRow((1,), (2,), (0.0,), advantage, 0.1)  # the shortest: in a micro-batch after good ones
    hook = model.lm_head.weight.register_hook(lambda grad: grad * math.nan if breaks_gradient else grad)
    with pytest.raises(NotFiniteError, match=message):
        learner.update(Batch((*batch.rows, poison)))
    hook.remove()
    assert_same_bits(model, weights)
    assert_close(state_of(learner)["state"], state["state"], rtol=0, atol=0)

    # Nor is a part of its gradient left for the next update.
    assert learner.update(batch) == other.update(batch)
    assert_same_bits(model, weights_of(undisturbed))


def test_a_broken_weight_stops_the_update():
    model = tiny_model()
    batch, learner = batch_of(model, [1.0, -1.0]), learner_of(model)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    weights = weights_of(model)
    with pytest.raises(NotFiniteError, match="the loss is nan") as error:
        learner.update(batch)
    assert isinstance(error.value, Stopped)  # no bug: the command ends in one line
    assert_same_bits(model, weights)
    assert state_of(learner)["state"] == {}


def test_the_gradient_is_scaled_down_to_the_norm_and_never_up(gradients):
    model = tiny_model()
    batch = batch_of(model, ADVANTAGES)
    norms = [
        learner_of(copy.deepcopy(model), max_grad_norm=max_norm).update(batch)["grad_norm"]
        for max_norm in (NO_CLIP, 0.01)
    ]

    def norm(gradient: list[Tensor]) -> float:
        return math.sqrt(sum(part.double().square().sum().item() for part in gradient))

    assert norms == pytest.approx([norm(gradients[0])] * 2)  # as it was before the clip
    assert norm(gradients[1]) == pytest.approx(0.01, rel=1e-3)
    shrunk = [part * (0.01 / norm(gradients[0])) for part in gradients[0]]
    assert_close(gradients[1], shrunk, atol=1e-7, rtol=1e-3)


def test_metrics_have_these_names_and_no_others():
    model = tiny_model()
    batch = batch_of(model, [1.0, -1.0, 0.0])
    metrics = learner_of(model).update(batch)
    names = {"loss", "grad_norm", "tokens", "entropy", "clip_frac", "sampler_gap"}
    assert set(metrics) == {"rows", "rows_with_signal", *names}
    assert all(type(value) is float for value in metrics.values())
    assert (metrics["rows"], metrics["rows_with_signal"]) == (3, 2)
    assert metrics["tokens"] == sum(len(row.token_ids) for row in batch.with_signal)


def test_entropy_is_the_mean_over_the_trained_tokens():
    model = tiny_model()
    batch = batch_of(model, [1.0, -1.0, 0.5, -0.5])
    entropies = []
    for row in batch.rows:
        ids = torch.tensor([row.prompt_token_ids + row.token_ids])
        logits = model(ids, use_cache=False).logits[0, len(row.prompt_token_ids) - 1 : -1] / TEMPERATURE
        entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    metrics = learner_of(model, micro_batch_tokens=64).update(batch)
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


@pytest.mark.parametrize("updates", [1, 3])
def test_the_sampler_gap_is_how_far_the_engine_is_from_the_learner_before_the_step(updates: int):
    model = tiny_model()
    batch = batch_of(model, [1.0, -1.0])
    both = (batch, off_policy(batch))
    gaps = [learner_of(copy.deepcopy(model), updates_per_step=updates).update(b)["sampler_gap"] for b in both]
    assert gaps == pytest.approx([0.0, 0.5], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_computed_in_the_dtype_of_the_rest(dtype: torch.dtype, monkeypatch):
    """Autocast gives a norm's output back in float32, and the largest product of all would be slow."""
    seen = []

    def head(hidden: Tensor, *arguments, **settings) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(hidden.dtype)
        return head_loss(hidden, *arguments, **settings)

    model = tiny_model()
    learner = Learner(model, LearnerConfig(), TEMPERATURE, dtype)
    plain = learner_of(copy.deepcopy(model))
    batch = batch_of(model, ADVANTAGES)
    expected = plain.update(batch)["entropy"]
    monkeypatch.setattr("cat_grpo.learner.learner.head_loss", head)
    assert learner.update(batch)["entropy"] == pytest.approx(expected, rel=2e-2)
    assert seen == [dtype]
    assert all(weight.grad is None and weight.dtype == torch.float32 for weight in model.parameters())


def test_what_is_saved_is_resumed_in_another_learner_as_if_nothing_had_been(tmp_path):
    model, other_model = tiny_model(), tiny_model()
    first, second = learner_of(model), learner_of(other_model)
    batch = batch_of(model, [1.0, -1.0])
    first.update(batch)
    first.save(tmp_path)
    second.restore(tmp_path)
    for learner in (first, second):
        learner.update(batch)
    assert_same_bits(other_model, weights_of(model))


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ((), ValueError, "a batch of 0 rollouts"),
        (
            (TrainingRow((1,), (2,) * 80, (0.0,) * 80, 1.0, 0.1),),
            BadInput,
            "64 is too small for a rollout of 1 \\+ 80 tokens",
        ),
        (
            (TrainingRow((1,), (VOCAB,), (0.0,), 1.0, 0.1),),
            BadInput,
            f"token {VOCAB} .* vocabulary has {VOCAB}",
        ),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_named_with_its_sizes(
    rows: tuple[TrainingRow, ...], kind: type, message: str
):
    model = tiny_model()
    weights = weights_of(model)
    with pytest.raises(kind, match=message):
        learner_of(model, micro_batch_tokens=64).update(Batch(rows))
    assert_same_bits(model, weights)


def passes(model: LlamaForCausalLM, learner: Learner, batch: Batch) -> int:
    """How often an update computes the first layer: twice where it keeps the layer's input alone."""
    calls = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    learner.update(batch)
    handle.remove()
    return len(calls)


def test_gradient_checkpointing_computes_again_and_changes_nothing(gradients):
    batch = batch_of(tiny_model(), ADVANTAGES)
    for setting, expected in (("off", 1), ("on", 2)):
        model = tiny_model()
        assert passes(model, learner_of(model, gradient_checkpointing=setting), batch) == expected
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_after_an_update_with_gradient_checkpointing_the_model_samples_as_before():
    """transformers' own switch, left on, would take an engine that shares the model its cache."""
    model = tiny_model()
    learner = learner_of(model, gradient_checkpointing="on", learning_rate=1e-12)
    prompt = torch.tensor([[1, 5, 7, 2]])
    before = model.generate(prompt, max_new_tokens=12, do_sample=False)
    learner.update(batch_of(model, ADVANTAGES))
    assert model.generate(prompt, max_new_tokens=12, do_sample=False).equal(before)
    assert not any(module.training for module in model.modules())  # dropout would come on with it


@pytest.mark.parametrize(("spare", "is_on"), [(1.5, False), (0.5, True)])
def test_gradient_checkpointing_comes_on_when_a_micro_batch_does_not_fit(spare, is_on, monkeypatch):
    """Measured on a pack as large as a micro-batch may be, not on the small ones of the estimate."""
    model = tiny_model()
    rows = [TrainingRow((1,) * 24, (1,) * 29, (0.0,) * 29, 1.0, 0.1)] * 8
    (chunk,) = micro_batches(rows, 256)

    def forward() -> Tensor:
        """The states that the head is given."""
        ids, places = chunk.input_ids, chunk.position_ids
        states = model.model(input_ids=ids, position_ids=places, layout=chunk.layout, use_cache=False)
        return states.last_hidden_state[0, chunk.predictors]

    with packed(model):
        activations = kept_bytes(model, forward)
    trained = sum(weight.numel() for weight in model.parameters())
    needed = activations + head_bytes(model.lm_head.weight) + 12 * trained
    monkeypatch.setattr("cat_grpo.learner.learner.free_bytes", lambda device: spare * needed)
    learner = learner_of(model, micro_batch_tokens=256)
    assert passes(model, learner, Batch(tuple(rows))) == (2 if is_on else 1)


def test_a_batch_set_aside_is_plain_values():
    row = TrainingRow((1, 2), (3,), (-0.5,), 1.5, 0.25, (-0.7,))
    fields = {"prompt_token_ids": (1, 2), "token_ids": (3,), "logprobs": (-0.5,), "advantage": 1.5}
    assert set_aside([row]) == {"rows": [{**fields, "weight": 0.25, "anchor_logprobs": (-0.7,)}]}
