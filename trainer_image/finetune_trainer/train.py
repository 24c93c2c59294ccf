"""One run, from top to bottom: preflight, data, model, method, training, evaluation, export.

Every stage refuses what it can as early as it can: nothing is loaded before the job's words fit the model, the data can
be read and the result can be written.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from finetune_trainer.checkpoint import CheckpointStore
from finetune_trainer.checkpoint.exchange import LAST_UPLOAD_SECONDS, download_checkpoint, uploads
from finetune_trainer.context import RunContext
from finetune_trainer.contract import RunResult, TrainerConfig
from finetune_trainer.contract.schedule import UnfreezeSchedule
from finetune_trainer.data import PreparedData
from finetune_trainer.distributed import (
    device_of,
    once_per_node,
    patient_group,
    process_group,
    shared_by_all,
    strategy_arguments,
)
from finetune_trainer.distributed.gather import as_the_base, whole_model
from finetune_trainer.errors import InternalError, Preempted
from finetune_trainer.evaluation import (
    Judgement,
)
from finetune_trainer.fast.compile_cache import CompileCache
from finetune_trainer.judge import Judge
from finetune_trainer.layers import checkpoint_blocks, trained_parameters
from finetune_trainer.methods import Start, TunedModel, apply_method
from finetune_trainer.methods.lora import adapter_can_be_left_out
from finetune_trainer.methods.qlora import check_device
from finetune_trainer.methods.unfreeze import ProgressiveUnfreezing
from finetune_trainer.model import load_model
from finetune_trainer.preflight import check_job, fetch_inputs, prepare_stage
from finetune_trainer.results.pointers import earlier_result
from finetune_trainer.results.save import Base, Outcome, save_result
from finetune_trainer.sanity import group_of
from finetune_trainer.stages import SharedBase, Stage, named, tune_adapters
from finetune_trainer.tasks import SupervisedTask, Task, task_of
from finetune_trainer.training import training_arguments
from finetune_trainer.training.callbacks import CheckpointCallback, ProgressCallback, StopCallback, TensorBoardCallback
from finetune_trainer.training.checkpoints import TRAINED_FILE, tensor_shapes
from finetune_trainer.training.late_files import late_files
from finetune_trainer.training.steps import TrainerParts, TrainingSteps

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
    with process_group(context, device):
        earlier = shared_by_all(context, lambda: earlier_result(config, context.store))
        return earlier or _trained(config, context, device)


def _trained(config: TrainerConfig, context: RunContext, device: torch.device) -> RunResult:
    if config.quantization is not None:
        check_device(config.quantization, device)
    inputs = once_per_node(context, "inputs", lambda: fetch_inputs(config, context))
    prepared = []
    for stage in config.stages():
        with named(stage):
            prepared.append(Stage(stage, *prepare_stage(stage, context, inputs)))
    if config.adapters:
        return tune_adapters(config, context, prepared, partial(tune, device=device))
    return tune(config, context, prepared[0].base, prepared[0].data, device)


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
    task = task_of(config, data, base.tokenizer, device, lambda: context.progress.report(0, 0, {}))
    task.begin(model)

    judge = Judge(config, base.tokenizer, data, task, device)
    divides = config.parallelism.divides_weights
    base_comes_back = not divides and _leaves_base(config, base, task)
    if base_comes_back:
        judge.rehearse(model, context.world_size)
    elif not divides:
        judge.base(model)
    set_seed(config.training.seed)
    checkpoints = CheckpointStore(context.store, config.run_uri, config, config.job.attempt)
    folder = context.workspace.checkpoints / config.folder_name
    resumed = download_checkpoint(context, checkpoints, folder / "resumed")
    start = Start(
        base.folder,
        task.batches if isinstance(task, SupervisedTask) else None,
        tensor_shapes(resumed / TRAINED_FILE) if resumed is not None else None,
    )
    tuned = apply_method(model, base.layout, base.selection, config, start)
    if context.is_main:
        _log_trained(tuned, base)
    # Anything below the lowest trained block gets no gradient, and nothing there is computed twice.
    lowest = _checkpoint_blocks(config, base, tuned)
    logger.info("the backward pass ends at block %d of %d", lowest, base.layout.block_count)

    output = context.workspace.output / config.folder_name
    if context.is_main:
        shutil.rmtree(output, ignore_errors=True)
    tensorboard = TensorBoardCallback(output / "tensorboard")

    def divided(trainer: TrainingSteps) -> None:
        if divides:
            with as_the_base(tuned.model, config):
                judge.base(trainer.forward_model)

    trainer = train(config, context, base, tuned, task, tensorboard, device, divided, checkpoints, resumed)
    if config.training.offload_activations:
        # Whatever follows has the host memory that was pinned.
        checkpoint_blocks(tuned.model, base.layout, enabled=False)
    after = judge.tuned(trainer.forward_model)
    if base_comes_back:
        # Not before the training: the first step comes earlier, and an attempt that is interrupted has not judged the
        # base in vain.
        with as_the_base(tuned.model, config):
            judge.base(trainer.forward_model)
    _report_evaluation(context, trainer, tensorboard, judge.before, after)
    trained = trainer.gather()
    result: list[RunResult | None] = [None]
    if context.is_main:
        if trained is not None:
            tuned = whole_model(base.folder, config, base.layout, base.selection, tuned, trained)
        outcome = Outcome(tuned, trainer.state, data, judge.before, after)
        result = [save_result(config, context, base, outcome, output)]
    else:
        # What becomes of the result is for rank 0 to say, which alone knows how far it is.
        context.stop.hold()
    if context.world_size > 1:
        dist.broadcast_object_list(result, src=0, group=patient_group())
    if result[0] is None:
        raise InternalError("rank 0 sent no result")
    shared.keep(config, base.selection, tuned)
    return result[0]


def _leaves_base(config: TrainerConfig, base: Base, task: Task) -> bool:
    """Whether the tuned model without its adapter is the base, to the last bit."""
    return isinstance(task, SupervisedTask) and adapter_can_be_left_out(config) and not base.selection.parameters


def _checkpoint_blocks(config: TrainerConfig, base: Base, tuned: TunedModel) -> int:
    training = config.training
    return checkpoint_blocks(
        tuned.model,
        base.layout,
        enabled=training.gradient_checkpointing,
        blocks=training.recomputed_blocks,
        offload=training.offload_activations,
    )


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
    stop = StopCallback(context.stop.hold)
    with (
        uploads(context, checkpoints, config.checkpoints.keep) as uploader,
        late_files(LAST_UPLOAD_SECONDS) as late,
    ):
        parts = TrainerParts(
            tuned,
            base.layout,
            config,
            training_arguments(config, folder, device, strategy_arguments(config, context.world_size)),
            callbacks=[
                *([ProgressCallback(context.progress), tensorboard] if context.is_main else []),
                CheckpointCallback(config.checkpoints, uploader, context.world_size, late),
                *([CompileCache(config, context, device)] if config.training.compile_cache else []),
                stop,
            ],
            stop_requested=lambda: context.stop.requested,
        )
        trainer = task.trainer(parts)
        stop.trainer = trainer
        trainer.late_files = late
        trainer.before_training = lambda: divided(trainer)
        if config.layers is not None and config.layers.unfreeze is not None:
            trainer.add_callback(_unfreezing(trainer, config, base, tuned, config.layers.unfreeze))
        if resumed is None:
            trainer.train()
        elif not trainer.resume_finished(resumed):
            trainer.train(resume_from_checkpoint=str(resumed))
    step = trainer.state.global_step
    if trainer.stop_agreed:
        raise Preempted(
            f"asked to stop; the checkpoint of step {step} is saved, and another attempt continues from it", step=step
        )
    context.stop.release(step)
    return trainer


def _unfreezing(
    trainer: TrainingSteps, config: TrainerConfig, base: Base, tuned: TunedModel, schedule: UnfreezeSchedule
) -> ProgressiveUnfreezing:
    def changed() -> None:
        trainer.trained_changed()
        _checkpoint_blocks(config, base, tuned)

    return ProgressiveUnfreezing(tuned.model, base.layout, base.selection, schedule, changed)


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
