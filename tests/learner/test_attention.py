"""Packed rollouts predict what each of them predicts alone."""

import random
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cat_grpo.learner import attention
from cat_grpo.learner.attention import packed
from cat_grpo.learner.batches import TrainingRow, micro_batches

VOCAB = 23
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
GEMMA = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "Qwen 3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "Gemma 3, with windows of 4": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **GEMMA)),
}


def rows(seed: int) -> list[TrainingRow]:
    rng = random.Random(seed)
    prompts = [tuple(rng.choices(range(1, VOCAB), k=k)) for k in (1, 4, 9)]
    made = []
    for prompt, length in product(prompts, (1, 2, 7, 5)):
        completion = tuple(rng.choices(range(1, VOCAB), k=length))
        made.append(TrainingRow(prompt, completion, (0.0,) * length, 1.0, 1.0))
    return made


def built(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("max_tokens", [16, 20, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_a_pack_predicts_what_its_rollouts_predict_alone(name: str, max_tokens: int):
    model = built(name)
    found = []
    with torch.no_grad():
        for pack in micro_batches(rows(seed=0), max_tokens):
            with packed(model):
                hidden = model.get_decoder()(
                    input_ids=pack.input_ids,
                    position_ids=pack.position_ids,
                    layout=pack.layout,
                    use_cache=False,
                ).last_hidden_state
            found += list(model.get_output_embeddings()(hidden[0, pack.predictors]))
        alone = []
        for row in rows(seed=0):
            logits = model(torch.tensor([row.prompt_token_ids + row.token_ids]), use_cache=False).logits[0]
            alone += list(logits[len(row.prompt_token_ids) - 1 : -1])
    assert_close(torch.stack(found), torch.stack(alone), atol=1e-5, rtol=1e-5)


def kernel_by_definition(
    query: Tensor, key: Tensor, value: Tensor, cu_q, cu_k, max_q: int, max_k: int, *, scale, window_size
) -> Tensor:
    """What flash attention computes of sequences of various lengths, the last query beside the last key."""
    outputs = []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        q, k, v = query[q0:q1], key[k0:k1], value[k0:k1]
        assert len(q) <= max_q and len(k) <= max_k
        place = torch.arange(len(q))[:, None] + len(k) - len(q)
        back = place - torch.arange(len(k))
        left, right = window_size
        hidden = (back < -right) | ((back > left) if left >= 0 else torch.zeros_like(back, dtype=torch.bool))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.parametrize("max_tokens", [16, 1000])
@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_of_a_gpu_is_asked_for_the_same(name: str, max_tokens: int, monkeypatch):
    model = built(name)
    for pack in micro_batches(rows(seed=0), max_tokens):
        states = []
        for is_flash in (False, True):
            monkeypatch.setattr(attention, "_has_flash", lambda query, answer=is_flash: answer)
            monkeypatch.setattr(attention, "varlen_attn", kernel_by_definition)
            with torch.no_grad(), packed(model):
                states.append(
                    model.get_decoder()(
                        input_ids=pack.input_ids,
                        position_ids=pack.position_ids,
                        layout=pack.layout,
                        use_cache=False,
                    ).last_hidden_state
                )
        assert_close(states[1], states[0], atol=1e-5, rtol=1e-5)


def test_the_models_own_attention_is_back_afterwards_whatever_happens():
    model = built("Llama")
    usual = model.config._attn_implementation
    with pytest.raises(KeyError), packed(model):
        assert model.config._attn_implementation != usual
        raise KeyError
    assert model.config._attn_implementation == usual
