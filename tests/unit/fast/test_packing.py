"""Packed samples of models whose own mask mixes them: a kernel that needs no mask keeps them apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.errors import UsageError
from finetune_trainer.fast.attention import choice as kernel_choice
from finetune_trainer.fast.attention.flex import FLEX
from finetune_trainer.fast.attention.kernel import Samples, Scores
from finetune_trainer.fast.attention.reference import ONE_BY_ONE, one_by_one
from finetune_trainer.fast.choice import mask_separates
from finetune_trainer.preflight import read_base
from finetune_trainer.tasks import SupervisedTask
from tests.task_jobs import TaskRun, prepared, run_task
from tests.tiny_models import tiny_model
from tests.trainer_jobs import QUESTIONS, trainer_config, write_dataset
from tests.unit.trainer_core.conftest import ModelFolder

CPU = torch.device("cpu")
SAMPLES, ROWS = 12, 5
"""Those that `job` trains on, and what they fill where they are packed."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def job(model: Path, folder: Path, *, packing: bool, **training: Any) -> TrainerConfig:
    """Steps that each see all of the data, so that they do not depend on which samples share a row."""
    rows = write_dataset(folder / "rows.jsonl", QUESTIONS, repeat=2)
    count = ROWS if packing else SAMPLES
    return trainer_config(
        model,
        rows,
        dataset={"packing": packing, "max_length": 128, "validation": {"count": 4}},
        training={"batch_size": count, "micro_batch_size": 1, "gradient_accumulation": count, **training},
    )


def assert_same(found: TaskRun, expected: TaskRun) -> None:
    """Losses, scores of held-out data and weights, up to the rounding of fp32."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    assert found.losses[-1] < found.losses[0]
    for one, other in ((found.before, expected.before), (found.after, expected.after)):
        assert one is not None and other is not None
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    pairs = zip(found.tuned.model.named_parameters(), expected.tuned.model.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        # Adam's first steps are as long as the learning rate, whatever the gradient's size.
        assert (one - other).abs().max() < 5e-4, name


@pytest.mark.usefixtures("differentiable")
@pytest.mark.parametrize("kernel", [ONE_BY_ONE, FLEX], ids=["one by one", "flex"])
def test_packed_samples_of_gpt_oss_train_as_they_do_alone(
    kernel: Any, model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers gives its mask no positions, by which samples would be told apart."""
    folder = model_folder("gpt-oss")
    alone = run_task(job(folder, tmp_path, packing=False, flash_attn="sdpa"), tmp_path / "alone")
    monkeypatch.setattr(kernel_choice, "_candidates", lambda *_: (replace(kernel, why_not=lambda *_: None),))
    packed = run_task(job(folder, tmp_path, packing=True, flash_attn="auto"), tmp_path / "packed")
    assert len(packed.trainer.train_dataset) == ROWS  # type: ignore[arg-type]
    assert_same(packed, alone)
    assert packed.tuned.model.config._attn_implementation == "eager"


def test_what_runs_with_a_mask_is_given_samples_alone(model_folder: ModelFolder, tmp_path: Path) -> None:
    """Adapters that start from the data, and scores, look at the model as transformers runs it."""
    for architecture in ("llama", "gpt-oss"):
        config = job(model_folder(architecture), tmp_path, packing=True)
        base = read_base(config, model_folder(architecture), None)
        data = prepared(config, base, tmp_path / "cache")
        task = SupervisedTask(config, data, base.tokenizer, CPU)
        task.begin(tiny_model(architecture))
        counts = [int((batch["position_ids"] == 0).sum()) for batch in task.batches(1)]
        assert len(counts) == (ROWS if architecture == "llama" else SAMPLES)
        assert sum(counts) == SAMPLES


def test_whether_the_mask_is_enough_is_asked_of_the_model() -> None:
    config = trainer_config(Path("m"), Path("d"), dataset={"packing": True})
    assert mask_separates(config, tiny_model("llama"))
    assert not mask_separates(config, tiny_model("gpt-oss"))


def all_at_once(q: Any, k: Any, v: Any, samples: Samples, scores: Scores) -> torch.Tensor:
    """A kernel that does not tell samples apart."""
    return one_by_one(q, k, v, samples._replace(bounds=samples.bounds[[0, -1]]), scores)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention of its own": ("falcon", {}, "FalconForCausalLM does not let its attention be chosen; set packing to"),
    "asked for a mask": (
        "gpt-oss",
        {"training": {"flash_attn": "sdpa"}},
        r"spec\.training\.flashAttn is sdpa; use auto, or set packing to false",
    ),
    "noise": ("gpt-oss", {"training": {"neftune_alpha": 5.0}}, "NEFTune's noise depends on the length of a row; set"),
    "divided": ("gpt-oss", {"parallelism": {"strategy": "fsdp"}}, "none of the fast paths; use strategy ddp, or set"),
    "asked for a kernel": (
        "gpt-oss",
        {"training": {"flash_attn": "flex"}},
        "FlexAttention runs on GPUs; use auto, or set",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_neither_a_mask_nor_a_kernel_keeps_apart_is_refused(case: str) -> None:
    architecture, changes, message = REFUSED[case]
    config = trainer_config(Path("m"), Path("d"), dataset={"packing": True}, **changes)
    with pytest.raises(UsageError, match=rf"^spec\.dataset\.packing: in \w+ samples .*: .*{message}") as refused:
        mask_separates(config, tiny_model(architecture))
    assert refused.value.reason == "PackingNotSupported"


def test_a_kernel_that_mixes_samples_is_no_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(ONE_BY_ONE, attend=all_at_once, rows=False)
    monkeypatch.setattr(kernel_choice, "_candidates", lambda *_: (wrong,))
    config = trainer_config(Path("m"), Path("d"), dataset={"packing": True})
    with pytest.raises(
        UsageError, match=r"packing: .*GptOssForCausalLM makes of two samples differs by .*; set packing"
    ):
        mask_separates(config, tiny_model("gpt-oss"))


def test_what_mixes_samples_beside_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tokens of a mixture of experts may be those of the sample alone, and its first one see the sample before."""
    monkeypatch.setattr(kernel_choice, "_away", lambda *_, **__: 0.0)
    model = tiny_model("gpt-oss")
    config = trainer_config(Path("m"), Path("d"), dataset={"packing": True}, training={"flash_attn": "varlen"})
    assert not mask_separates(config, model)
    model.get_input_embeddings().register_forward_hook(lambda *called: called[2] + 0.3 * called[2].roll(1, dims=1))
    with pytest.raises(UsageError, match="in GptOssForCausalLM samples see each other without a mask, too; set"):
        mask_separates(config, model)
