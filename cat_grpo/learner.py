"""Stage 5: the learner owns the policy's weights and their optimizer, and makes GRPO updates."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cat_grpo.batches import Batch, MicroBatch, TrainingRow, micro_batches
from cat_grpo.config import LearnerConfig
from cat_grpo.grpo import clipped_surrogate, is_clipped, sequence_mean, token_entropy, token_logprobs


class NotFiniteError(ArithmeticError):
    """The loss or the gradient is not finite: the update was not made, the weights are as before it."""


class Learner:
    """Float32 weights and AdamW, whatever the dtype that the model computes in."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: LearnerConfig,
        temperature: float,
        pad_token_id: int,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self._compute_dtype = compute_dtype
        self._config = config
        self._temperature = temperature
        self._pad_token_id = pad_token_id
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def update(self, batch: Batch) -> dict[str, float]:
        """`updates_per_step` optimizer updates on the batch; the metrics are means over them.

        Raises NotFiniteError before an update that would spoil the weights.
        """
        rows = batch.with_signal
        metrics = {"rows": float(len(batch.rows)), "rows_with_signal": float(len(rows))}
        if not rows:
            return metrics
        chunks = list(micro_batches(rows, self._config.micro_batch_tokens, self._pad_token_id))
        old_logprobs = self._old_logprobs(chunks)
        updates = [
            self._update_once(chunks, old_logprobs, batch) for _ in range(self._config.updates_per_step)
        ]
        return metrics | {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}

    def optimizer_state(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)

    def _old_logprobs(self, chunks: Sequence[MicroBatch]) -> Sequence[Tensor | None]:
        """The policy before this step. With one update it is the policy of the forward pass itself."""
        if self._config.updates_per_step == 1:
            return [None] * len(chunks)
        with torch.no_grad():
            return [token_logprobs(*self._predictions(chunk), self._temperature) for chunk in chunks]

    def _update_once(
        self, chunks: Sequence[MicroBatch], old_logprobs: Sequence[Tensor | None], batch: Batch
    ) -> dict[str, float]:
        sums: dict[str, float] = {}
        for chunk, old in zip(chunks, old_logprobs, strict=True):
            loss, chunk_sums = self._loss(chunk, old, num_sequences=len(batch.rows))
            if not math.isfinite(loss.item()):
                self._optimizer.zero_grad()
                raise NotFiniteError(f"the loss is {loss.item()}")
            loss.backward()
            for name, value in (chunk_sums | {"loss": loss.item()}).items():
                sums[name] = sums.get(name, 0.0) + value
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._config.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            self._optimizer.zero_grad()
            raise NotFiniteError(f"the gradient's norm is {grad_norm}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        num_tokens = sums.pop("tokens")
        loss_sum = sums.pop("loss")
        per_token = {name: value / num_tokens for name, value in sums.items()}
        return {"loss": loss_sum, "grad_norm": grad_norm, "tokens": num_tokens, **per_token}

    def _loss(
        self, chunk: MicroBatch, old_logprobs: Tensor | None, num_sequences: int
    ) -> tuple[Tensor, dict[str, float]]:
        """The negated objective of one micro-batch (CaT eq. 6) and sums over its tokens of what to report."""
        logits, token_ids = self._predictions(chunk)
        logprobs = token_logprobs(logits, token_ids, self._temperature)  # (B, T)
        old = logprobs.detach() if old_logprobs is None else old_logprobs
        mask, advantages = chunk.loss_mask.to(logits.device), chunk.advantages.to(logits.device)
        clip = (self._config.clip_low, self._config.clip_high)
        surrogate = clipped_surrogate(logprobs, old, advantages, *clip)
        with torch.no_grad():
            gap = (logprobs - chunk.sampling_logprobs.to(logits.device)).abs()
            sums = {
                "tokens": mask.sum().item(),
                "entropy": token_entropy(logits, self._temperature)[mask].sum().item(),
                "clip_frac": is_clipped(logprobs, old, advantages, *clip)[mask].sum().item(),
                "sampler_gap": gap[mask].sum().item(),
            }
        return -sequence_mean(surrogate, mask, num_sequences), sums

    def _predictions(self, chunk: MicroBatch) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) that predict the completion's tokens, and those tokens (B, T)."""
        device = self.model.device
        input_ids, attention_mask = chunk.input_ids.to(device), chunk.attention_mask.to(device)
        length = chunk.loss_mask.shape[1]
        is_lower = self._compute_dtype != torch.float32
        with torch.autocast(device.type, self._compute_dtype, enabled=is_lower):
            logits = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
                logits_to_keep=length + 1,
                use_cache=False,
            ).logits
        return logits[:, :-1], input_ids[:, -length:]


def set_aside(rows: Sequence[TrainingRow]) -> dict[str, Any]:
    """A batch in plain values, for the file that a stopped run leaves behind."""
    return {
        "rows": [
            {name: getattr(row, name) for name in ("prompt_token_ids", "token_ids", "logprobs", "advantage")}
            for row in rows
        ]
    }
