"""Runs inside vLLM's own processes, beside its worker."""

from typing import Any

from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


class WeightReceiver:
    """A worker extension, as vLLM calls it: its methods become the worker's."""

    def receive_weights(self: Any, folder: str) -> None:
        """Loads the folder's weights over the present ones.

        On a CPU, vLLM 0.32 computes a layer with a packed copy of its weights. It makes new copies only for
        the layers that it reads from the folder. A head that is tied to the embedding is not among them, and
        would keep the old weights.
        """
        self.reload_weights(weights_path=folder)
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
