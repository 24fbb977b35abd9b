"""Settings of the supervised stages that come before preference fine-tuning."""

from dataclasses import dataclass, field

from configs.choices import DataFormat, RateSchedule
from configs.schema_lora import LoraConfig


@dataclass
class StageConfig:
    """One stage: SFT on rows of prompt and response, or a reward model on pairs of responses.

    Ranks, ZeRO stage, precision and Adam's betas are those of `learner`. An epoch's examples are
    shared out evenly among ⌈examples / minibatch⌉ steps, so that none is left out.
    """

    path: str = ""  # JSONL, Parquet or a data set; sft: prompt and response; else preferences
    format: DataFormat = DataFormat.auto  # by the columns of each row
    subset: str = ""  # of a data set that has several, as `alpaca_instructions`
    split: str = "train"
    model: str = ""  # a directory or hub name to begin with; empty: policy.path
    revision: str = ""  # of `model`: commit on the hub
    epochs: int = 1
    minibatch: int = 64  # examples (rows, or pairs) per optimizer step at most, over all ranks
    micro_batch: int = 0  # examples per forward on one rank; 0: a rank's whole share
    lr: float = 1e-5
    schedule: RateSchedule = RateSchedule.linear
    warmup: int = 0  # steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    max_tokens: int = 0  # of prompt and response; longer rows are dropped; 0: the context
    held_out: float = 0.1  # share of the distinct prompts whose rows are not trained on
    eval_every: int = 0  # steps; 0: only before the first and after the last
    pad_token: str = ""  # by its text; empty: the tokenizer's own, else config.json's
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class PipelineConfig:
    """The stages that `python -m cluster pipeline` runs before training, in this order: of each the
    directory under `run.dir`; empty: there is no such stage. Presets that name the same directory
    share what is in it. `{sft}` in another setting stands for that stage's directory."""

    data: str = ""  # the length problems' data and starting network
    sft: str = ""
    label: str = ""  # preferences by the gold reward
    reward_model: str = ""
    seed: int = 0  # of these stages, whatever the run's
