"""The records that flow between the stages. A stage makes new ones and never fills in an old one.

No type here holds a gold answer, so training cannot read one. Labelled problems live in `evaluation` alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict, get_args

Kind = Literal["verifiable", "open"]
KINDS_WITH_ANSWER: tuple[Kind, ...] = ("verifiable",)
"""Problems of these kinds ask for a final answer in a box, which can be compared."""
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

    @property
    def has_final_answer(self) -> bool:
        """Whether its rollouts should end in a final answer."""
        return self.kind in KINDS_WITH_ANSWER


def kinds_of(problems: Iterable[Problem]) -> list[Kind]:
    """Returns the kinds of the problems, each once."""
    present = {problem.kind for problem in problems}
    return [kind for kind in get_args(Kind) if kind in present]


@dataclass(frozen=True, slots=True)
class Completion:
    """A text that an engine wrote in answer to a prompt."""

    text: str
    token_ids: tuple[int, ...]
    """As sampled, the end-of-turn token included when there is one. Training uses these ids."""
    logprobs: tuple[float, ...]
    """log pi(token) in nats under the distribution at the sampling temperature, one per token id."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    """The cost of one call."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that a prefix cache already had."""
    completion_tokens: int = 0
    retries: int = 0
    """Failed requests before the one that was answered."""
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
        """Makes a generation whose usage is counted from its ids."""
        written = sum(len(completion.token_ids) for completion in completions)
        usage = Usage(len(prompt_token_ids), cached_tokens, written)
        return cls(tuple(prompt_token_ids), tuple(completions), usage)


@dataclass(frozen=True, slots=True)
class LabelRead:
    """A one-token read: the probability of each asked label as the next token."""

    probabilities: tuple[float, ...]
    """One per label, in the order asked. They need not sum to one."""
    usage: Usage = Usage()
    is_told: bool = True
    """False where the server told no probabilities at all."""

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
    """The pseudo-reference estimated from one group: an answer, never a model.

    An estimator gives the text and what it knows of it; `method.cat` adds the rest.
    """

    text: str | None
    """None when the estimator gave nothing usable. The group is then dropped and counted."""
    answer: str | None = None
    """The final answer in the text; None for a problem that asks for none."""
    token_ids: tuple[int, ...] = ()
    """The ids as the engine wrote them, or the chosen rollout's; empty where only the text is known."""
    chosen: int | None = None
    """The rollout that the reference is, for an estimator that selects one."""
    written: str = ""
    """The anchor's own words, kept also where they cannot be used; empty where no model was asked."""
    refused: str | None = None
    """Why `text` is None."""
    prompt: str = ""
    """The prompt that the anchor read; empty where no model was asked."""
    num_tokens: int = 0
    """The number of tokens that the anchor wrote."""
    finish_reason: FinishReason | None = None
    problem_id: str = ""
    estimator: str = ""
    """The name in the config."""
    majority: str | None = None
    """The group's most frequent final answer, whatever the estimator, to compare with; None when nothing
    parsed."""
    num_votes: int = 0
    """How many rollouts stand behind `majority`."""


@dataclass(frozen=True, slots=True)
class Rubric:
    """Yes/no criteria that the anchor proposed from a reference."""

    criteria: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judge's answer to one criterion about one rollout."""

    satisfied: bool | None
    """None: the judge abstained, or could not be read. Never counted as a no."""
    probability: float | None
    """p(yes) / (p(yes) + p(no)) of a label read; None for a generated verdict."""


@dataclass(frozen=True, slots=True)
class PartReward:
    """One part of the rewards of one group."""

    rewards: tuple[float | None, ...]
    """One per rollout; None for one that could not be judged."""
    rubric: Rubric | None = None
    """The rubric that the rollouts were judged by, if any."""
    verdicts: tuple[tuple[Verdict, ...], ...] = ()
    """Per rollout, one verdict per criterion; empty without a rubric."""


@dataclass(frozen=True, slots=True)
class RolloutReward:
    """The reward of one rollout. None when it could not be judged: the rollout is dropped and counted."""

    reward: float | None
    """The weighted sum of the parts; in [0, 1] where they and their weights are the paper's."""
    penalty: float = 0.0
    """Subtracted from the reward before the advantage, and logged apart; 0.0 or more."""
    parts: Mapping[str, float | None] = field(default_factory=dict)
    """Each part of the reward by its name in the config, before its weight."""
    agrees: bool | None = None
    """Whether its final answer equals the reference's; None where there is no such answer to compare with."""
    answer: str | None = None
    """The final answer read from the rollout; None where there is none."""
    verdicts: tuple[Verdict, ...] = ()
    """One per criterion, where there is a rubric."""


@dataclass(frozen=True, slots=True)
class RewardedGroup:
    """A group with its reference and one reward per rollout, in the rollouts' order."""

    group: Group
    reference: Reference
    rubric: Rubric | None
    rewards: tuple[RolloutReward, ...]
