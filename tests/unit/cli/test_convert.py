"""`finetune convert`, in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from finetune_operator.api.parse import load_manifests
from finetune_operator.cli import main
from tests.unit.convert.configs import config

Result = tuple[int, str, str]
Cli = Callable[..., Result]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Call the command line in a folder with a training configuration: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    Path("my_Lora.yaml").write_text(yaml.safe_dump(config(finetuning_type="lora", lora_rank=4)))

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.argv", ["finetune", "convert", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_the_manifest_on_standard_output_is_valid_and_the_notes_are_elsewhere(cli: Cli) -> None:
    code, out, err = cli("my_Lora.yaml", "--output", "s3://models/it")
    (job,) = load_manifests(out)
    assert code == 0 and job.name == "my-lora" and job.spec.output.uri == "s3://models/it"
    assert "carried  lora_rank: 4  lora.rank" in err.splitlines()
    assert "valid as it is" in err


def test_what_is_missing_is_said_and_the_exit_code_is_0(cli: Cli) -> None:
    code, out, err = cli("my_Lora.yaml")
    assert code == 0 and "uri: saves/it" in out
    said = err.split("to be decided before it can be applied:")[1]
    assert said.strip().startswith("spec.output.uri: 'saves/it'") and len(said.strip().splitlines()) == 1


def test_a_new_file_and_never_one_that_is_there(cli: Cli) -> None:
    assert cli("my_Lora.yaml", "-o", "job.yaml", "--name", "Other", "--gpus", "4", "--output", "s3://models/it")[0] == 0
    (job,) = load_manifests(Path("job.yaml"))
    assert (job.name, job.spec.resources.gpus, job.spec.training.batch_size) == ("other", 4, 32)
    before = Path("job.yaml").read_bytes()
    code, out, err = cli("my_Lora.yaml", "-o", "job.yaml")
    assert (code, out) == (2, "") and "job.yaml: exists already" in err
    assert Path("job.yaml").read_bytes() == before
    code, _, err = cli("my_Lora.yaml", "-o", "no/such/job.yaml")
    assert code == 2 and "cannot be written" in err


def test_notes_go_to_standard_output_where_the_manifest_does_not(cli: Cli) -> None:
    code, out, err = cli("my_Lora.yaml", "-o", "job.yaml")
    assert code == 0 and err == "" and "carried  finetuning_type" in out and "apiVersion" not in out


def test_dataset_info(cli: Cli) -> None:
    Path("info.json").write_text(json.dumps({"mine": {"hf_hub_url": "org/mine"}}))
    config_text = yaml.safe_dump(config(dataset="mine"))
    code, out, _ = cli("-", "--dataset-info", "info.json", "--output", "s3://models/it", stdin=config_text)
    (job,) = load_manifests(out)
    assert code == 0 and job.name == "job" and job.spec.dataset.uri == "hf://datasets/org/mine"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcde", "bcdef", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not one map of options"),
        ("- 1\n", "not one map of options"),
        ("a: 1\n---\nb: 2\n", "not one map of options"),
        ("model_name_or_path: !!python/object/apply:os.system [ls]\n", "tag"),
        ("a: [", "line"),
        (BOMB, "aliases written out"),
        ("a: " + "[" * 100, "nested"),
        ("x" * (2**20 + 1), "larger than 1 MiB"),
        ("hello: world\n", "no training configuration of LLaMA-Factory"),
        ("stage: sft\nstage: dpo\n", "second time"),
    ],
    ids=["empty", "list", "two", "code", "broken", "bomb", "deep", "large", "other", "repeated"],
)
def test_unusable_input_is_code_2_and_writes_nothing(cli: Cli, text: str, said: str) -> None:
    Path("bad.yaml").write_text(text)
    code, out, err = cli("bad.yaml", "-o", "job.yaml")
    assert (code, out) == (2, "") and said in err and "Traceback" not in err and "internal error" not in err
    assert not Path("job.yaml").exists()


def test_a_missing_file(cli: Cli) -> None:
    code, _, err = cli("none.yaml")
    assert code == 2 and "none.yaml: cannot be read" in err


def test_text_of_strangers_stays_on_its_line(cli: Cli) -> None:
    text = json.dumps(config(finetuning_type="lora\n- evil: 1", run_name="[red]x[/red]\x1b[31m", **{"a\nb": 1}))
    code, out, err = cli("-", stdin=text)
    assert code == 0 and "\x1b[31m" not in err and "[red]x[/red]" in err
    assert yaml.safe_load(out)["spec"]["method"] == "lora\n- evil: 1"
    assert any(line.startswith("unknown  a b: 1") for line in err.splitlines())
