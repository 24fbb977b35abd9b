"""Texts and conversations to token ids, by the policy's own tokenizer and chat template."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.adapters import Text
from actors.tables import DataError, brief

# What the paper's AlpacaFarm policies were fine-tuned on, for tokenizers without a template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{% elif message.role == 'system' %}"
    "<|system|>{% else %}<|prompter|>{% endif %}{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# One of these is in every directory that holds a tokenizer. Where none is, AutoTokenizer may make
# up one with an empty vocabulary from config.json alone.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def open_tokenizer(path: str, revision: str = "") -> Any | None:
    """The tokenizer of a model directory or hub name (no remote code), of transformers; None where
    there is none."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path, revision=revision or None, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None


class EncodingError(ValueError):
    """A tokenizer that cannot serve, in one line."""


class TextEncoder:
    """A tokenizer of transformers with what data need of it.

    name: of the policy, for messages. ends: the token ids that end a response by the policy's
    config.json. EncodingError where tokenizer and policy do not name one and the same end token:
    a response would never end.
    """

    def __init__(self, tokenizer: Any, name: str, ends: Sequence[int]) -> None:
        end = tokenizer.eos_token_id
        if end is None and not ends:
            raise EncodingError(
                f"policy.path={name}: has no end token, so no response could end; set "
                "eos_token in its tokenizer_config.json and eos_token_id in its config.json"
            )
        if end is not None and end not in ends:
            known = f"names {', '.join(map(str, ends))}" if ends else "names none"
            raise EncodingError(
                f"policy.path={name}: its tokenizer ends with token {end}, its config.json {known};"
                f" set eos_token_id={end} in its config.json"
            )
        self.tokenizer, self.name = tokenizer, name
        self.end = int(ends[0] if end is None else end)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the tokenizer."""
        if self.tokenizer.pad_token_id is not None:
            return []
        return [f"{self.name} has no pad token: batches are masked by length, so none is needed"]

    def __call__(self, prompt: Text) -> list[int]:
        """Token ids of a prompt: text as it stands, messages through the chat template and up to
        where the answer begins."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        template = None if self.tokenizer.chat_template else self._plain_template()
        text = self.tokenizer.apply_chat_template(
            prompt, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def response(self, text: str) -> list[int]:
        """Token ids of a response, its end token included; the empty one is the end token alone."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, without an end token at their end."""
        kept = ids[:-1] if len(ids) and ids[-1] == self.end else ids
        return str(self.tokenizer.decode(kept))

    def _plain_template(self) -> str:
        if self.tokenizer.eos_token is None:
            raise EncodingError(f"{self.name} has neither a chat template nor an end token's text")
        return PLAIN_TEMPLATE


def encoded(where: str, encode: Callable[[Any], Sequence[int]], text: Text) -> list[int]:
    """`encode(text)`; DataError that names the row, where the tokenizer or its template raises."""
    try:
        return [int(token) for token in encode(text)]
    except Exception as error:  # whatever a user's tokenizer or template raises
        raise DataError(f"{where}: cannot be tokenized: {brief(error)}") from error
