"""The layouts of rows that are read, and how each becomes a conversation or a text. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date, time
from typing import Any

from finetune_trainer.contract.vocabulary import DatasetFormat
from finetune_trainer.data.cells import maybe_json, maybe_turns
from finetune_trainer.data.conversation import Conversation, Document, Message, Sample
from finetune_trainer.data.rows import RowError, describe

Fields = Mapping[str, Any]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


_PAIRS = {
    DatasetFormat.ALPACA: ("instruction", "output"),
    DatasetFormat.PROMPT_COMPLETION: ("prompt", "completion"),
}


def recognise(row: Fields) -> tuple[DatasetFormat, str] | None:
    """The format of one row and what gave it away; None where it is none that is known."""
    keys = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= keys:
        return DatasetFormat.PREFERENCE, "rows have 'chosen' and 'rejected'"
    for key in ("messages", "conversations"):
        turns = maybe_json(row.get(key))
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            if "role" in turns[0]:
                return DatasetFormat.MESSAGES, f"rows have '{key}' of role and content"
            if "from" in turns[0]:
                return DatasetFormat.SHAREGPT, f"rows have '{key}' of from and value"
    for format_, (prompt, answer) in _PAIRS.items():
        if {prompt, answer} <= keys:
            return format_, f"rows have '{prompt}' and '{answer}'"
    if "text" in keys:
        return DatasetFormat.TEXT, "rows have 'text'"
    return None


def most_frequent(matches: Sequence[tuple[DatasetFormat, str] | None]) -> tuple[DatasetFormat, str] | None:
    """The format that most rows have, and why it was taken; the earlier one of two that are as frequent."""
    found = Counter(match for match in matches if match is not None)
    if not found:
        return None
    ((format_, reason), count), *_ = found.most_common(1)
    return format_, reason if count == len(matches) else f"{count} of the first {len(matches)} {reason}"


def parse(format_: DatasetFormat, row: Fields) -> Sample:
    """One row in the given format. Raises RowError, which says what the row lacks."""
    try:
        return _PARSERS[format_](row)
    except RowError as error:
        other = recognise(row)
        if other is None or other[0] is format_:
            raise
        raise RowError(f"{error}; it looks like the format '{other[0]}': {other[1]}") from None


def _parse_messages(row: Fields) -> Conversation:
    turns = _turns(row, "messages" if row.get("messages") is not None else "conversations")
    return _conversation(row, [_message(turn, position) for position, turn in enumerate(turns, 1)])


def _message(turn: Fields, position: int) -> Message:
    role = turn.get("role")
    if not isinstance(role, str) or not role:
        raise RowError(f"message {position} has no 'role'")
    message = {key: value for key, value in turn.items() if value is not None}
    content = _maybe_parts(turn.get("content"), position)
    if content is None and not message.get("tool_calls"):
        raise RowError(f"message {position} ({role}) has no 'content'")
    # Templates add strings to the content, and a call of a tool often comes without one.
    message["content"] = content or ""
    if "tool_calls" in message:
        message["tool_calls"] = _calls(maybe_json(message["tool_calls"]), f"message {position} ({role})")
    return {key: _plain(value) for key, value in message.items()}


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not calls:
        return []
    if not isinstance(calls, list):
        raise RowError(f"{where} has {describe(calls)} as 'tool_calls' instead of a list of calls")
    for number, call in enumerate(calls, 1):
        if not isinstance(call, dict):
            raise RowError(f"{where} has {describe(call)} as call {number} of 'tool_calls' instead of an object")
    return [_with_object(call) for call in calls]


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's interface has the arguments of a call as JSON text; chat templates write them as JSON themselves."""
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": maybe_json(function.get("arguments", {}))}}


def _maybe_parts(content: object, position: int) -> str | None:
    """Content is text, or a list of parts of which this trainer reads text alone."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"message {position} has {describe(content)} as 'content' instead of a string")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else describe(part)
            raise RowError(f"message {position} has a content part of type {kind!r}; only text can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _parse_sharegpt(row: Fields) -> Conversation:
    turns = _turns(row, "conversations" if row.get("conversations") is not None else "messages")
    return _conversation(row, [_sharegpt_message(turn, position) for position, turn in enumerate(turns, 1)])


def _sharegpt_message(turn: Fields, position: int) -> Message:
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise RowError(f"turn {position} has 'from' {speaker!r}, which is none of {known}")
    if not isinstance(value, str):
        raise RowError(f"turn {position} ({speaker}) has {describe(value)} as 'value' instead of a string")
    message: Message = {"role": SHAREGPT_ROLES[speaker], "content": value}
    if speaker == "function_call":
        message |= {"content": "", "tool_calls": _tool_calls(value, position)}
    return message


def _tool_calls(value: str, position: int) -> list[dict[str, Any]]:
    calls = maybe_json(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f"turn {position} (function_call) is not JSON with 'name' and 'arguments'")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": maybe_json(call.get("arguments", {}))}}
        for call in calls
    ]


def _parse_alpaca(row: Fields) -> Conversation:
    question = _string(row, "instruction")
    if row.get("input"):
        question = "\n".join(part for part in (question, _string(row, "input")) if part)
    messages = [*_history(row.get("history")), {"role": "user", "content": question}]
    return _conversation(row, [*messages, {"role": "assistant", "content": _string(row, "output")}])


def _parse_prompt_completion(row: Fields) -> Conversation:
    prompt, completion = maybe_turns(row.get("prompt")), maybe_turns(row.get("completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        return _parse_messages({**row, "messages": [*prompt, *completion]})
    pair = [
        {"role": "user", "content": _string(row, "prompt")},
        {"role": "assistant", "content": _string(row, "completion")},
    ]
    conversation = _conversation(row, pair)
    return replace(conversation, is_plain=conversation.tools is None and len(conversation.messages) == len(pair))


def _history(history: object) -> list[Message]:
    """Earlier exchanges, as pairs of an instruction and an answer."""
    pairs = maybe_json(history) if history else []
    if not isinstance(pairs, list):
        raise RowError(f"has {describe(pairs)} as 'history' instead of a list of pairs")
    messages = []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(f"exchange {number} of 'history' is not a pair of strings")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _parse_text(row: Fields) -> Document:
    return Document(_string(row, "text"))


def _parse_preference(row: Fields) -> Sample:
    raise RowError("pairs of 'chosen' and 'rejected' need a preference objective")


_PARSERS: dict[DatasetFormat, Callable[[Fields], Sample]] = {
    DatasetFormat.MESSAGES: _parse_messages,
    DatasetFormat.SHAREGPT: _parse_sharegpt,
    DatasetFormat.ALPACA: _parse_alpaca,
    DatasetFormat.PROMPT_COMPLETION: _parse_prompt_completion,
    DatasetFormat.TEXT: _parse_text,
    DatasetFormat.PREFERENCE: _parse_preference,
}


def _conversation(row: Fields, messages: list[Message]) -> Conversation:
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no turn of the assistant, so nothing to learn from it")
    if row.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _string(row, "system")}, *messages]
    tools = _plain(maybe_json(row.get("tools"))) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("'tools' is not a list of JSON schemas")
    return Conversation(tuple(messages), tuple(_schema(tool) for tool in tools) if tools else None)


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    """Templates expect what OpenAI's interface has; LLaMA-Factory's data sets have the inner object alone."""
    return {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool


def _turns(row: Fields, key: str) -> list[Fields]:
    turns = maybe_json(row.get(key))
    if turns is None:
        raise RowError(f"no '{key}'; its fields are {_names(row)}")
    if not isinstance(turns, list) or not turns:
        raise RowError(f"'{key}' is {'an empty list' if turns == [] else describe(turns)}, not a list of turns")
    for position, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {position} of '{key}' is {describe(turn)}, not an object")
    return turns


def _string(row: Fields, key: str) -> str:
    value = row.get(key)
    if value is None:
        raise RowError(f"no '{key}'; its fields are {_names(row)}")
    if not isinstance(value, str):
        raise RowError(f"has {describe(value)} as '{key}' instead of a string")
    return value


def _names(row: Fields) -> str:
    return ", ".join(repr(str(key)[:40]) for key in list(row)[:8]) or "none"


def _plain(value: Any) -> Any:
    """What JSON can say of a value: a Parquet column may hold dates, decimals and bytes, which no template writes and
    no file of prompts could keep. Raises RowError."""
    try:
        return _json_value(value)
    except RecursionError:
        raise RowError("nested too deeply") from None


def _json_value(value: Any) -> Any:
    match value:
        case str() | bool() | int() | float() | None:
            return value
        case dict():
            return {str(key): _json_value(item) for key, item in value.items()}
        case list() | tuple():
            return [_json_value(item) for item in value]
        case date() | time():
            return value.isoformat()
    return str(value)
