"""What both sides take."""

from __future__ import annotations

from tests.unit.api.manifests import GATE, HELD_OUT, Accepted
from tests.unit.api.objective_cases import OBJECTIVES_ACCEPTED

ACCEPTED = (
    Accepted("minimal"),
    *(Accepted(name, spec) for name, spec in OBJECTIVES_ACCEPTED),
    Accepted("longest-name", name="a" * 40),
    Accepted("one-letter-name", name="a"),
    Accepted("freeze-ids", {"method": "freeze", "layers": {"ids": [15, 1, 1]}}),
    Accepted("freeze-ranges", {"method": "freeze", "layers": {"ranges": ["8-15"], "also": ["lm_head", "norm"]}}),
    Accepted("unfreeze", {"method": "full", "layers": {"all": True, "unfreeze": {"every": 100}}}),
    Accepted("qlora", {"method": "qlora", "quantization": {}, "lora": {"variant": "lora+"}}),
    Accepted("fp8", {"method": "qlora", "quantization": {"type": "fp8", "keepTransposed": "always"}}),
    Accepted(
        "adapters",
        {
            "adapters": [
                {"name": "a"},
                {"name": "b-2", "dataset": {"uri": "s3://b/x"}, "layers": {"last": 2}, "lora": {"rank": 4}},
                {"name": "c", "training": {"learningRate": 1e-3, "scheduler": "linear", "maxSteps": 5}},
            ]
        },
    ),
    Accepted("loftq", {"method": "qlora", "lora": {"variant": "loftq"}, "output": {"merge": "dequantized"}}),
    Accepted(
        "patterns", {"lora": {"rankPattern": {"layers.8-15.mlp": 64, "[qv]_proj": 8}, "alphaPattern": {"mlp": 9}}}
    ),
    Accepted("prefix", {"method": "prefix", "prompt": {"virtualTokens": 4, "projection": True, "projectionSize": 9}}),
    Accepted(
        "scheduler-options",
        {
            "training": {
                "scheduler": "warmup_stable_decay",
                "schedulerOptions": {"decayRatio": 0.2, "decayType": "1-sqrt"},
            }
        },
    ),
    Accepted("merge-dequantized", {"method": "qlora", "output": {"merge": "dequantized"}}),
    Accepted("cpu", {"resources": {"gpus": 0, "cpu": 2, "memory": "4Gi"}, "training": {"batchSize": 7}}),
    Accepted("two-nodes", {"resources": {"gpus": 16}, "training": {"batchSize": 32, "microBatchSize": 2}}),
    Accepted("odd-nodes", {"resources": {"gpus": 12, "gpusPerNode": 6}, "training": {"batchSize": 24}}),
    Accepted(
        "offload",
        {
            "parallelism": {
                "strategy": "deepspeed",
                "zeroStage": 3,
                "offload": {"optimizer": "cpu", "parameters": "cpu"},
                "deepspeed": {"zero_optimization": {"stage3_max_live_parameters": 1e9}},
            }
        },
    ),
    Accepted("gates", {"evaluation": {"gates": [GATE, {"metric": "accuracy", "min": 0.1}]}, "dataset": HELD_OUT}),
    Accepted("validation-count", {"dataset": {"validation": {"count": 5}}}),
    Accepted("mask-history", {"dataset": {"maskHistory": True}}),
    Accepted("template-by-name", {"dataset": {"template": "chatml"}}),
    Accepted("template-as-text", {"dataset": {"template": "{%- for m in messages -%}\n{{ m.content }}{% endfor %}"}}),
    Accepted("columns-and-tags", {"dataset": {"columns": {"prompt": "ask"}, "tags": {"roleTag": "role"}}}),
    Accepted("sources", {"dataset": {"uri": ..., "sources": [{"uri": "hf://datasets/o/n"}, {"uri": "file:x.jsonl"}]}}),
    Accepted("nulls", {"training": {"maxSteps": None, "seed": None}, "layers": None, "resources": {"gpus": None}}),
    Accepted(
        "pods",
        {
            "trainer": {"podTemplate": {"spec": {"hostNetwork": None, "volumes": [{"name": "x", "emptyDir": {}}]}}},
            "scheduling": {"nodeSelector": {"a.b/c": "d"}, "tolerations": [{"operator": "Exists"}]},
        },
    ),
)
