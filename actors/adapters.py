"""From the columns of public data sets to one form: a prompt and its responses, still as text.

An adapter is a pure function of a row. `auto` takes it from the row's columns; the others can be
named by `prompts.format` and `data.format`:

text        prompt; response, or chosen and rejected, or responses with rewards and labels
alpaca      AlpacaFarm: instruction, input; output, or output_1, output_2 and preference (1 or 2)
relabelled  the paper's relabelled AlpacaFarm and its Min, Mode and Skew Length sets: prompt, y_w,
            y_l, y_w_score, y_l_score; y_w and y_l repeat the prompt, or not
chat        UltraFeedback (binarised): chosen and rejected as lists of messages; UltraChat: messages
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.tables import DataError, Row, brief, require
from configs.choices import DataFormat

Message = dict[str, str]  # role and content
Text = str | list[Message]  # as it stands, or a conversation for the tokenizer's chat template

ASSISTANT = "<|assistant|>"  # before a response in the paper's own sets …
END = "<|endoftext|>"  # … and after it; Pythia's end token


@dataclass(frozen=True)
class Example:
    """One row. responses: without an end token, perhaps empty texts; none for a prompt alone.

    labels: 1 preferred or good, 0 not. rewards: as the row has them, not yet checked. None in
    either is unknown. tied: whether it prefers none of two responses.
    """

    prompt: Text
    responses: tuple[str, ...] = ()
    labels: tuple[int | None, ...] = ()
    rewards: tuple[float | None, ...] = ()
    tied: bool = False


def detect(values: Mapping[str, Any]) -> DataFormat:
    """The format that a row's columns are of; `text` where nothing else is certain."""
    given = {column for column, value in values.items() if value is not None}
    if {"y_w", "y_l"} <= given:
        return DataFormat.relabelled
    if any(isinstance(values.get(column), list) for column in ("chosen", "messages")):
        return DataFormat.chat
    if "instruction" in given and "prompt" not in given:
        return DataFormat.alpaca
    return DataFormat.text


def adapt(row: Row, form: DataFormat = DataFormat.auto, column: str = "prompt") -> Example:
    """The row as an Example. column: of the prompt in `text`. Raises DataError in one line."""
    if form is DataFormat.auto:
        form = detect(row.values)
    if form is DataFormat.text:
        return _text(row, column)
    return {
        DataFormat.alpaca: _alpaca, DataFormat.relabelled: _relabelled, DataFormat.chat: _chat,
    }[form](row)  # fmt: skip


def _text(row: Row, column: str) -> Example:
    prompt: Text
    if isinstance(row.values.get(column), list):
        prompt = _messages(row, column)
    else:
        prompt = _string(row, column)
    given = {name for name, value in row.values.items() if value is not None}
    if {"chosen", "rejected"} & given:
        return _pair(row, prompt, _string(row, "chosen"), _string(row, "rejected"))
    if "responses" in given:
        return _many(row, prompt)
    if "response" in given:
        return Example(prompt, (_string(row, "response"),), (None,), (None,))
    return Example(prompt)


def _many(row: Row, prompt: Text) -> Example:
    responses = row.values["responses"]
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise DataError(f"{row.where}: column 'responses' must be a list of texts")
    columns = []
    for name in ("labels", "rewards"):
        given = row.values.get(name)
        if given is None:
            given = [None] * len(responses)
        if not isinstance(given, list) or len(given) != len(responses):
            raise DataError(f"{row.where}: '{name}' must be a list, one for each response")
        columns.append(tuple(given))
    return Example(prompt, tuple(responses), columns[0], columns[1])


def _alpaca(row: Row) -> Example:
    instruction, given = _string(row, "instruction"), row.values.get("input")
    content = f"{instruction}\n{given}" if given else instruction
    prompt: Text = [{"role": "user", "content": content}]
    if row.values.get("preference") is None:
        output = row.values.get("output")
        responses = (output,) if isinstance(output, str) else ()
        unknown = ((None,), (None,)) if responses else ((), ())
        return Example(prompt, responses, *unknown)
    first, second = _string(row, "output_1"), _string(row, "output_2")
    preferred = row.values["preference"]
    if preferred in (0, 1.5):  # how AlpacaEval writes a draw
        return Example(prompt, (first, second), tied=True)
    if preferred not in (1, 2):
        raise DataError(f"{row.where}: preference {brief(repr(preferred), 40)} is neither 1 nor 2")
    return _pair(row, prompt, *((first, second) if preferred == 1 else (second, first)))


def _relabelled(row: Row) -> Example:
    prompt = _string(row, "prompt")
    better, worse = (_answer(prompt, _string(row, name)) for name in ("y_w", "y_l"))
    return _pair(row, prompt, better, worse, ("y_w_score", "y_l_score"))


def _answer(prompt: str, text: str) -> str:
    """What follows the prompt in a text that may repeat it; without the end token."""
    text = text.removeprefix(prompt) if text.startswith(prompt) else text.split(ASSISTANT)[-1]
    return text.removesuffix(END)


def _chat(row: Row) -> Example:
    if row.values.get("chosen") is None:
        messages = _messages(row, "messages")
        if messages[-1]["role"] != "assistant":
            return Example(messages)
        answer = messages[-1]["content"]
        return Example(_asked(row, messages), (answer,), (None,), (None,))
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    for messages, name in ((chosen, "chosen"), (rejected, "rejected")):
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{row.where}: '{name}' does not end with a message of the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise DataError(f"{row.where}: chosen and rejected answer different conversations")
    return _pair(
        row, _asked(row, chosen), chosen[-1]["content"], rejected[-1]["content"],
        ("score_chosen", "score_rejected"),
    )  # fmt: skip


def _asked(row: Row, messages: list[Message]) -> Text:
    """The conversation before its last answer, or the prompt where there is nothing else in it."""
    if len(messages) > 1:
        return messages[:-1]
    if isinstance(row.values.get("prompt"), list):
        return _messages(row, "prompt")
    return [{"role": "user", "content": _string(row, "prompt")}]


def _pair(
    row: Row,
    prompt: Text,
    better: str,
    worse: str,
    scores: tuple[str, str] = ("chosen_reward", "rejected_reward"),
) -> Example:
    """A preference. scores: the columns of their rewards, as far as the row has them."""
    rewards = tuple(row.values.get(name) for name in scores)
    tied = better == worse or (rewards[0] is not None and rewards[0] == rewards[1])
    return Example(prompt, (better, worse), (1, 0), rewards, tied)


def _string(row: Row, column: str) -> str:
    value = require(row, column)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column '{column}' must be text")
    return value


def _messages(row: Row, column: str) -> list[Message]:
    value = require(row, column)
    texts = isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )
    if not texts or not value:
        raise DataError(f"{row.where}: '{column}' must be messages with role and content")
    return [{"role": message["role"], "content": message["content"]} for message in value]
