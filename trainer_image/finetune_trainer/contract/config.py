"""The trainer's configuration. It is complete: the operator resolved every default, nothing is guessed later."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_trainer.contract import vocabulary as v
from finetune_trainer.contract.base import ContractModel
from finetune_trainer.contract.selection import LayerSelection

CONFIG_PATH = "/etc/finetune/config.json"
ADAPTER_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"


class JobIdentity(ContractModel):
    """Which job, and which attempt of it, this process works for."""

    name: str
    namespace: str
    uid: str
    """UID of the FineTuneJob: two jobs of the same name never share anything in storage."""
    attempt: int = Field(ge=1)


class ModelConfig(ContractModel):
    """The model to tune."""

    uri: str
    """`hf://org/name`, `s3://bucket/prefix`, `pvc://claim/path` or `file:///path`."""
    revision: str | None = None
    """Branch, tag or commit, for hf://."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""


class DataSource(ContractModel):
    """One file, or folder of files, of samples."""

    uri: str
    weight: float = Field(default=1.0, gt=0)
    """How often each of its samples is seen in an epoch: 2 twice, 0.5 every second one."""
    max_samples: int | None = None
    """So many of its usable rows are taken, the first ones; None for all."""


class ColumnsConfig(ContractModel):
    """Names of a row's fields, where they are not the usual ones. LLaMA-Factory's names for what they hold."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = None
    text: str | None = None


class TagsConfig(ContractModel):
    """Names within the turns of a conversation, where they are not sharegpt's. LLaMA-Factory's names and defaults."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


class ValidationConfig(ContractModel):
    """The held-out data: a file of its own, or a share or a number of the data set's rows."""

    uri: str | None = None
    fraction: float | None = None
    count: int | None = None


class CleaningConfig(ContractModel):
    """What is done to rows before they are used."""

    deduplicate: bool = True
    near_duplicates: float | None = None
    """Jaccard similarity, 0 to 1, from which a row counts as a repetition of an earlier one; None compares nothing."""
    min_characters: int = 1
    drop_empty_turns: bool = True
    """Whether rows go in which the user or the assistant says nothing."""
    drop_mojibake: bool = True
    """Whether rows go whose text was once decoded with the wrong encoding."""
    drop_invalid: bool = True
    max_invalid_share: float = 0.05
    """Share of broken rows, 0 to 1, above which the data set is refused."""


class DatasetConfig(ContractModel):
    """The data."""

    sources: tuple[DataSource, ...]
    format: v.DatasetFormat = v.DatasetFormat.AUTO
    columns: ColumnsConfig | None = None
    tags: TagsConfig | None = None
    template: str | None = None
    """Chat template: a name of `ChatTemplateName`, or Jinja; None for the model's own."""
    max_length: int = 2048
    """Tokens of a sample."""
    overlong: v.Overlong = v.Overlong.TRUNCATE
    packing: bool = True
    """Whether several samples share a row, without seeing each other."""
    train_on_prompt: bool = False
    """Whether the loss is taken over the user's turns too."""
    mask_history: bool = False
    """Whether the loss is taken over the last of the assistant's turns alone."""
    validation: ValidationConfig | None = None
    cleaning: CleaningConfig = CleaningConfig()


class LoraConfig(ContractModel):
    """Low-rank adapters."""

    rank: int
    alpha: int
    dropout: float
    variant: v.LoraVariant
    bias: v.LoraBias
    learning_rate_ratio: float = 16.0
    """Learning rate of B over that of A, for `lora+`."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Ranks of their own for the modules that a pattern matches; see `contract.adapters`."""
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Alphas of their own, likewise."""
    eva_rho: float = Field(default=2.0, ge=1)
    """For `eva`: the most that one module's rank may become, as a multiple of the rank it has before."""


class PromptConfig(ContractModel):
    """The trained positions of prefix, prompt and adapter."""

    virtual_tokens: int = Field(ge=1)
    """Trained positions before every sample (prefix, prompt), or in each block (adapter)."""
    initialization: v.PromptInit = v.PromptInit.RANDOM
    """What they start from, for prompt."""
    projection: bool = False
    """Whether a prefix is trained through an MLP in front of it, for prefix."""
    projection_size: int | None = Field(default=None, ge=1)
    """Hidden width of that MLP; None is the model's."""


class QuantizationConfig(ContractModel):
    """How the frozen base is stored."""

    type: v.QuantizationType
    double_quant: bool
    compute_dtype: v.ComputeDtype


class PreferenceConfig(ContractModel):
    """How a preference objective weighs what it learns from. LLaMA-Factory's names stand in brackets."""

    beta: float
    """Scale of the reward, and strength of the bond to the reference [pref_beta]."""
    loss: v.PreferenceLoss = v.PreferenceLoss.SIGMOID
    """Of `dpo` [pref_loss]."""
    label_smoothing: float = 0.0
    """Share of pairs, 0 to 0.5, that are taken to be the wrong way round, for `dpo` with `sigmoid`
    [dpo_label_smoothing]."""
    sft_weight: float = 0.0
    """Weight of the mean cross-entropy of chosen answers beside the loss [pref_ftx]."""
    simpo_gamma: float = 0.5
    """Margin that a pair's rewards are to have, for `simpo` [simpo_gamma]."""
    chosen_weight: float = 1.0
    """Weight of answers that are liked, for `kto` [kto_chosen_weight]."""
    rejected_weight: float = 1.0
    """Weight of answers that are not, for `kto` [kto_rejected_weight]."""


class HeadConfig(ContractModel):
    """A head that predicts a class or a number of a text, for method `head`."""

    task: v.HeadTask
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; empty: those found in the data, sorted."""
    dense: tuple[int, ...] = ()
    """Widths of layers between the model and the output."""
    dropout: float = 0.0
    """Dropout before each layer of the head, 0 to 1."""


class SchedulerOptions(ContractModel):
    """What some schedulers want to know besides the warm-up."""

    min_learning_rate_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the peak at which `cosine_with_min_lr`, `polynomial` and `warmup_stable_decay` end."""
    cycles: int = Field(default=1, ge=1)
    """Falls from the peak, for `cosine_with_restarts`."""
    power: float = Field(default=1.0, gt=0)
    """Exponent, for `polynomial`."""
    decay_ratio: float = Field(default=0.1, gt=0, le=1)
    """Share of the steps in which the learning rate falls, for `warmup_stable_decay`."""
    decay_type: v.DecayType = v.DecayType.LINEAR
    """How it falls there."""


class TrainingConfig(ContractModel):
    """The optimization."""

    objective: v.Objective = v.Objective.SFT
    preference: PreferenceConfig | None = None
    """Set when, and only when, the objective is one of preference."""

    epochs: float
    max_steps: int | None = None
    learning_rate: float
    scheduler: v.Scheduler
    scheduler_options: SchedulerOptions = SchedulerOptions()
    warmup_ratio: float
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of the warm-up; takes the place of the ratio."""
    weight_decay: float
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    batch_size: int
    """Samples (rows, when packing) per optimizer step, over all processes."""
    micro_batch_size: int
    """Rows per forward pass of one process."""
    gradient_accumulation: int
    """Forward passes per optimizer step: batch_size = micro_batch_size x gradient_accumulation x processes."""
    optimizer: v.Optimizer
    precision: v.Precision
    gradient_checkpointing: bool
    max_grad_norm: float
    neftune_alpha: float | None = None
    logging_steps: int
    seed: int


class OffloadConfig(ContractModel):
    """What is kept off the GPU."""

    optimizer: v.OffloadTarget = v.OffloadTarget.NONE
    parameters: v.OffloadTarget = v.OffloadTarget.NONE


class ParallelismConfig(ContractModel):
    """How the work is spread."""

    strategy: v.Strategy
    zero_stage: int | None = None
    offload: OffloadConfig = OffloadConfig()
    deepspeed: dict[str, Any] | None = None
    """The user's own DeepSpeed configuration, merged over ours."""

    @property
    def divides_weights(self) -> bool:
        """Whether no process keeps the whole model on its GPU."""
        return self.strategy is v.Strategy.FSDP or (self.strategy is v.Strategy.DEEPSPEED and self.zero_stage == 3)


class S3Config(ContractModel):
    """The object store. Credentials come from the environment (AWS_ACCESS_KEY_ID, ...), never from here."""

    endpoint: str | None = None
    region: str | None = None


class OutputConfig(ContractModel):
    """Where results go."""

    uri: str
    """`s3://bucket/prefix`."""
    merge: v.Merge = v.Merge.NONE


class Gate(ContractModel):
    """A bound that the tuned model has to keep for the run to succeed."""

    metric: v.Metric
    max: float | None = None
    min: float | None = None


class EvaluationConfig(ContractModel):
    """What is computed on held-out data."""

    metrics: tuple[v.Metric, ...]
    compare_with_base: bool
    max_samples: int = 1000
    """At most so many held-out samples are evaluated."""
    generations: int = 2
    """So many held-out prompts are answered by the base and by the tuned model, for people to read."""
    generation_samples: int = 100
    """At most so many held-out prompts are answered for `bleu`, `rouge` and `exactMatch`."""
    generation_batch_size: int = 8
    """So many answers are written at the same time."""
    max_new_tokens: int = 96
    """Tokens of such an answer, at most."""
    gates: tuple[Gate, ...] = ()


class CheckpointConfig(ContractModel):
    """When checkpoints are written, and whether an attempt continues from one."""

    every: int
    unit: v.Unit
    keep: int
    resume: Literal["auto", "never"] = "auto"


class AdapterConfig(ContractModel):
    """One of several adapters on one base, trained one after the other: what it has of its own."""

    name: str = Field(pattern=ADAPTER_NAME, max_length=40)
    """Its result lies at `<run>/adapters/<name>`."""
    dataset: DatasetConfig
    layers: LayerSelection | None = None
    lora: LoraConfig
    training: TrainingConfig


class TrainerConfig(ContractModel):
    """Everything a run depends on, besides credentials."""

    version: Literal[1] = 1
    job: JobIdentity
    model: ModelConfig
    dataset: DatasetConfig
    method: v.Method
    layers: LayerSelection | None = None
    lora: LoraConfig | None = None
    prompt: PromptConfig | None = None
    quantization: QuantizationConfig | None = None
    head: HeadConfig | None = None
    training: TrainingConfig
    parallelism: ParallelismConfig
    s3: S3Config = S3Config()
    output: OutputConfig
    evaluation: EvaluationConfig
    checkpoints: CheckpointConfig
    adapters: tuple[AdapterConfig, ...] = ()
    """Several adapters in place of one; dataset, layers, lora and training are then theirs."""
    adapter: str | None = None
    """The adapter that this configuration is one of; see `stages`."""

    def stages(self) -> tuple[TrainerConfig, ...]:
        """The configuration of each adapter, as if it were the only one; of a job without a list, its own."""
        if not self.adapters:
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    "dataset": one.dataset,
                    "layers": one.layers,
                    "lora": one.lora,
                    "training": one.training,
                    "adapters": (),
                    "adapter": one.name,
                }
            )
            for one in self.adapters
        )

    @property
    def folder_name(self) -> str:
        """Name of the folders that this attempt uses on a node."""
        name = f"{self.job.uid}-{self.job.attempt}"
        return name if self.adapter is None else f"{name}-{self.adapter}"

    @property
    def run_uri(self) -> str:
        """Where this job's objects lie, whatever its attempts: `<output.uri>/runs/<uid>`, and below it
        `adapters/<name>` for one of several adapters."""
        run = f"{self.output.uri.rstrip('/')}/runs/{self.job.uid}"
        return run if self.adapter is None else f"{run}/adapters/{self.adapter}"

    def digest(self) -> str:
        """SHA-256 of the whole configuration, its attempt left out."""
        return _sha256(self._without_attempt())

    def resume_digest(self) -> str:
        """SHA-256 of what a checkpoint depends on. Batch splitting may change between attempts; the rest may not."""
        data = self._without_attempt()
        for name in ("microBatchSize", "gradientAccumulation", "gradientCheckpointing", "loggingSteps"):
            data["training"].pop(name, None)
        for name in ("evaluation", "checkpoints", "s3", "parallelism"):
            data.pop(name, None)
        return _sha256(data)

    def _without_attempt(self) -> dict[str, Any]:
        data = self.model_dump(by_alias=True, mode="json")
        data["job"].pop("attempt")
        return data


def _sha256(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
