"""Stage 5: the learner owns the policy's weights and their optimizer, and makes GRPO updates."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cat_grpo.config import LearnerConfig
from cat_grpo.errors import BadInput, Stopped
from cat_grpo.learner import grpo
from cat_grpo.learner.attention import packed
from cat_grpo.learner.batches import KL_ESTIMATORS, Batch, MicroBatch, TrainingRow, micro_batches
from cat_grpo.learner.checkpointing import OPTIMIZER_BYTES, free_bytes, kept_bytes, layer_inputs_only
from cat_grpo.learner.lm_head import head_bytes, head_logprobs, head_loss
from cat_grpo.learner.lora import ADAPTER_WEIGHTS, load_adapters

OPTIMIZER = "optimizer.pt"
"""The file in a checkpoint that holds the optimizer's state."""
RATIOS = {"token": grpo.token_ratio, "sequence": grpo.sequence_ratio}
SURROGATES = {"clipped": grpo.clipped_surrogate, "cispo": grpo.cispo_surrogate}
IS_CLIPPED = {"clipped": grpo.is_clipped, "cispo": grpo.is_capped}
IMPORTANCE = {
    "none": grpo.no_importance,
    "token": grpo.token_importance,
    "sequence": grpo.sequence_importance,
}

PACKING_TOLERANCE, HALF_PACKING_TOLERANCE = 1e-2, 0.25
"""In nats: above the rounding of float32 and of bfloat16, below the gap from another attention or head."""


class NotFiniteError(Stopped):
    """The loss or the gradient is not finite. The update was not made, so the weights have not changed."""


class Learner:
    """Trains a model's unfrozen weights with AdamW, in float32 whatever dtype the model computes in."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: LearnerConfig,
        temperature: float,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """BadInput for a model that cannot be trained in packs."""
        self.model: Any = model  # transformers' types know neither decoder nor head
        self._compute_dtype = compute_dtype
        self._config = config
        self._temperature = temperature
        self._check_packing()
        wanted = config.gradient_checkpointing
        self._layer_inputs_only = wanted == "on" or (wanted == "auto" and not self._fits())
        self._prepare()
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )

    def update(self, batch: Batch) -> dict[str, float]:
        """Makes `updates_per_step` optimizer updates on the batch. The metrics are means over them.

        Raises NotFiniteError before an update that would spoil the weights, ValueError for a batch without
        rows, and BadInput for a row that fits into no micro-batch or has tokens that the model lacks.
        """
        if not batch.rows:
            raise ValueError("a batch of 0 rollouts")
        self._check_vocabulary(batch.rows)
        rows = batch.with_signal
        metrics = {"rows": float(len(batch.rows)), "rows_with_signal": float(len(rows))}
        if not rows:
            return metrics
        chunks = [chunk.to(self.model.device) for chunk in self._chunks(rows)]
        # The first forward pass computes the policy before the step, so that policy needs no extra pass.
        old_logprobs: list[Tensor | None] = [None] * len(chunks)
        updates = []
        memory = layer_inputs_only(self.model) if self._layer_inputs_only else nullcontext()
        with packed(self.model), memory:
            for _ in range(self._config.updates_per_step):
                update, logprobs = self._update_once(chunks, old_logprobs)
                old_logprobs = [
                    new if old is None else old for old, new in zip(old_logprobs, logprobs, strict=True)
                ]
                updates.append(update)
        return metrics | {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}

    def save(self, folder: Path) -> None:
        """Writes what is trained, for `from_pretrained`, and the optimizer's state."""
        self.model.save_pretrained(folder)
        torch.save(self._optimizer.state_dict(), folder / OPTIMIZER)

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote there, bit for bit."""
        if (folder / ADAPTER_WEIGHTS).exists():
            load_adapters(self.model, folder)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=self.model.dtype)
            self.model.load_state_dict(loaded.state_dict())
        self._optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location=self.model.device))

    def close(self) -> None:
        """Does nothing here. A learner on many ranks ends them."""

    def _prepare(self) -> None:
        """Prepares the model before the optimizer takes its weights. Does nothing here."""

    def _chunks(self, rows: Sequence[TrainingRow]) -> list[MicroBatch]:
        return list(micro_batches(rows, self._config.micro_batch_tokens))

    def _total(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the sums over all ranks. Here there is only one."""
        return sums

    def _update_once(
        self, chunks: Sequence[MicroBatch], old_logprobs: Sequence[Tensor | None]
    ) -> tuple[dict[str, float], list[Tensor]]:
        """Makes one optimizer update. Returns its metrics, and each chunk's logprobs before it."""
        sums: dict[str, Tensor] = {}
        seen = []
        for chunk, old in zip(chunks, old_logprobs, strict=True):
            loss, logprobs, entropy = self._loss(chunk, old)
            loss.backward()
            seen.append(logprobs)
            parts = {"loss": loss.detach(), **self._sums(chunk, logprobs, old, entropy)}
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value * (not chunk.is_idle)
        grad_norm = torch.nn.utils.clip_grad_norm_(self._weights, self._config.max_grad_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        sums = self._total(sums) | {"grad_norm": grad_norm}
        figures = {name: value.item() for name, value in sums.items()}
        for name, what in (("loss", "the loss"), ("grad_norm", "the gradient's norm")):
            if not math.isfinite(figures[name]):
                self._optimizer.zero_grad()
                raise NotFiniteError(f"{what} is {figures[name]}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        of_step = {"loss", "grad_norm", "tokens"}
        return {
            name: value if name in of_step else value / figures["tokens"] for name, value in figures.items()
        }, seen

    def _loss(self, chunk: MicroBatch, old_logprobs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk's part of the loss, and the logprob and the entropy of each of its tokens."""
        return head_loss(
            self._hidden(chunk),
            self._head,
            chunk.token_ids,
            partial(self._objective, chunk, old_logprobs),
            self._temperature,
            separable="sequence" not in (self._config.ratio, self._config.importance),
        )

    @property
    def _head(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    def _hidden(self, chunk: MicroBatch) -> Tensor:
        """The states that predict the chunk's tokens: (N, H)."""
        with self._autocast():
            output = self.model.get_decoder()(
                input_ids=chunk.input_ids,
                position_ids=chunk.position_ids,
                layout=chunk.layout,
                use_cache=False,
            )
        hidden = output.last_hidden_state[0, chunk.predictors]
        # The last norm returns float32 if its weights are float32. The head would then compute in float32.
        return hidden.to(self._compute_dtype) if self._is_half else hidden

    @property
    def _is_half(self) -> bool:
        return self._compute_dtype != torch.float32

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, self._compute_dtype, enabled=self._is_half)

    def _example(self, prompt: Sequence[int], *completions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Packs completions of one prompt. Returns the states of `_hidden` and the tokens they predict."""
        rows = [TrainingRow(tuple(prompt), tuple(ids), (0.0,) * len(ids), 1.0, 1.0) for ids in completions]
        (chunk,) = micro_batches(rows, sum(map(len, completions)) + len(prompt))
        chunk = chunk.to(self.model.device)
        with packed(self.model):
            return self._hidden(chunk), chunk.token_ids

    def _fits(self) -> bool:
        """Whether what a micro-batch keeps for its backward pass fits beside gradients and optimizer."""
        group = {
            n: partial(self._example, [1] * n, *[[1] * n] * 8) for n in (4, 20)
        }  # prompts as long as rollouts
        few, many = (kept_bytes(self.model, forward) for forward in group.values())
        per_token = (many - few) / (9 * (20 - 4))
        activations = few + per_token * self._config.micro_batch_tokens
        trained = [weight.numel() for weight in self.model.parameters() if weight.requires_grad]
        optimizer = OPTIMIZER_BYTES * sum(trained) / self._config.num_ranks
        return activations + head_bytes(self._head) + optimizer < free_bytes(self.model.device)

    def _check_vocabulary(self, rows: Sequence[TrainingRow]) -> None:
        largest = max(max(row.prompt_token_ids + row.token_ids) for row in rows)
        if largest >= (size := self.model.get_input_embeddings().weight.shape[0]):
            raise BadInput(f"token {largest} from the engine is unknown: the learner's vocabulary has {size}")

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Raises BadInput for a model that predicts differently in a pack, for example because it has
        recurrent layers, or a bias or a scale after its head."""
        prompt, completions = (1, 2, 3), ((1, 4, 5), (2, 4, 5))
        hidden, token_ids = self._example(prompt, *completions)
        ours = head_logprobs(hidden, self._head, token_ids)
        ids = torch.tensor([prompt + completion for completion in completions], device=self.model.device)
        with self._autocast():
            logits = self.model(ids, use_cache=False).logits[:, 2:-1]
        gap = (ours - grpo.token_logprobs(logits, ids[:, 3:]).flatten()).abs().max().item()
        if not gap < (HALF_PACKING_TOLERANCE if self._is_half else PACKING_TOLERANCE):
            kind = self.model.config.model_type
            raise BadInput(
                f"model of type {kind}: its logprobs are {gap:.2g} off when packed, so it cannot be trained"
            )

    def _objective(
        self, chunk: MicroBatch, old_logprobs: Tensor | None, logprobs: Tensor, at: slice
    ) -> Tensor:
        """The part of the loss that comes from the chunk's tokens `at`."""
        config = self._config
        old = logprobs.detach() if old_logprobs is None else old_logprobs[at]
        advantages, weights, sampling, anchor = (
            values[at].to(logprobs.dtype)
            for values in (chunk.advantages, chunk.weights, chunk.sampling_logprobs, chunk.anchor_logprobs)
        )
        return grpo.policy_loss(
            logprobs,
            old,
            advantages,
            weights,
            row := chunk.row[at],
            ratio=RATIOS[config.ratio],
            surrogate=SURROGATES[config.surrogate],
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            importance=IMPORTANCE[config.importance](old, sampling, row, config.importance_cap),
            kl=config.kl_coef * KL_ESTIMATORS[config.kl_estimator](logprobs, anchor) if len(anchor) else 0.0,
        )

    def _sums(
        self, chunk: MicroBatch, logprobs: Tensor, old_logprobs: Tensor | None, entropy: Tensor
    ) -> dict[str, Tensor]:
        """The figures to report, summed over the chunk's tokens."""
        old = logprobs if old_logprobs is None else old_logprobs
        ratio = RATIOS[self._config.ratio](logprobs, old, chunk.row)
        is_clipped = IS_CLIPPED[self._config.surrogate]
        clipped = is_clipped(ratio, chunk.advantages, self._config.clip_low, self._config.clip_high)
        kl = {}
        if len(chunk.anchor_logprobs):
            kl["kl"] = KL_ESTIMATORS[self._config.kl_estimator](logprobs, chunk.anchor_logprobs).sum()
        return kl | {
            "tokens": torch.tensor(len(chunk.token_ids), device=logprobs.device),
            "entropy": entropy.sum(),
            "clip_frac": clipped.sum(),
            "sampler_gap": (old - chunk.sampling_logprobs).abs().sum(),
        }


def set_aside(rows: Sequence[TrainingRow]) -> dict[str, Any]:
    """Returns the rows as plain values, for the file that a stopped run leaves behind."""
    return {"rows": [asdict(row) for row in rows]}
