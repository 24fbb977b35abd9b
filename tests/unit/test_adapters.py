"""Public data sets' rows, as they come, to prompts and responses; whatever is wrong in one line."""

import pytest

from actors.adapters import Example, adapt, detect
from actors.tables import DataError, Row
from configs.choices import DataFormat

USER = {"role": "user", "content": "What is 2 + 2?"}
GOOD = {"role": "assistant", "content": "4."}
BAD = {"role": "assistant", "content": "I will not say."}
ASKED = "<|prompter|>Give three tips for staying healthy.<|endoftext|><|assistant|>"

ALPACA_FARM = {
    "instruction": "Rewrite the sentence.", "input": "He done it.", "output_1": "He did it.",
    "output_2": "It done him.", "preference": 1, "raw_preference": 1,
}  # fmt: skip
RELABELLED = {
    "output": "", "text": f"{ASKED}Sleep.", "alpaca_text": "### Instruction …", "y_ref": "Rest.",
    "y_1": "Eat well.", "y_2": "Run.", "y_w": f"{ASKED}Run.<|endoftext|>", "y_w_alpaca": "…",
    "y_l": f"{ASKED}Eat well.<|endoftext|>", "y_l_alpaca": "…", "y_w_score": -2.0,
    "y_l_score": -9.0, "score_diff": 7.0, "prompt": ASKED, "alpaca_prompt": "…",
}  # fmt: skip
ULTRAFEEDBACK = {
    "prompt": USER["content"], "prompt_id": "ffe1", "messages": [USER, GOOD],
    "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.5, "score_rejected": 3.0,
}  # fmt: skip
ULTRACHAT = {
    "prompt": "Hi.", "prompt_id": "a0",
    "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."},
                 USER, GOOD],
}  # fmt: skip

ROWS = [
    (ALPACA_FARM, DataFormat.alpaca, Example(
        [{"role": "user", "content": "Rewrite the sentence.\nHe done it."}],
        ("He did it.", "It done him."), (1, 0), (None, None))),
    (ALPACA_FARM | {"preference": 2, "input": ""}, DataFormat.alpaca, Example(
        [{"role": "user", "content": "Rewrite the sentence."}],
        ("It done him.", "He did it."), (1, 0), (None, None))),
    ({"instruction": "Name a fruit.", "input": "", "output": "Plum."}, DataFormat.alpaca, Example(
        [{"role": "user", "content": "Name a fruit."}], ("Plum.",), (None,), (None,))),
    (RELABELLED, DataFormat.relabelled, Example(
        ASKED, ("Run.", "Eat well."), (1, 0), (-2.0, -9.0))),
    (RELABELLED | {"y_w": "Run.", "y_l": "Eat well."}, DataFormat.relabelled, Example(
        ASKED, ("Run.", "Eat well."), (1, 0), (-2.0, -9.0))),
    (ULTRAFEEDBACK, DataFormat.chat, Example([USER], ("4.", "I will not say."), (1, 0),
                                             (8.5, 3.0))),
    (ULTRACHAT, DataFormat.chat, Example(ULTRACHAT["messages"][:3], ("4.",), (None,), (None,))),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, DataFormat.chat, Example(
        [USER], ("4.", "I will not say."), (1, 0), (None, None))),
    ({"messages": [USER]}, DataFormat.chat, Example([USER])),
    ({"prompt": "a :", "chosen": "", "rejected": "b"}, DataFormat.text, Example(
        "a :", ("", "b"), (1, 0), (None, None))),
    ({"prompt": "a :", "response": "b"}, DataFormat.text, Example(
        "a :", ("b",), (None,), (None,))),
    ({"prompt": "a :", "responses": ["b", ""], "rewards": [1, None], "labels": None},
     DataFormat.text, Example("a :", ("b", ""), (None, None), (1, None))),
    ({"prompt": "a :"}, DataFormat.text, Example("a :")),
]  # fmt: skip


@pytest.mark.parametrize("values, form, example", ROWS)
def test_a_row_of_a_public_set_is_recognised_and_read(values, form, example):
    assert detect(values) is form
    assert adapt(Row("a", values)) == example == adapt(Row("a", values), form)


@pytest.mark.parametrize(
    "values",
    [
        ALPACA_FARM | {"preference": 0},
        ALPACA_FARM | {"output_2": "He did it."},
        RELABELLED | {"y_l_score": -2.0},
        ULTRAFEEDBACK | {"score_rejected": 8.5},
        ULTRAFEEDBACK | {"rejected": [USER, GOOD]},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
    ],
)
def test_equal_preference_is_seen(values):
    assert adapt(Row("a", values)).tied


def test_a_named_format_is_kept_to_whatever_the_columns():
    row = Row("a", ULTRAFEEDBACK | {"instruction": "x"})
    assert adapt(row, DataFormat.alpaca).prompt == [{"role": "user", "content": "x"}]
    assert adapt(Row("a", {"question": "q", "prompt": "p"}), column="question").prompt == "q"


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"text": "a"}, "no column 'prompt', found: text"),
        ({"prompt": 3}, "column 'prompt' must be text"),
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected', found: prompt, chosen"),
        ({"prompt": "a", "responses": "b"}, "column 'responses' must be a list of texts"),
        ({"prompt": "a", "responses": ["b"], "rewards": [1, 2]}, "'rewards' must be a list, one"),
        (ALPACA_FARM | {"preference": 3}, "preference 3 is neither 1 nor 2"),
        (ALPACA_FARM | {"output_1": None}, "column 'output_1' is null"),
        (RELABELLED | {"prompt": None}, "column 'prompt' is null"),
        (ULTRAFEEDBACK | {"rejected": [USER]}, "'rejected' does not end with a message of the as"),
        (ULTRAFEEDBACK | {"rejected": [GOOD, BAD]}, "answer different conversations"),
        (ULTRAFEEDBACK | {"rejected": None}, "column 'rejected' is null"),
        ({"messages": []}, "'messages' must be messages with role and content"),
        ({"messages": [{"role": "user"}]}, "'messages' must be messages with role and content"),
        ({"messages": [GOOD]}, "no column 'prompt'"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(values, reason):
    with pytest.raises(DataError) as caught:
        adapt(Row("f.jsonl: line 2", values))
    assert str(caught.value).startswith("f.jsonl: line 2: ") and reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
