"""An engine that answers with a Python function, for tests and dry runs of everything around the models."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from cat_grpo.engines import Sampling
from cat_grpo.errors import BadInput
from cat_grpo.records import Completion, Generation, LabelRead, Messages


class ScriptedEngine:
    """Answers `reply(text of the last turn, index of the completion)`: one token per UTF-8 byte, then an end.

    `read` answers label reads with one probability per label. Without it, the label that equals the reply
    gets 1 and every other label 0. `prompts` keeps all prompts, in order.
    """

    END = 256

    def __init__(
        self,
        reply: Callable[[str, int], str],
        read: Callable[[str, Sequence[str]], Sequence[float]] | None = None,
    ) -> None:
        self.prompts: list[str] = []
        self.weights: Path | None = None
        self._reply = reply
        self._read = read

    async def generate(self, prompts: Sequence[Messages], sampling: Sampling) -> list[Generation]:
        return [self._generation(messages[-1]["content"], sampling) for messages in prompts]

    async def read_labels(self, prompts: Sequence[Messages], labels: Sequence[str]) -> list[LabelRead]:
        if len({label.encode()[:1] for label in labels}) < len(labels):
            raise BadInput(f"labels {tuple(labels)} begin with the same token")
        return [LabelRead(tuple(self._label_probabilities(m[-1]["content"], labels))) for m in prompts]

    async def logprobs(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        return [(-math.log(2.0),) * len(completion) for completion in completions]

    async def load_weights(self, checkpoint: Path) -> None:
        self.weights = checkpoint

    def without_adapters(self) -> "ScriptedEngine":
        return self

    async def close(self) -> None:
        pass

    def _generation(self, prompt: str, sampling: Sampling) -> Generation:
        self.prompts.append(prompt)
        completions = tuple(self._completion(self._reply(prompt, i), sampling) for i in range(sampling.n))
        return Generation.counted(prompt.encode(), completions)

    def _completion(self, text: str, sampling: Sampling) -> Completion:
        token_ids = (*text.encode(), self.END)
        if len(token_ids) > sampling.max_tokens:
            token_ids = token_ids[: sampling.max_tokens]
            text = bytes(token_ids).decode(errors="ignore")
        finish_reason = "stop" if token_ids[-1] == self.END else "length"
        return Completion(text, token_ids, (-math.log(2.0),) * len(token_ids), finish_reason)

    def _label_probabilities(self, prompt: str, labels: Sequence[str]) -> Sequence[float]:
        self.prompts.append(prompt)
        if self._read is not None:
            return self._read(prompt, labels)
        reply = self._reply(prompt, 0)
        return [float(reply == label) for label in labels]
