"""Answers to held-out prompts: for people to read, and to be compared with the given ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.contract.vocabulary import Method, Strategy
from finetune_trainer.data import Prompt
from finetune_trainer.distributed import told_by_all
from finetune_trainer.evaluation.text import METRICS
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.model import autocast, end_tokens


def prompts_to_answer(prompts: Sequence[Prompt], config: TrainerConfig) -> Sequence[Prompt]:
    """The first prompts: as many as people read, or as the metrics of generated text are taken over."""
    evaluation = config.evaluation
    compared = evaluation.generation_samples if any(metric in METRICS for metric in evaluation.metrics) else 0
    return prompts[: max(evaluation.generations, compared)]


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: TrainerConfig,
    device: torch.device,
) -> list[str]:
    """The model's greedy answers, in the order of the prompts; in other processes than that of rank 0 an empty list.

    prompts: each read as a whole; those of prepared data fit into the job's maximum length.

    Every process writes its share of them, as many at a time as the job says: a step of several sequences takes hardly
    longer than that of one. The longest prompts come first, so that memory runs out at once or not at all.
    """
    texts = [
        str(
            tokenizer.apply_chat_template(
                prompt.messages, tools=cast("Any", prompt.tools), add_generation_prompt=True, tokenize=False
            )
        )
        for prompt in prompts
    ]
    if not texts:
        return []
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    longest_first = sorted(range(len(texts)), key=lambda index: (-len(texts[index]), index))
    # PEFT puts a trained prompt before the padding, so that beside a longer prompt its distance would be another one.
    size = 1 if config.method is Method.PROMPT else config.evaluation.generation_batch_size
    # Sharded weights are gathered by all processes together: each takes as many turns as the others, if need be with
    # a prompt that another one answers.
    turns = math.ceil(len(texts) / (size * world))
    own = longest_first[rank::world] or longest_first[:1]
    answers: dict[int, str] = {}
    model.eval()
    for turn in range(turns):
        chosen = own[turn * size : (turn + 1) * size] or own[:1]
        answers |= zip(chosen, _generate(model, tokenizer, [texts[i] for i in chosen], config, device), strict=True)
    answers = {index: text for part in told_by_all(answers) for index, text in part.items()}
    return [answers[index] for index in range(len(texts))] if rank == 0 else []


def _generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    config: TrainerConfig,
    device: torch.device,
) -> list[str]:
    """The continuations of a few texts, written at the same time."""
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
    ).to(device)
    parallelism = config.parallelism
    sharded = parallelism.strategy is Strategy.FSDP or parallelism.zero_stage == 3
    with quiet_peft(), autocast(config, device):
        produced = model.generate(  # type: ignore[operator]
            **encoded,
            max_new_tokens=config.evaluation.max_new_tokens,
            do_sample=False,
            # A model's own sampling settings mean nothing to greedy decoding.
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_tokens(model, tokenizer),
            synced_gpus=sharded,
        )
    new = produced[:, encoded["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
