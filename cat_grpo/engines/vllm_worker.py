"""What runs inside vLLM's own processes, beside its worker."""

from typing import Any

from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


class WeightReceiver:
    """A worker extension, as vLLM calls it: its methods become the worker's."""

    def receive_weights(self: Any, folder: str) -> None:
        """The folder's weights into those that are there.

        vLLM 0.32 on a CPU computes a layer with a packed copy of its weights, and makes new copies for the
        layers that it reads from the folder: a head that is tied to the embedding is none of them, and would
        keep the old weights.
        """
        self.reload_weights(weights_path=folder)
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
