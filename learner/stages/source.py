"""The model directory that a stage begins with: its architecture, its tokenizer, special tokens."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from actors import policy
from actors.adapters import adapt
from actors.encoding import TextEncoder, encoded, open_tokenizer
from actors.tables import DataError, Row, brief, require, token_ids
from configs.choices import DataFormat
from configs.errors import ConfigError
from configs.schema import Config, PolicyConfig
from configs.schema_stages import StageConfig

Kind = Literal["sft", "reward_model"]
IDS = ("prompt_ids", "response_ids")


def settings(config: Config, kind: Kind) -> StageConfig:
    """The stage's section of the configuration."""
    return config.sft if kind == "sft" else config.reward_model


@dataclass(frozen=True)
class Source:
    """What a stage begins with. key: the setting that names it, for error messages."""

    key: str
    policy: PolicyConfig  # path and revision
    shape: PretrainedConfig
    tokenizer: Any | None  # of transformers; None where the directory has none

    @property
    def path(self) -> str:
        return self.policy.path

    @property
    def vocabulary(self) -> int:
        return int(self.shape.get_text_config().vocab_size)

    @functools.cached_property
    def encoder(self) -> TextEncoder | None:
        """For rows of text; None where the directory has no tokenizer."""
        if self.tokenizer is None:
            return None
        return TextEncoder(self.tokenizer, self.path, self.end_tokens())

    def end_tokens(self) -> tuple[int, ...]:
        """Token ids that end a response, the one to append first. Raises ConfigError where there is
        none, or where config.json and the tokenizer disagree."""
        known, own = policy.end_tokens(self.shape), self._tokenizers("eos_token_id")
        if own is None and not known:
            problem = "neither its config.json nor its tokenizer names an end token"
            raise ConfigError(self.key, self.path, problem, "set eos_token_id in its config.json")
        if own is None or not known:
            return known or (own,)  # type: ignore[return-value]
        if own not in known:
            problem = f"ends with token {known[0]} by its config.json, {own} by its tokenizer"
            fix = f"set eos_token_id to {own} in its config.json"
            raise ConfigError(self.key, self.path, problem, fix)
        return (own, *(token for token in known if token != own))

    def pad_token(self, kind: Kind, text: str) -> int:
        """The token to pad with, not one that ends a response: the last token but padding is what a
        reward is read from. text: the setting `pad_token`. Raises ConfigError."""
        key, fix = f"{kind}.pad_token", "set it to a token of the vocabulary that no text has"
        pad: int | None = None
        if text:
            names = self.tokenizer.get_vocab() if self.tokenizer is not None else {}
            if text not in names:
                raise ConfigError(key, text, f"is no token of {self.path}", fix)
            pad = int(names[text])
        if pad is None:
            pad = self._tokenizers("pad_token_id")
        if pad is None:
            pad = self.shape.pad_token_id
        if pad is None:
            raise ConfigError(key, text, f"{self.path} has no pad token", fix)
        ends = {*policy.end_tokens(self.shape), self._tokenizers("eos_token_id")}
        if pad in ends or not 0 <= pad < self.vocabulary:
            what = "ends responses, too" if pad in ends else "has no embedding"
            raise ConfigError(key, text, f"the pad token {pad} of {self.path} {what}", fix)
        return int(pad)

    def _tokenizers(self, name: str) -> int | None:
        """One of the tokenizer's special tokens, as far as it has both."""
        token = getattr(self.tokenizer, name, None)
        return None if token is None else int(token)

    def prompt_and_response(self, row: Row, form: DataFormat) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a row with one response, int32, perhaps none: from `prompt_ids` and
        `response_ids` as they are, else from text as `actors.adapters` has it, without the end
        token that the encoder adds. Raises DataError."""
        if any(row.values.get(name) is not None for name in IDS):
            given = [require(row, name) for name in IDS]
        else:
            given = self._encoded(row, form)
        prompt, response = (
            token_ids(ids, name, row.where, self.vocabulary) if ids != [] else _none()
            for ids, name in zip(given, IDS)
        )
        return prompt, response

    def _encoded(self, row: Row, form: DataFormat) -> list[list[int]]:
        example = adapt(row, form)
        if not example.responses:
            require(row, "response")
        if len(example.responses) != 1:
            found = f"has {len(example.responses)} responses"
            raise DataError(f"{row.where}: {found}, and one is learned from")
        if self.encoder is None:
            raise DataError(
                f"{row.where}: is text and {self.path} has no tokenizer; give token ids in columns "
                f"{IDS[0]} and {IDS[1]}"
            )
        prompt = encoded(row.where, self.encoder, example.prompt)
        return [prompt, encoded(row.where, self.encoder.response, example.responses[0])[:-1]]


def open_source(config: Config, kind: Kind) -> Source:
    """The directory of `<kind>.model`, else of `policy.path`. Raises ConfigError."""
    path, key = settings(config, kind).model, f"{kind}.model"
    chosen = PolicyConfig(path, settings(config, kind).revision) if path else config.policy
    if not chosen.path:
        problem = "there is no model to begin with"
        raise ConfigError(key, "", problem, "set it, or policy.path, to a model directory")
    revision = chosen.revision or None
    try:
        policy.pinned(chosen)
        shape = AutoConfig.from_pretrained(
            chosen.path, revision=revision, trust_remote_code=False
        )  # fmt: skip
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {brief(error, 120)}"
        raise ConfigError(key, chosen.path, problem, "set it to a model directory") from error
    return Source(key, chosen, shape, open_tokenizer(chosen.path, chosen.revision))


def pad_right(sequences: Sequence[np.ndarray], fill: int, device: Any) -> tuple[Tensor, Tensor]:
    """Sequences padded on the right with `fill`: token ids int64 [N, T], attention mask [N, T]."""
    length_N = np.array([len(ids) for ids in sequences])
    attention_NT = np.arange(length_N.max()) < length_N[:, None]
    input_NT = np.full(attention_NT.shape, fill, dtype=np.int64)
    input_NT[attention_NT] = np.concatenate(sequences)
    return (
        torch.from_numpy(input_NT).to(device),
        torch.from_numpy(attention_NT.astype(np.int64)).to(device),
    )


def numbered(prompts: Iterable[np.ndarray]) -> np.ndarray:
    """For each prompt the number of its first equal among them, int64 [n]."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(ids.tobytes(), len(seen)) for ids in prompts], dtype=np.int64)


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int32)
