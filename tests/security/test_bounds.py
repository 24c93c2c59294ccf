"""Every parser is bounded: in memory, in time, in depth."""

from __future__ import annotations

import gzip
import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from finetune_operator.api.documents import read_documents
from finetune_operator.cli.app import app
from finetune_operator.errors import FinetuneError, InvalidManifest
from finetune_operator.progress_protocol import MAX_BODY_BYTES
from finetune_operator.settings import Settings
from finetune_trainer.contract import TerminationMessage, select
from finetune_trainer.errors import InputMissing, UsageError
from finetune_trainer.layers import layout_of
from finetune_trainer.model import empty_model, load_model, read_config, read_tokenizer
from finetune_trainer.model_files import check_model
from fuzz.targets_http import request, server
from tests.trainer_jobs import save_tiny_model, trainer_config

MEBIBYTE = 2**20


# ---- manifests, options, settings ----

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
MAPS = "a0: &a0 {k: v}\n" + "".join(f"a{i + 1}: &a{i + 1} {{x: *a{i}, y: *a{i}}}\n" for i in range(40))
YAML = {
    "a billion laughs": LAUGHS,
    "a billion laughs of maps": MAPS,
    "merged again and again": "a0: &a0 {k: v}\n"
    + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}], k{i}: *a{i}}}\n" for i in range(30)),
    "nesting": "[" * 100_000,
    "an anchor within itself": "a: &a [*a]",
    "a million digits": "a: " + "1" * 1_000_000,
    "more than a MiB": "a: " + "b" * 2**21,
    "a Python object": "a: !!python/object/apply:os.system [true]",
}
QUICK = {
    "digits and a letter": "a: " + "1" * 1_000_000 + "x",
    "digits, a dot, and a letter": "a: 1." + "1" * 1_000_000 + "x",
    "underscores": "a: " + "1_" * 500_000 + "x",
    "thousands of merges": "x: &a {q: 1}\n" + "".join(f"m{i}:\n  <<: *a\n" for i in range(7000)),
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_a_bomb_of_yaml_is_refused_at_once(text: str, tmp_path: Path) -> None:
    began = time.process_time()
    with pytest.raises(InvalidManifest):
        read_documents(text)
    path = tmp_path / "finetune.yaml"
    path.write_text(text, encoding="utf-8")
    for command in (["validate", str(path)], ["plan", str(path)], ["convert", str(path)]):
        answer = CliRunner().invoke(app, command)
        assert answer.exit_code != 0 and "Traceback" not in answer.output
        assert answer.exception is None or isinstance(answer.exception, FinetuneError | SystemExit)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", QUICK.values(), ids=QUICK)
def test_odd_yaml_takes_time_in_proportion_to_its_length(text: str) -> None:
    began = time.process_time()
    assert len(read_documents(text)) == 1
    assert time.process_time() - began < 5


@pytest.mark.parametrize("wrong", [{"step": -1}, {"step": 10**20}, {"resumedFrom": 10**20}, {"exitCode": 10**20}])
def test_a_number_that_no_status_holds_makes_no_termination_message(wrong: dict[str, int]) -> None:
    said = {"exitCode": 70, "reason": "InternalError", "message": "", "step": 5}
    assert TerminationMessage.decode(json.dumps(said)) is not None
    assert TerminationMessage.decode(json.dumps({**said, **wrong})) is None


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 100_000, '[{"resource": ' + "[" * 50_000])
def test_settings_that_no_parser_should_meet_name_the_variable(text: str) -> None:
    with pytest.raises(FinetuneError, match="FINETUNE_TRAINER__GPU_TYPES"):
        Settings.from_env({"FINETUNE_TRAINER__GPU_TYPES": text})


def test_settings_that_contradict_each_other_name_the_variable() -> None:
    with pytest.raises(FinetuneError, match="FINETUNE_TRAINER__IMAGE: FINETUNE_TRAINER is set as well"):
        Settings.from_env({"FINETUNE_TRAINER": "x", "FINETUNE_TRAINER__IMAGE": "y"})


# ---- models ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """A model, to be broken."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in whole.iterdir():
        os.link(file, folder / file.name)
    return folder


def put(path: Path, content: bytes) -> None:
    """In place of a link: the others keep the file."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"]
)
@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"{"], ids=["lists", "objects", "cut off"])
def test_json_of_a_model_is_looked_at_before_any_library_reads_it(name: str, content: bytes, model: Path) -> None:
    put(model / name, content)
    with pytest.raises(UsageError, match=f"{name} of hf://a/b is not JSON"):
        check_model("hf://a/b", model, ["model.safetensors"])


@pytest.mark.parametrize(("name", "mebibytes"), [("config.json", 64), ("tokenizer.json", 256)])
def test_a_huge_file_of_a_model_is_refused_unread(name: str, mebibytes: int, model: Path) -> None:
    put(model / name, b"")
    os.truncate(model / name, mebibytes * MEBIBYTE + 1)
    with pytest.raises(UsageError, match=f"larger than {mebibytes} MiB"):
        check_model("hf://a/b", model, ["model.safetensors"])


ODD_CONFIGS: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": "x"},
    {"num_hidden_layers": 2.5},
    {"hidden_size": 10**18},
    {"num_attention_heads": 0},
    {"model_type": ["a"]},
    {"model_type": None},
    {"rope_scaling": [1]},
    {"rope_scaling": {"rope_type": "x"}},
    {"hidden_act": "__class__"},
    {"hidden_act": 3},
    {"id2label": 3},
    {"dtype": "__import__"},
    {"vocab_size": None},
    {"rms_norm_eps": "a"},
]


@pytest.mark.parametrize("changes", ODD_CONFIGS, ids=str)
def test_an_odd_configuration_is_the_users_error(changes: dict[str, Any], model: Path) -> None:
    put(model / "config.json", json.dumps(json.loads((model / "config.json").read_text()) | changes).encode())
    with pytest.raises(UsageError, match=r"^spec\.model\.uri: "):
        empty_model(read_config(model))


ODD_TOKENIZERS: list[dict[str, Any]] = [
    {"model": {"type": "Evil"}},
    {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}},
    {"added_tokens": [{"id": 1}]},
    {"added_tokens": 3},
    {"normalizer": {"type": "Sequence", "normalizers": "x"}},
]


@pytest.mark.parametrize("changes", ODD_TOKENIZERS, ids=str)
def test_an_odd_tokenizer_is_the_users_error(changes: dict[str, Any], model: Path) -> None:
    put(model / "tokenizer.json", json.dumps(json.loads((model / "tokenizer.json").read_text()) | changes).encode())
    with pytest.raises(InputMissing, match=r"^spec\.model\.uri: no usable tokenizer"):
        read_tokenizer(model)


def header(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


WEIGHTS = {
    "empty": b"",
    "a header of 8 EiB": header(b"{}", 2**63),
    "a header of 1 GiB": header(b"{}", 2**30),
    "a nested header": header(b'{"a":' * 50_000),
    "no JSON": header(b"\xff" * 16),
    "a tensor of 2^60 bytes": header(b'{"w":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}')
    + b"0000",
    "a tensor beyond the end": header(b'{"w":{"dtype":"F32","shape":[1024],"data_offsets":[0,4096]}}'),
    "negative offsets": header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}') + b"0000",
    "overlapping tensors": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    + b"0000",
}


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_with_a_lying_header_are_the_users_error(content: bytes, model: Path) -> None:
    layout = layout_of(empty_model(read_config(model)))
    config = trainer_config(model, model / "none")
    put(model / "model.safetensors", content)
    with pytest.raises(InputMissing, match=r"^spec\.model\.uri: the weights in model cannot be read"):
        load_model(model, config, layout, select(layout, config.method, None), torch.device("cpu"))


# ---- reports and messages ----


def chunked(size: int) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (size, b" " * size)


REQUESTS: dict[str, tuple[bytes, tuple[int | None, ...]]] = {
    "a body that says it is large": (request(b"", "Content-Length: 9999999999"), (413,)),
    "a body that is large": (
        request(b" " * (MAX_BODY_BYTES + 1), f"Content-Length: {MAX_BODY_BYTES + 1}"),
        (400, 413),
    ),
    "a large body in chunks": (request(chunked(8 * MEBIBYTE), "Transfer-Encoding: chunked"), (400, 413)),
    "chunks of a byte": (request(b"1\r\n \r\n" * 100_000 + b"0\r\n\r\n", "Transfer-Encoding: chunked"), (400, 413)),
    "a nested body": (request(b"[" * 60_000, "Content-Length: 60000"), (400,)),
    "a huge number": (request(b"9" * 60_000, "Content-Length: 60000"), (400,)),
    "a header of 1 MiB": (request(b"", "X: " + "a" * MEBIBYTE), (400, 431)),
    "100,000 headers": (request(b"", *["A: b"] * 100_000), (400, 431)),
    "two lengths": (request(b"{}", "Content-Length: 2", "Content-Length: 3"), (400,)),
    "a length and chunks": (request(b"{}", "Content-Length: 2", "Transfer-Encoding: chunked"), (400,)),
    "an expectation that is no text": (
        request(b"{}", "Content-Length: 2", "Expect: x").replace(b"Expect: x", b"Expect: \xff\xfe"),
        (400,),
    ),
    "an expectation of a page that is not there": (b"GET /x HTTP/1.1\r\nHost: a\r\nExpect: \xff\r\n\r\n", (405,)),
    "a negative length": (request(b"{}", "Content-Length: -1"), (400,)),
    "a packed body": (request(gzip.compress(b" " * 2**24), "Content-Encoding: gzip"), (400, 413)),
}


@pytest.mark.parametrize(("sent", "answers"), REQUESTS.values(), ids=REQUESTS)
def test_the_progress_server_bounds_what_it_reads(sent: bytes, answers: tuple[int | None, ...]) -> None:
    assert server().answer(sent) in (*answers, None), "an answer, or the connection is closed"
    body = b'{"trainerStatus": {}}'
    assert server().answer(request(body, f"Content-Length: {len(body)}")) == 200, "the next one is served"


def test_a_token_that_is_no_text_is_refused() -> None:
    sent = request(b"", "Content-Length: 0").replace(b".good", b".\xff\xfegood")
    assert server().answer(sent) == 401


@pytest.mark.parametrize("text", ["[" * 100_000, '{"exitCode": ' + "9" * 100_000, "a" * 10_000_000, '{"a":' * 5000])
def test_a_termination_message_that_is_none_is_none(text: str) -> None:
    assert TerminationMessage.decode(text) is None


def test_a_long_termination_message_fits_what_a_kubelet_reads() -> None:
    message = TerminationMessage(exit_code=70, reason="InternalError", message='\U0001f600\\"\n' * 100_000)
    assert len(message.encode().encode()) <= 4096
    assert TerminationMessage.decode(message.encode()) is not None
