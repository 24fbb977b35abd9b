"""The model directory that a stage begins with: its architecture, its tokenizer, special tokens."""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from actors import policy
from actors.encoding import TextEncoder
from actors.tables import DataError, Row, brief, require, token_ids
from configs.errors import ConfigError
from configs.schema import Config, PolicyConfig
from configs.schema_stages import StageConfig

Kind = Literal["sft", "reward_model"]

# One of these is in every directory that holds a tokenizer. Where none is, AutoTokenizer may make
# up one with an empty vocabulary from config.json alone.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


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

    def ids(self, row: Row, column: str, special: bool) -> np.ndarray:
        """Token ids of a row, from `<column>_ids` as they are, else from the text in `column`;
        int32, perhaps none. special: with what the tokenizer puts around a text. Raises DataError.
        """
        name = f"{column}_ids"
        given = row.values.get(name)
        if given is not None:
            empty = isinstance(given, list | tuple) and not given
            return _none() if empty else token_ids(given, name, row.where, self.vocabulary)
        text = require(row, column)
        if not isinstance(text, str):
            raise DataError(f"{row.where}: column '{column}' must be text")
        if self.tokenizer is None:
            raise DataError(
                f"{row.where}: column '{column}' is text and {self.path} has no tokenizer; "
                f"give token ids in a column {name}"
            )
        try:
            ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        except Exception as error:  # whatever a tokenizer raises
            raise DataError(f"{row.where}: cannot be tokenized: {brief(error)}") from error
        return token_ids(ids, f"'{column}'", row.where, self.vocabulary) if ids else _none()


def open_source(config: Config, kind: Kind) -> Source:
    """The directory of `<kind>.model`, else of `policy.path`. Raises ConfigError."""
    path, key = settings(config, kind).model, f"{kind}.model"
    chosen = PolicyConfig(path, settings(config, kind).revision) if path else config.policy
    if not chosen.path:
        problem = "there is no model to begin with"
        raise ConfigError(key, "", problem, "set it, or policy.path, to a model directory")
    revision = chosen.revision or None
    try:
        shape = AutoConfig.from_pretrained(
            chosen.path, revision=revision, trust_remote_code=False
        )  # fmt: skip
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {brief(error, 120)}"
        raise ConfigError(key, chosen.path, problem, "set it to a model directory") from error
    return Source(key, chosen, shape, _tokenizer(chosen.path, revision))


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


def _tokenizer(path: str, revision: str | None) -> Any | None:
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int32)
