"""The learner on many devices and machines: its weights are in shards, with one Ray actor per shard.

FSDP2 gathers each layer when it is needed and adds up the gradients. Ray starts the processes, on this
machine or on the cluster that the environment variable RAY_ADDRESS names.
"""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AutoModelForCausalLM, PreTrainedModel

from cat_grpo.config import LearnerConfig
from cat_grpo.errors import BadInput
from cat_grpo.learner.batches import Batch, MicroBatch, TrainingRow, micro_batches, packs
from cat_grpo.learner.checkpointing import free_cached_memory
from cat_grpo.learner.learner import Learner

PATIENCE = 60
"""Seconds to wait for room on a Ray cluster that others use."""
SHARDS = "optimizer"
"""The folder in a checkpoint where the ranks keep their parts of the optimizer's state."""


class Ranks:
    """A `Learner` whose weights are spread over `config.num_ranks` Ray actors.

    `model` is the copy that engines serve from. It has the ranks' weights after every update. On a cluster,
    every machine must find the model's folder and the run's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        path: str,
        config: LearnerConfig,
        temperature: float,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """`path` is the folder or hub id that `model` came from. BadInput as in `Learner`, and for more ranks
        than Ray has room for."""
        self.model = model
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a training run sends no usage reports
            ray.init(include_dashboard=False, log_to_driver=False)
        device = model.device.type
        bundle = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
        self._ranks: list[Any] = []
        self._group = _room_for(bundle, config.num_ranks)
        actor = ray.remote(_Rank).options(
            num_cpus=1,
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group),
        )
        self._ranks += [actor.remote(rank, config.num_ranks) for rank in range(config.num_ranks)]
        path = str(Path(path).resolve()) if Path(path).exists() else path  # the ranks run in another folder
        try:
            address = ray.get(self._ranks[0].address.remote())
            self._each("join", address, path, device, config, temperature, compute_dtype)
        except BaseException:
            self.close()
            raise

    def update(self, batch: Batch) -> dict[str, float]:
        """Updates the weights as `Learner.update` does. Every rank returns the same metrics."""
        free_cached_memory()  # this process serves engines on a device that a rank also uses
        metrics = self._each("update", ray.put(batch))[0]
        self._gather()
        return metrics

    def save(self, folder: Path) -> None:
        """Writes the whole weights, for `from_pretrained`, and the optimizer's state in the ranks' shards."""
        self.model.save_pretrained(folder)
        self._each("save", folder.resolve())

    def restore(self, folder: Path) -> None:
        self._each("restore", folder.resolve())
        self._gather()

    def close(self) -> None:
        """Ends the actors and gives their devices back."""
        for rank in self._ranks:
            ray.kill(rank)
        remove_placement_group(self._group)

    def _each(self, method: str, *arguments: object) -> list[Any]:
        """Calls the method on all ranks at once, because their collectives wait for each other."""
        return ray.get([getattr(rank, method).remote(*arguments) for rank in self._ranks])

    def _gather(self) -> None:
        self.model.load_state_dict(self._each("weights")[0])


def _room_for(bundle: dict[str, float], num_ranks: int) -> PlacementGroup:
    """Reserves room for all ranks at once. BadInput when Ray has too little, or others use it."""
    for kind, each in bundle.items():
        needed, there = each * num_ranks, ray.cluster_resources().get(kind, 0)
        if there < needed:
            raise BadInput(f"learner.num_ranks: needs {needed:g} {kind}s, and Ray has {there:g}")
    group = placement_group([bundle] * num_ranks, strategy="PACK")
    if not group.wait(timeout_seconds=PATIENCE):
        remove_placement_group(group)
        raise BadInput(f"learner.num_ranks: Ray had no room for {num_ranks} ranks within {PATIENCE} s")
    return group


def even_size(rows: Sequence[TrainingRow], max_tokens: int, num_ranks: int) -> int:
    """The size of micro-batches, at most `max_tokens`, at which the ranks share them most evenly.

    It is the smallest size that needs no more rounds of one micro-batch per rank than `max_tokens` does.
    """
    rounds = -(-sum(1 for _ in packs(rows, max_tokens)) // num_ranks)
    longest = max(len(row.prompt_token_ids) + len(row.token_ids) for row in rows)
    size = min(longest, max_tokens)
    while size < max_tokens and sum(1 for _ in packs(rows, size)) > rounds * num_ranks:
        size = min(size + max(size // 50, 1), max_tokens)
    return size


class ShardedLearner(Learner):
    """One rank's part of the learner: its shard of the weights, its share of the micro-batches."""

    def restore(self, folder: Path) -> None:
        """Restores the weights, which every rank reads whole, and its shard of the optimizer's state."""
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, loaded.state_dict(), options=whole)
        if (folder / SHARDS).exists():
            state = get_optimizer_state_dict(self.model, self._optimizer)
            load(state, checkpoint_id=folder / SHARDS)
            set_optimizer_state_dict(self.model, self._optimizer, state)

    def save_optimizer(self, folder: Path) -> None:
        """Does nothing before the first update, because reading the state would create it."""
        if self._optimizer.state:
            save(get_optimizer_state_dict(self.model, self._optimizer), checkpoint_id=folder / SHARDS)

    def _prepare(self) -> None:
        policy = MixedPrecisionPolicy(param_dtype=self._compute_dtype, reduce_dtype=torch.float32)
        for module in (*self.model.get_decoder().layers, self.model):
            fully_shard(module, mp_policy=policy)
            # A token's weight is its share of the whole step, so ranks' gradients are added, not averaged.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        # The head is used outside of the model's forward, so `grpo_loss` must count as the root's forward.
        self.model.grpo_loss = super()._loss
        register_fsdp_forward_method(self.model, "grpo_loss")

    def _loss(self, chunk: MicroBatch, old_logprobs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.grpo_loss(chunk, old_logprobs)

    def _chunks(self, rows: Sequence[TrainingRow]) -> list[MicroBatch]:
        """This rank's micro-batches, as many as every other rank has. A rank that lacks one computes the
        smallest instead, with weights of 0."""
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        chunks = list(micro_batches(rows, even_size(rows, self._config.micro_batch_tokens, num_ranks)))
        smallest = min(chunks, key=lambda chunk: chunk.input_ids.numel())
        return [*chunks, *[smallest.idle()] * (-len(chunks) % num_ranks)][rank::num_ranks]

    def _total(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        values = torch.stack([value.double() for value in sums.values()])
        dist.all_reduce(values)
        return dict(zip(sums, values, strict=True))


class _Rank:
    """The process around one ShardedLearner."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks = rank, num_ranks

    def address(self) -> str:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def join(
        self,
        address: str,
        path: str,
        device: str,
        config: LearnerConfig,
        temperature: float,
        compute_dtype: torch.dtype,
    ) -> None:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=address, rank=self._rank, world_size=self._num_ranks)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        torch.nn.Module.to(model, device)
        self._learner = ShardedLearner(model.eval(), config, temperature, compute_dtype)

    def update(self, batch: Batch) -> dict[str, float]:
        metrics = self._learner.update(batch)
        free_cached_memory()
        return metrics

    def weights(self) -> dict[str, Any]:
        """Returns the whole weights on the first rank and nothing on the others."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self._learner.model, options=whole)

    def save(self, folder: Path) -> None:
        self._learner.save_optimizer(folder)

    def restore(self, folder: Path) -> None:
        self._learner.restore(folder)
