"""Texts and conversations to token ids, and what they count for in a data set."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.encoding import EncodingError, TextEncoder
from actors.preferences import PreferenceError, read
from actors.prompts import PromptError, PromptStream, StreamedPrompts
from actors.row_limits import RowCounts
from cluster import inputs
from configs.choices import DataFormat, OverLength, PromptKind
from configs.load import prepare
from configs.schema import Config, DataConfig, PromptsConfig
from configs.schema_length import LengthDataConfig
from learner.stages import length_data

WORDS = ["<end>", "<unk>", "a", "b", "c", "<|prompter|>", "<|assistant|>", "<|system|>", "user"]
END, UNKNOWN, A, B, C, PROMPTER, ASSISTANT, SYSTEM, USER = range(9)


def tokenizer(**special):
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, **{"eos_token": "<end>", "unk_token": "<unk>", **special}
    )
    fast.add_tokens(WORDS[5:8], special_tokens=True)
    return fast


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(tokenizer(), "tiny", (END,))


def jsonl(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prompt_stream(path, limit, encoder, kind=PromptStream, **fields):
    config = PromptsConfig(source=PromptKind.jsonl, path=path, **{"count": 0, **fields})
    return kind(config, 0, len(WORDS), limit, encoder)


# --- tokens ----------------------------------------------------------------------------------


def test_a_response_ends_with_the_end_token_and_may_be_that_alone(encoder):
    assert encoder.response("a b") == [A, B, END] and encoder.response("") == [END]
    assert encoder("a b") == [A, B]


def test_messages_go_through_the_tokenizers_own_template():
    own = tokenizer()
    own.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}c"
    assert TextEncoder(own, "tiny", (END,))([{"role": "user", "content": "a"}]) == [USER, A, C]


def test_without_a_template_messages_take_the_papers_form(encoder):
    turns = [{"role": "system", "content": "c"}, {"role": "user", "content": "a"},
             {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]  # fmt: skip
    assert encoder(turns) == [SYSTEM, C, END, PROMPTER, A, END, ASSISTANT, B, END, PROMPTER, C, END,
                              ASSISTANT]  # fmt: skip
    text = encoder.tokenizer.apply_chat_template(
        turns, chat_template=encoder._plain_template(), tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|system|>c<end><|prompter|>a<end><|assistant|>b<end><|prompter|>c<end><|assistant|>"
    )


@pytest.mark.parametrize(
    "special, ends, reason",
    [
        ({"eos_token": None}, (), "has no end token, so no response could end; set eos_token"),
        ({}, (), "its config.json names none; set eos_token_id=0"),
        ({}, (3, 4), "ends with token 0, its config.json names 3, 4"),
    ],
)
def test_a_policy_without_one_end_token_is_refused(special, ends, reason):
    with pytest.raises(EncodingError) as caught:
        TextEncoder(tokenizer(**special), "models/x", ends)
    assert reason in str(caught.value) and str(caught.value).startswith("policy.path=models/x: ")


def test_the_policys_own_end_token_serves_a_tokenizer_without_one():
    assert TextEncoder(tokenizer(eos_token=None), "x", (C,)).response("a") == [A, C]


def test_a_tokenizer_without_a_pad_token_is_said():
    assert "no pad token" in TextEncoder(tokenizer(), "x", (END,)).notes[0]
    assert TextEncoder(tokenizer(pad_token="<unk>"), "x", (END,)).notes == []


# --- offline rows of text --------------------------------------------------------------------


def test_pairs_of_text_become_groups_of_token_ids(tmp_path, encoder):
    rows = [pair("a b", "c", "") | {"chosen_reward": 2}, pair("a", "b", "c c")]
    one, two = read(jsonl(tmp_path, *rows), None, len(WORDS), encoder=encoder)
    assert one.prompt_ids.tolist() == [A, B] and one.labels_C.tolist() == [1, 0]
    assert [ids.tolist() for ids in one.responses] == [[C, END], [END]]
    np.testing.assert_array_equal(one.rewards_C, [2, np.nan])
    assert [ids.tolist() for ids in two.responses] == [[B, END], [C, C, END]]


def test_rows_without_a_response_field_are_one_clear_line(tmp_path, encoder):
    with pytest.raises(PreferenceError, match=r"line 1: no responses; give response, chosen and"):
        read(jsonl(tmp_path, {"prompt": "a"}), encoder=encoder)


def test_text_without_a_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(PreferenceError, match="line 1: is text and the policy has no tokenizer"):
        read(jsonl(tmp_path, pair("a", "b", "c")))


def test_rows_with_equal_preference_are_dropped_and_counted(tmp_path, encoder):
    ids = {"prompt_ids": [A], "chosen_ids": [B], "rejected_ids": [B]}
    rows = [pair("a", "b", "c"), pair("a", "b", "b"), ids, pair("a", "c", "b")]
    counts = RowCounts()
    groups = read(jsonl(tmp_path, *rows), encoder=encoder, counts=counts)
    assert len(groups) == 2 and counts.record() == {
        "rows": 4, "kept": 2, "dropped": 0, "tied": 2, "cut_prompts": 0, "cut_responses": 0,
        "duplicate_prompts": 1,
    }  # fmt: skip
    assert counts.notes("f") == [
        "f: 2 of 4 rows prefer none of their responses and were dropped",
        "f: 1 of 4 rows repeat a prompt",
    ]


def test_a_file_of_ties_alone_says_so(tmp_path, encoder):
    with pytest.raises(PreferenceError, match="line 1: .* which prefers none"):
        read(jsonl(tmp_path, pair("a", "b", "b")), encoder=encoder)


@pytest.mark.parametrize(
    "policy, kept, cut",
    [(OverLength.drop, [[C, END]], 0), (OverLength.cut, [[C, END], [A, B], [B, END]], 1)],
)
def test_rows_over_a_limit_are_dropped_or_cut_and_counted(tmp_path, encoder, policy, kept, cut):
    rows = [pair("a", "c", "b"), pair("a", "a b c", "b"), pair("a b c", "b", "c"),
            pair("a", "a b a", "a b b")]  # fmt: skip
    counts, how = RowCounts(), DataConfig(over_length=policy)
    groups = read(jsonl(tmp_path, *rows), None, None, 2, 2, encoder, how, counts)
    assert [group.responses[0].tolist() for group in groups] == kept
    assert groups[-1].prompt_ids.tolist() == ([B, C] if cut else [A])
    assert (counts.rows, counts.kept, counts.dropped) == (4, len(kept), 0 if cut else 3)
    assert (counts.cut_responses, counts.cut_prompts, counts.tied) == (cut, cut, cut)


def test_refusal_over_a_limit_names_the_way_out(tmp_path, encoder):
    path = jsonl(tmp_path, pair("a b", "b", "c"))
    with pytest.raises(PreferenceError, match=r"limit of 1; set data.over_length=drop or cut"):
        read(path, max_prompt=1, encoder=encoder)
    drop = DataConfig(over_length=OverLength.drop)
    with pytest.raises(PreferenceError, match="all 1 rows are over a length limit"):
        read(path, max_prompt=1, encoder=encoder, how=drop)


def test_a_format_that_is_named_is_used(tmp_path, encoder):
    row = {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 2, "prompt": "x"}
    (group,) = read(jsonl(tmp_path, row), encoder=encoder, how=DataConfig(format=DataFormat.alpaca))
    assert [ids.tolist() for ids in group.responses] == [[C, END], [B, END]]


# --- prompts ---------------------------------------------------------------------------------


def test_prompts_over_the_limit_are_refused_dropped_or_cut(tmp_path, encoder):
    path = jsonl(tmp_path, {"prompt": "a b c"}, {"prompt": "a"}, {"prompt": "a"})
    with pytest.raises(PromptError, match=r"limit of 2; set prompts.over_length=drop or cut"):
        prompt_stream(path, 2, encoder)
    dropped = prompt_stream(path, 2, encoder, over_length=OverLength.drop)
    cut = prompt_stream(path, 2, encoder, over_length=OverLength.cut)
    assert [dropped[p].ids.tolist() for p in range(3)] == [[A], [A], [A]] and dropped.rows == 2
    assert cut[0].ids.tolist() == [B, C] and cut.rows == 3
    assert (dropped.counts.dropped, cut.counts.cut_prompts) == (1, 1)
    assert dropped.counts.duplicate_prompts == 1
    with pytest.raises(PromptError, match="holds no prompts: all 1 are over the length limit"):
        prompt_stream(path, 2, encoder, over_length=OverLength.drop, count=1)


@pytest.mark.parametrize("kind", [PromptStream, StreamedPrompts])
def test_prompts_of_a_preference_set_are_its_conversations(tmp_path, encoder, kind):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = jsonl(tmp_path, {"messages": turns}, {"prompt": "a b"})
    stream = prompt_stream(path, 9, encoder, kind)
    assert stream[0].ids.tolist() == encoder(turns[:1]) and stream[1].ids.tolist() == [A, B]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """25 prompts of ids, of which every fifth is over the limit of two tokens."""
    rows = ({"prompt_ids": [n % 9] * (3 if n % 5 == 4 else 1 + n % 2)} for n in range(25))
    return jsonl(tmp_path_factory.mktemp("numbered"), *rows)


def streamed(path, seed=0, **fields):
    fields = {"buffer": 6, "over_length": OverLength.drop, "streaming": True, **fields}
    config = PromptsConfig(source=PromptKind.jsonl, path=path, **{"count": 0, **fields})
    return StreamedPrompts(config, seed, 9, 2)


def test_streamed_prompts_are_those_in_memory(numbered):
    whole = prompt_stream(numbered, 2, None, over_length=OverLength.drop)
    stream = streamed(numbered)
    for position in [0, 5, 3, 11, 12, 7, 19, 20, 21, 39, 40, 2, 65]:
        one, other = whole[position], stream[position]
        assert one.row == other.row and one.ids.tolist() == other.ids.tolist(), position
    assert stream.rows == whole.rows == 20
    assert stream.counts.record() == whole.counts.record()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_streamed_position_gives_the_same_prompt_whatever_was_read_before(numbered, shuffle):
    ahead = streamed(numbered, shuffle=shuffle)
    rows = [ahead[position].row for position in range(60)]
    for position in (0, 13, 19, 20, 47, 59):
        assert streamed(numbered, shuffle=shuffle)[position].row == rows[position]
    assert all(sorted(rows[e : e + 20]) == list(range(20)) for e in (0, 20, 40))
    assert (rows[:20] == rows[20:40]) is not shuffle


def test_streaming_reads_no_further_than_it_is_asked(numbered):
    stream = streamed(numbered)
    assert stream.counts.rows == 7  # six prompts and one dropped before them
    assert stream[7].row == 7 and stream.counts.rows == 14
    assert len(stream._buffered.kept) <= 2


def test_a_streamed_set_without_prompts_says_so(tmp_path):
    with pytest.raises(PromptError, match="holds no prompts"):
        streamed(jsonl(tmp_path))


# --- through a model directory ---------------------------------------------------------------


@pytest.fixture(scope="module")
def length_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("length")
    data = LengthDataConfig(sft=20, pairs=200, prompts=10)
    length_data.write(folder, Config(length_data=data))
    return folder


def test_a_run_reads_text_through_the_policys_tokenizer(length_folder):
    config = prepare("offline_ipo", [
        f"policy.path={length_folder / 'model'}", "prompts.source=jsonl",
        f"prompts.path={length_folder / 'prompts.jsonl'}", "prompts.count=0",
        "rollout.responses_per_prompt=2", "rollout.max_tokens=64",
        f"data.path={length_folder / 'preferences_skew.jsonl'}",
    ])  # fmt: skip
    checked = inputs.check(config)
    counts = {path.rpartition("/")[2]: rows.kept for path, rows in checked.rows.items()}
    assert counts == {"prompts.jsonl": 10, "preferences_skew.jsonl": 200}
    groups = inputs.offline_data(config, config.data.path)
    assert any(group.responses[0].tolist() == [0] for group in groups)  # the end token alone
    assert all(ids[-1] == 0 for group in groups for ids in group.responses)


def test_a_data_set_saved_to_disk_is_read(tmp_path, encoder):
    import datasets

    rows = datasets.Dataset.from_list([pair("a", "b", "c"), pair("b", "c", "a")])
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_json(str(tmp_path / "loadable" / "train.jsonl"))
    saved = read(str(tmp_path / "saved"), encoder=encoder)
    loadable = read(str(tmp_path / "loadable"), encoder=encoder)
    arrow = read(str(next((tmp_path / "saved").glob("*.arrow"))), encoder=encoder)
    for groups in (saved, loadable, arrow):
        assert [group.prompt_ids.tolist() for group in groups] == [[A], [B]]
