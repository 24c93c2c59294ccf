"""What the operator and its command line read: manifests, plans, model configurations, reports, conversions."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from finetune_operator.acceptance import accept
from finetune_operator.api.documents import read_documents
from finetune_operator.api.parse import load_manifests, parse_manifest
from finetune_operator.claims import claimed_caller
from finetune_operator.constants import PROGRESS_AUDIENCE
from finetune_operator.convert import convert
from finetune_operator.errors import FinetuneError, PlanningError
from finetune_operator.observed import JobRef, ObservedJob
from finetune_operator.planner import plan_job, read_model
from finetune_operator.progress_protocol import InvalidReport, parse_report
from finetune_operator.render import Attempt, config_map, pytorch_job
from finetune_operator.settings import Permissions, Settings, TrainerDefaults
from finetune_operator.shape import unplanned
from finetune_trainer.contract import LayerSelection, SelectionError, TerminationMessage, select
from finetune_trainer.contract.addresses import endpoint_problem
from finetune_trainer.contract.vocabulary import LoraBias, Method
from fuzz.inputs import ODD_TEXT, as_json, changed_bytes, changed_document, merged, values
from fuzz.runner import Target

GIBIBYTE = 2**30

SPEC: dict[str, Any] = {
    "model": {"uri": "hf://acme/small", "tokenSecretRef": {"name": "hf", "key": "token"}},
    "dataset": {"uri": "s3://data/qa.jsonl", "validation": {"fraction": 0.1}, "template": "chatml"},
    "method": "lora",
    "layers": {"ranges": ["0-1"], "modules": ["mlp", "self_attn.q_proj"], "also": ["norm"]},
    "lora": {"rank": 8, "rankPattern": {"*.q_proj": 4}},
    "training": {"batchSize": 8, "microBatchSize": "auto", "learningRate": 1e-4},
    "resources": {"gpus": 2, "gpusPerNode": 1, "memory": "8Gi"},
    "scheduling": {"queue": "team-a", "nodeSelector": {"a": "b"}, "tolerations": [{"key": "gpu"}]},
    "output": {"uri": "s3://models/qa", "s3": {"endpoint": "https://s3.example", "secretRef": {"name": "s3"}}},
    "evaluation": {"metrics": ["perplexity"], "gates": [{"metric": "perplexity", "max": 12}]},
    "trainer": {
        "image": "registry.example/trainer:1",
        "podTemplate": {
            "metadata": {"labels": {"team": "a"}},
            "spec": {
                "containers": [
                    {"name": "pytorch", "env": [{"name": "A", "value": "1"}], "securityContext": {"runAsUser": 5}},
                    {"name": "side", "image": "x", "securityContext": {"capabilities": {"drop": ["ALL"]}}},
                ],
                "volumes": [{"name": "v", "emptyDir": {}}],
                "securityContext": {"sysctls": [{"name": "kernel.shm_rmid_forced", "value": "1"}]},
            },
        },
    },
}
MINIMAL = {"model": {"uri": "hf://a/b"}, "dataset": {"uri": "pvc://c/d"}, "output": {"uri": "s3://models/x"}}
SPECS = (
    SPEC,
    MINIMAL,
    merged(SPEC, method="qlora", quantization={"type": "nf4"}),
    merged(MINIMAL, method="freeze", layers={"last": 2}),
    merged(MINIMAL, method="full", parallelism={"strategy": "deepspeed", "zeroStage": 3, "deepspeed": {"x": 1}}),
    merged(MINIMAL, training={"objective": "dpo"}, adapters=[{"name": "a", "layers": {"first": 1}}, {"name": "b"}]),
)


def manifest(spec: Any) -> dict[str, Any]:
    """Of a job with this spec."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "qa", "namespace": "team-a"},
        "spec": spec,
    }


YAML_SEEDS = (
    b"apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: a}\nspec:\n  model: {uri: hf://a/b}\n"
    b"  dataset: &d {uri: 's3://b/c'}\n  output: {uri: s3://bucket/x}\n  training: {learningRate: 1e-4, seed: 0x1F}\n"
    b"---\n# nothing\n---\nmerge: {<<: *d}\n",
    b"base: &a {k: 1, on: yes}\nlist:\n- <<: *a\n  k: 2\n- *a\n- [1.5, .inf, ~, 'x', \"\\u00e9\", 2001-01-01, 0o17]\n"
    b"text: |\n  a\n  b\nfolded: >-\n  c\n",
    as_json(manifest(MINIMAL)),
    as_json(manifest(SPEC)),
)
CONFIGS = (
    {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "intermediate_size": 128,
        "vocab_size": 320,
        "tie_word_embeddings": True,
    },
    {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": 320, "n_positions": 128},
    {
        "model_type": "qwen2_moe",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 320,
        "mlp_only_layers": [1],
    },
    {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 128,
            "vocab_size": 320,
        },
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "patch_size": 14},
    },
)
LLAMA_FACTORY = (
    {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": "meta-llama/Llama-3.1-8B-Instruct",
        "finetuning_type": "lora",
        "lora_target": "all",
        "dataset": "identity,mine",
        "template": "llama3",
        "cutoff_len": 2048,
        "output_dir": "saves/x",
        "per_device_train_batch_size": 1,
        "learning_rate": "1.0e-4",
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "val_size": 0.1,
    },
    {"stage": "dpo", "finetuning_type": "freeze", "freeze_trainable_layers": 2, "dataset": "x", "quantization_bit": 4},
)
REPORTS = (
    {
        "trainerStatus": {
            "progressPercentage": 12,
            "estimatedRemainingSeconds": 340,
            "metrics": [{"name": "loss", "value": "1.25"}, {"name": "current_step", "value": 7}],
            "lastUpdatedTime": "2027-01-15T07:00:00Z",
        }
    },
)
MESSAGES = (
    {
        "exitCode": 0,
        "reason": "Succeeded",
        "message": "done",
        "step": 4,
        "result": {
            "uri": "s3://b/runs/u",
            "manifestSha256": "0" * 64,
            "sizeBytes": 1,
            "trainableParameters": 1,
            "totalParameters": 2,
        },
    },
)
CLAIMS = (
    {
        "aud": [PROGRESS_AUDIENCE],
        "exp": 4_102_444_800,
        "kubernetes.io": {"namespace": "team-a", "pod": {"name": "qa-1-master-0", "uid": "u"}},
    },
)


def _yaml(text: bytes) -> None:
    read_documents(text)
    load_manifests(text)


def _job(spec: Any) -> None:
    """The way of a manifest through the operator: accepted, planned, rendered. What is rendered is JSON."""
    parsed = parse_manifest(manifest(spec)).spec
    job = ObservedJob(
        ref=JobRef("team-a", "qa"),
        uid="u",
        generation=1,
        resource_version="1",
        created_at=0.0,
        deleting=False,
        labels={},
        annotations={},
        spec=spec,
        status={},
    )
    defaults = TrainerDefaults(progress_url="https://progress", s3_secret="s3")
    fact, accepted = accept(job, Permissions(local_files=True), defaults)
    if accepted is None:
        assert fact.status == "False" and fact.message
        return
    try:
        plan = plan_job(accepted, CONFIGS[0], gpu_memory=80 * GIBIBYTE).plan
    except PlanningError:
        plan = unplanned(parsed)
    attempt = Attempt(job.ref, "u", 1, accepted, plan, defaults)
    json.dumps([pytorch_job(attempt), config_map(attempt)], allow_nan=False)


def _model(config: Any) -> None:
    spec = parse_manifest(manifest(MINIMAL)).spec
    plan_job(spec, config, gpu_memory=80 * GIBIBYTE)


def _convert(given: tuple[Any, Any]) -> None:
    options, dataset_info = given
    done = convert(options, name="a job", output="s3://bucket/x", dataset_info=dataset_info)
    assert [one.data for one in read_documents(done.text)] == [done.manifest], "the text is the manifest"


_LAYOUT = read_model(CONFIGS[0]).layout
_LAYERS: tuple[dict[str, Any], ...] = (
    {"last": 2},
    {"ids": [0, 3], "modules": ["mlp"]},
    {"ranges": ["1-2"], "also": ["lm_head", "norm"]},
    {},
)


def _layers(given: tuple[Any, Method]) -> None:
    layers, method = given
    select(_LAYOUT, method, LayerSelection.model_validate(layers), LoraBias.NONE)


def _termination(text: str) -> None:
    message = TerminationMessage.decode(text)
    assert message is None or len(message.encode().encode()) <= 4096


def _settings(environment: dict[str, str]) -> None:
    Settings.from_env(environment)


_variables = st.sampled_from(
    [
        "FINETUNE_TRAINER",
        "FINETUNE_TRAINER__IMAGE",
        "FINETUNE_TRAINER__GPU_TYPES",
        "FINETUNE_TRAINER__GPU_MEMORY",
        "FINETUNE_WATCH_NAMESPACES",
        "FINETUNE_PERMISSIONS",
        "FINETUNE_PERMISSIONS__REMOTE_CODE",
        "FINETUNE_PERMISSIONS__SERVICE_ACCOUNTS",
        "FINETUNE_PARALLEL_RECONCILES",
        "FINETUNE_RESYNC_SECONDS",
        "FINETUNE_ADDRESS",
        "FINETUNE_METRICS_PORT__X",
    ]
)
_texts = (
    st.sampled_from([*ODD_TEXT, "[" * 5000, '[{"resource": "a/b", "memory": "1Gi"}]', "true", "80Gi"])
    | values.map(lambda value: as_json(value).decode())
    | st.text(max_size=30)
)
_claims = changed_document(CLAIMS).map(lambda claims: as_json(claims))
_parts = st.binary(max_size=8).map(lambda data: data.decode("utf-8", "surrogateescape"))


def _token(given: tuple[str, bytes, str]) -> None:
    import base64

    head, claims, signature = given
    middle = base64.urlsafe_b64encode(claims).decode().rstrip("=")
    caller = claimed_caller(f"{head}.{middle}.{signature}", PROGRESS_AUDIENCE, 1.8e9)
    assert caller is None or f"{head}{signature}".isascii(), "a token of our audience can be sent on"
    claimed_caller(claims.decode("utf-8", "surrogateescape"), PROGRESS_AUDIENCE, 1.8e9)


_hosts = st.sampled_from(
    ["169.254.169.254", "[fd00:ec2::254]", "2852039166", "0xa9fea9fe", "s3.example", "[::1]", "169.254.43518", "%"]
)
_urls = st.tuples(st.sampled_from(["http://", "https://", "file://", ""]), _hosts | st.text(max_size=12), st.text())

OPERATOR_TARGETS = (
    Target("yaml", changed_bytes(YAML_SEEDS), _yaml, (FinetuneError,)),
    Target("job", changed_document(SPECS), _job, (FinetuneError, SelectionError)),
    Target("model-config", changed_document(CONFIGS), _model, (FinetuneError, SelectionError)),
    Target("convert", st.tuples(changed_document(LLAMA_FACTORY), st.none()), _convert, (FinetuneError,)),
    Target(
        "layers",
        st.tuples(changed_document(_LAYERS), st.sampled_from(list(Method))),
        _layers,
        (SelectionError, ValueError),
    ),
    Target(
        "report",
        changed_document(REPORTS).map(as_json) | changed_bytes([as_json(one) for one in REPORTS]),
        lambda body: parse_report(body, received_at=0.0),
        (InvalidReport,),
    ),
    Target("token", st.tuples(_parts, _claims | st.binary(max_size=40), _parts), _token),
    Target("termination", changed_document(MESSAGES).map(lambda one: as_json(one).decode()) | st.text(), _termination),
    Target("settings", st.dictionaries(_variables, _texts, max_size=4), _settings, (FinetuneError,)),
    Target("endpoint", _urls.map("".join), endpoint_problem),
)
