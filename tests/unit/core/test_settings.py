"""Settings out of the environment: what is read, and what is said of what cannot be."""

from __future__ import annotations

import pytest

from finetune_operator.errors import FinetuneError
from finetune_operator.settings import GpuType, Settings

MIG = '[{"resource": "nvidia.com/mig-3g.40gb", "memory": "40Gi", "nodeSelector": {"zone": "a"}}]'


def test_groups_lists_and_json() -> None:
    read = Settings.from_env(
        {
            "FINETUNE_WATCH_NAMESPACES": "a, b,",
            "FINETUNE_PERMISSIONS__SERVICE_ACCOUNTS": " a , b, ,",
            "FINETUNE_TRAINER__GPU_MEMORY": "141Gi",
            "FINETUNE_TRAINER__GPU_TYPES": MIG,
            "FINETUNE_PERMISSIONS__REMOTE_CODE": "true",
            "FINETUNE_OPERATOR_SERVICE_HOST": "10.0.0.1",
            "HOME": "/home/me",
        }
    )
    assert read.watch_namespaces == ("a", "b") and read.permissions.remote_code
    assert read.permissions.service_accounts == ("a", "b")
    assert read.trainer.gpu_types == (
        GpuType(resource="nvidia.com/mig-3g.40gb", memory="40Gi", node_selector={"zone": "a"}),
    )
    assert read.trainer.gpu_memory_of("nvidia.com/mig-3g.40gb") == "40Gi"
    assert read.trainer.gpu_memory_of("nvidia.com/gpu") == "141Gi"


@pytest.mark.parametrize(("value", "user"), [(None, 65532), ("1001", 1001), ("", None)])
def test_the_user_of_pods(value: str | None, user: int | None) -> None:
    environment = {} if value is None else {"FINETUNE_TRAINER__RUN_AS_USER": value}
    assert Settings.from_env(environment).trainer.run_as_user == user


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FINETUNE_METRICS_PORT", "http", "FINETUNE_METRICS_PORT: "),
        ("FINETUNE_LOG_FORMAT", "xml", "FINETUNE_LOG_FORMAT: "),
        ("FINETUNE_TRAINER__S3_ENDPOIN", "x", "FINETUNE_TRAINER__S3_ENDPOIN: Extra inputs"),
        ("FINETUNE_TRAINER__GPU_MEMORY", "80GB", "FINETUNE_TRAINER__GPU_MEMORY: "),
        ("FINETUNE_TRAINER__GPU_TYPES", "[{", "FINETUNE_TRAINER__GPU_TYPES: "),
        ("FINETUNE_TRAINER__RUN_AS_USER", "0", "FINETUNE_TRAINER__RUN_AS_USER: "),
        ("FINETUNE_TRAINER__RUN_AS_USER", "trainer", "FINETUNE_TRAINER__RUN_AS_USER: "),
        ("FINETUNE_TRAINER__GPU_TYPES", '[{"memory": "1Gi"}]', "FINETUNE_TRAINER__GPU_TYPES[0].resource: "),
        ("FINETUNE_PROGRESS_TLS_SECRET", "tls", "FINETUNE_TRAINER__PROGRESS_URL"),
        ("FINETUNE_PROGRESS_SERVICE", "progress", "FINETUNE_ADDRESS"),
    ],
)
def test_what_is_wrong_is_named(variable: str, value: str, said: str) -> None:
    with pytest.raises(FinetuneError) as caught:
        Settings.from_env({variable: value})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("value", "within"),
    [
        ("FINETUNE_TRAINER__IMAGE", "FINETUNE_TRAINER__IMAGE__TAG"),
        ("FINETUNE_TRAINER", "FINETUNE_TRAINER__IMAGE"),
        ("FINETUNE_NAMESPACE", "FINETUNE_NAMESPACE__A__B"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_value_and_something_within_it(value: str, within: str, turned: bool) -> None:
    names = [within, value] if turned else [value, within]
    with pytest.raises(FinetuneError) as caught:
        Settings.from_env(dict.fromkeys(names, "x"))
    assert str(caught.value) == f"{within}: {value} is set as well; remove one of them"


def test_a_certificate_that_the_operator_makes_has_somebody_to_serve() -> None:
    made = {"FINETUNE_PROGRESS_TLS_SECRET": "tls"}
    dashboard = {"FINETUNE_DASHBOARD__PORT": "8444", "FINETUNE_DASHBOARD__SERVICE": "d", "FINETUNE_ADDRESS": "10.0.0.1"}
    progress = {"FINETUNE_TRAINER__PROGRESS_URL": "https://p.system.svc:8443"}
    own = {"FINETUNE_NAMESPACE": "system"}
    assert Settings.from_env(made | progress | own).certificate_hosts == ("p.system.svc",)
    assert Settings.from_env(made | dashboard | own).certificate_hosts == ("d.system.svc",)
    assert Settings.from_env(made | progress | dashboard | own).certificate_hosts == ("p.system.svc", "d.system.svc")
    plain = {"FINETUNE_TRAINER__PROGRESS_URL": "http://p.system.svc:8443"}
    for wrong in ({}, plain, plain | dashboard):
        with pytest.raises(FinetuneError, match="FINETUNE_TRAINER__PROGRESS_URL"):
            Settings.from_env(made | wrong)
