"""Our losses against those of TRL, on random inputs, with the gradient of every logprob."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cat_grpo.learner import grpo

B, T, LOW, HIGH, BETA, CAP = 6, 9, 0.2, 0.3, 0.04, 1.5


def inputs(seed: int) -> dict[str, Tensor]:
    """Sequences of different lengths; a past policy, an engine and an anchor that differ from the policy."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, T + 1, (B,), generator=generator)
    logprobs = -3 * random(B, T)
    return {
        "mask": (torch.arange(T) < lengths[:, None]).double(),
        "logprobs": logprobs,
        "old_logprobs": logprobs + random(B, T) - 0.5,
        "sampling_logprobs": logprobs + random(B, T) - 0.5,
        "anchor_logprobs": logprobs + random(B, T) - 0.5,
        "advantages": 2 * random(B) - 1,
    }


def loss_of_trl(
    given: dict[str, Tensor], loss_type: str, level: str, beta: float, use_vllm: bool
) -> list[Tensor]:
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is of the extra dev")
    logprobs = given["logprobs"].clone().requires_grad_()
    trainer = SimpleNamespace(
        **{"loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "use_vllm": use_vllm},
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        epsilon_low=LOW,
        epsilon_high=1 + HIGH if loss_type == "cispo" else HIGH,  # of CISPO it is the bound itself
        max_completion_length=T,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        vllm_importance_sampling_correction=use_vllm,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    batch: dict[str, Any] = {
        **dict.fromkeys(("prompt_ids", "prompt_mask"), torch.ones(B, 1).long()),
        "completion_ids": torch.ones(B, T).long(),
        "completion_mask": given["mask"],
        "advantages": given["advantages"],
        "old_per_token_logps": given["old_logprobs"],
        "ref_per_token_logps": given["anchor_logprobs"],
        "importance_sampling_ratio": (given["old_logprobs"] - given["sampling_logprobs"])
        .exp()
        .clamp(max=CAP),
        "num_items_in_batch": given["mask"].sum(),
    }
    loss = trainer_module.GRPOTrainer._compute_loss(trainer, None, batch)
    loss.backward()
    return [loss.detach(), logprobs.grad]


def our_loss(
    given: dict[str, Tensor], weights, ratio, surrogate, beta: float, use_vllm: bool
) -> list[Tensor]:
    logprobs = given["logprobs"].clone().requires_grad_()
    is_token = given["mask"].bool()
    lengths = is_token.sum(dim=1)
    row = torch.arange(B).repeat_interleave(lengths)
    ours, old, sampling, anchor = (
        values[is_token]
        for values in (
            logprobs,
            given["old_logprobs"],
            given["sampling_logprobs"],
            given["anchor_logprobs"],
        )
    )
    loss = grpo.policy_loss(
        ours,
        old,
        given["advantages"][row],
        weights(lengths)[row],
        row,
        ratio=ratio,
        surrogate=surrogate,
        clip_low=LOW,
        clip_high=HIGH,
        importance=grpo.token_importance(old, sampling, row, CAP) if use_vllm else 1.0,
        kl=beta * grpo.k3_kl(ours, anchor),
    )
    loss.backward()
    return [loss.detach(), logprobs.grad]


def per_sequence(lengths: Tensor) -> Tensor:
    return grpo.sequence_mean_weights(lengths, B)


def per_token(lengths: Tensor) -> Tensor:
    return grpo.token_mean_weights(lengths, int(lengths.sum()))


def constant(lengths: Tensor) -> Tensor:
    return grpo.constant_weights(lengths, B, T)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("use_vllm", [False, True])
@pytest.mark.parametrize(
    ("loss_type", "level", "weights", "ratio", "surrogate"),
    [
        pytest.param("grpo", "token", per_sequence, grpo.token_ratio, grpo.clipped_surrogate, id="GRPO"),
        pytest.param("dapo", "token", per_token, grpo.token_ratio, grpo.clipped_surrogate, id="DAPO"),
        pytest.param("dr_grpo", "token", constant, grpo.token_ratio, grpo.clipped_surrogate, id="Dr. GRPO"),
        pytest.param(
            "grpo", "sequence", per_sequence, grpo.sequence_ratio, grpo.clipped_surrogate, id="GSPO"
        ),
        pytest.param("cispo", "token", per_token, grpo.token_ratio, grpo.cispo_surrogate, id="CISPO"),
    ],
)
def test_the_loss_and_its_gradient_are_those_of_trl(
    loss_type, level, weights, ratio, surrogate, beta, use_vllm, seed
):
    given = inputs(seed)
    theirs = loss_of_trl(given, loss_type, level, beta, use_vllm)
    ours = our_loss(given, weights, ratio, surrogate, beta, use_vllm)
    assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert theirs[1].abs().max() > 1e-3
