"""Single options: where each goes, what is said of it, and what no input may do."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.api.documents import read_documents
from finetune_operator.convert import Outcome, convert
from finetune_operator.convert.llamafactory import CARRIED, job_name
from finetune_operator.convert.placeless import PLACELESS
from finetune_operator.errors import InvalidManifest
from tests.unit.convert.configs import config
from tests.unit.convert.conversions import at, converted, outcome

HANDS: list[tuple[dict[str, Any], str]] = [
    ({"lora_rank": "many"}, "lora_rank"),
    ({"learning_rate": float("nan")}, "learning_rate"),
    ({"learning_rate": True}, "learning_rate"),
    ({"bf16": "perhaps"}, "bf16"),
    ({"lora_target": [1]}, "lora_target"),
    ({"deepspeed": "mine.json"}, "deepspeed"),
    ({"deepspeed": "ds_z2_autotp.json"}, "deepspeed"),
    ({"deepspeed": {"zero_optimization": {"stage": True}}}, "deepspeed"),
    ({"deepspeed": "ds_z2.json", "fsdp": "full_shard"}, "fsdp"),
    ({"use_rslora": True, "use_dora": True}, "use_rslora"),
    ({"pissa_init": True, "quantization_bit": 4}, "pissa_init"),
    ({"finetuning_type": "full", "quantization_bit": 4}, "quantization_bit"),
    ({"lr_scheduler_kwargs": "[1"}, "lr_scheduler_kwargs"),
    ({"lr_scheduler_kwargs": {"num_decay_steps": 5}}, "lr_scheduler_kwargs"),
    ({"flash_attn": "disabled"}, "flash_attn"),
    ({"template": "default"}, "template"),
    ({"interleave_probs": "0.5,0.5"}, "interleave_probs"),
    ({"eval_dataset": "s3://a/b,s3://a/c"}, "eval_dataset"),
    ({"save_steps": 0.1}, "save_steps"),
    ({"resume_from_checkpoint": "saves/checkpoint-5"}, "resume_from_checkpoint"),
    ({"adapter_name_or_path": "saves/lora"}, "adapter_name_or_path"),
    ({"trust_remote_code": True}, "trust_remote_code"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"default_system": "Be kind."}, "default_system"),
    ({"lora_target": "lm_head"}, "lora_target"),
]


@pytest.mark.parametrize(("changes", "option"), HANDS, ids=[json.dumps(case[0]) for case in HANDS])
def test_what_cannot_be_carried_is_for_a_person(changes: dict[str, Any], option: str) -> None:
    found = converted(**changes)
    assert outcome(found, option) is Outcome.HAND
    assert f"# {option}: " in found.text and found.problems == ()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dataset": "identity"}, "spec.dataset.uri"),
    ({"dataset": None}, "spec.dataset.uri"),
    ({"eval_dataset": "identity"}, "spec.dataset.validation.uri"),
    ({"finetuning_type": "freeze", "freeze_trainable_layers": 0}, "spec.layers"),
    ({"quantization_bit": 3}, "spec.quantization.type"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "spec.training.scheduler"),
    ({"optim": "grokadamw"}, "spec.training.optimizer"),
    ({"stage": "dpo", "pref_loss": "kto_pair"}, "spec.training.preference.loss"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=[json.dumps(case[0]) for case in REFUSED])
def test_what_has_no_counterpart_is_left_for_the_api_to_refuse(changes: dict[str, Any], field: str) -> None:
    found = converted(**changes)
    assert [problem.split(":")[0] for problem in found.problems] == [field]
    assert "# " in found.text


def test_without_a_bucket_the_output_is_refused_and_a_comment_says_why() -> None:
    found = convert(config(), name="it")
    assert at(found, "output.uri") == "saves/it"
    assert [problem.split(":")[0] for problem in found.problems] == ["spec.output.uri"]
    lines = found.text.splitlines()
    assert "# output_dir: name a bucket" in lines[lines.index("    uri: saves/it") - 1]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tensor_model_parallel_size": 2}, "spec:"),
        ({"trust_remote_code": True}, "  model:"),
        ({"adapter_name_or_path": "x"}, "    uri: hf://org/model-1b"),
        ({"template": "default"}, "  dataset:"),
        ({"dataset": "mine"}, "    uri: mine"),
        ({"dataset": "mine,s3://b/c"}, "    sources:"),
        ({"deepspeed": "mine.json"}, "spec:"),
        ({"use_muon": True}, "  training:"),
        ({"use_muon": True, "optim": "sgd"}, "    optimizer: sgd"),
    ],
)
def test_a_comment_stands_over_the_field_or_the_nearest_one_around_it(changes: dict[str, Any], field: str) -> None:
    lines = converted(**changes).text.splitlines()
    over = lines[lines.index(field) - 1]
    assert over.strip().startswith("#") and len(over) - len(over.lstrip()) == len(field) - len(field.lstrip())
    assert sum("#" in line for line in lines[: lines.index(field)]) == sum("#" in line for line in lines)


def test_the_least_that_a_configuration_can_say() -> None:
    found = convert({"model_name_or_path": "a/b", "dataset": "s3://b/c"}, name="it", output="s3://models/it")
    assert found.problems == () and "#" not in found.text
    assert [note.option for note in found.notes if note.outcome is Outcome.ASSUMED] == [
        "bf16", "lora_rank", "packing", "learning_rate", "lr_scheduler_type", "warmup_ratio",
        "per_device_train_batch_size",
    ]  # fmt: skip
    assert len(found.notes) == 9
    assert found.manifest["spec"] == {
        "model": {"uri": "hf://a/b"},
        "dataset": {"uri": "s3://b/c", "packing": False},
        "method": "lora",
        "lora": {"rank": 8},
        "training": {
            "objective": "sft", "precision": "fp32", "learningRate": 5e-5, "scheduler": "linear", "warmupRatio": 0.0,
            "batchSize": 8, "microBatchSize": 8,
        },
        "resources": {"gpus": 1},
        "output": {"uri": "s3://models/it"},
    }  # fmt: skip


def test_an_unknown_option_is_listed_with_near_names() -> None:
    note = next(note for note in converted(lora_rnak=4).notes if note.option == "lora_rnak")
    assert note.outcome is Outcome.UNKNOWN and "lora_rank" in note.text and note.value == "4"
    assert "near" not in next(n.text for n in converted(qqqqq=1).notes if n.option == "qqqqq")


def test_options_of_another_method_have_no_effect() -> None:
    found = converted(finetuning_type="full", lora_rank=4, freeze_trainable_layers=2, pref_beta=0.1)
    for option in ("lora_rank", "freeze_trainable_layers", "pref_beta"):
        assert outcome(found, option) is Outcome.DROPPED
    assert "lora" not in found.manifest["spec"] and "layers" not in found.manifest["spec"]


def test_secrets_are_not_shown() -> None:
    found = converted(hf_hub_token="hf_abc", swanlab_api_key="key-abc", wandb_api_key="key-abc")
    assert "abc" not in found.text and not [n for n in found.notes if "abc" in n.value + n.text]


NESTED: list[tuple[str, Any, str]] = [
    ("ray_init_kwargs", {"runtime_env": {"env_vars": {"WANDB_API_KEY": "abcdef"}}, "num_cpus": 2},
     "{runtime_env, num_cpus}"),
    ("ray_init_kwargs", '{"runtime_env": {"env_vars": {"MINE": "abcdef"}}}', "{...}"),
    ("accelerator_config", [{"MINE": "abcdef"}, 1], "[2 entries]"),
    ("accelerator_config", [["abcdef"]], "[1 entry]"),
    ("optim_args", ['{"MINE": "abcdef"}'], "[1 entry]"),
    ("WANDB_API_KEY", "abcdef", "***"),
    ("token", "abcdef", "***"),
    ("odd", {"x" * 80: "abcdef"}, "{" + "x" * 55 + " ..."),
    ("gradient_checkpointing_kwargs", {}, "{}"),
    ("report_to", ["wandb", "mlflow"], '["wandb", "mlflow"]'),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value", "shown"), NESTED)
def test_of_maps_the_names_alone_are_shown(option: str, value: Any, shown: str) -> None:
    found = converted(**{option: value})
    note = next(note for note in found.notes if note.option == option)
    assert note.value == shown
    assert "abcdef" not in found.text + note.text


def test_no_option_stands_in_two_tables() -> None:
    assert not CARRIED & PLACELESS.keys()


def test_the_order_of_the_options_changes_nothing() -> None:
    options = config(finetuning_type="freeze", val_size=0.1, deepspeed="ds_z2.json", seed=1)
    before = copy.deepcopy(options)
    first = convert(options, name="it")
    assert convert(dict(reversed(options.items())), name="it").text == first.text
    assert options == before


INFO = {
    "local": {"file_name": "local.json"},
    "hub": {"hf_hub_url": "org/hub", "formatting": "sharegpt", "columns": {"messages": "talk", "images": "pictures"},
            "tags": {"role_tag": "role", "content_tag": "content"}},
    "cloud": {"cloud_file_name": "s3://b/c.jsonl", "num_samples": 10},
    "elsewhere": {"ms_hub_url": "org/else"},
    "pairs": {"hf_hub_url": "org/pairs", "ranking": True, "columns": {"chosen": "chosen", "rejected": "worse"}},
    "plain": {"hf_hub_url": "org/plain", "columns": {"prompt": "body"}},
    "odd": "no map",
}  # fmt: skip
DATASETS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"dataset": "local"}, {"uri": "file:data/local.json", "format": "alpaca"}, ["finetune run"]),
    ({"dataset": "local", "dataset_dir": "/d/"}, {"uri": "file:///d/local.json", "format": "alpaca"}, []),
    (
        {"dataset": "hub"},
        {"uri": "hf://datasets/org/hub", "format": "sharegpt", "columns": {"messages": "talk"},
         "tags": {"roleTag": "role", "contentTag": "content"}},
        ["columns.images"],
    ),
    ({"dataset": "cloud"}, {"uri": "s3://b/c.jsonl", "format": "alpaca", "maxSamples": 10}, []),
    ({"dataset": "cloud", "max_samples": 4}, {"uri": "s3://b/c.jsonl", "format": "alpaca", "maxSamples": 4}, []),
    (
        {"dataset": "cloud,local", "max_samples": 20},
        {"sources": [{"uri": "s3://b/c.jsonl", "maxSamples": 10}, {"uri": "file:data/local.json"}], "format": "alpaca",
         "maxSamples": 20},
        [],
    ),
    ({"dataset": "hub,local"},
     {"sources": [{"uri": "hf://datasets/org/hub"}, {"uri": "file:data/local.json"}]}, ["differently"]),
    ({"dataset": "pairs", "stage": "dpo"}, {"uri": "hf://datasets/org/pairs"}, ["columns.rejected"]),
    ({"dataset": "plain", "stage": "pt"},
     {"uri": "hf://datasets/org/plain", "format": "text", "columns": {"text": "body"}, "packing": True}, []),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected", "said"), DATASETS, ids=[json.dumps(case[0]) for case in DATASETS])
def test_dataset_info(changes: dict[str, Any], expected: dict[str, Any], said: list[str]) -> None:
    found = converted(dataset_info=INFO, **changes)
    assert at(found, "dataset") == {"maxLength": 512, "packing": False, **expected}
    assert found.problems == ()
    note = next(note.text for note in found.notes if note.option == "dataset")
    assert all(word in note for word in said)


@pytest.mark.parametrize(
    ("entry", "lacks"),
    [
        ({"ranking": True}, ""),
        ({"ranking": True, "columns": {"chosen": "chosen", "kto_tag": "kto_tag"}}, ""),
        ({"formatting": "mine"}, "formatting mine"),
        ({"formatting": "mine", "ranking": True}, "formatting mine"),
        ({"split": "test", "subset": "", "columns": {"chosen": "better"}}, "split, columns.chosen"),
        ({"tags": {"tool_tag": "x"}}, "tags.tool_tag"),
    ],
)
def test_what_an_entry_of_dataset_info_says_in_vain(entry: dict[str, Any], lacks: str) -> None:
    found = converted(dataset_info={"one": {"hf_hub_url": "org/one", **entry}}, dataset="one")
    note = next(note for note in found.notes if note.option == "dataset")
    assert note.text == (f"in dataset_info.json, not carried: one: {lacks}" if lacks else "dataset.uri")


NOT_DURING = "nothing is evaluated during training; held-out data are evaluated before and after it"
NOTES: list[tuple[dict[str, Any], str, str]] = [
    ({"warmup_steps": 20}, "warmup_ratio", "dropped warmup_steps is set, which wins there too"),
    ({"warmup_steps": 0}, "warmup_steps", "as here 0: warmupRatio counts"),
    ({"fp16": True}, "fp16", "as here precision is bf16"),
    ({"fp16": True}, "bf16", "carried training.precision"),
    ({"fp16": True, "bf16": False}, "bf16", "as here precision is fp16"),
    ({"pure_bf16": False}, "pure_bf16", "as here off"),
    ({"stage": "kto", "packing": False}, "packing", "carried dataset.packing"),
    ({"use_dora": False}, "use_dora", "as here off"),
    ({"use_galore": False}, "use_galore", "as here off"),
    ({"trust_remote_code": False}, "trust_remote_code", "as here off"),
    ({"train_on_prompt": False}, "train_on_prompt", "as here off"),
    ({"stage": "kto", "mask_history": True}, "mask_history", "dropped preference objectives learn from answers alone"),
    ({"stage": "kto", "packing": True}, "packing", "dropped preference objectives look at each sample as a whole"),
    ({"stage": "pt"}, "template", "as here plain text has none"),
    ({"report_to": ["wandb", "tensorboard"]}, "report_to",
     "dropped metrics go to status and TensorBoard, not to wandb"),
    ({"report_to": "tensorboard"}, "report_to", "as here TensorBoard lies beside the result"),
    ({"logging_steps": 0.1}, "logging_steps", "as here every step is reported"),
    ({"save_strategy": "epoch"}, "save_steps", "dropped save_strategy is epoch"),
    ({"save_strategy": "no"}, "save_strategy", "dropped checkpoints are always kept, for interruptions"),
    ({"val_size": 0.1, "eval_dataset": "s3://b/c"}, "val_size", "dropped eval_dataset is set"),
    ({"predict_with_generate": True}, "predict_with_generate", "dropped nothing is held out"),
    (
        {"predict_with_generate": True, "val_size": 0.1, "stage": "dpo"},
        "predict_with_generate",
        "dropped answers are written for objective sft",
    ),
    ({"do_eval": True}, "do_eval", "as here held-out data are evaluated before and after training"),
    ({"eval_strategy": "steps", "eval_steps": 100}, "eval_strategy", f"dropped {NOT_DURING}"),
    ({"eval_strategy": "steps", "eval_steps": 100}, "eval_steps", f"dropped {NOT_DURING}"),
    ({"eval_strategy": "no"}, "eval_strategy", "as here off"),
    ({"disable_shuffling": True}, "disable_shuffling", "by hand samples are always shuffled; not carried"),
    ({"disable_shuffling": False}, "disable_shuffling", "as here off"),
    ({"auto_find_batch_size": False}, "auto_find_batch_size", "as here microBatchSize is set"),
    ({"dataset_dir": "d"}, "dataset_dir",
     "dropped its dataset_info.json says where the data is: give it with --dataset-info"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "option", "expected"), NOTES, ids=[f"{case[1]} {case[0]}" for case in NOTES])
def test_what_is_said(changes: dict[str, Any], option: str, expected: str) -> None:
    note = next(note for note in converted(**changes).notes if note.option == option)
    assert f"{note.outcome} {note.text}" == expected


@pytest.mark.parametrize(
    ("name", "folder"), [("elsewhere", None), ("odd", None), ("absent", None), ("local", "REMOTE:org/data")]
)
def test_a_data_set_that_lies_nowhere_we_know(name: str, folder: str | None) -> None:
    found = converted(dataset_info=INFO, dataset=name, dataset_dir=folder)
    assert outcome(found, "dataset") is Outcome.HAND and len(found.problems) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([1], "no map"),
        ({}, "no training configuration"),
        ({"model_name_or_path": "a/b"}, "no training configuration"),
        ({"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob"}, "already"),
        ({"model": "a/b", "peft_config": {}}, "v1"),
        ({"model": "a/b", "train_dataset": "x"}, "v1"),
        ({"model_name_or_path": "a/b", "export_dir": "out"}, "finetune merge"),
        ({"model_name_or_path": "a/b", "dataset": "x", "do_train": False}, "trains nothing"),
        ({"model_name_or_path": "a/b", "dataset": "x", "do_predict": True}, "trains nothing"),
        ({**config(), **{f"o{n}": 1 for n in range(1000)}}, "more than 1000"),
    ],
)
def test_other_files_are_refused(options: Any, said: str) -> None:
    with pytest.raises(InvalidManifest, match=said):
        convert(options, name="it")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("qwen3_lora_sft", "qwen3-lora-sft"),
        ("3b", "job-3b"),
        ("a1_x", "a1-x"),
        ("ÄÖ", "job"),
        ("x" * 50, "x" * 40),
        ("a" * 39 + "-b", "a" * 39),
    ],
)
def test_names(given: str, expected: str) -> None:
    assert job_name(given) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(CARRIED | PLACELESS.keys())) | st.text(max_size=12), JSON, max_size=12),
    st.dictionaries(st.sampled_from(["local", "hub"]), JSON, max_size=2),
)
def test_whatever_the_values_each_option_has_a_note_and_the_text_is_one_manifest(
    options: dict[str, Any], info: dict[str, Any]
) -> None:
    given_options = {"model_name_or_path": "a/b", "dataset": "local,hub", **options}
    try:
        found = convert(given_options, name="it", dataset_info=info)
    except InvalidManifest:
        return
    assert len(found.notes) >= len(given_options)
    assert read_documents(found.text)[0].data == found.manifest
    assert all("\n" not in note.option + note.value + note.text for note in found.notes)
