"""What is refused and read before any weight: the job's words against the model, and its data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_trainer.context import RunContext
from finetune_trainer.contract import SelectionError, TrainerConfig, select
from finetune_trainer.contract.vocabulary import LoraBias, Method
from finetune_trainer.data import PreparedData, Purpose, check_first_rows, prepare, use_template
from finetune_trainer.distributed import check_strategy, first_then_rest
from finetune_trainer.errors import UsageError
from finetune_trainer.evaluation import check_evaluation, check_prompts
from finetune_trainer.fast.choice import use_of
from finetune_trainer.heads.module import head_layout
from finetune_trainer.heads.task import check_head
from finetune_trainer.layers import layout_of
from finetune_trainer.methods import check_adapters, check_method
from finetune_trainer.model import empty_model, read_config, read_tokenizer
from finetune_trainer.preferences.task import check_preferences
from finetune_trainer.results.merge import check_merge
from finetune_trainer.results.save import Base
from finetune_trainer.sanity import learning_rate_warning
from finetune_trainer.sources import fetch_dataset, fetch_model
from finetune_trainer.storage import S3Uri

UNKNOWN_CLASSES = ("0", "1")
"""Stand for the classes that are found in the data."""

logger = logging.getLogger(__name__)


def prepare_stage(config: TrainerConfig, context: RunContext, inputs: dict[str, Any]) -> tuple[Base, PreparedData]:
    """What there is to know of the model and the data before any weight is read."""
    base = read_base(config, Path(inputs["model"]), inputs["revision"])

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
    return base, data


def check_job(config: TrainerConfig, world_size: int) -> None:
    """Refuse what no model and no data could make right. Raises UsageError."""
    check_strategy(config, world_size)
    check_evaluation(config)
    check_merge(config)
    check_preferences(config)
    check_head(config)
    _check_paths(config)
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


def _check_paths(config: TrainerConfig) -> None:
    """Of the fast paths, as far as the job's own words say. Heads and preferences have none to choose."""
    if config.method is Method.HEAD or config.training.objective.is_preference:
        return
    problems = list(use_of(config).problems())
    if problems:
        raise UsageError("; ".join(problems))


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
