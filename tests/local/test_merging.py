"""`python -m finetune_trainer.merging`: from a finished run to a stand-alone model, as `finetune merge` starts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_operator.local.seaweed import SeaweedServer
from finetune_trainer.contract import ExitCode
from finetune_trainer.merging.__main__ import main
from finetune_trainer.merging.gguf import CONVERTER
from finetune_trainer.storage import ObjectStore, S3Uri
from tests.local.test_methods_train import METHODS, download, job, load_by_its_card, run
from tests.quick_torch import quick_torch
from tests.s3 import connect
from tests.trainer_jobs import QUESTIONS, save_tiny_model, write_dataset

__all__ = ["quick_torch"]

Finished = Callable[[str], Path]


BUCKET = S3Uri("merging", "")


@pytest.fixture(scope="module")
def kept(seaweed: SeaweedServer) -> ObjectStore:
    """What the runs of this module are kept in."""
    seaweed.create_bucket(BUCKET.bucket)
    return connect(seaweed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, kept: ObjectStore) -> Finished:
    """`finished("lora")`: the folder of a result of that method, made once."""
    folder = tmp_path_factory.mktemp("finished")
    model = save_tiny_model(folder / "model", "llama-biased", tie_word_embeddings=True)
    held_out = write_dataset(folder / "heldout.jsonl", tuple((f"Tell me: {q}", a) for q, a in QUESTIONS[:3]))
    inputs = (model, write_dataset(folder / "train.jsonl"), held_out)

    def result(name: str) -> Path:
        if not (folder / name).exists():
            config = job(inputs, BUCKET.child(name), **METHODS[name])
            uri = run(config, kept, folder / f"work-{name}").uri
            download(kept, uri, folder / name)
            manifest = kept.get_bytes(S3Uri.parse(uri).child("manifest.json"))
            (folder / name / "manifest.json").write_bytes(manifest)
        return folder / name

    return result


def merge(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "freeze", "bitfit", "ia3"])
def test_a_merged_model_is_the_adapter_on_its_base(
    name: str, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "merged"
    assert merge(finished(name), "--output", output) == 0
    merged = AutoModelForCausalLM.from_pretrained(output)
    expected = logits(load_by_its_card(finished(name)))
    assert torch.allclose(logits(merged), expected, atol=2e-5)
    assert AutoTokenizer.from_pretrained(output).chat_template
    report = json.loads(capsys.readouterr().out)
    assert report["into"] == "base16" and report["largestLogitDifference"] < 1e-4 < report["largestLogit"]
    assert report["sameFirstChoice"] > 0.99
    assert json.loads((output / "merge.json").read_text()) == {k: v for k, v in report.items() if k != "output"}
    assert [path.name for path in output.parent.iterdir()] == ["merged"]


def test_a_quantized_base_is_merged_into_what_it_expands_to_or_into_the_original(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    differences = {}
    for into in ("dequantized", "base16"):
        assert merge(finished("qlora"), "--output", tmp_path / into, "--into", into) == 0
        differences[into] = json.loads(capsys.readouterr().out)["largestLogitDifference"]
    # The adapter was trained on the 4-bit base; the original differs from it by the quantization.
    assert differences["dequantized"] < 1e-4 < differences["base16"]
    expanded, original = (AutoModelForCausalLM.from_pretrained(tmp_path / into) for into in differences)
    assert not torch.allclose(logits(expanded), logits(original), atol=1e-3)
    assert not hasattr(expanded.config, "quantization_config")


def test_a_result_in_s3_by_its_run_and_by_its_job(
    finished: Finished, kept: ObjectStore, s3_environment: dict[str, str], tmp_path: Path
) -> None:
    finished("lora")
    job_uri = BUCKET.child("lora")
    run_uri = json.loads(kept.get_bytes(job_uri.child("latest.json")))["uri"]
    for number, uri in enumerate((str(job_uri), run_uri)):
        output = tmp_path / str(number)
        assert merge(uri, "--output", output, "--endpoint", kept.endpoint) == 0
        assert torch.allclose(
            logits(AutoModelForCausalLM.from_pretrained(output)), logits(load_by_its_card(finished("lora"))), atol=2e-5
        )


@pytest.mark.parametrize("name", ["lora", "full"])
def test_onnx_computes_the_same(
    name: str, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    assert merge(finished(name), "--output", tmp_path / "onnx", "--format", "onnx") == 0
    assert json.loads(capsys.readouterr().out)["largestDifferenceInOnnxRuntime"] < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    tokens = torch.arange(3, 60)[None].expand(2, -1)
    feed = {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}
    expected = logits(load_by_its_card(finished(name)))
    assert torch.allclose(torch.from_numpy(session.run(None, feed)[0])[:1], expected, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "onnx").chat_template


def test_gguf_is_left_to_the_converter_of_llama_cpp(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (finished("lora"), "--output", tmp_path / "gguf", "--format", "gguf")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert merge(*arguments) == ExitCode.USAGE
    assert "check out llama.cpp and set LLAMA_CPP" in capsys.readouterr().err
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert merge(*arguments) == ExitCode.USAGE
    assert f"there is no {CONVERTER} in it" in capsys.readouterr().err
    # Whatever the converter is: it gets a whole model, and its failure is told.
    (tmp_path / CONVERTER).write_text("import sys; sys.exit('Model LlamaForCausalLM is not supported')")
    assert merge(*arguments) == ExitCode.USAGE
    assert "Model LlamaForCausalLM is not supported" in capsys.readouterr().err
    (tmp_path / CONVERTER).write_text(
        "import pathlib, sys\n"
        "names = sorted(p.name for p in pathlib.Path(sys.argv[1]).iterdir())\n"
        "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text(' '.join(names))\n"
    )
    assert merge(*arguments) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        (tmp_path / "gguf" / "model.gguf").read_text().split()
    )


def test_what_is_refused(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, output = finished("lora"), tmp_path / "out"

    def refused(words: str, *arguments: Any) -> None:
        assert merge(*arguments) != 0
        assert words in capsys.readouterr().err
        assert not output.exists() or not (output / "model.safetensors").exists()

    refused("there is no manifest.json in it", tmp_path, "--output", output)
    refused("the base of", whole, "--output", output, "--into", "dequantized")
    refused("there is no model in this folder", whole, "--output", output, "--model", tmp_path)
    refused("does not change weights", finished("prefix"), "--output", output)
    refused("is a stand-alone model already", finished("full"), "--output", output)
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    refused("it is there already", whole, "--output", output)
    assert (output / "mine.txt").read_text() == "kept"
    shutil.rmtree(output)

    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    adapter = broken / "adapter" / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    adapter.write_bytes(content)
    refused("is not the file that manifest.json lists", broken, "--output", output)
    adapter.unlink()
    refused("is missing, which manifest.json lists", broken, "--output", output)
    (broken / "manifest.json").write_text("{}")
    refused("is not a result's manifest", broken, "--output", output)
