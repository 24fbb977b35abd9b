"""A reward model's files, looked at without torch: where they are, whose they are, and whether
they are those of a reward model."""

import functools
import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from configs.schema import RewardConfig

HEAD = "score.weight"  # of the sequence classifiers that transformers makes of decoders
TOKENIZER = "tokenizer.json"
WANTED = ["*.json", "*.safetensors"]


def directory(config: RewardConfig, section: str = "reward") -> Path:
    """The reward model's directory; a hub name's is the pinned commit's, downloaded if need be.

    ValueError in one line where there is none.
    """
    if Path(config.path).is_dir():
        return Path(config.path)
    key = f"{section}.path={config.path}"
    if not config.revision:
        raise ValueError(
            f"{key}: no such directory; correct it, or pin a hub name with "
            f"{section}.revision=COMMIT"
        )
    try:
        return _snapshot(config.path, config.revision)
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors
        why = " ".join(str(error).split())[:160]
        raise ValueError(f"{key}: {config.revision} cannot be had from the hub: {why}") from error


@functools.lru_cache(maxsize=16)
def _snapshot(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))


def identity(config: RewardConfig, section: str = "reward") -> str:
    """Name and hash: `model(PATH, sha256=…)`, the first 16 digits of `digest`."""
    name = f"{config.path}@{config.revision}" if config.revision else config.path
    return f"model({name}, sha256={digest(directory(config, section))[:16]})"


def digest(folder: Path) -> str:
    """SHA-256, in hex, over the names and SHA-256 of config.json and every safetensors file.

    A file is read once in a process, and again where its size or time of change is another.
    """
    total = hashlib.sha256()
    for path in (folder / "config.json", *_weights(folder)):
        stat = path.stat()
        file_digest = _file_digest(path, stat.st_size, stat.st_mtime_ns)
        total.update(f"{path.name} {file_digest}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def check(config: RewardConfig, section: str = "reward") -> None:
    """ValueError in one line where the directory holds no reward model in safetensors."""
    folder = directory(config, section)
    key = f"{section}.path={config.path}"
    if vocabulary(folder) is None:
        raise ValueError(f"{key}: {folder} has no config.json that can be read; name a model")
    if not _weights(folder):
        raise ValueError(f"{key}: has no *.safetensors; save it anew with save_pretrained")
    shape = None
    for path in _weights(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                if HEAD in file.keys():  # noqa: SIM118, it is no mapping
                    shape = file.get_slice(HEAD).get_shape()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{key}: {path.name} is damaged: {error}") from error
    if shape is None:
        fix = "train one with python -m cluster reward-model"
        raise ValueError(f"{key}: has no {HEAD}, so it is no reward model; {fix}")
    if shape[0] != 1:
        raise ValueError(f"{key}: scores {shape[0]} labels; a reward model has num_labels=1")


def vocabulary(folder: Path) -> int | None:
    """How many token ids the model of a directory knows; None where its config.json is unreadable.

    0 where it does not say.
    """
    try:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(shape.get("vocab_size") or 0)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def tokenizer_file(path: str, revision: str) -> Path | None:
    """tokenizer.json of a model directory or hub name; None where there is none to be had."""
    if Path(path).is_dir():
        file = Path(path) / TOKENIZER
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, TOKENIZER, revision=revision or None))
    except (OSError, ValueError):
        return None


def tokenizer_difference(ours: Path, theirs: Path) -> str:
    """The first token that two tokenizer.json have under another id or not at all; empty where
    every id means the same. Equal files are equal; else their vocabularies decide.

    ValueError in one line for a file that is no tokenizer's.
    """
    if hashlib.sha256(ours.read_bytes()).digest() == hashlib.sha256(theirs.read_bytes()).digest():
        return ""
    our_words, their_words = _by_id(ours), _by_id(theirs)
    for token in sorted(our_words.keys() | their_words.keys()):
        one, other = our_words.get(token), their_words.get(token)
        if one != other:
            return f"token {token} is {_shown(other)} to it and {_shown(one)} to the policy"
    return ""


def _by_id(path: Path) -> dict[int, str]:
    from tokenizers import Tokenizer

    try:
        words = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{path}: is no tokenizer: {' '.join(str(error).split())}") from error
    return {token: word for word, token in words.items()}


def _shown(word: str | None) -> str:
    return "unknown" if word is None else repr(word)[:30]
