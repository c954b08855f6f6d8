"""Every decision that a user may change, once. A field's docstring is its help text in the Prefect form.

Defaults follow the paper (CaT, arXiv:2509.14234v3) where it gives a value for every model, but for the
departures that the README lists. The resolved tree is saved with the run.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cat_grpo.records import Kind

Equivalence = Literal["math", "string"]
Weight = Annotated[float, Field(allow_inf_nan=False)]


class MayChange:
    """Marks a setting that a resumed run may set anew: more steps, less memory, other servers.

    Every other setting decides what the run's steps mean.
    """


class Section(BaseModel):
    """Frozen; unknown keys and numbers that are not finite are forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class VLLMConfig(Section):
    """How vLLM serves a model in this process."""

    gpu_memory: float | None = Field(default=None, gt=0.0, le=1.0)
    """The share of the GPU that it may take; None works it out of the model's size and prints it."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Most tokens of a prompt with its completion; None: what the model was made for."""
    engine_args: dict[str, Any] = {}
    """Further arguments of vLLM's own, for example `{"tensor_parallel_size": 2}`."""


class ServerConfig(Section):
    """OpenAI-compatible servers of one model: equals, of which the least busy is asked."""

    urls: tuple[Annotated[str, Field(pattern=r"^https?://[^@]+$")], ...] = ()
    """For example `http://localhost:8000/v1`. A server that fails is set aside and its requests go to the
    others."""
    api: Literal["tokens", "chat"] = "tokens"
    """`tokens`: prompts go as token ids, which vLLM's servers read and give back; `path` names the tokenizer.
    `chat`: messages go as text, to any server; for an anchor or a judge."""
    model: str = ""
    """The model's name there; empty: `path`."""
    api_key: str = Field(default="", pattern=r"^((env|prefect):.+)?$")
    """Where the key is, never the key: `env:NAME`, a variable, or `prefect:NAME`, a Secret block."""
    max_concurrency: int = Field(default=128, ge=1)
    """Most requests at once to each server."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Most requests a minute to all of them."""
    timeout_s: float = Field(default=600.0, gt=0.0)
    """Longest wait for one answer."""
    max_retries: int = Field(default=3, ge=0)
    """Tries again on the same server, ever later, before it is set aside."""
    set_aside_s: float = Field(default=30.0, gt=0.0)
    """For how long."""
    price_per_million_prompt_tokens: float = Field(default=0.0, ge=0.0)
    """For the metric of the cost."""
    price_per_million_completion_tokens: float = Field(default=0.0, ge=0.0)
    """For the metric of the cost."""


class ModelConfig(Section):
    """A model and what runs it."""

    path: str = "Qwen/Qwen3-4B"
    """A folder, a hub id, or `lab` for the model that ships with cat_grpo."""
    engine: Literal["hf", "vllm", "openai"] = "hf"
    """What answers for it: transformers or vLLM, in this process, or OpenAI-compatible servers."""
    vllm: Annotated[VLLMConfig, MayChange] = Field(default=VLLMConfig(), title="vLLM")
    """For engine vllm."""
    server: Annotated[ServerConfig, MayChange] = Field(default=ServerConfig(), title="Servers")
    """For engine openai."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type: `auto` is float32 on the CPU and bfloat16 on a GPU. Trained weights stay in float32."""
    max_batch_tokens: Annotated[int, MayChange] = Field(default=65536, ge=256)
    """Most positions, padding included, in one batch that transformers samples or scores: lower it when
    memory runs out."""
    chat_template_kwargs: dict[str, Any] = {}
    """Handed to the chat template, for example `{"enable_thinking": false}` for Qwen 3."""

    @property
    def is_chat(self) -> bool:
        """Whether servers make tokens of its prompts, and tell none of them."""
        return self.engine == "openai" and self.server.api == "chat"

    @model_validator(mode="after")
    def _servers_have_addresses(self) -> "ModelConfig":
        if self.engine == "openai" and not self.server.urls:
            raise ValueError("server.urls: engine openai needs at least one")
        return self


class DataConfig(Section):
    """Where the unlabelled problems come from."""

    path: str = ""
    """A file (jsonl, json, csv, parquet), a folder of such files, or a hub data set id; `lab:verifiable`
    and `lab:open` ship with cat_grpo."""
    split: str = "train"
    """The split of a hub data set."""
    prompt_column: str = "prompt"
    """Text, or chat messages with `role` and `content`."""
    id_column: str = "id"
    """Where a row has none, its id is a hash of its prompt."""
    kind_column: str = "kind"
    """`verifiable` or `open`, per row."""
    kind: Literal["verifiable", "open"] | None = None
    """The kind of every row; overrides the column."""
    reviews: Annotated[str | None, MayChange] = None
    """A reviews.jsonl of the inspector: problems whose reference people last found wrong are left out from
    the run's next start on. `own`: the run's own."""


class RolloutConfig(Section):
    """How the policy samples."""

    group_size: int = Field(default=8, ge=2, le=1024)
    """G, rollouts per problem. One rollout has no group to be relative to."""
    temperature: float = Field(default=1.0, gt=0.0, le=4.0)
    """Sampling temperature. The learner's logprobs are taken at the same temperature."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling; below 1 the samples no longer have the policy's own distribution."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    max_tokens: int = Field(default=1536, ge=1)
    """Most new tokens in a rollout."""


class ReferenceConfig(Section):
    """How a group becomes one reference."""

    estimator: str = "synthesis"
    """`synthesis`: the anchor reads all rollouts and writes the reference (CaT eq. 1). `majority`: the most
    frequent final answer; verifiable problems only. `module:function`: a function of your own."""
    include_question: bool = False
    """Show the question to the anchor. The paper leaves it out, so that the anchor reconciles the rollouts
    and does not simply answer once more."""
    temperature: float = Field(default=0.0, ge=0.0, le=4.0)
    """0 is greedy: the reference then has no sampling noise of its own."""
    max_tokens: int = Field(default=2048, ge=1)
    """Most new tokens in a reference; one that is cut off is no reference."""


class RewardConfig(Section):
    """How a rollout and a reference become a reward."""

    verifiable: dict[str, Weight] = Field(default={"agreement": 1.0}, min_length=1)
    """The parts of a verifiable problem's reward, each with its weight. `agreement`: 1 when the final answers
    are equal (CaT eq. 2). `module:function`: a function of your own."""
    open: dict[str, Weight] = Field(default={"self_rubric": 1.0}, min_length=1)
    """The parts of an open problem's reward, each with its weight. `self_rubric`: the share of the criteria,
    proposed from the reference, that the judge finds met (CaT eq. 3-4)."""
    equivalence: Equivalence = "math"
    """When two final answers are equal: mathematically (math-verify), or as text up to white space."""
    min_criteria: int = Field(default=5, ge=1)
    """A rubric with fewer criteria is not used, and its group drops out."""
    max_criteria: int = Field(default=20, ge=1)
    """Criteria beyond this many are not judged."""
    rubric_max_tokens: int = Field(default=1024, ge=1)
    """Most new tokens in a rubric."""
    verdict: Literal["label", "xml"] = "label"
    """How the judge answers: `label` reads the probabilities of yes and no as the next token; `xml` has it
    write a verdict."""
    soft_verdicts: bool = False
    """A criterion counts p(yes) of its label read, and not the likelier of yes and no as in the paper."""
    min_label_mass: float = Field(default=0.5, ge=0.0, le=1.0)
    """A label read with less probability than this on yes and no together is an abstention."""
    min_judged_frac: float = Field(default=0.5, gt=0.0, le=1.0)
    """A rollout with a smaller share of its criteria judged has no reward and drops out."""
    length_limit: int | None = Field(default=None, ge=1)
    """A rollout longer than this many tokens is penalised (the paper: 750 on HealthBench)."""
    length_penalty: float = Field(default=1.0, ge=0.0)
    """What is subtracted from the reward of a rollout over the limit."""

    def parts(self, kind: Kind) -> dict[str, float]:
        """The parts of the reward of this kind of problem, each with its weight."""
        return getattr(self, kind)


class LearnerConfig(Section):
    """The GRPO update."""

    learning_rate: float = Field(default=5e-7, gt=0.0)
    """Constant, without warm-up."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """The gradient is scaled down to this norm."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Divide centred rewards by the standard deviation of their group (GRPO), of the whole batch, or by
    nothing (Dr. GRPO)."""
    mean_over: Literal["sequence", "token", "constant"] = "sequence"
    """Every rollout counts the same, whatever its length (GRPO); every token of the step does (DAPO); or a
    token counts one over rollouts x rollout.max_tokens, whatever their lengths are (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """The importance ratio of the policy to its past self, of each token, or of whole rollouts (GSPO, whose
    clips are 3e-4 and 4e-4)."""
    surrogate: Literal["clipped", "cispo"] = "clipped"
    """PPO's clip, which takes the gradient of far tokens away, or CISPO's, which only bounds their weight."""
    clip_low: float = Field(default=0.2, ge=0.0, le=1.0)
    """The importance ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0.0)
    """The importance ratio is clipped above 1 + clip_high."""
    kl_coef: float = Field(default=1e-3, ge=0.0)
    """Times the estimate of KL(policy || anchor). 0 needs no anchor pass."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Subtract the KL from a rollout's reward, as the paper does, or add it to the loss of its tokens."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """The estimate of a token's KL, by Schulman's names. k1 has the right gradient in the reward; in the
    loss k2 has, k3 nearly, and k1 none."""
    kl_over_tokens: Literal["sum", "mean"] = "sum"
    """Of a rollout's tokens, where the KL is in the reward."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Weigh tokens, or whole rollouts, by the learner's probability over the engine's: for engines whose
    logprobs differ from the learner's. Off where rollout.top_p or top_k cut the engine's distribution."""
    importance_cap: float = Field(default=2.0, gt=0.0)
    """No weight above this."""
    lora_rank: int = Field(default=0, ge=0)
    """Train adapters of this rank (LoRA) beside the frozen weights; 0 trains the weights. The anchor is then
    the policy with its adapters off, and needs no memory of its own."""
    lora_alpha: int = Field(default=32, ge=1)
    """Adapters count lora_alpha / lora_rank."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer updates on each batch of rollouts."""
    micro_batch_tokens: Annotated[int, MayChange] = Field(default=16384, ge=64)
    """Most tokens in one backward pass. It never changes the gradient."""
    gradient_checkpointing: Annotated[Literal["auto", "on", "off"], MayChange] = "auto"
    """Keep each layer's input alone and compute the rest again in the backward pass: a third more time, for
    when the activations of a micro-batch do not fit. auto: on when they do not."""

    num_ranks: int = Field(default=1, ge=1)
    """Processes that the learner's weights are spread over, each with a GPU where there are any: Ray actors,
    on this machine or on the cluster that RAY_ADDRESS names. 1: none but this one."""

    @model_validator(mode="after")
    def _ranks_train_whole_weights(self) -> "LearnerConfig":
        if self.lora_rank and self.num_ranks > 1:
            raise ValueError("lora_rank: adapters are trained on 1 rank, not num_ranks > 1")
        return self

    @model_validator(mode="after")
    def _kl_has_a_gradient(self) -> "LearnerConfig":
        if self.kl_coef and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_estimator k1 has no gradient in the loss on average: k2 or k3")
        return self


class TrainConfig(Section):
    """The run as a whole."""

    seed: int = 0
    """Every random draw is a function of (seed, step, stage, problem)."""
    steps: Annotated[int, MayChange] = Field(default=1000, ge=1)
    """Train until this step."""
    problems_per_step: int = Field(default=32, ge=1)
    """Problems in each step; times group_size gives the rollouts per update."""
    shard_size: int | None = Field(default=None, ge=1)
    """Problems that walk through the stages together, in one file a stage. Shards do not wait for each other.
    None: each problem walks by itself, or, where transformers answers, the whole step together."""
    checkpoint_every: Annotated[int, MayChange] = Field(default=10, ge=1)
    """Steps between checkpoints: at most this many are done again after a crash."""
    validation: Annotated[str | None, MayChange] = None
    """A labelled file: the best checkpoint is then chosen by its score, else by label-free signals."""
    validation_limit: Annotated[int, MayChange] = Field(default=200, ge=1)
    """Most problems of the validation file that each validation asks."""
    tracker: Annotated[Literal["tensorboard", "wandb", "trackio"] | None, MayChange] = None
    """Where the figures of every step go besides the run's metrics.jsonl; by that library's own settings and
    environment variables."""
    patience: Annotated[int | None, MayChange] = Field(default=None, ge=1)
    """Stop when this many checkpoints in a row were no better than the best. None: never."""
    max_consensus: Annotated[float | None, MayChange] = Field(default=0.98, gt=0.0, le=1.0)
    """Stop when the policy's rollouts agree more than this, on average over ten steps (verifiable):
    there is then nothing left to reconcile and only the collapse ahead. None: never."""
    max_failure_frac: float = Field(default=0.5, gt=0.0, le=1.0)
    """Stop when a larger share of a step's rollouts than this has no reward."""
    review_gate: Annotated[bool, MayChange] = False
    """Pause before each update until a person has accepted the step's references in the dashboard."""


class BudgetConfig(Section):
    """Where this start of a run ends, if training has not ended before; the next start goes on from there."""

    steps: int | None = Field(default=None, ge=1)
    """At most this many steps."""
    minutes: float | None = Field(default=None, gt=0.0)
    """No step is begun that, as long as the longest so far, would end later than this. One always is."""
    problems: int | None = Field(default=None, ge=1)
    """No step is begun that would take more problems than this, all in all. One always is."""


class Config(Section):
    """One training run."""

    prompts: str = "default"
    """A shipped prompt set, `default` or `lab`, or a folder of templates of your own."""
    model: ModelConfig = Field(default=ModelConfig(), title="Model")
    """The initial policy. Frozen, it is also the anchor."""
    anchor: ModelConfig | None = Field(default=None, title="Anchor")
    """The initial policy, where another engine runs it; None runs it as `model` says."""
    judge: ModelConfig | None = Field(default=None, title="Judge")
    """An independent judge for open problems; None asks the anchor."""
    data: DataConfig = Field(default=DataConfig(), title="Data")
    rollout: RolloutConfig = Field(default=RolloutConfig(), title="Rollouts")
    reference: ReferenceConfig = Field(default=ReferenceConfig(), title="References")
    reward: RewardConfig = Field(default=RewardConfig(), title="Rewards")
    learner: LearnerConfig = Field(default=LearnerConfig(), title="Learner")
    train: TrainConfig = Field(default=TrainConfig(), title="Training")
    budget: Annotated[BudgetConfig, MayChange] = Field(default=BudgetConfig(), title="Budget")

    @property
    def shard_size(self) -> int:
        """`train.shard_size`, or what suits the engines: transformers makes a batch of each call, the others
        of all calls that there are, so that no problem need wait for the long rollouts of another."""
        answers = {model.engine for model in (self.model, self.anchor, self.judge) if model}
        return self.train.shard_size or (self.train.problems_per_step if "hf" in answers else 1)

    @model_validator(mode="after")
    def _anchor_and_policy_are_compared_alike(self) -> "Config":
        if self.learner.kl_coef and self.learner.kl_in == "loss" and self.rollout.temperature != 1.0:
            raise ValueError("learner.kl_in: loss needs rollout.temperature 1, at which the anchor is scored")
        return self

    @model_validator(mode="after")
    def _soft_verdicts_have_probabilities(self) -> "Config":
        if self.reward.soft_verdicts and self.reward.verdict == "xml":
            raise ValueError("reward.soft_verdicts: a written verdict has no probability: verdict label")
        return self
