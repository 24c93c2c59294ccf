"""`python -m finetune_trainer.merging RESULT`: a stand-alone model from a finished run. `finetune merge` calls it."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from finetune_trainer.contract import MergeReport, ResultManifest, TrainerConfig, select
from finetune_trainer.contract.config import ModelConfig, S3Config
from finetune_trainer.contract.manifest import BaseModelRecord
from finetune_trainer.contract.outcome import ExitCode
from finetune_trainer.contract.vocabulary import LoraBias, LoraVariant, Merge, Method
from finetune_trainer.errors import TrainerError, UsageError
from finetune_trainer.explain import explain
from finetune_trainer.merging.result_files import ResultFiles, open_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

FORMATS = ("safetensors", "onnx", "gguf")
REPORT = "merge.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge, write the model to a new folder and say what changed, as JSON on standard output. The exit code is one of
    the trainer's."""
    options = _parser().parse_args(arguments)
    try:
        report = _merge(options)
    except (Exception, KeyboardInterrupt) as error:  # whatever it was, it is told in one line
        return _fail(explain(error))
    json.dump({"output": str(options.output), **report}, sys.stdout)
    sys.stdout.write("\n")
    return int(ExitCode.OK)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune merge", description="Make a stand-alone model of a finished run.")
    parser.add_argument("result", help="a run's folder, or s3://bucket/prefix of a run or of a job's output")
    parser.add_argument("--into", choices=[Merge.BASE16.value, Merge.DEQUANTIZED.value], default=Merge.BASE16.value)
    parser.add_argument("--model", help="the base model: hf://org/name, s3://bucket/prefix or a folder")
    parser.add_argument("--output", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    parser.add_argument("--endpoint", help="of the S3 store, where it is not AWS")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    return parser


def _merge(options: argparse.Namespace) -> dict[str, object]:
    output: Path = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output {output}: it is there already, and not empty; name a new folder")
    _check_format(options.format)
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=output.absolute().parent) as scratch:
        found = open_result(options.result, Path(scratch) / "result", endpoint=options.endpoint)
        target = Path(scratch) / "model"
        target.mkdir()
        report = _write(found, options, Path(scratch), target)
        (target / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        # A folder appears at once and whole, or not at all.
        if output.exists():
            output.rmdir()
        target.rename(output)
    return report


def _check_format(name: str) -> None:
    # torch takes seconds to import; what is missing is told at once.
    if name == "onnx":
        from finetune_trainer.merging.onnx import check_onnx

        check_onnx()
    elif name == "gguf":
        from finetune_trainer.merging.gguf import find_converter

        find_converter()


def _write(found: ResultFiles, options: argparse.Namespace, scratch: Path, target: Path) -> dict[str, object]:
    # What bitsandbytes says of optional kernels when it is imported is of no use here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from finetune_trainer.results.artefact import save_whole

    transformers_logging.disable_progress_bar()
    manifest = found.manifest
    report: dict[str, object] = {"job": manifest.job, "uid": manifest.uid, "format": options.format}
    config = _configuration(manifest, trusted=options.trust_remote_code)
    if manifest.artifact == "model":
        if options.format == FORMATS[0]:
            raise UsageError(f"{found.artefact} is a stand-alone model already; use it as it is, or name a --format")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(  # nosec B615  # a folder on this disk
            found.artefact, use_safetensors=True, trust_remote_code=config.model.trust_remote_code, dtype="auto"
        )
    else:
        model, merge_report = _merged(found, config, options, scratch)
        report |= merge_report.model_dump(by_alias=True, mode="json")
    tokenizer = AutoTokenizer.from_pretrained(  # nosec B615  # a folder on this disk
        found.artefact, trust_remote_code=config.model.trust_remote_code
    )
    tokenizer.save_pretrained(target)
    if options.format == "onnx":
        from finetune_trainer.merging.onnx import export_onnx

        _say("exporting to ONNX, and running it")
        model.config.save_pretrained(target)
        report["largestDifferenceInOnnxRuntime"] = export_onnx(model, target)
        return report
    whole = target if options.format == FORMATS[0] else scratch / "whole"
    _say("writing the model")
    save_whole(model, tokenizer, whole)
    if options.format == "gguf":
        from finetune_trainer.merging.gguf import export_gguf, find_converter

        _say("converting to GGUF")
        tokenizer.save_pretrained(whole)
        export_gguf(whole, target, find_converter())
    return report


def _merged(
    found: ResultFiles, config: TrainerConfig, options: argparse.Namespace, scratch: Path
) -> tuple[PreTrainedModel, MergeReport]:
    from finetune_trainer.merging.merge import MergeSource, merge_model
    from finetune_trainer.model import DTYPES

    into = Merge(options.into)
    if config.method in (Method.PREFIX, Method.PROMPT, Method.ADAPTER):
        raise UsageError(f"{found.artefact}: method {config.method} does not change weights; load it with PEFT")
    if config.head is not None:
        raise UsageError(f"{found.artefact}: a head has no language model to merge into; load it as its card says")
    if config.lora is not None and config.lora.variant is LoraVariant.LOFTQ and into is Merge.BASE16:
        raise UsageError(f"{found.artefact}: a loftq adapter belongs to its quantized base; use --into dequantized")
    if into is Merge.DEQUANTIZED and config.quantization is None:
        raise UsageError(f"--into dequantized: the base of {found.artefact} was not quantized; use base16")
    base = _base_model(config, found.manifest.base_model, options, scratch)
    source = MergeSource(
        base,
        found.artefact,
        "delta" if found.manifest.artifact == "delta" else "adapter",
        into,
        _quantization(config, base),
        config.model.trust_remote_code,
        DTYPES[config.training.precision],
    )
    merged = merge_model(source, _say)
    return merged.model, merged.report


def _quantization(config: TrainerConfig, base: Path) -> QuantizationConfigMixin | None:
    """How the base was stored in training."""
    if config.quantization is None:
        return None
    from finetune_trainer.layers import layout_of
    from finetune_trainer.methods.qlora import quantization_of
    from finetune_trainer.model import empty_model, read_config

    trusted = config.model.trust_remote_code
    layout = layout_of(empty_model(read_config(base, trust_remote_code=trusted), trust_remote_code=trusted))
    bias = config.lora.bias if config.lora is not None else LoraBias.NONE
    return quantization_of(config.quantization, layout, select(layout, config.method, config.layers, bias))


def _base_model(config: TrainerConfig, record: BaseModelRecord, options: argparse.Namespace, scratch: Path) -> Path:
    """The folder of the base: the one that was trained on, or the one that `--model` names.

    Raises UsageError where the first has changed since, and what `fetch_model` raises.
    """
    from finetune_trainer.sources import fetch_model
    from finetune_trainer.storage import ObjectStore
    from finetune_trainer.workspace import Workspace

    named: str | None = options.model
    if named is not None and "://" not in named:
        if not (Path(named) / "config.json").is_file():
            raise UsageError(f"--model {named}: there is no model in this folder")
        _compare_base(Path(named), named, record, chosen=True)
        return Path(named)
    model = config.model if named is None else ModelConfig(uri=named, revision=None)
    if model.uri == record.uri and record.revision is not None:
        # A branch has moved on since, and no revision at all means the newest one.
        model = model.model_copy(update={"revision": record.revision})
    _say(f"looking for the base model {model.uri}")
    endpoint = options.endpoint if named is not None else options.endpoint or config.s3.endpoint
    store = ObjectStore(S3Config(endpoint=endpoint, region=config.s3.region))
    folder = fetch_model(model, store, Workspace.at(scratch / "work")).path
    _compare_base(folder, model.uri, record, chosen=named is not None)
    return folder


def _compare_base(folder: Path, place: str, record: BaseModelRecord, *, chosen: bool) -> None:
    """Compare a base's `config.json` with that of the model that was trained on, whose weights nobody kept a digest of.

    A base that somebody has `chosen` may be a copy that was saved anew: it is only warned of. Raises UsageError for
    others.
    """
    if hashlib.sha256((folder / "config.json").read_bytes()).hexdigest() == record.config_sha256:
        return
    trained = record.uri if record.revision is None else f"{record.uri} at {record.revision}"
    what = f"{place}: its config.json is not the one that was trained on ({trained})"
    if not chosen:
        raise UsageError(f"{what}; it has changed since. Name a copy of that model with --model")
    _say(f"warning: {what}; the merged model is of use only where the weights are the same")


def _configuration(manifest: ResultManifest, *, trusted: bool) -> TrainerConfig:
    """What the run was configured with. Whether code may run here is not the manifest's to say."""
    if not manifest.configuration:
        raise UsageError("this result does not hold its configuration; it was written by an older trainer")
    try:
        config = TrainerConfig.model_validate(manifest.configuration)
    except ValidationError as error:
        raise UsageError(
            f"this result was written by another version of the trainer ({manifest.versions.get('finetune-operator')});"
            " merge it with that one"
        ) from error
    if config.model.trust_remote_code and not trusted:
        raise UsageError(
            f"this result belongs to a model that brings its own code ({config.model.uri}), which would run here; read"
            " it, and add --trust-remote-code"
        )
    return config


def _say(what: str) -> None:
    sys.stderr.write(f"{what}\n")
    sys.stderr.flush()


def _fail(error: TrainerError) -> int:
    sys.stderr.write(f"error: {error.message}\n")
    return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
