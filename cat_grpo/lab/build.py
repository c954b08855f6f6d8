"""Builds the lab: tokenizer, base model, problem files. A build is seeded, and resumes to the same weights.

Every step's data are a function of (seed, step, job), so a build that was stopped resumes from its last
checkpoint as if it had never stopped.
"""

import json
import logging
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cat_grpo.files import whole, write_whole
from cat_grpo.lab import corpus, problems
from cat_grpo.lab.tokenizer import END, PAD, train_tokenizer
from cat_grpo.method.prompts import template_hashes
from cat_grpo.models import CARD

log = logging.getLogger(__name__)

STEPS = 1400
FIRST_STEPS = 300
"""Steps on few jobs, until the model begins to judge. Among all jobs a verdict's one token would be lost."""
WARM_UP = 20
FULL_REACH = 100
"""The step from which texts have their full length."""
MUON_LR = 0.02
ADAM_LR = 3e-3
WEIGHTS = {"judge_label": 4.0, "judge_xml": 2.0, "quote": 2.0}
"""The weight of a job's loss, if not 1. A verdict is one token among many, so it would be learned late."""
PROMPT_WEIGHT = 0.2
"""The weight of the prompts' tokens while texts are short. Rollouts that repeat each other teach copying."""
SAVE_EVERY = 100
HOW_ASKED = {
    "prompts": corpus.PROMPT_SET,
    "rollout": {"max_tokens": 64},
    "reference": {"max_tokens": 64},
    "reward": {"equivalence": "string", "min_criteria": 2, "rubric_max_tokens": 96},
}
"""The settings that the model was made for; its card carries them."""
VOCAB_SIZE = 1600
"""An upper bound: training ends earlier, once every piece of the corpus is one token."""
TRAIN_PROBLEMS = 1024
HELD_OUT_PROBLEMS = 200


def build_lab(out: Path, seed: int = 0, steps: int = STEPS) -> Path:
    """Writes everything that `data/lab` holds to `out`. Returns the folder of the model."""
    out.mkdir(parents=True, exist_ok=True)
    write_problem_files(out)
    tokenizer = train_tokenizer(_tokenizer_texts(seed), VOCAB_SIZE)
    model = train_base(tokenizer, seed, steps, out / "building.pt")
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    card = {
        "prompt_hashes": template_hashes(corpus.PROMPT_SET, corpus.TEMPLATES),
        "config": HOW_ASKED,
        "seed": seed,
        "step": steps,
    }
    write_whole(out / "model" / CARD, json.dumps(card, indent=2))
    (out / "building.pt").unlink(missing_ok=True)  # a short trial has saved none
    return out / "model"


def write_problem_files(out: Path) -> None:
    """Writes unlabelled training problems and labelled held-out ones, one folder per family."""
    for kind in ("verifiable", "open"):
        train = problems.labelled_rows(kind, TRAIN_PROBLEMS, seed=0, held_out=False)
        problems.write_problems(problems.unlabelled(train), out / kind / "train.jsonl")
        held_out = problems.labelled_rows(kind, HELD_OUT_PROBLEMS, seed=0)
        problems.write_problems(held_out, out / kind / "heldout.jsonl")


def base_model(vocab_size: int, eos_token_id: int, pad_token_id: int) -> LlamaForCausalLM:
    """The base model's architecture, with fresh weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.05,  # the usual 0.02 is for wide models and starts slowly here
        tie_word_embeddings=True,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train_base(
    tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, checkpoint: Path
) -> LlamaForCausalLM:
    """Trains the base model to predict the corpus's next tokens, above all those of the completions."""
    torch.manual_seed(seed)
    model = base_model(len(tokenizer), *_token_ids(tokenizer, END, PAD))
    muon, adam = _optimizers(model)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        first = saved["step"]
    for step in range(first, steps):
        share = decay(step)
        muon.param_groups[0]["lr"] = MUON_LR * share
        adam.param_groups[0]["lr"] = ADAM_LR * share
        losses = {}
        reach = reach_at(step)
        for job, batch in job_batches(tokenizer, seed, step):
            completion_loss, prompt_loss = token_losses(model, *batch)
            loss = WEIGHTS.get(job, 1.0) * completion_loss
            (loss + (PROMPT_WEIGHT * prompt_loss if reach < 1.0 else 0.0)).backward()
            losses[job] = completion_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            shown = {job: round(loss, 3) for job, loss in losses.items()}
            log.info("lab build: %s", shown, extra={"progress": (step + 1, steps)})
            _save_whole(checkpoint, model, muon, adam, step + 1)
    return model


def decay(step: int) -> float:
    """The learning rates at a step as a share of their peaks: a warm-up, and half a cosine over the build."""
    cosine = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
    return min(1.0, (step + 1) / WARM_UP) * cosine


def reach_at(step: int) -> float:
    """The length that texts may have at a step, as a share of the full length: from a fifth up to 1."""
    return min(1.0, 0.2 + 0.8 * step / FULL_REACH)


def _optimizers(model: LlamaForCausalLM) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest. AdamW alone takes 900 steps to learn to judge."""
    layers = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    rest = [model.lm_head.weight, *(weight for weight in model.parameters() if weight.ndim == 1)]
    return (
        torch.optim.Muon(layers, weight_decay=0.01),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01),
    )


def token_losses(model: LlamaForCausalLM, input_ids: Tensor, is_completion: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-token cross-entropy of completions and of prompts: (B, T), (B, T) -> (), ().

    Rows are padded on the right, so under causal attention no mask is needed.
    """
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T - 1, H)
    targets, is_completion = input_ids[:, 1:], is_completion[:, 1:]
    is_prompt = ~is_completion & (targets != model.config.pad_token_id)
    return _cross_entropy(model, hidden, targets, is_completion), _cross_entropy(
        model, hidden, targets, is_prompt
    )


def _cross_entropy(model: LlamaForCausalLM, hidden: Tensor, targets: Tensor, chosen: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen])


def job_batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, step: int
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yields each job's batch of one step: ids, and which of them are completion, both (B, T)."""
    for job, rows in (corpus.FIRST_JOBS if step < FIRST_STEPS else corpus.JOBS).items():
        rng = random.Random(f"{seed} {step} {job.__name__}")
        size = corpus.draw_size(rng, reach_at(step))
        num_rows = corpus.sized_rows(job, rows, size)
        yield job.__name__, padded([job(rng, size) for _ in range(num_rows)], tokenizer)


def padded(dialogues: Sequence[corpus.Dialogue], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Dialogues as right-padded ids, and which of them the model has to write: both (B, T)."""
    rows = [_encode(dialogue, tokenizer) for dialogue in dialogues]
    length = max(len(ids) for ids, _ in rows)
    (pad,) = _token_ids(tokenizer, PAD)
    input_ids = torch.full((len(rows), length), pad)
    is_completion = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (ids, written) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        is_completion[row, : len(ids)] = torch.tensor(written)
    return input_ids, is_completion


def _encode(dialogue: corpus.Dialogue, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """Ids in the format of the chat template, and which of them belong to the model's turns."""
    ids: list[int] = []
    written: list[bool] = []
    for prompt, completion in dialogue:
        for text, is_written in (
            (f"<|user|>{prompt}{END}<|assistant|>", False),
            (f"{completion}{END}", True),
        ):
            turn = tokenizer.encode(text, add_special_tokens=False)
            ids += turn
            written += [is_written] * len(turn)
    return ids, written


def _token_ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def _tokenizer_texts(seed: int) -> Iterator[str]:
    rng = random.Random(f"{seed} tokenizer")
    for _ in range(1500):
        for job in corpus.JOBS:
            if job is not corpus.quote:
                for turn in job(rng, corpus.draw_size(rng, 1.0)):
                    yield from turn


def _save_whole(
    path: Path, model: LlamaForCausalLM, muon: torch.optim.Optimizer, adam: torch.optim.Optimizer, step: int
) -> None:
    state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(), "step": step}
    with whole(path) as temporary:
        torch.save(state, temporary)
