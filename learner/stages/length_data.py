"""The data of the three length problems (arXiv 2404.14367, Section 3.2), written to a folder.

Min Length prefers the shorter response to a prompt, Mode Length the one nearer the mode of the
SFT data, Skew Length the shorter one again, of pairs that are mostly truncated to an exponentially
distributed length: so what is preferred lies where the data is (Skew) or where it is not (Min).
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from actors.randomness import stream_key, uniforms
from actors.tables import write_jsonl
from configs.schema import Config
from configs.schema_length import LengthDataConfig
from learner.stages import length_text
from learner.stages.length_text import Instruction

MANIFEST = "manifest.json"
SETS = ("min", "mode", "skew")
ATTEMPTS = 64  # draws of a pair, until its responses are not equally good

Row = dict[str, str]


def write(folder: str | Path, config: Config) -> dict[str, Any]:
    """Write data and starting network; returns the manifest. Finished data are left as they are.

    `model/` (network and tokenizer), `sft.jsonl` (prompt, response), `prompts.jsonl` (prompt) and
    `preferences_{min,mode,skew}.jsonl` (prompt, chosen, rejected). A function of
    `config.length_data` and `config.seed`; ValueError where the folder holds those of others.
    """
    folder, data, seed = Path(folder), config.length_data, config.seed
    settings = {"seed": seed} | asdict(data)
    if (finished := read_manifest(folder)) is not None:
        if finished["settings"] != settings:
            changed = [key for key, value in settings.items() if finished["settings"][key] != value]
            raise ValueError(
                f"{folder}: holds data with another {', '.join(changed)}; name another folder"
            )
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "sft.jsonl", sft_rows(data, seed))
    write_jsonl(folder / "prompts.jsonl", prompt_rows(data, seed))
    for name in SETS:
        write_jsonl(folder / f"preferences_{name}.jsonl", preference_rows(data, seed, name))
    from learner.stages.length_model import write_model

    write_model(folder / "model", data, seed)
    manifest = {"settings": settings, "files": _hashes(folder)} | _statistics(data, seed)
    beside = folder / f"{MANIFEST}.part"
    beside.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, folder / MANIFEST)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `write` returned, or None where it has not ended."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def sft_rows(data: LengthDataConfig, seed: int) -> list[Row]:
    """Prompts, some of them several times, each with a response."""
    asked = length_text.choose(data.sft, seed, "sft")
    length_N = length_text.draw_lengths(data, asked, seed, "sft")
    words = length_text.responses(asked, length_N, seed, "sft")
    return [
        {"prompt": prompt.text, "response": " ".join(response)}
        for prompt, response in zip(asked, words, strict=True)
    ]


def prompt_rows(data: LengthDataConfig, seed: int) -> list[Row]:
    """Different prompts."""
    return [{"prompt": p.text} for p in length_text.choose_distinct(data.prompts, seed, "prompts")]


def preference_rows(data: LengthDataConfig, seed: int, name: str) -> list[Row]:
    """Pairs of one preference set. name: one of SETS.

    Min and Mode are the same pairs, labelled otherwise, but for those that one of them finds
    equally good.
    """
    best = data.mode if name == "mode" else 0
    asked = length_text.choose(data.pairs, seed, "pairs")
    length_N2 = _unequal(data, asked, seed, best, skewed=name == "skew")
    words = [
        length_text.responses(asked, length_N2[:, member], seed, f"pairs/{member}")
        for member in (0, 1)
    ]
    first_N = abs(length_N2[:, 0] - best) < abs(length_N2[:, 1] - best)
    rows = []
    for prompt, one, other, first in zip(asked, *words, first_N, strict=True):
        chosen, rejected = (one, other) if first else (other, one)
        rows.append(
            {"prompt": prompt.text, "chosen": " ".join(chosen), "rejected": " ".join(rejected)}
        )
    return rows


def _unequal(
    data: LengthDataConfig, asked: list[Instruction], seed: int, best: int, skewed: bool
) -> np.ndarray:
    """Lengths [N, 2] of two responses to each prompt, of which one is nearer the best length."""
    length_N2 = np.zeros((len(asked), 2), dtype=np.int64)
    for attempt in range(ATTEMPTS):
        open_N = abs(length_N2[:, 0] - best) == abs(length_N2[:, 1] - best)
        if not open_N.any():
            return length_N2
        drawn_N2 = _pair_lengths(data, asked, seed, f"pairs/{attempt}", skewed)
        length_N2 = np.where(open_N[:, None], drawn_N2, length_N2)
    raise ValueError(
        "length_data: two responses to a prompt are hardly ever of different lengths; "
        "set length_data.spread=0.4 or length_data.skew_mean=4"
    )


def _pair_lengths(
    data: LengthDataConfig, asked: list[Instruction], seed: int, stream: str, skewed: bool
) -> np.ndarray:
    drawn = [length_text.draw_lengths(data, asked, seed, f"{stream}/{member}") for member in (0, 1)]
    length_N2 = np.stack(drawn, axis=1)
    row_N = np.arange(len(asked))
    if not skewed:
        wide_N = uniforms(stream_key(seed, "pairs/wide"), row_N) < data.wide
        uniform_N2 = uniforms(stream_key(seed, f"{stream}/wide"), row_N[:, None], np.arange(2))
        most = min(2 * data.mode, data.longest)
        return np.where(wide_N[:, None], 1 + (most * uniform_N2).astype(np.int64), length_N2)
    truncated_N = uniforms(stream_key(seed, "skew/which"), row_N) < data.skewed
    uniform_N2 = uniforms(stream_key(seed, f"{stream}/skew"), row_N[:, None], np.arange(2))
    limit_N2 = (-data.skew_mean * np.log(uniform_N2)).astype(np.int64)  # whole words; 0 is none
    return np.where(truncated_N[:, None], np.minimum(length_N2, limit_N2), length_N2)


def _statistics(data: LengthDataConfig, seed: int) -> dict[str, Any]:
    """Lengths in words of the SFT responses, as drawn."""
    asked = length_text.choose(data.sft, seed, "sft")
    length_N = length_text.draw_lengths(data, asked, seed, "sft")
    counts = np.bincount(length_N)
    return {
        "sft_length": {
            "mode": int(counts.argmax()),
            "mean": float(length_N.mean()),
            "min": int(length_N.min()),
            "max": int(length_N.max()),
        }
    }


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
