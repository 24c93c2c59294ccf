"""Text of a job, of a data set or of a model stays text: in pods, in chat templates, in commands and in messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api.parse import parse_manifest
from finetune_operator.api.v1alpha1 import FineTuneJobSpec
from finetune_operator.errors import InvalidManifest
from finetune_operator.render import config_map, pytorch_job
from finetune_operator.render.pod import COMMAND
from finetune_trainer.contract import TrainerConfig
from finetune_trainer.data.conversation import Conversation
from finetune_trainer.data.rows import RowError
from finetune_trainer.data.template import ChatTemplate
from finetune_trainer.errors import UsageError
from tests.builders import job_manifest, spec_wire
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.render.cases import make

EXPANDS = "$(AWS_SECRET_ACCESS_KEY)"
FREE_TEXT: dict[str, dict[str, Any]] = {
    "model uri": {"model": {"uri": f"s3://models/{EXPANDS}"}},
    "revision": {"model": {"revision": EXPANDS}},
    "dataset uri": {"dataset": {"uri": f"s3://data/{EXPANDS}"}},
    "dataset path in a claim": {"dataset": {"uri": f"pvc://claim/{EXPANDS}"}},
    "column": {"dataset": {"columns": {"prompt": EXPANDS}}},
    "template": {"dataset": {"template": f"{{{{ messages }}}}{EXPANDS}"}},
    "module": {"layers": {"last": 1, "modules": [EXPANDS]}},
    "rank pattern": {"lora": {"rankPattern": {EXPANDS: 4}}},
    "deepspeed": {"parallelism": {"strategy": "deepspeed", "deepspeed": {EXPANDS: EXPANDS}}},
    "output uri": {"output": {"uri": f"s3://models/{EXPANDS}"}},
    "endpoint": {"output": {"s3": {"endpoint": f"https://s3.example/{EXPANDS}"}}},
    "region": {"output": {"s3": {"region": EXPANDS}}},
}


def strings(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a manifest, keys included, with the path to it."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield path, name
            yield from strings(child, (*path, name))
    elif isinstance(node, list):
        for child in node:
            yield from strings(child, path)
    elif isinstance(node, str):
        yield path, node


@pytest.mark.parametrize("changes", FREE_TEXT.values(), ids=FREE_TEXT)
def test_kubernetes_expands_no_variable_in_a_jobs_text(changes: dict[str, Any]) -> None:
    """`$(NAME)` in commands, arguments and variables of a pod is replaced by the kubelet, with secrets too."""
    attempt = make(**changes)
    found = {path for path, text in strings(pytorch_job(attempt)) if EXPANDS in text}
    assert not found, "the pod holds none of it"
    ((path, text),) = ((path, text) for path, text in strings(config_map(attempt)) if EXPANDS in text)
    assert path[0] == "data", "a ConfigMap's data are not expanded"
    assert TrainerConfig.model_validate_json(text)


def test_the_command_is_a_list_and_the_same_for_every_job() -> None:
    for changes in FREE_TEXT.values():
        container = pytorch_job(make(**changes))["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"][
            "containers"
        ][0]
        assert container["command"] == list(COMMAND) and "args" not in container


ODD_NAMES = {
    "job": lambda text: {**job_manifest(), "metadata": {"name": text}},
    "queue": lambda text: job_manifest(scheduling={"queue": text}),
    "priority class": lambda text: job_manifest(scheduling={"priorityClassName": text}),
    "runtime class": lambda text: job_manifest(scheduling={"runtimeClassName": text}),
    "secret": lambda text: job_manifest(output={"s3": {"secretRef": {"name": text}}}),
    "adapter": lambda text: job_manifest(adapters=[{"name": text}]),
    "gpu resource": lambda text: job_manifest(resources={"gpuResource": text}),
    "quantity": lambda text: job_manifest(resources={"memory": text}),
    "claim": lambda text: job_manifest(dataset={"uri": f"pvc://{text}/x"}),
    "bucket": lambda text: job_manifest(output={"uri": f"s3://{text}/x"}),
}


@pytest.mark.parametrize("text", [EXPANDS, "a b", "a\nb: c", "a|b", "-a-", "{{a}}", "a;b", "A", "é", "a\0", ""])
@pytest.mark.parametrize("field", ODD_NAMES)
def test_what_becomes_a_name_or_a_label_is_one(field: str, text: str) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(ODD_NAMES[field](text))


def test_text_cannot_leave_its_place_in_yaml_or_json() -> None:
    odd = "x\n---\nkind: Secret\n\u2028'\"\\: #{[&*!|>%@`"
    spec = FineTuneJobSpec.model_validate(spec_wire(dataset={"columns": {"prompt": odd}}))
    attempt = make(dataset={"columns": {"prompt": odd}})
    rendered = yaml.safe_dump(config_map(attempt))
    (document,) = yaml.safe_load_all(rendered)
    columns = json.loads(document["data"]["config.json"])["dataset"]["columns"]
    assert spec.dataset.columns is not None
    assert columns["prompt"] == spec.dataset.columns.prompt == odd


CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__}' | format('') }}{{ (''.format).__self__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('touch MARKER') }}",
    "{{ strftime_now.__self__.__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__.__builtins__ }}",
    "{% set x = messages.__class__ %}{{ x }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ range(1000000000) | list }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(escape: str, tmp_path: Path) -> None:
    marker = tmp_path / "escaped"
    template = CHAT + escape.replace("MARKER", str(marker)) + PROMPT
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    rendered = []
    try:
        chat = ChatTemplate(tiny_tokenizer(template), train_on_prompt=True)
        rendered = chat.render(Conversation(messages=turns))
    except (UsageError, RowError) as error:
        assert "Traceback" not in str(error)
    assert not marker.exists()
    for sample in rendered:
        assert not any(word in sample.text for word in ("<class", "<module", "<function", "root:", "subclasses"))


def test_text_of_a_data_set_is_no_template() -> None:
    chat = ChatTemplate(tiny_tokenizer(CHAT + PROMPT), train_on_prompt=True)
    said = "{{ 7 * 6 }}{% raw %}"
    turns = ({"role": "user", "content": said}, {"role": "assistant", "content": "b"})
    assert said in chat.render(Conversation(messages=turns))[0].text
