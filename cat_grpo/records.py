"""What flows between the stages. Frozen: a stage makes a new record and never fills in an old one.

There is no gold answer among these types: training cannot read what it cannot hold. Labelled problems
live in `evaluate`, and only there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

Kind = Literal["verifiable", "open"]
FinishReason = Literal["stop", "length"]


class Message(TypedDict):
    """One turn of a chat, in the format that chat templates and OpenAI-compatible servers share."""

    role: str
    content: str


Messages = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of unlabelled data."""

    id: str
    messages: tuple[Message, ...]
    """The conversation up to the turn that the policy answers; its last message is the user's."""
    kind: Kind

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine wrote to a prompt."""

    text: str
    token_ids: tuple[int, ...]
    """As sampled, the end-of-turn token included when there is one. Training uses these ids."""
    logprobs: tuple[float, ...]
    """log pi(token) in nats under the distribution at the sampling temperature, one per token id."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    """What one call cost."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's tokens, those that a prefix cache had already."""
    completion_tokens: int = 0
    retries: int = 0
    """Requests that failed before the one that was answered."""
    cost: float = 0.0
    """At the prices of the config."""


@dataclass(frozen=True, slots=True)
class Generation:
    """An engine's answer to one prompt: `n` completions and the prompt's ids, which are made only once."""

    prompt_token_ids: tuple[int, ...]
    """Empty from a server that reads text and tells no ids; so are the completions' ids and logprobs."""
    completions: tuple[Completion, ...]
    usage: Usage

    @classmethod
    def counted(
        cls, prompt_token_ids: Sequence[int], completions: Sequence[Completion], cached_tokens: int = 0
    ) -> "Generation":
        """Its usage is what its ids say."""
        written = sum(len(completion.token_ids) for completion in completions)
        usage = Usage(len(prompt_token_ids), cached_tokens, written)
        return cls(tuple(prompt_token_ids), tuple(completions), usage)


@dataclass(frozen=True, slots=True)
class LabelRead:
    """A one-token read: the probability of each asked label as the next token."""

    probabilities: tuple[float, ...]
    """One per label, in the order asked. They need not sum to one."""
    usage: Usage = Usage()

    @property
    def mass(self) -> float:
        """The share of the whole distribution that falls on any of the labels."""
        return sum(self.probabilities)


@dataclass(frozen=True, slots=True)
class Group:
    """One problem and the G rollouts that the policy made for it."""

    problem: Problem
    prompt_token_ids: tuple[int, ...]
    rollouts: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """The pseudo-reference estimated from one group: an answer, never a model."""

    problem_id: str
    text: str | None
    """None when the aggregator gave nothing usable: the group then drops out and is counted."""
    aggregator: str
    prompt: str
    """What the anchor read; empty for an aggregator that asks no model."""
    num_tokens: int
    finish_reason: FinishReason | None
    majority: str | None
    """The group's majority answer (verifiable), kept to compare with; None when nothing parsed."""
    num_votes: int
    """How many rollouts stand behind `majority`."""


@dataclass(frozen=True, slots=True)
class Rubric:
    """Yes/no criteria that the anchor proposed from a reference."""

    criteria: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judge on one criterion and one rollout."""

    satisfied: bool | None
    """None: the judge abstained, or could not be read. Never counted as a no."""
    probability: float | None
    """p(yes) / (p(yes) + p(no)) of a label read; None for a generated verdict."""


@dataclass(frozen=True, slots=True)
class RolloutScore:
    """What one rollout earned. `reward` is None when it could not be judged: it drops out and is counted."""

    reward: float | None
    """In [0, 1]: agreement with the reference (CaT eq. 2) or the share of criteria met (eq. 4)."""
    penalty: float
    """Subtracted from the reward before the advantage, logged apart: 0.0 or more."""
    answer: str | None
    """The final answer read from the rollout (verifiable)."""
    verdicts: tuple[Verdict, ...]
    """One per criterion (open)."""


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with its reference and one score per rollout, in the rollouts' order."""

    group: Group
    reference: Reference
    rubric: Rubric | None
    scores: tuple[RolloutScore, ...]
