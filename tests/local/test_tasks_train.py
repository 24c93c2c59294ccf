"""Preferences and heads, from the data set to an artefact in a real S3 server, through the product's one way in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainer.contract import TrainerConfig
from finetune_trainer.errors import Preempted, UsageError
from finetune_trainer.heads import load_classifier
from finetune_trainer.methods.lora import quiet_peft
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.local.pod import Pod
from tests.local.test_methods_train import Recorder, StopAfter, download, run
from tests.local.test_two_processes import losses
from tests.quick_torch import quick_torch
from tests.task_jobs import DISLIKED, LIKED, head_config, labelled, pairs, preference_config
from tests.trainer_jobs import save_tiny_model

__all__ = ["quick_torch"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def delivered(config: TrainerConfig, uri: S3Uri, **evaluation: object) -> TrainerConfig:
    """The same job with its results at `uri`."""
    output = config.output.model_copy(update={"uri": str(uri)})
    return config.model_copy(
        update={"output": output, "evaluation": type(config.evaluation).model_validate(
            {**config.evaluation.model_dump(), "max_new_tokens": 4, **evaluation}
        )}
    )  # fmt: skip


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_preference_run_leaves_an_adapter_that_prefers(
    objective: str, model: Path, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    gates = [{"metric": "rewardAccuracy", "min": 0.9}, {"metric": "loss", "max": 0.69}]
    metrics = ["perplexity", "accuracy", "rewardAccuracy", "rewardMargin", "loss"]
    config = delivered(
        preference_config(model, tmp_path, objective), folder_uri, metrics=metrics, gates=gates, generations=1
    )
    progress = Recorder()
    result = run(config, store, tmp_path / "work", progress=progress)
    manifest = download(store, result.uri, tmp_path / "got")
    assert result.evaluation is not None and result.evaluation.base is not None
    base, tuned = result.evaluation.base, result.evaluation.tuned
    assert set(base) == set(tuned) == set(metrics)
    assert (base["rewardMargin"], base["rewardAccuracy"]) == (0.0, 0.5)
    assert tuned["rewardAccuracy"] > 0.9 and tuned["rewardMargin"] > 0.5
    assert manifest.evaluation == result.evaluation
    assert result.evaluation.samples == (16 if objective == "kto" else 8)
    assert manifest.data.classes == {"liked": 16, "disliked": 16}
    assert manifest.data.format == ("unpaired" if objective == "kto" else "preference")
    assert "eval_loss" in progress.reports[-1][2]
    assert len(json.loads((tmp_path / "got" / "evaluation.json").read_text())["generations"]) == 1
    assert json.loads(store.get_bytes(folder_uri.child("latest.json")))["uri"] == result.uri

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "got" / "adapter")
    with quiet_peft():
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "got" / "adapter")
        )

    def likelihood(question: str, answer: str) -> float:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found: torch.Tensor = loaded(input_ids=ids, labels=ids).loss
        return -found.item()

    for row in pairs(3, 200):
        assert likelihood(row["prompt"], LIKED) > likelihood(row["prompt"], DISLIKED)


def test_a_stopped_preference_run_is_continued(
    model: Path, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    config = delivered(preference_config(model, tmp_path, training={"max_steps": 5}), folder_uri, generations=0)
    download(store, run(config, store, tmp_path / "whole").uri, tmp_path / "a")
    other = config.model_copy(update={"job": config.job.model_copy(update={"uid": "uid-2"})})
    # A look before the first step, then one per step.
    with pytest.raises(Preempted, match="the checkpoint of step 2 is saved"):
        run(other, store, tmp_path / "stopped", stop=StopAfter(2))
    again = other.model_copy(update={"job": other.job.model_copy(update={"attempt": 2})})
    download(store, run(again, store, tmp_path / "resumed").uri, tmp_path / "b")
    first, second = (load_file(tmp_path / x / "adapter" / "adapter_model.safetensors") for x in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("head", [{"dense": [16]}, {"task": "regression"}], ids=["classification", "regression"])
def test_a_head_is_delivered_without_its_model(
    head: dict[str, object], model: Path, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    config = delivered(head_config(model, tmp_path, head, layers={"last": 2}), folder_uri)
    result = run(config, store, tmp_path / "work")
    manifest = download(store, result.uri, tmp_path / "got")
    assert manifest.artifact == "delta" and manifest.method == "head"
    assert result.evaluation is not None and result.evaluation.base is not None
    tuned = result.evaluation.tuned
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    assert sizes["delta/delta.safetensors"] < 0.7 * (model / "model.safetensors").stat().st_size
    assert sum(count for _, count in manifest.data.classes.items()) == (0 if "task" in head else 48)
    assert "load_classifier" in (tmp_path / "got" / "README.md").read_text()

    loaded = load_classifier(model, tmp_path / "got" / "delta")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "got" / "delta")
    rows = labelled(18, 101, task=str(head.get("task", "classification")))
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        outputs = loaded(**batch).logits
    if "task" in head:
        wanted = torch.tensor([row["label"] for row in rows])
        assert tuned["mse"] == pytest.approx(((outputs.squeeze(1) - wanted) ** 2).mean().item(), rel=1e-4)
        assert tuned["pearson"] > 0.9
    else:
        names = [loaded.config.id2label[int(number)] for number in outputs.argmax(1)]  # type: ignore[index]
        right = sum(name == row["label"] for name, row in zip(names, rows, strict=True)) / len(rows)
        assert tuned["accuracy"] == pytest.approx(right) and right > 0.9


def test_a_missed_gate_on_pairs_fails_the_run(
    model: Path, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path
) -> None:
    gates = [{"metric": "rewardMargin", "min": 1000.0}]
    config = delivered(
        preference_config(model, tmp_path, "simpo", training={"max_steps": 1}),
        folder_uri,
        metrics=["rewardMargin"],
        gates=gates,
        generations=0,
        compare_with_base=False,
    )
    with pytest.raises(UsageError, match=r"rewardMargin is .*, below 1000\. The artefact was written"):
        run(config, store, tmp_path / "work")
    assert not store.exists(folder_uri.child("latest.json"))


@pytest.mark.timeout(480)
def test_two_processes_equal_one(model: Path, pod: Pod, store: ObjectStore, folder_uri: S3Uri, tmp_path: Path) -> None:
    """What is estimated over a batch is estimated over that of all processes, and what was computed before the training
    is known to all of them."""
    found = {}
    for processes in (1, 2):
        training = {"max_steps": 4, "micro_batch_size": 4 // processes, "gradient_accumulation": 1}
        folder = tmp_path / str(processes)
        folder.mkdir()
        config = delivered(
            preference_config(
                model,
                folder,
                "kto",
                method="freeze",
                layers={"last": 2},
                training=training,
                parallelism={"strategy": "ddp" if processes > 1 else "single"},
                s3={"endpoint": store.endpoint},
            ),
            folder_uri,
            generations=0,
        )
        config = config.model_copy(update={"job": config.job.model_copy(update={"uid": f"of-{processes}"})})
        if processes == 1:
            run(config, store, folder / "work")
        else:
            pod.start(config, folder / "two")
            assert pod.end() == 0, (folder / "two" / "log").read_text()
        manifest = download(store, config.run_uri, folder / "got")
        assert manifest.evaluation is not None
        found[processes] = (losses(store, config.run_uri, 4), manifest.evaluation.tuned)
    assert found[2][0] == pytest.approx(found[1][0], abs=1e-5)
    assert found[2][1] == pytest.approx(found[1][1], rel=1e-3)
