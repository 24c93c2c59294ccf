"""Code that comes with a model runs only where the administrator, and then the user, said so."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.acceptance import accept
from finetune_operator.constants import Reason
from finetune_operator.settings import Permissions, Settings, TrainerDefaults
from finetune_trainer.contract.outcome import ExitCode
from finetune_trainer.errors import InputMissing, TrainerError
from finetune_trainer.merging.__main__ import main
from finetune_trainer.model import empty_model, read_config, read_tokenizer
from tests.builders import observed_job
from tests.security.test_paths import result_manifest
from tests.trainer_jobs import save_tiny_model, trainer_config

TRUSTING = {"trustRemoteCode": True}


def test_a_job_may_not_ask_for_it_unless_the_administrator_allows_it() -> None:
    job = observed_job(model=TRUSTING)
    fact, spec = accept(job, Permissions(), TrainerDefaults())
    assert spec is None and fact.reason == Reason.NOT_PERMITTED
    assert fact.message.startswith("spec.model.trustRemoteCode: ") and "permissions.remoteCode" in fact.message
    assert accept(job, Permissions(remote_code=True), TrainerDefaults())[1] is not None


def test_it_is_off_unless_somebody_says_so() -> None:
    assert not Settings.from_env({}).permissions.remote_code
    assert Settings.from_env({"FINETUNE_PERMISSIONS__REMOTE_CODE": "true"}).permissions.remote_code


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "the-code-ran"
    yield path
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def model(tmp_path: Path, marker: Path) -> Path:
    """A model whose folder holds code that leaves a mark when it is imported."""
    folder = save_tiny_model(tmp_path / "model")
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n", encoding="utf-8")
    return folder


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")


AUTO = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoModelForSequenceClassification": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", None],
}


@pytest.mark.parametrize("kind", ["llama", "evil"])
def test_code_in_a_models_folder_does_not_run(kind: str, model: Path, marker: Path) -> None:
    rewrite(model / "config.json", auto_map=AUTO, model_type=kind)
    rewrite(model / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="EvilTokenizer")
    for read in (lambda: empty_model(read_config(model)), lambda: read_tokenizer(model)):
        try:
            read()
        except TrainerError as error:
            assert error.message.startswith("spec.model.uri: ")
    assert not marker.exists()


def test_a_tokenizer_that_is_code_is_refused(model: Path, marker: Path) -> None:
    rewrite(model / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="EvilTokenizer")
    rewrite(model / "config.json", auto_map=AUTO, model_type="evil")
    with pytest.raises(InputMissing, match="no usable tokenizer"):
        read_tokenizer(model)
    assert not marker.exists()


def merge(folder: Path, output: Path, *more: str) -> int:
    return main([str(folder), "--output", str(output), *more])


def test_a_manifest_does_not_say_whether_code_runs_where_it_is_merged(
    model: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(model / "config.json", auto_map=AUTO)
    config = trainer_config(model, tmp_path / "d")
    config = config.model_copy(update={"model": config.model.model_copy(update={"trust_remote_code": True})})
    manifest = result_manifest("adapter/x") | {"files": [], "configuration": json.loads(config.to_json())}
    manifest["baseModel"] = {
        "uri": config.model.uri,
        "configSha256": hashlib.sha256((model / "config.json").read_bytes()).hexdigest(),
        "architecture": "X",
        "parameters": 1,
    }
    result = tmp_path / "result"
    (result / "adapter").mkdir(parents=True)
    (result / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert merge(result, tmp_path / "merged") == ExitCode.USAGE
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "merged").exists()
    # With it the code is run, which is what was asked for.
    merge(result, tmp_path / "merged", "--trust-remote-code")
    assert marker.exists()
