"""The commands that run nothing, in this process."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator import __version__
from finetune_operator.cli import main
from finetune_operator.errors import ClusterError
from finetune_operator.local.buckets import StoreError

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip

Result = tuple[int, str, str]
Cli = Callable[..., Result]


def manifest(**spec: Any) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "toy"},
            "spec": {
                "model": {"uri": "file:model"},
                "dataset": {"uri": "s3://data/a.jsonl", "maxLength": 64},
                "training": {"batchSize": 4},
                "output": {"uri": "s3://models/toy"},
                **spec,
            },
        }
    )


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Call the command line in a folder with a job and its model: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "job.yaml").write_text(manifest())

    def call(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.argv", ["finetune", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_help_is_there_at_once() -> None:
    program = "from finetune_operator.cli import main; import sys; sys.argv = ['finetune', '--help']; main()"
    best = 99.0
    for _ in range(3):
        begun = os.times()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        ended = os.times()
        # CPU time: the wall clock of a busy machine says nothing about the program.
        best = min(best, ended.children_user + ended.children_system - begun.children_user - begun.children_system)
        assert "Usage: finetune" in done.stdout
    assert best < 0.5


def test_help_imports_neither_the_api_nor_rich() -> None:
    program = (
        "import sys; sys.argv = ['finetune', 'run', '--help']\n"
        "from finetune_operator.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = ('finetune_operator.api.v1alpha1', 'rich.console', 'boto3', 'yaml', 'torch')\n"
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(cli: Cli) -> None:
    assert cli("version") == (0, f"{__version__}\n", "")


def test_a_usage_error_is_code_2(cli: Cli) -> None:
    code, _, error = cli("run", "--no-such-option")
    assert code == 2 and "--no-such-option" in error


def test_validate_tells_every_problem_of_every_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(manifest(method="lorra", training={"batchSize": 0}))
    code, out, err = cli("validate", "bad.yaml", "missing.yaml", "job.yaml")
    assert code == 2
    assert out == "job.yaml: toy is valid\n"
    assert "bad.yaml: " in err and "spec.method" in err and "spec.training.batchSize" in err
    assert "missing.yaml: cannot be read" in err
    assert "Traceback" not in err


def test_validate_tells_what_this_version_cannot_do(cli: Cli, tmp_path: Path) -> None:
    asked = {"torchCompile": "always", "cacheFrozenPrefix": "always", "batchSize": 2}
    sharded = manifest(training=asked, resources={"gpus": 2}, parallelism={"strategy": "fsdp"})
    (tmp_path / "sharded.yaml").write_text(sharded)
    code, out, err = cli("validate", "sharded.yaml", "job.yaml")
    assert code == cli("plan", "sharded.yaml")[0] == 3
    assert out == "job.yaml: toy is valid\n"
    assert [line.split(" ", 2)[:2] for line in err.splitlines()] == [["sharded.yaml:", "toy:"]] * 2
    assert "spec.training.torchCompile: always cannot be kept: strategy fsdp" in err
    assert "spec.training.cacheFrozenPrefix: strategy fsdp" in err


def test_validate_reads_standard_input_in_both_ways(cli: Cli) -> None:
    assert cli("validate", "-", stdin=manifest()) == (0, "-: toy is valid\n", "")
    assert cli("validate", "-f", "-", stdin=manifest())[0] == 0
    code, _, err = cli("validate", "-", stdin="")
    assert code == 2 and "standard input" in err
    assert cli("validate")[0] == 2


def test_plan_shows_parameters_blocks_and_memory(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(manifest(method="freeze", layers={"ids": [3, 1]}))
    code, out, err = cli("plan", "job.yaml", "--gpu-memory", "16Gi")
    assert (code, err) == (0, "")
    for expected in (
        "freeze",
        "2 of 4",
        "·■·■",
        "1 pod with 1 GPU",
        "4 = ",
        "of 16 GiB",
        "weights",
        "total",
    ):
        assert expected in out, expected
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    total = 4 * block + 2 * 256 * 64 + 64
    assert f"{2 * block:,} trained of {total:,}" in out


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("never", "checkpointing    off"),
        ("always", "activations are recomputed\n"),
        ("offload", "activations are recomputed from inputs in host memory\n"),
    ],
)
def test_plan_says_what_is_recomputed(cli: Cli, tmp_path: Path, choice: str, text: str) -> None:
    training = {"batchSize": 4, "gradientCheckpointing": choice}
    (tmp_path / "job.yaml").write_text(manifest(training=training))
    code, out, err = cli("plan", "job.yaml")
    assert (code, err) == (0, "")
    assert text in "\n".join(line.rstrip() for line in out.splitlines())
    assert ("in each pod (training.gradientCheckpointing: offload)" in out) is (choice == "offload")


def test_plan_for_programs(cli: Cli) -> None:
    code, out, _ = cli("plan", "-f", "-", "-o", "json", stdin=manifest(model={"uri": f"file://{Path.cwd()}/model"}))
    assert code == 0
    plan = json.loads(out)["plan"]
    assert (plan["nodes"], plan["gpusPerNode"], plan["fits"]) == (1, 1, True)
    code, out, _ = cli("plan", "job.yaml", "-o", "yaml")
    assert yaml.safe_load(out)["plan"] == plan


@pytest.mark.parametrize(
    ("spec", "arguments", "code", "message"),
    [
        ({"method": "full"}, ("--gpu-memory", "1Mi"), 3, "GPU"),
        ({"layers": {"ids": [4]}}, (), 3, "spec.layers.ids"),
        ({"layers": {"modules": ["key_proj"]}}, (), 3, "k_proj"),
        ({}, ("--gpu-memory", "lots"), 2, "--gpu-memory 'lots' is not a size"),
        ({"method": "lorra"}, (), 2, "spec.method"),
        ({}, ("--model-mirror", "nowhere"), 2, "--model-mirror nowhere"),
    ],
)
def test_what_cannot_be_planned(
    cli: Cli, tmp_path: Path, spec: dict[str, Any], arguments: tuple[str, ...], code: int, message: str
) -> None:
    (tmp_path / "job.yaml").write_text(manifest(**spec))
    found, out, err = cli("plan", "job.yaml", *arguments)
    assert (found, out) == (code, "")
    assert message in err and "Traceback" not in err


def test_a_model_that_cannot_be_read_is_planned_blindly_and_says_so(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").unlink()
    code, out, _ = cli("plan", "job.yaml")
    assert code == 0 and "config.json" in out and "trained of" not in out


def test_a_mirrored_model_is_found(cli: Cli, tmp_path: Path) -> None:
    mirror = tmp_path / "cache" / "finetune" / "models" / "org"
    mirror.mkdir(parents=True)
    (tmp_path / "model").rename(mirror / "name")
    (tmp_path / "job.yaml").write_text(manifest(model={"uri": "hf://org/name"}))
    code, out, _ = cli("plan", "job.yaml", "-o", "json")
    assert code == 0 and json.loads(out)["plan"]["totalParameters"] > 0


def test_render_prints_what_the_operator_would_create(cli: Cli) -> None:
    text = manifest(model={"uri": "s3://models/base"})
    code, out, _ = cli("render", "-", stdin=text)
    assert code == 0
    assert out.startswith("# uid 00000000-0000-0000-0000-000000000000 stands for")
    config, job = yaml.safe_load_all(out)
    assert (config["kind"], job["kind"], job["metadata"]["name"]) == ("ConfigMap", "PyTorchJob", "toy-1")
    code, out, err = cli("render", "-f", "-", "-o", "json", stdin=text)
    assert json.loads(out)["items"] == [config, job]
    assert "stands for" in err


def test_render_refuses_what_no_cluster_could_run(cli: Cli) -> None:
    code, out, err = cli("render", "job.yaml")
    assert (code, out) == (2, "") and "spec.model.uri" in err


def test_several_jobs_in_one_file_are_too_many_for_one_plan(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(manifest() + "---\n" + manifest().replace("toy", "other"))
    code, _, err = cli("plan", "two.yaml")
    assert code == 2 and "2 jobs in one file (toy, other)" in err
    assert cli("plan")[0] == 2


@pytest.mark.parametrize("command", ["plan", "render", "run"])
def test_a_job_is_named_in_one_way(cli: Cli, command: str) -> None:
    code, out, err = cli(command, "job.yaml", "-f", "other.yaml")
    assert (code, out) == (2, "") and "job.yaml" in err and "other.yaml" in err and "name one of them" in err


def test_status_of_nothing_and_of_a_cluster(cli: Cli) -> None:
    assert cli("status") == (0, "no runs in finetune-runs\n", "")
    code, _, err = cli("status", "toy")
    assert code == 2 and "no run in toy or finetune-runs/toy" in err
    code, _, err = cli("status", "toy", "-n", "ml")
    assert code == 3 and "kubectl get finetunejob toy -n ml" in err


def test_a_defect_is_one_message_and_debug_shows_where(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise RuntimeError("odd [bold]thing")

    monkeypatch.setattr("finetune_operator.cli.validate.validate_command", broken)
    code, _, err = cli("validate", "job.yaml")
    assert code == 70 and "internal error: RuntimeError: odd [bold]thing" in err and "Traceback" not in err
    code, _, err = cli("validate", "job.yaml", "--debug")
    assert code == 70 and "Traceback" in err


def test_a_failure_on_the_way_is_code_1(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise ClusterError("disk full\nfree it")

    monkeypatch.setattr("finetune_operator.cli.validate.validate_command", failing)
    assert cli("validate", "job.yaml") == (1, "", "error: disk full\nfree it\n")


def test_a_store_that_does_not_answer_is_code_1(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise StoreError("s3://data/a.jsonl: connection refused")

    monkeypatch.setattr("finetune_operator.cli.validate.validate_command", failing)
    assert cli("validate", "job.yaml") == (1, "", "error: s3://data/a.jsonl: connection refused\n")


@pytest.mark.parametrize(
    ("number", "file", "code", "message"),
    [
        (errno.ENOSPC, "/full/x", 1, "error: /full/x: No space left on device\n"),
        (errno.EMFILE, None, 1, "error: Too many open files\n"),
        (errno.ENOENT, "/x", 70, "error: internal error: FileNotFoundError: [Errno 2] No such file or directory: '/x'"),
    ],
)
def test_what_the_machine_refuses_is_no_defect(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, number: int, file: str | None, code: int, message: str
) -> None:
    def failing(*_: object) -> int:
        raise OSError(number, os.strerror(number), file)

    monkeypatch.setattr("finetune_operator.cli.validate.validate_command", failing)
    found, out, err = cli("validate", "job.yaml")
    assert (found, out) == (code, "") and err.startswith(message)


def test_a_broken_run_does_not_hide_the_others(cli: Cli, tmp_path: Path) -> None:
    from finetune_operator.local.cluster import LocalCluster

    for name, text in (("broken", "{"), ("empty", '{"version": 1, "resourceVersion": 0, "objects": []}'), ("good", "")):
        folder = tmp_path / "finetune-runs" / name
        folder.mkdir(parents=True)
        if text:
            (folder / "state.json").write_text(text)
        else:
            LocalCluster(folder / "state.json", time.time).apply_job(yaml.safe_load(manifest()))
    code, out, err = cli("status")
    assert code == 1 and "finetune-runs/good" in out and "broken" not in out
    assert "finetune-runs/broken/state.json cannot be read" in err and "finetune-runs/empty holds no job" in err
    code, out, err = cli("status", "-o", "json")
    assert code == 1 and len(json.loads(out)["items"]) == 1 and "cannot be read" in err


def test_a_run_is_shown_while_nobody_runs_it(cli: Cli, tmp_path: Path) -> None:
    from finetune_operator.local.cluster import LocalCluster

    folder = tmp_path / "finetune-runs" / "toy"
    folder.mkdir(parents=True)
    cluster = LocalCluster(folder / "state.json", time.time)
    job = yaml.safe_load(manifest())
    job["status"] = {"phase": "Running", "progress": {"step": 3}, "attempts": {"current": 1}}
    cluster.apply_job(job)
    code, out, _ = cli("status", "toy")
    assert code == 0
    assert "Running (not running now; finetune run continues it)" in out and "step 3" in out
    assert cli("status", folder)[1] == out
    assert "finetune-runs/toy" in cli("status")[1]
    assert json.loads(cli("status", "toy", "-o", "json")[1])["status"] == job["status"]
    assert yaml.safe_load(cli("status", "-o", "yaml")[1])["items"][0]["metadata"]["name"] == "toy"
