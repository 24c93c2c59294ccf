"""Peers of the bench that run in environments of their own: who starts them, with what, and what is said of them."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.trainer.__main__ import ROOT, main
from bench.trainer.clock import Clock, real_tokens
from bench.trainer.llamafactory_config import dataset_info, training_config
from bench.trainer.meter import Measured, Meter
from bench.trainer.settings import OWN_PYTHON, TABLE, TINY, Setting
from bench.trainer.unsloth_config import adapters, base, loading, training_arguments
from bench.trainer.worker import MODULES
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

PEER_RUN = "lora-fastest/llamafactory-defaults"
BY_NAME = {setting.name: setting for setting in TABLE}


def program(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def bench(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    out = folder / "bench.json"
    code = main(["--cpu", "--folder", str(folder / "work"), "--out", str(out), "--only", PEER_RUN, *options])
    return code, json.loads(out.read_text())


def test_a_peer_without_its_python_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = bench(tmp_path)
    assert code == 0
    assert report["left_out"] == [PEER_RUN]
    assert report["results"] == []
    assert f"left out, for want of a python of the peer's own (--python): {PEER_RUN}\n" in capsys.readouterr().out


def test_a_peer_is_run_by_its_own_python_and_sees_nothing_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere/of/ours")
    seen = tmp_path / "seen"
    figures = {"tokens_per_second": 1000.0, "median_seconds": 0.5, "model_tflops": 1.0, "peak_gib": 2.0}
    figures |= {"first_step_seconds": 1.0, "losses": [3.0, 2.0]}
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"setting": {"name": PEER_RUN}, **figures}))
    python = program(
        tmp_path / "python",
        f'read line; echo "$PYTHONPATH" "$HF_HOME" "$1" "$2" > {seen}; cp {result} "${{3%.json}}.result.json"',
    )
    code, report = bench(tmp_path, "--python", f"llamafactory={python}")
    assert code == 0
    assert report["left_out"] == []
    assert report["results"][0]["tokens_per_second"] == 1000.0
    assert "1,000 tok/s" in capsys.readouterr().out
    path, caches, *command = seen.read_text().split()
    assert path == str(ROOT)
    assert Path(caches).is_relative_to(tmp_path / "work")
    assert command == ["-m", "bench.trainer.worker"]
    told = json.loads((tmp_path / "work" / "lora-fastest--llamafactory-defaults.json").read_text())
    assert Setting(**told["setting"]) in TINY


@pytest.mark.parametrize("wait", ["", "read line; "], ids=["while it imports", "later"])
def test_a_peer_that_fails_says_why(tmp_path: Path, wait: str) -> None:
    python = program(tmp_path / "python", f'{wait}echo "first"; echo "ImportError: no GPU" >&2; exit 3')
    code, report = bench(tmp_path, "--python", f"llamafactory={python}")
    assert code == 1
    expected = "exit code 3; lora-fastest--llamafactory-defaults.log: ImportError: no GPU"
    assert report["results"][0]["error"] == expected


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("ours=/bin/sh", "ours: no peer with an environment of its own"),
        ("llamafactory=/nowhere/python", "llamafactory: no program at /nowhere/python"),
        ("llamafactory", "llamafactory: no program at (nothing)"),
    ],
)
def test_a_wrong_python_is_refused(told: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--python", told])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_runs_elsewhere_imports_nothing_of_the_trainer() -> None:
    """At the top of a module; `worker` looks at the trainer's packing for ours alone."""
    folder = ROOT / "bench" / "trainer"
    names = ["worker", "clock", "inputs", "meter", "report", "settings", "shapes"]
    names += ["llamafactory_config", "unsloth_config", *(MODULES[peer] for peer in OWN_PYTHON)]
    found: dict[str, list[str]] = {}
    for name in names:
        for node in ast.parse((folder / f"{name}.py").read_text()).body:
            if isinstance(node, ast.ImportFrom):
                found.setdefault(node.module or "", []).append(name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    found.setdefault(alias.name, []).append(name)
    assert "transformers" in found
    ours = {module for module in found if module.startswith("finetune") or module == "pydantic"}
    benches = {module.removeprefix("bench.trainer.") for module in found if module.startswith("bench")}
    assert not ours
    assert benches <= set(names)


@pytest.mark.parametrize("setting", [setting for setting in TABLE if setting.peer == "llamafactory"], ids=str)
def test_a_row_is_the_same_work_for_llamafactory(setting: Setting) -> None:
    config = training_config(setting, Path("/model"), Path("/work"), cpu=False)
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * config["cutoff_len"] == 8192
    assert config["dataset"] in dataset_info(Path("/data.jsonl"))
    assert ("quantization_bit" in config) is setting.row.startswith("qlora")
    assert ("lora_rank" in config) is ("freeze" not in setting.row)
    assert config.get("neat_packing", False) is setting.row.startswith("real")
    assert ("disable_gradient_checkpointing" in config) is not setting.checkpointing
    assert config["max_steps"] > setting.warmup + setting.steps


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora-fastest/llamafactory-defaults", {"finetuning_type": "lora", "lora_rank": 16, "lora_alpha": 32}),
        ("lora-fastest/llamafactory-best", {"disable_gradient_checkpointing": True, "enable_liger_kernel": True}),
        ("lora-small/llamafactory-best", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        ("qlora-small/llamafactory-best-4-rows", {"per_device_train_batch_size": 4, "quantization_bit": 4}),
        ("freeze-last-2/llamafactory-best", {"finetuning_type": "freeze", "freeze_trainable_layers": 2}),
        ("real-lengths-1b/llamafactory-best", {"packing": True, "neat_packing": True}),
    ],
)
def test_variants_of_llamafactory(name: str, said: dict[str, Any]) -> None:
    config = training_config(BY_NAME[name], Path("/model"), Path("/work"), cpu=False)
    assert config | said == config
    if "defaults" in name:
        assert "enable_liger_kernel" not in config
        assert "disable_gradient_checkpointing" not in config


@pytest.mark.parametrize("setting", [setting for setting in TABLE if setting.peer == "unsloth"], ids=str)
def test_a_row_is_the_same_work_for_unsloth(setting: Setting) -> None:
    arguments = training_arguments(setting, Path("/work"))
    rows = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    assert rows * arguments["max_length"] == 8192
    assert arguments["packing"] is setting.row.startswith("real")
    assert arguments["max_steps"] > setting.warmup + setting.steps
    loaded = loading(setting, Path("/model"))
    assert loaded["max_seq_length"] == arguments["max_length"]
    assert loaded["use_gradient_checkpointing"] == ("unsloth" if "small" in setting.name else False)
    assert adapters(setting)["use_gradient_checkpointing"] == loaded["use_gradient_checkpointing"]
    assert adapters(setting)["r"] == 16


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("lora-fastest/unsloth-best", "Parameter", ["load_in_16bit"]),
        ("qlora-small/unsloth-small", "Params4bit", ["load_in_4bit"]),
        ("lora-fp8-fastest/unsloth-best", "Float8Tensor", []),
    ],
)
def test_unsloth_loads_the_base_in_one_precision(name: str, weights: str, said: list[str]) -> None:
    assert base(BY_NAME[name]) == weights
    loaded = loading(BY_NAME[name], Path("/model"))
    assert [key for key, value in loaded.items() if key.startswith("load_in") and value] == said


def test_the_clock_sees_every_step_of_transformers_trainer(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6], "attention_mask": [1, 1, 2, 0]},
        {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6], "attention_mask": [1, 1, 1, 1]},
    ]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=2, **sizes))
    options = {"logging_steps": 1, "max_steps": 9, "per_device_train_batch_size": 2, "use_cpu": True}
    options |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    meter = Meter(warmup=1, steps=3)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **options),
        train_dataset=rows,  # type: ignore[arg-type]
        callbacks=[Clock(meter, 2)],
    )
    with pytest.raises(Measured):
        trainer.train()
    assert meter.tokens_per_step == 7
    figures = meter.figures()
    assert len(figures["seconds"]) == 3
    assert len(figures["losses"]) == 4
    assert figures["losses"][-1] < figures["losses"][0]


def test_rows_without_a_mask_count_whole() -> None:
    assert real_tokens([{"input_ids": [1, 2, 3]}, {"input_ids": [1]}]) == 2


def test_rehearsals_leave_out_what_needs_a_gpu() -> None:
    peers = [setting for setting in TINY if setting.peer in OWN_PYTHON]
    assert PEER_RUN in [setting.name for setting in peers]
    assert all(setting.peer == "llamafactory" and not setting.training for setting in peers)
    full = BY_NAME[PEER_RUN]
    tiny = next(setting for setting in peers if setting.name == PEER_RUN)
    assert replace(tiny, shape="8b", length=2048, steps=15, warmup=5, rank=16) == full
