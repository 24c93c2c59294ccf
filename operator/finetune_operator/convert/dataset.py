"""The data, from the names that LLaMA-Factory's `dataset_info.json` explains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_operator.convert.draft import Draft, number, text, whole, words
from finetune_operator.convert.method import file_uri

_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
_REMOTE = "REMOTE:"
"""Before the name of a data set of the Hub in `dataset_dir`, which then holds `dataset_info.json` and the files."""
_USUAL_COLUMNS = {"chosen": ("chosen",), "rejected": ("rejected",), "kto_tag": ("kto_tag", "label")}
"""Names with which these are found without spec.dataset.columns, which cannot name them."""


@dataclass(frozen=True)
class _Source:
    """One data set."""

    uri: str
    found: bool
    layout: dict[str, Any]
    """`format`, `columns` and `tags` of spec.dataset."""
    lacks: tuple[str, ...] = ()
    """What its entry says that has no place."""
    samples: int | None = None


def carry_dataset(draft: Draft, objective: str, info: Mapping[str, Any] | None) -> None:
    """Sources, layout, template, length, packing, held-out data."""
    pretraining = draft.options.get("stage") == "pt"
    folder = draft.read("dataset_dir", text) or "data"
    names = draft.read("dataset", words)
    limit = draft.read("max_samples", whole)
    if limit is not None:
        draft.carry("max_samples", "dataset.maxSamples", limit, "of each source")
    if names is None:
        draft.put("dataset.uri", "")
        draft.hand("dataset", "is not set; say where the data is", "dataset.uri")
        sources = []
    else:
        sources = [_source(name, info, folder, pretraining=pretraining) for name in names]
        _sources(draft, names, sources, limit)
    _layout(draft, sources, pretraining=pretraining)
    _template(draft, pretraining=pretraining)
    draft.carry_given("cutoff_len", "dataset.maxLength", whole)
    _packing(draft, objective, pretraining=pretraining)
    _loss(draft, objective)
    _validation(draft, info, folder)
    if "dataset_dir" not in draft.options:
        return
    if info is None:
        draft.drop("dataset_dir", "its dataset_info.json says where the data is: give it with --dataset-info")
    else:
        draft.ours("dataset_dir", "stands in the URIs")


def _source(name: str, info: Mapping[str, Any] | None, folder: str, *, pretraining: bool) -> _Source:
    if "://" in name:
        return _Source(name, True, {})
    entry = (info or {}).get(name)
    if not isinstance(entry, Mapping):
        return _Source(name, False, {})
    uri = None
    if isinstance(entry.get("hf_hub_url"), str):
        uri = f"hf://datasets/{entry['hf_hub_url']}"
    elif isinstance(entry.get("cloud_file_name"), str):
        uri = entry["cloud_file_name"]
    elif isinstance(entry.get("file_name"), str) and not folder.startswith(_REMOTE):
        file = entry["file_name"]
        uri = file_uri(file if file.startswith("/") else f"{folder.rstrip('/')}/{file}")
    layout, lacks = _layout_of(entry, pretraining=pretraining)
    samples = entry.get("num_samples")
    return _Source(
        name if uri is None else uri,
        uri is not None,
        layout,
        tuple(lacks),
        samples if isinstance(samples, int) and not isinstance(samples, bool) else None,
    )


def _layout_of(entry: Mapping[str, Any], *, pretraining: bool) -> tuple[dict[str, Any], list[str]]:
    layout: dict[str, Any] = {}
    lacks = [name for name in ("script_url", "subset", "split", "folder") if entry.get(name)]
    formatting = str(entry.get("formatting", "alpaca"))
    columns = entry.get("columns")
    columns = columns if isinstance(columns, Mapping) else {}
    if pretraining:
        layout["format"] = "text"
    elif columns.get("kto_tag") and not entry.get("ranking") and formatting in _FORMATS:
        # The answers are judged one by one, whatever form the conversations have.
        layout["format"] = "unpaired"
    elif not entry.get("ranking") and formatting in _FORMATS:
        layout["format"] = _FORMATS[formatting]
    elif formatting not in _FORMATS:
        lacks.append(f"formatting {formatting}")
    for key, value in columns.items():
        if pretraining and key == "prompt":
            layout.setdefault("columns", {})["text"] = value
        elif key in _COLUMNS:
            layout.setdefault("columns", {})[key] = value
        elif value not in _USUAL_COLUMNS.get(key, ()):
            lacks.append(f"columns.{key}")
    tags = entry.get("tags")
    for key, value in tags.items() if isinstance(tags, Mapping) else ():
        if key in _TAGS:
            layout.setdefault("tags", {})["".join([key.split("_")[0], key.split("_")[1].title()])] = value
        else:
            lacks.append(f"tags.{key}")
    return layout, lacks


def _sources(draft: Draft, names: list[str], sources: list[_Source], limit: int | None) -> None:
    counts = [one.samples if limit is None or one.samples is None else min(limit, one.samples) for one in sources]
    if len(sources) == 1:
        draft.carry("dataset", "dataset.uri", sources[0].uri)
        if counts[0] is not None:
            draft.put("dataset.maxSamples", counts[0])
    else:
        entries = [
            {"uri": one.uri} if count is None else {"uri": one.uri, "maxSamples": count}
            for one, count in zip(sources, counts, strict=True)
        ]
        draft.carry("dataset", "dataset.sources", entries, ", ".join(one.uri for one in sources))
    at = "dataset.uri" if len(sources) == 1 else "dataset.sources"
    missing = [name for name, one in zip(names, sources, strict=True) if not one.found]
    if missing:
        draft.hand(
            "dataset",
            f"say where {', '.join(missing)} lies (s3://, hf://datasets/, pvc://, file:); --dataset-info reads "
            "LLaMA-Factory's dataset_info.json",
            at,
        )
    lacks = [f"{name}: {', '.join(one.lacks)}" for name, one in zip(names, sources, strict=True) if one.lacks]
    if lacks:
        draft.hand("dataset", f"in dataset_info.json, not carried: {'; '.join(lacks)}", at)
    if any(one.uri.startswith("file:") for one in sources):
        draft.hand(
            "dataset", "files on your machine are for `finetune run`; a cluster needs s3://, hf:// or pvc://", at
        )
    for option in ("mix_strategy", "interleave_probs"):
        if option in draft.options and draft.options[option] != "concat":
            draft.hand(option, "sources are joined here; `weight` of a source says how often it is seen", at)


def _layout(draft: Draft, sources: list[_Source], *, pretraining: bool) -> None:
    layouts = [one.layout for one in sources if one.found]
    if pretraining:
        draft.put("dataset.format", "text")
    if not layouts:
        return
    if any(one != layouts[0] for one in layouts):
        draft.hand(
            "dataset", "its data sets are laid out differently; bring them to one form, or let auto try", "dataset"
        )
        return
    for name, value in layouts[0].items():
        draft.put(f"dataset.{name}", value)


def _template(draft: Draft, *, pretraining: bool) -> None:
    name = draft.read("template", text)
    if name is None:
        return
    if pretraining:
        draft.ours("template", "plain text has none")
    elif name in ("chatml", "alpaca"):
        draft.carry("template", "dataset.template", name)
    elif name in ("default", "empty"):
        draft.hand(
            "template", "the model's own is used; a model without one needs chatml, alpaca or a Jinja text", "dataset"
        )
    else:
        draft.ours("template", "the model's own chat template is used, and saved with the result")


def _packing(draft: Draft, objective: str, *, pretraining: bool) -> None:
    given = [option for option in ("packing", "neat_packing") if option in draft.options]
    asked = any([draft.is_on(option) for option in given]) or (pretraining and "packing" not in given)
    packing = asked and objective == "sft"
    if given:
        draft.put("dataset.packing", packing)
    else:
        draft.assume("packing", "dataset.packing", packing)
    for option in given:
        if packing:
            draft.carry(option, "dataset.packing", True, "packed samples do not see each other")
        elif draft.is_on(option):
            draft.drop(option, "preference objectives look at each sample as a whole")
        else:
            draft.carry(option, "dataset.packing", False)


def _loss(draft: Draft, objective: str) -> None:
    """Over which parts of a sample the loss is taken."""
    for option, path in (("train_on_prompt", "trainOnPrompt"), ("mask_history", "maskHistory")):
        if not draft.is_on(option):
            if option in draft.options:
                draft.ours(option, "off")
        elif objective == "sft":
            draft.carry(option, f"dataset.{path}", True)
        else:
            draft.drop(option, "preference objectives learn from answers alone")


def _validation(draft: Draft, info: Mapping[str, Any] | None, folder: str) -> None:
    names, size = draft.read("eval_dataset", words), draft.read("val_size", number)
    if names is not None:
        source = _source(names[0], info, folder, pretraining=False)
        draft.carry("eval_dataset", "dataset.validation.uri", source.uri)
        if len(names) > 1:
            draft.hand("eval_dataset", "one source of held-out data only; the first was taken", "dataset.validation")
        if not source.found:
            draft.hand("eval_dataset", f"say where {names[0]} lies", "dataset.validation.uri")
        if size:
            draft.drop("val_size", "eval_dataset is set")
    elif size:
        path, value = ("fraction", size) if size < 1 else ("count", round(size))
        draft.carry("val_size", f"dataset.validation.{path}", value)
    if size == 0:
        draft.ours("val_size", "nothing is held out")
    if draft.is_on("predict_with_generate"):
        if names is None and not size:
            draft.drop("predict_with_generate", "nothing is held out")
        elif draft.spec["training"]["objective"] != "sft":
            draft.drop("predict_with_generate", "answers are written for objective sft")
        else:
            draft.carry(
                "predict_with_generate",
                "evaluation.metrics",
                ["perplexity", "accuracy", "bleu", "rouge"],
                "BLEU and ROUGE of answers to held-out questions",
            )
