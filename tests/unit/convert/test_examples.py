"""Every kind of published example, converted and validated."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.documents import read_documents
from finetune_operator.api.parse import load_manifests
from finetune_operator.convert import Outcome, convert
from tests.unit.convert.configs import EXAMPLES, PROBLEMS, config


@pytest.mark.parametrize("kind", EXAMPLES)
def test_each_kind_is_valid_or_refused_for_what_a_person_decides(kind: str) -> None:
    options = config(**EXAMPLES[kind])
    found = convert(options, name=kind, output="s3://models/it", gpus=None)
    assert [problem.split(":")[0] for problem in found.problems] == ([PROBLEMS[kind]] if kind in PROBLEMS else [])
    assert read_documents(found.text)[0].data == found.manifest
    if kind not in PROBLEMS:
        assert load_manifests(found.text)[0].name == kind
    else:
        assert "# " in found.text


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_option_has_one_note_and_none_is_unknown(kind: str) -> None:
    options = config(**EXAMPLES[kind])
    notes = convert(options, name=kind).notes
    assert [note.option for note in notes][: len(options)] == list(options)
    assert len({note.option for note in notes}) == len(notes)
    assert not [note.option for note in notes if note.outcome is Outcome.UNKNOWN]
    assert all(note.outcome is Outcome.ASSUMED for note in notes[len(options) :])


SPECS: list[tuple[str, dict[str, Any]]] = [
    ("lora-sft", {"method": "lora", "lora": {"rank": 4}, "resources": {"gpus": 1}}),
    ("lora-sft-ds3", {"parallelism": {"strategy": "deepspeed", "zeroStage": 3}}),
    ("lora-sft-ray", {"resources": {"gpus": 4}}),
    (
        "qlora-bnb",
        {"method": "qlora", "quantization": {"type": "nf4", "doubleQuant": False, "computeDtype": "bfloat16"}},
    ),
    ("qlora-hqq", {"method": "qlora", "quantization": {"type": "int8"}}),
    (
        "fsdp-qlora",
        {"parallelism": {"strategy": "fsdp", "offload": {"optimizer": "cpu", "parameters": "cpu"}}, "method": "qlora"},
    ),
    (
        "full-ds3",
        {
            "method": "full",
            "parallelism": {
                "strategy": "deepspeed",
                "zeroStage": 3,
                "offload": {"optimizer": "cpu", "parameters": "cpu"},
            },
        },
    ),
    ("full-ds2", {"parallelism": {"strategy": "deepspeed", "zeroStage": 2}}),
    ("freeze", {"method": "freeze", "layers": {"last": 4, "modules": ["mlp", "self_attn"]}}),
    ("loraplus", {"lora": {"rank": 4, "variant": "lora+", "learningRateRatio": 16.0}}),
    ("pissa", {"lora": {"rank": 4, "variant": "pissa"}}),
    ("dora", {"lora": {"rank": 4, "variant": "dora"}}),
    (
        "lora-pretrain",
        {"dataset": {"uri": "s3://data/train.jsonl", "format": "text", "maxLength": 512, "packing": True}},
    ),
]


@pytest.mark.parametrize(("kind", "expected"), SPECS, ids=[kind for kind, _ in SPECS])
def test_sections(kind: str, expected: dict[str, Any]) -> None:
    spec = convert(config(**EXAMPLES[kind]), name=kind).manifest["spec"]
    assert {name: spec[name] for name in expected} == expected


TRAINING = {
    "objective": "sft", "precision": "bf16", "epochs": 2.0, "learningRate": 1e-4, "scheduler": "cosine",
    "warmupRatio": 0.1, "batchSize": 8, "microBatchSize": 2, "loggingSteps": 5,
}  # fmt: skip
OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    ("lora-sft", {}),
    ("lora-pretrain", {}),
    ("lora-sft-ray", {"batchSize": 32}),
    ("mod", {"optimizer": "paged_adamw_8bit"}),
    ("lora-dpo", {"objective": "dpo", "learningRate": 5e-6, "preference": {"beta": 0.2, "loss": "sigmoid"}}),
    ("lora-orpo", {"objective": "orpo", "learningRate": 5e-6, "preference": {"beta": 0.2}}),
    ("lora-simpo", {"objective": "simpo", "learningRate": 5e-6, "preference": {"beta": 0.2, "simpoGamma": 0.7}}),
    ("lora-kto", {"objective": "kto", "preference": {"beta": 0.1, "chosenWeight": 1.5}}),
    ("lora-reward", {"objective": "rm"}),
]


@pytest.mark.parametrize(("kind", "changes"), OBJECTIVES, ids=[kind for kind, _ in OBJECTIVES])
def test_training(kind: str, changes: dict[str, Any]) -> None:
    spec = convert(config(**EXAMPLES[kind]), name=kind).manifest["spec"]
    assert spec["training"] == {**TRAINING, **changes}
    assert spec["dataset"]["packing"] is (kind == "lora-pretrain")


HANDS: list[tuple[str, set[str]]] = [
    ("lora-sft", set()),
    ("lora-reward", {"stage"}),
    ("qlora-gptq", {"model_name_or_path"}),
    ("qlora-hqq", {"quantization_method"}),
    ("llama-pro", {"use_llama_pro", "freeze_trainable_layers"}),
    ("galore", {"use_galore"}),
    ("badam", {"use_badam"}),
    ("muon", {"use_muon"}),
    ("mod", {"mixture_of_depths"}),
    ("dft", {"use_dft_loss"}),
    ("fp8", {"fp8"}),
    ("oft", {"finetuning_type"}),
    ("kt", {"use_kt"}),
    ("megatron", {"pipeline_model_parallel_size", "use_mca"}),
    ("vision", set()),
]


@pytest.mark.parametrize(("kind", "expected"), HANDS, ids=[kind for kind, _ in HANDS])
def test_what_a_person_decides_is_noted_and_stands_as_a_comment(kind: str, expected: set[str]) -> None:
    found = convert(config(**EXAMPLES[kind]), name=kind, output="s3://models/it")
    assert {note.option for note in found.notes if note.outcome is Outcome.HAND} == expected
    comments = [line.strip() for line in found.text.splitlines() if line.strip().startswith("#")]
    for option in expected:
        assert any(line.startswith(f"# {option}: ") for line in comments)
    assert bool(comments) is bool(expected)
