"""One run, from top to bottom: preflight, data, model, method, training, evaluation, export.

Every stage refuses what it can as early as it can: nothing is loaded before the job's words fit the model, the data can
be read and the result can be written.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from finetune_trainer.checkpoint import BackgroundUploader, CheckpointStore
from finetune_trainer.context import RunContext
from finetune_trainer.contract import RunResult, SelectionError, TrainerConfig, select
from finetune_trainer.contract.selection import UnfreezeSchedule
from finetune_trainer.contract.vocabulary import LoraBias
from finetune_trainer.data import Collator, PreparedData, RowDataset, Samples, check_first_rows, prepare
from finetune_trainer.distributed import (
    check_strategy,
    device_of,
    first_then_rest,
    once_per_node,
    process_group,
    strategy_arguments,
)
from finetune_trainer.errors import InternalError, Preempted, TrainerError, UsageError
from finetune_trainer.evaluate import Judgement, answer, check_evaluation, score
from finetune_trainer.layers import checkpoint_blocks, layout_of, trained_parameters
from finetune_trainer.methods import TunedModel, apply_method, check_method
from finetune_trainer.methods.prompts import METHODS as PROMPT_METHODS
from finetune_trainer.methods.unfreeze import ProgressiveUnfreezing
from finetune_trainer.model import autocast, empty_model, load_model, read_config, read_tokenizer
from finetune_trainer.results.merge import check_merge
from finetune_trainer.results.save import Base, Outcome, save_result
from finetune_trainer.sanity import check_packing, group_of, learning_rate_warning
from finetune_trainer.sources import fetch_dataset, fetch_model
from finetune_trainer.storage import S3Uri
from finetune_trainer.training import FinetuneTrainer, training_arguments
from finetune_trainer.training.callbacks import CheckpointCallback, ProgressCallback, StopCallback, TensorBoardCallback

LAST_UPLOAD_SECONDS = 60.0
"""How long a failing run waits for a checkpoint that is being uploaded."""

logger = logging.getLogger(__name__)


def run(config: TrainerConfig, context: RunContext) -> RunResult:
    """Carry out a job; every process of it calls this, and all return the same result.

    Raises the errors of `finetune_trainer.errors`, Preempted among them: the checkpoint is then saved.
    """
    transformers_logging.disable_progress_bar()
    check_job(config, context.world_size)
    device = device_of(context)
    inputs = once_per_node(context, "inputs", lambda: fetch_inputs(config, context))
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
        )

    data = first_then_rest(context, "data", prepare_data)
    _stop_here(context, "before the model was loaded")
    with process_group(context, device):
        return tune(config, context, base, data, device)


# ---- preflight ----


def check_job(config: TrainerConfig, world_size: int) -> None:
    """Refuse what no model and no data could make right. Raises UsageError."""
    check_strategy(config, world_size)
    check_evaluation(config)
    check_merge(config)
    training = config.training
    rows = training.micro_batch_size * training.gradient_accumulation * world_size
    if rows != training.batch_size:
        raise UsageError(
            f"spec.training.batchSize: {training.batch_size} is not microBatchSize {training.micro_batch_size} x"
            f" gradientAccumulation {training.gradient_accumulation} x {world_size} processes"
        )
    warning = learning_rate_warning(config.method, training.optimizer, training.learning_rate)
    if warning is not None:
        logger.warning(warning)


def fetch_inputs(config: TrainerConfig, context: RunContext) -> dict[str, Any]:
    """Check that results can be written, then bring the model and the data to this node and look at the first rows."""
    if context.is_main:
        context.store.probe_write(S3Uri.parse(config.run_uri))
    files = fetch_model(config.model, context.store, context.workspace)
    uris = [source.uri for source in config.dataset.sources]
    if config.dataset.validation is not None and config.dataset.validation.uri is not None:
        uris.append(config.dataset.validation.uri)
    data = {uri: fetch_dataset(uri, context.store, context.workspace) for uri in dict.fromkeys(uris)}
    check_first_rows(config.dataset, data.__getitem__)
    return {
        "model": str(files.path),
        "revision": files.revision,
        "data": {uri: [str(path) for path in paths] for uri, paths in data.items()},
    }


def read_base(config: TrainerConfig, folder: Path, revision: str | None) -> Base:
    """Resolve the job's words against the model, on the meta device. Raises UsageError where they do not fit it."""
    trusted = config.model.trust_remote_code
    model_config = read_config(folder, trust_remote_code=trusted)
    layout = layout_of(empty_model(model_config, trust_remote_code=trusted))
    check_method(config, layout, str(model_config.model_type))
    try:
        selection = select(
            layout, config.method, config.layers, config.lora.bias if config.lora is not None else LoraBias.NONE
        )
    except SelectionError as error:
        raise UsageError(str(error), reason="InvalidSelection") from error
    tokenizer = read_tokenizer(folder, trust_remote_code=trusted)
    return Base(folder, revision, model_config, layout, selection, tokenizer)


# ---- the model ----


def tune(config: TrainerConfig, context: RunContext, base: Base, data: PreparedData, device: torch.device) -> RunResult:
    """From the loaded weights to the verified artefact."""
    set_seed(config.training.seed)
    model = load_model(base.folder, config, base.layout, base.selection, device)
    if config.dataset.packing:
        with autocast(config, device):
            check_packing(model, device)
    held_out = _rows(data.validation[: config.evaluation.max_samples] if data.validation is not None else None, config)
    collate = _collator(config, base.tokenizer)

    def judge(state: torch.nn.Module) -> Judgement:
        scores = score(state, held_out, collate, config, device) if held_out is not None else None
        prompts = data.generation_prompts[: config.evaluation.generations] if context.is_main else []
        return Judgement(scores, tuple(answer(state, base.tokenizer, prompts, config, device)))

    before = judge(model) if config.evaluation.compare_with_base else None
    _stop_here(context, "before the first step")
    set_seed(config.training.seed)
    tuned = apply_method(model, base.layout, base.selection, config)
    if context.is_main:
        _log_trained(tuned, base)
    # Anything below the lowest trained block gets no gradient, and nothing there is computed twice.
    lowest = checkpoint_blocks(tuned.model, base.layout, enabled=config.training.gradient_checkpointing)
    logger.info("the backward pass ends at block %d of %d", lowest, base.layout.block_count)

    output = context.workspace.output / f"{config.job.uid}-{config.job.attempt}"
    if context.is_main:
        shutil.rmtree(output, ignore_errors=True)
    tensorboard = TensorBoardCallback(output / "tensorboard")
    trainer = train(config, context, base, tuned, data, collate, tensorboard, device)
    after = judge(tuned.model)
    _report_evaluation(context, trainer, tensorboard, before, after)
    result: list[RunResult | None] = [None]
    if context.is_main:
        outcome = Outcome(tuned, trainer.state, data, before, after)
        result = [save_result(config, context, base, outcome, output)]
    if context.world_size > 1:
        dist.broadcast_object_list(result, src=0)
    if result[0] is None:
        raise InternalError("rank 0 sent no result")
    return result[0]


def _rows(samples: Samples | None, config: TrainerConfig) -> RowDataset | None:
    if samples is None or not len(samples):
        return None
    return RowDataset.packed(samples, config.dataset.max_length) if config.dataset.packing else RowDataset(samples)


def _collator(config: TrainerConfig, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[Any]], dict[str, Any]]:
    assert isinstance(tokenizer.pad_token_id, int), "read_tokenizer has seen to it"
    collator = Collator(tokenizer.pad_token_id, packed=config.dataset.packing)

    def collate(rows: list[Any]) -> dict[str, Any]:
        batch = collator(rows)
        if config.method in PROMPT_METHODS:
            # PEFT counts positions itself, after its own.
            batch.pop("position_ids")
        return batch

    return collate


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
    data: PreparedData,
    collate: Callable[[list[Any]], dict[str, Any]],
    tensorboard: TensorBoardCallback,
    device: torch.device,
) -> FinetuneTrainer:
    """Train, from the newest checkpoint where there is one. Raises Preempted when asked to stop."""
    rows = _rows(data.train, config)
    if rows is None:
        raise InternalError("the prepared data has no training row")
    checkpoints = CheckpointStore(context.store, config.run_uri, config, config.job.attempt)
    folder = context.workspace.checkpoints / f"{config.job.uid}-{config.job.attempt}"
    resumed = _download_checkpoint(context, checkpoints, folder / "resumed")
    stop = StopCallback()
    with _uploads(context, checkpoints, config.checkpoints.keep) as uploader:
        trainer = FinetuneTrainer(
            tuned,
            base.layout,
            config,
            training_arguments(config, folder, device, strategy_arguments(config, context.world_size)),
            rows=rows,
            collate=collate,
            callbacks=[
                *([ProgressCallback(context.progress), tensorboard] if context.is_main else []),
                CheckpointCallback(config.checkpoints, uploader, context.world_size),
                stop,
            ],
            stop_requested=lambda: context.stop.requested,
        )
        stop.trainer = trainer
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
    trainer: FinetuneTrainer, config: TrainerConfig, base: Base, tuned: TunedModel, schedule: UnfreezeSchedule
) -> ProgressiveUnfreezing:
    def changed() -> None:
        trainer.trained_changed()
        checkpoint_blocks(tuned.model, base.layout, enabled=config.training.gradient_checkpointing)

    return ProgressiveUnfreezing(tuned.model, base.layout, base.selection, schedule, changed)


@contextmanager
def _uploads(context: RunContext, checkpoints: CheckpointStore, keep: int) -> Iterator[BackgroundUploader | None]:
    """Rank 0's uploader. It has uploaded everything when this ends, in all processes: one that ended earlier would
    give rank 0 only the launcher's patience for what is left."""
    if not context.is_main:
        yield None
        dist.barrier()
        return
    uploader = BackgroundUploader(checkpoints, keep)
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
    trainer: FinetuneTrainer,
    tensorboard: TensorBoardCallback,
    before: Judgement | None,
    after: Judgement,
) -> None:
    step, total = trainer.state.global_step, trainer.state.max_steps
    found: dict[str, float] = {}
    for name, judgement in (("base", before), ("tuned", after)):
        if judgement is None or judgement.scores is None:
            continue
        scores = judgement.scores
        found |= {f"{name}/{metric}": value for metric, value in scores.metrics().items()}
        logger.info(
            "held-out data, %s model: perplexity %.4g, token accuracy %.1f %%, %d tokens",
            name,
            scores.perplexity,
            100 * scores.accuracy,
            scores.tokens,
        )
    tensorboard.finish(found, step)
    if after.scores is not None:
        context.progress.report(step, total, {"eval_loss": after.scores.loss}, 0)


def _stop_here(context: RunContext, where: str) -> None:
    """Raise Preempted where the run was asked to stop before there was anything to save."""
    if context.stop.requested:
        raise Preempted(
            f"asked to stop {where}; another attempt starts from the last checkpoint, or from the beginning"
        )
