"""Every decision that a user may change stands here, once. A field's docstring is its help text in the form.

Defaults follow the paper (CaT, arXiv:2509.14234v3) where it gives one value for all models. README lists the
departures. The resolved tree is saved with the run.
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
    """The share of the GPU that it may take. None: computed from the model's size, and logged."""
    max_model_len: int | None = Field(default=None, ge=16)
    """The most tokens of a prompt with its completion. None: the model's own limit."""
    engine_args: dict[str, Any] = {}
    """More arguments for vLLM, for example `{"tensor_parallel_size": 2}`."""


class ServerConfig(Section):
    """OpenAI-compatible servers of one model. The least busy one is asked."""

    urls: tuple[Annotated[str, Field(pattern=r"^https?://[^@]+$")], ...] = ()
    """For example `http://localhost:8000/v1`. A server that fails is set aside, and the
    others take its requests."""
    api: Literal["tokens", "chat"] = "tokens"
    """`tokens` sends prompts as token ids, which vLLM's servers read and return; `path` names the tokenizer.
    `chat` sends messages as text to any server, for an anchor or a judge."""
    model: str = ""
    """The model's name on the servers. Empty: `path`."""
    api_key: str = Field(default="", pattern=r"^((env|prefect):.+)?$")
    """Where to find the key, never the key itself: `env:NAME` or `prefect:NAME`, a Secret block."""
    max_concurrency: int = Field(default=128, ge=1)
    """The most requests that one server has at a time."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """The most requests per minute to all servers together."""
    timeout_s: float = Field(default=600.0, gt=0.0)
    """The longest wait for one answer, in seconds."""
    max_retries: int = Field(default=3, ge=0)
    """How often a request is retried on the same server, later each time, before the server is set aside."""
    set_aside_s: float = Field(default=30.0, gt=0.0)
    """How long a failed server is set aside, in seconds."""
    price_per_million_prompt_tokens: float = Field(default=0.0, ge=0.0)
    """Used by the cost metric."""
    price_per_million_completion_tokens: float = Field(default=0.0, ge=0.0)
    """Used by the cost metric."""


class ModelConfig(Section):
    """A model and what runs it."""

    path: str = "Qwen/Qwen3-4B"
    """A folder, a hub id, or `lab` for the model that ships with cat_grpo."""
    engine: Literal["hf", "vllm", "openai"] = "hf"
    """What runs the model: transformers (hf) or vLLM in this process, or OpenAI-compatible servers."""
    vllm: Annotated[VLLMConfig, MayChange] = Field(default=VLLMConfig(), title="vLLM")
    """Used by engine vllm."""
    server: Annotated[ServerConfig, MayChange] = Field(default=ServerConfig(), title="Servers")
    """Used by engine openai."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type: `auto` is float32 on the CPU and bfloat16 on a GPU. Trained weights stay in float32."""
    max_batch_tokens: Annotated[int, MayChange] = Field(default=65536, ge=256)
    """The most positions, padding included, in one batch of transformers. Lower it when memory runs out."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template, for example `{"enable_thinking": false}` for Qwen 3."""

    @property
    def is_chat(self) -> bool:
        """Whether servers tokenise its prompts, and tell no token ids."""
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
    """The column of the ids. A row without one gets a hash of its prompt."""
    kind_column: str = "kind"
    """The column that says `verifiable` or `open`."""
    kind: Kind | None = None
    """The kind of every row. It overrides the column."""
    reviews: Annotated[str | None, MayChange] = None
    """A reviews.jsonl of the inspector, or `own` for the run's own. From its next start on, the run leaves
    out the problems whose reference was last marked wrong."""


class RolloutConfig(Section):
    """How the policy samples."""

    group_size: int = Field(default=8, ge=2, le=1024)
    """G, the rollouts per problem."""
    temperature: float = Field(default=1.0, gt=0.0, le=4.0)
    """Sampling temperature. The learner's logprobs are taken at the same temperature."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus sampling. Below 1 the samples no longer have the policy's own distribution."""
    top_k: int = Field(default=0, ge=0)
    """Keeps the k likeliest tokens; 0 keeps all."""
    max_tokens: int = Field(default=1536, ge=1)
    """The most new tokens in a rollout."""


class ReferenceConfig(Section):
    """How a group becomes one reference."""

    estimator: str = "synthesis"
    """`synthesis`, the paper's, in which the anchor reads all rollouts and writes the reference; another of
    `cat_grpo.method.references`, such as `majority`; or `module:function`, a function of your own."""
    include_question: bool = False
    """Shows the question to the anchor. The paper leaves it out, so that the anchor reconciles the rollouts
    and does not simply answer again."""
    temperature: float = Field(default=0.0, ge=0.0, le=4.0)
    """0 is greedy, and gives a reference without sampling noise of its own."""
    max_tokens: int = Field(default=2048, ge=1)
    """The most new tokens in a reference. One that is cut off cannot be used."""


class RewardConfig(Section):
    """How a rollout and a reference become a reward."""

    verifiable: dict[str, Weight] = Field(default={"agreement": 1.0}, min_length=1)
    """The parts of a verifiable problem's reward, each with its weight: of `cat_grpo.method.rewards`, such as
    `agreement` (1 when the final answers are equal), or `module:function`, a function of your own."""
    open: dict[str, Weight] = Field(default={"self_rubric": 1.0}, min_length=1)
    """The same for open problems. `self_rubric` is the share of the criteria, proposed from the reference,
    that the judge finds met (CaT eq. 3-4)."""
    equivalence: Equivalence = "math"
    """When two final answers are equal: `math` by math-verify, `string` as text up to white space."""
    min_criteria: int = Field(default=5, ge=1)
    """A rubric with fewer criteria is not used, and its group is dropped."""
    max_criteria: int = Field(default=20, ge=1)
    """Criteria beyond this many are not judged."""
    rubric_max_tokens: int = Field(default=1024, ge=1)
    """The most new tokens in a rubric."""
    verdict: Literal["label", "xml"] = "label"
    """How the judge answers: `label` reads the probabilities of yes and no as the next token; `xml` has it
    write a verdict."""
    soft_verdicts: bool = False
    """A criterion counts its p(yes). Otherwise it counts 1 or 0, by the likelier label, as in the paper."""
    min_label_mass: float = Field(default=0.5, ge=0.0, le=1.0)
    """A label read with less probability than this on yes and no together is an abstention."""
    min_judged_frac: float = Field(default=0.5, gt=0.0, le=1.0)
    """A rollout with a smaller share of its criteria judged has no reward and is dropped."""
    length_limit: int | None = Field(default=None, ge=1)
    """A rollout longer than this many tokens is penalised (the paper: 750 on HealthBench)."""
    length_penalty: float = Field(default=1.0, ge=0.0)
    """Subtracted from the reward of a rollout over the limit."""

    def parts(self, kind: Kind) -> dict[str, float]:
        """Returns the parts of the reward for a kind of problem, each with its weight."""
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
    """Centred rewards are divided by the standard deviation of their group (GRPO), by that of the whole
    batch, or not at all (Dr. GRPO)."""
    mean_over: Literal["sequence", "token", "constant"] = "sequence"
    """`sequence`: every rollout counts the same, whatever its length (GRPO). `token`: every token of the step
    counts the same (DAPO). `constant`: a token counts 1 / (rollouts x rollout.max_tokens) (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """The importance ratio of the policy to the policy before the step: of each token, or of whole rollouts
    (GSPO, whose clips are 3e-4 and 4e-4)."""
    surrogate: Literal["clipped", "cispo"] = "clipped"
    """`clipped`: PPO's clip, which removes the gradient of far tokens. `cispo`: it bounds their weight."""
    clip_low: float = Field(default=0.2, ge=0.0, le=1.0)
    """The importance ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0.0)
    """The importance ratio is clipped above 1 + clip_high."""
    kl_coef: float = Field(default=1e-3, ge=0.0)
    """The weight of the estimate of KL(policy || anchor). 0 saves the anchor's pass."""
    kl_in: Literal["reward", "loss"] = "reward"
    """The KL is subtracted from a rollout's reward, as in the paper, or added to the loss of its tokens."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """The estimate of a token's KL, by Schulman's names. k1 has the right gradient in the reward; in the
    loss k2 has, k3 nearly, and k1 none."""
    kl_over_tokens: Literal["sum", "mean"] = "sum"
    """How a rollout's KL is made of its tokens', where the KL is in the reward."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Tokens, or whole rollouts, are weighed by the learner's probability over the engine's. This corrects
    for engines whose logprobs differ. Off where rollout.top_p or top_k cut the engine's distribution."""
    importance_cap: float = Field(default=2.0, gt=0.0)
    """The largest importance weight."""
    lora_rank: int = Field(default=0, ge=0)
    """The rank of adapters (LoRA) that are trained beside the frozen weights; 0 trains the weights. With
    adapters the anchor is the policy with its adapters off, and needs no memory of its own."""
    lora_alpha: int = Field(default=32, ge=1)
    """Adapters are scaled by lora_alpha / lora_rank."""
    updates_per_step: int = Field(default=1, ge=1)
    """The optimizer updates on each batch of rollouts."""
    micro_batch_tokens: Annotated[int, MayChange] = Field(default=16384, ge=64)
    """The most tokens in one backward pass. It never changes the gradient."""
    gradient_checkpointing: Annotated[Literal["auto", "on", "off"], MayChange] = "auto"
    """Only each layer's input is kept, and the backward pass computes the rest again, in a third more time.
    `auto` turns it on when the activations of a micro-batch do not fit into memory."""

    num_ranks: int = Field(default=1, ge=1)
    """The learner's weights are spread over this many Ray actors, each with a GPU where there are any, on
    this machine or on the cluster that RAY_ADDRESS names. 1: the learner runs in this process."""

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
    """Training ends at this step."""
    problems_per_step: int = Field(default=32, ge=1)
    """The problems in each step. Times group_size they give the rollouts per update."""
    shard_size: int | None = Field(default=None, ge=1)
    """The problems that pass through the stages together, in one file per stage. Shards do not wait for each
    other. None: each problem by itself or, where transformers answers, the whole step together."""
    checkpoint_every: Annotated[int, MayChange] = Field(default=10, ge=1)
    """The steps between checkpoints. After a crash at most this many steps are done again."""
    validation: Annotated[str | None, MayChange] = None
    """A labelled file that chooses the best checkpoint. None: label-free signals choose it."""
    validation_limit: Annotated[int, MayChange] = Field(default=200, ge=1)
    """The most problems of the validation file that each validation asks."""
    tracker: Annotated[Literal["tensorboard", "wandb", "trackio"] | None, MayChange] = None
    """Where the figures of every step go besides metrics.jsonl. The library's own settings and environment
    variables apply."""
    patience: Annotated[int | None, MayChange] = Field(default=None, ge=1)
    """The run stops when this many checkpoints in a row were no better than the best. None: never."""
    max_consensus: Annotated[float | None, MayChange] = Field(default=0.98, gt=0.0, le=1.0)
    """The run stops when the rollouts of verifiable problems agree more than this, on average over ten steps,
    while entropy falls: nothing is left to reconcile, and a collapse is near. None: never."""
    max_failure_frac: float = Field(default=0.5, gt=0.0, le=1.0)
    """The run stops when a larger share of a step's rollouts has no reward."""
    review_gate: Annotated[bool, MayChange] = False
    """The run pauses before each update until a person accepts the step's references in the dashboard."""


class BudgetConfig(Section):
    """Where this start of a run ends, if training has not ended before. The next start resumes the run."""

    steps: int | None = Field(default=None, ge=1)
    """At most this many steps."""
    minutes: float | None = Field(default=None, gt=0.0)
    """Starts no step that would overrun this if it took as long as the longest step so far. The first step
    always runs."""
    problems: int | None = Field(default=None, ge=1)
    """Starts no step that would take more problems than this in all. The first step always runs."""


class Config(Section):
    """One training run."""

    prompts: str = "default"
    """A shipped prompt set, `default` or `lab`, or a folder of templates of your own."""
    model: ModelConfig = Field(default=ModelConfig(), title="Model")
    """The initial policy. Frozen, it is also the anchor."""
    anchor: ModelConfig | None = Field(default=None, title="Anchor")
    """The initial policy, where another engine runs it. None: it runs as `model` says."""
    judge: ModelConfig | None = Field(default=None, title="Judge")
    """An independent judge for open problems. None: the anchor judges."""
    data: DataConfig = Field(default=DataConfig(), title="Data")
    rollout: RolloutConfig = Field(default=RolloutConfig(), title="Rollouts")
    reference: ReferenceConfig = Field(default=ReferenceConfig(), title="References")
    reward: RewardConfig = Field(default=RewardConfig(), title="Rewards")
    learner: LearnerConfig = Field(default=LearnerConfig(), title="Learner")
    train: TrainConfig = Field(default=TrainConfig(), title="Training")
    budget: Annotated[BudgetConfig, MayChange] = Field(default=BudgetConfig(), title="Budget")

    @property
    def shard_size(self) -> int:
        """Returns `train.shard_size`, or what suits the engines. transformers makes a batch of each call. The
        others batch all calls, so no problem need wait for the long rollouts of another."""
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
