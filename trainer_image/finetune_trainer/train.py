"""One run, from top to bottom: preflight, data, model, method, training, evaluation, export.

Every stage refuses what it can as early as it can: nothing is loaded before the job's words fit the model, the data can
be read and the result can be written.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from finetune_trainer.checkpoint import BackgroundUploader, CheckpointStore, NodeCheckpoints
from finetune_trainer.context import RunContext
from finetune_trainer.contract import RunResult, SelectionError, TrainerConfig, select
from finetune_trainer.contract.selection import UnfreezeSchedule
from finetune_trainer.contract.vocabulary import LoraBias
from finetune_trainer.data import PreparedData, Purpose, check_first_rows, prepare, use_template
from finetune_trainer.distributed import (
    check_strategy,
    device_of,
    first_then_rest,
    node_of,
    once_per_node,
    process_group,
    strategy_arguments,
)
from finetune_trainer.distributed.gather import as_the_base, whole_model
from finetune_trainer.errors import InternalError, Preempted, TrainerError, UsageError
from finetune_trainer.evaluation import (
    HeldOutScores,
    Judgement,
    answer,
    check_evaluation,
    check_prompts,
    prompts_to_answer,
    text_metrics,
)
from finetune_trainer.heads.module import head_layout
from finetune_trainer.heads.task import check_head
from finetune_trainer.layers import checkpoint_blocks, layout_of, trained_parameters
from finetune_trainer.methods import Start, TunedModel, apply_method, check_adapters, check_method
from finetune_trainer.methods.unfreeze import ProgressiveUnfreezing
from finetune_trainer.model import autocast, empty_model, load_model, read_config, read_tokenizer
from finetune_trainer.preferences.task import check_preferences
from finetune_trainer.results.merge import check_merge
from finetune_trainer.results.save import Base, Outcome, save_result
from finetune_trainer.sanity import check_packing, group_of, learning_rate_warning
from finetune_trainer.sources import fetch_dataset, fetch_model
from finetune_trainer.stages import SharedBase, Stage, named, tune_adapters
from finetune_trainer.storage import S3Uri
from finetune_trainer.tasks import SupervisedTask, Task, task_of
from finetune_trainer.training import training_arguments
from finetune_trainer.training.callbacks import CheckpointCallback, ProgressCallback, StopCallback, TensorBoardCallback
from finetune_trainer.training.checkpoints import TRAINED_FILE, tensor_shapes
from finetune_trainer.training.steps import TrainingSteps

UNKNOWN_CLASSES = ("0", "1")
"""Stand for the classes that are found in the data."""
LAST_UPLOAD_SECONDS = 60.0
"""How long a failing run waits for a checkpoint that is being uploaded."""

logger = logging.getLogger(__name__)


def run(config: TrainerConfig, context: RunContext) -> RunResult:
    """Carry out a job; every process of it calls this, and all return the same result.

    Raises the errors of `finetune_trainer.errors`, Preempted among them: the checkpoint is then saved.
    """
    transformers_logging.disable_progress_bar()
    for stage in config.stages():
        with named(stage):
            check_job(stage, context.world_size)
    device = device_of(context)
    inputs = once_per_node(context, "inputs", lambda: fetch_inputs(config, context))
    prepared = []
    for stage in config.stages():
        with named(stage):
            prepared.append(Stage(stage, *prepare_stage(stage, context, inputs)))
    with process_group(context, device):
        if config.adapters:
            return tune_adapters(config, context, prepared, partial(tune, device=device))
        return tune(config, context, prepared[0].base, prepared[0].data, device)


# ---- preflight ----


def prepare_stage(config: TrainerConfig, context: RunContext, inputs: dict[str, Any]) -> tuple[Base, PreparedData]:
    """What there is to know of the model and the data before any weight is read."""
    base = read_base(config, Path(inputs["model"]), inputs["revision"])
    _stop_here(context, "before the data was prepared")

    def prepare_data() -> PreparedData:
        return prepare(
            config.dataset,
            base.tokenizer,
            lambda uri: [Path(path) for path in inputs["data"][uri]],
            seed=config.training.seed,
            cache_dir=context.workspace.data / "prepared",
            rows_per_batch=config.training.micro_batch_size,
            purpose=Purpose.of(config),
        )

    data = first_then_rest(context, "data" if config.adapter is None else f"data-{config.adapter}", prepare_data)
    check_prompts(config, data)
    if config.head is not None:
        base = read_base(config, base.folder, base.revision, data.classes)
    _stop_here(context, "before the model was loaded")
    return base, data


def check_job(config: TrainerConfig, world_size: int) -> None:
    """Refuse what no model and no data could make right. Raises UsageError."""
    check_strategy(config, world_size)
    check_evaluation(config)
    check_merge(config)
    check_preferences(config)
    check_head(config)
    training = config.training
    rows = training.micro_batch_size * training.gradient_accumulation * world_size
    if rows != training.batch_size:
        raise UsageError(
            f"spec.training.batchSize: {training.batch_size} is not microBatchSize {training.micro_batch_size} x"
            f" gradientAccumulation {training.gradient_accumulation} x {world_size} processes"
        )
    warning = learning_rate_warning(config.method, training.optimizer, training.learning_rate, training.objective)
    if warning is not None:
        logger.warning(warning)


def fetch_inputs(config: TrainerConfig, context: RunContext) -> dict[str, Any]:
    """Check that results can be written, then bring the model and the data to this node and look at the first rows."""
    if context.is_main:
        context.store.probe_write(S3Uri.parse(config.run_uri))
    files = fetch_model(config.model, context.store, context.workspace)
    data: dict[str, list[Path]] = {}
    for stage in config.stages():
        uris = [source.uri for source in stage.dataset.sources]
        if stage.dataset.validation is not None and stage.dataset.validation.uri is not None:
            uris.append(stage.dataset.validation.uri)
        data |= {uri: fetch_dataset(uri, context.store, context.workspace) for uri in uris if uri not in data}
        check_first_rows(stage.dataset, data.__getitem__, Purpose.of(stage))
    return {
        "model": str(files.path),
        "revision": files.revision,
        "data": {uri: [str(path) for path in paths] for uri, paths in data.items()},
    }


def read_base(
    config: TrainerConfig, folder: Path, revision: str | None, classes: Sequence[str] = UNKNOWN_CLASSES
) -> Base:
    """Resolve the job's words against the model, on the meta device. Raises UsageError where they do not fit it.

    `classes` are those of a head, once the data is known.
    """
    trusted = config.model.trust_remote_code
    model_config = read_config(folder, trust_remote_code=trusted)
    causal = layout_of(empty_model(model_config, trust_remote_code=trusted))
    layout = causal if config.head is None else head_layout(model_config, causal, config.head, classes, trusted)
    check_method(config, layout, str(model_config.model_type))
    try:
        selection = select(
            layout, config.method, config.layers, config.lora.bias if config.lora is not None else LoraBias.NONE
        )
        check_adapters(config, selection)
    except SelectionError as error:
        raise UsageError(str(error), reason="InvalidSelection") from error
    tokenizer = read_tokenizer(folder, trust_remote_code=trusted)
    use_template(tokenizer, config.dataset.template)
    return Base(folder, revision, model_config, layout, selection, tokenizer)


# ---- the model ----


def tune(
    config: TrainerConfig,
    context: RunContext,
    base: Base,
    data: PreparedData,
    device: torch.device,
    shared: SharedBase | None = None,
) -> RunResult:
    """From the loaded weights to the verified artefact. `shared`: takes and keeps a base for several adapters."""
    set_seed(config.training.seed)
    # What is going to be divided comes to the GPU in parts.
    home = torch.device("cpu") if config.parallelism.divides_weights else device
    shared = shared or SharedBase()
    model = shared.take(config) or load_model(base.folder, config, base.layout, base.selection, home, data.classes)
    if config.dataset.packing:
        with autocast(config, home):
            check_packing(model, home)
    task = task_of(config, base.layout, data, base.tokenizer, device, lambda: context.progress.report(0, 0, {}))
    task.begin(model)

    def judge(state: torch.nn.Module, score: Callable[[torch.nn.Module], HeldOutScores | None]) -> Judgement:
        scores = score(state)
        prompts = prompts_to_answer(data.generation_prompts, config)
        answers = answer(state, base.tokenizer, prompts, config, device)
        given = [prompt.reference for prompt in prompts]
        text = text_metrics(config.evaluation.metrics, answers, given) if answers else {}
        return Judgement(scores, tuple(answers), text)

    judged: list[Judgement] = []

    def judge_base(state: torch.nn.Module) -> None:
        if config.evaluation.compare_with_base:
            judged.append(judge(state, task.score_base))

    if not config.parallelism.divides_weights:
        judge_base(model)
    _stop_here(context, "before the first step")
    set_seed(config.training.seed)
    checkpoints = CheckpointStore(context.store, config.run_uri, config, config.job.attempt)
    folder = context.workspace.checkpoints / config.folder_name
    resumed = _download_checkpoint(context, checkpoints, folder / "resumed")
    start = Start(
        base.folder,
        task.batches if isinstance(task, SupervisedTask) else None,
        tensor_shapes(resumed / TRAINED_FILE) if resumed is not None else None,
    )
    tuned = apply_method(model, base.layout, base.selection, config, start)
    if context.is_main:
        _log_trained(tuned, base)
    # Anything below the lowest trained block gets no gradient, and nothing there is computed twice.
    lowest = checkpoint_blocks(tuned.model, base.layout, enabled=config.training.gradient_checkpointing)
    logger.info("the backward pass ends at block %d of %d", lowest, base.layout.block_count)

    output = context.workspace.output / config.folder_name
    if context.is_main:
        shutil.rmtree(output, ignore_errors=True)
    tensorboard = TensorBoardCallback(output / "tensorboard")

    def divided(trainer: TrainingSteps) -> None:
        if config.parallelism.divides_weights:
            with as_the_base(tuned.model, config):
                judge_base(trainer.forward_model)

    trainer = train(config, context, base, tuned, task, tensorboard, device, divided, checkpoints, resumed)
    after = judge(trainer.forward_model, task.score)
    before = judged[0] if judged else None
    _report_evaluation(context, trainer, tensorboard, before, after)
    trained = trainer.gather()
    result: list[RunResult | None] = [None]
    if context.is_main:
        if trained is not None:
            tuned = whole_model(base.folder, config, base.layout, base.selection, tuned, trained)
        outcome = Outcome(tuned, trainer.state, data, before, after)
        result = [save_result(config, context, base, outcome, output)]
    if context.world_size > 1:
        dist.broadcast_object_list(result, src=0)
    if result[0] is None:
        raise InternalError("rank 0 sent no result")
    shared.keep(config, base.selection, tuned)
    return result[0]


def _log_trained(tuned: TunedModel, base: Base) -> None:
    counts: Counter[str] = Counter()
    for name, parameter in trained_parameters(tuned.model).items():
        counts[group_of(name, base.layout)] += parameter.numel()
    for group, count in counts.items():
        logger.info("trained: %-12s %15s", group, f"{count:,}")
    total = base.layout.total
    logger.info(
        "trained: %-12s %15s (%.3g %% of %s)",
        "all",
        f"{tuned.trainable:,}",
        100 * tuned.trainable / total,
        f"{total:,}",
    )
    for note in base.selection.notes:
        logger.info("note: %s", note)


# ---- training ----


def train(
    config: TrainerConfig,
    context: RunContext,
    base: Base,
    tuned: TunedModel,
    task: Task,
    tensorboard: TensorBoardCallback,
    device: torch.device,
    divided: Callable[[TrainingSteps], None],
    checkpoints: CheckpointStore,
    resumed: Path | None,
) -> TrainingSteps:
    """Train, from the newest checkpoint where there is one. `divided` is called when a model whose tensors are sharded
    stands on the GPUs, and nothing is trained yet. Raises Preempted when asked to stop."""
    folder = context.workspace.checkpoints / config.folder_name
    stop = StopCallback()
    with _uploads(context, checkpoints, config.checkpoints.keep, config.job.attempt) as uploader:
        trainer = task.trainer(
            tuned,
            training_arguments(config, folder, device, strategy_arguments(config, context.world_size)),
            callbacks=[
                *([ProgressCallback(context.progress), tensorboard] if context.is_main else []),
                CheckpointCallback(config.checkpoints, uploader, context.world_size),
                stop,
            ],
            stop_requested=lambda: context.stop.requested,
        )
        stop.trainer = trainer
        trainer.before_training = lambda: divided(trainer)
        if config.layers is not None and config.layers.unfreeze is not None:
            trainer.add_callback(_unfreezing(trainer, config, base, tuned, config.layers.unfreeze))
        if resumed is None:
            trainer.train()
        elif not trainer.resume_finished(resumed):
            trainer.train(resume_from_checkpoint=str(resumed))
    if trainer.stop_agreed and trainer.state.global_step < trainer.state.max_steps:
        raise Preempted(
            f"asked to stop; the checkpoint of step {trainer.state.global_step} is saved, and another attempt continues"
            " from it",
            step=trainer.state.global_step,
        )
    return trainer


def _unfreezing(
    trainer: TrainingSteps, config: TrainerConfig, base: Base, tuned: TunedModel, schedule: UnfreezeSchedule
) -> ProgressiveUnfreezing:
    def changed() -> None:
        trainer.trained_changed()
        checkpoint_blocks(tuned.model, base.layout, enabled=config.training.gradient_checkpointing)

    return ProgressiveUnfreezing(tuned.model, base.layout, base.selection, schedule, changed)


@contextmanager
def _uploads(
    context: RunContext, checkpoints: CheckpointStore, keep: int, attempt: int
) -> Iterator[BackgroundUploader | None]:
    """The uploader of a node's first process. All have uploaded everything when this ends, in all processes: one that
    ended earlier would give the others only the launcher's patience for what is left."""
    node, nodes = node_of(context)
    if context.local_rank != 0:
        yield None
        dist.barrier()
        return
    ours = NodeCheckpoints(checkpoints, context.store, attempt, node, nodes) if nodes > 1 else checkpoints
    uploader = BackgroundUploader(ours, keep)
    try:
        yield uploader
    except BaseException:
        # What is on its way may still become a checkpoint, but must not hide why the run ends.
        with suppress(TrainerError):
            uploader.close(timeout=LAST_UPLOAD_SECONDS)
        raise
    uploader.close()
    if context.world_size > 1:
        dist.barrier()


def _download_checkpoint(context: RunContext, checkpoints: CheckpointStore, folder: Path) -> Path | None:
    """The checkpoint to continue from, on this node's disk. Rank 0 decides which one for all."""
    chosen: list[int | None] = [None]
    if context.is_main:
        newest = checkpoints.newest_complete()
        usable = checkpoints.download(newest, folder) if newest is not None else None
        chosen = [usable.step if usable is not None else None]
    if context.world_size > 1:
        dist.broadcast_object_list(chosen, src=0)
    step = chosen[0]
    if step is not None and context.local_rank == 0 and not context.is_main:
        newest = checkpoints.newest_complete()
        usable = checkpoints.download(newest, folder) if newest is not None else None
        if usable is None or usable.step != step:
            raise InternalError(f"this node cannot read the checkpoint of step {step} that rank 0 continues from")
    if context.world_size > 1:
        dist.barrier()
    if step is None:
        return None
    logger.info("continuing from the checkpoint of step %d", step)
    return folder


def _report_evaluation(
    context: RunContext,
    trainer: TrainingSteps,
    tensorboard: TensorBoardCallback,
    before: Judgement | None,
    after: Judgement,
) -> None:
    step, total = trainer.state.global_step, trainer.state.max_steps
    found: dict[str, float] = {}
    for name, judgement in (("base", before), ("tuned", after)):
        metrics = judgement.metrics() if judgement is not None else {}
        found |= {f"{name}/{metric}": value for metric, value in metrics.items()}
        if metrics:
            described = ", ".join(f"{metric} {value:.4g}" for metric, value in metrics.items())
            logger.info("held-out data, %s model: %s", name, described)
    tensorboard.finish(found, step)
    if after.scores is not None:
        context.progress.report(step, total, {"eval_loss": after.scores.loss}, 0)


def _stop_here(context: RunContext, where: str) -> None:
    """Raise Preempted where the run was asked to stop before there was anything to save."""
    if context.stop.requested:
        raise Preempted(
            f"asked to stop {where}; another attempt starts from the last checkpoint, or from the beginning"
        )
