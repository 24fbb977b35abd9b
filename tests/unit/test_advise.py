"""`python -m cluster advise`: the paper's answers on its bandit, and on problems of other kinds."""

import json
import shlex
import textwrap

import numpy as np
import pytest
import torch

from cluster.__main__ import main
from cluster.advise import advice, advise
from configs.load import prepare, presets
from learner.stages.bandit import reference_histogram


@pytest.fixture
def ask(tmp_path, capsys):
    """Runs the command; gives what it printed and what it wrote."""

    def asked(source: str, *settings: str):
        runs = tmp_path / "runs"
        assert main(["advise", source, f"run.dir={runs}", *settings]) == 0
        (path,) = runs.glob("advice/*/advice.json")
        page = capsys.readouterr().out
        assert page.splitlines()[-1] == f"every figure: {path}"
        return page, json.loads(path.read_text())

    return asked


def rows(path, tokens, count=60):
    """Pairs of responses whose tokens `tokens(generator)` draws, ten each."""
    random = np.random.default_rng(0)
    with open(path, "w") as file:
        for row in range(count):
            pair = [tokens(random).tolist() for _ in range(2)]
            line = {"prompt_ids": [row % 10], "chosen_ids": pair[0], "rejected_ids": pair[1]}
            file.write(json.dumps(line) + "\n")
    return str(path)


HISTOGRAM = reference_histogram(prepare("bandit", []).policy.bandit)


def of_reference(random):
    return random.choice(len(HISTOGRAM), 10, p=HISTOGRAM)


def of_elsewhere(random):
    return random.integers(60, 80, 10)


# --- the paper's bandit ----------------------------------------------------------------------


@pytest.mark.parametrize("centre", [70, 50, 90])
def test_a_peak_where_the_reference_has_little_mass_takes_on_policy_and_a_negative_gradient(
    ask, centre
):
    page, record = ask("bandit_rwr", f"reward.centre={centre}")
    found = record["advice"]
    assert (found["c1"], found["c2"], found["preset"]) == ("far", "not measured", "bandit")
    assert found["recommended"][0].startswith(advice.ON_POLICY)
    assert "FAR" in page and "no data given" in page
    assert f"train bandit run.dir={record_dir(page)} reward.centre={centre}" in page


def record_dir(page):
    return page.splitlines()[-1].removeprefix("every figure: ").partition("/advice/")[0]


@pytest.mark.parametrize("centre", [20, 15])
def test_a_peak_by_the_references_mode_takes_no_more_than_supervised_methods(ask, centre):
    page, record = ask("bandit", f"reward.centre={centre}")
    assert record["advice"]["c1"] == "near" and "NEAR" in page
    assert record["advice"]["recommended"][0].startswith(advice.SUPERVISED)
    assert record["advice"]["preset"] == "offline_best_of_n"


@pytest.mark.parametrize("centre", [20, 70])
def test_too_few_samples_are_unclear_and_state_both_branches_and_how_many_would_do(ask, centre):
    page, record = ask("bandit", f"reward.centre={centre}", "samples=20")
    assert record["advice"]["c1"] == "unclear" and 500 < record["c1"]["enough"] < 2000
    assert [text[:18] for text in record["advice"]["recommended"]] == [
        "if the peak is nea", "if the peak is far",
    ]  # fmt: skip
    assert "samples would likely do" in page


def test_equal_seeds_give_equal_figures(ask):
    first, second = (ask("bandit", "samples=100", "seed=3")[1] for _ in range(2))
    other = ask("bandit", "samples=100", "seed=4")[1]
    assert first["c1"] == second["c1"] != other["c1"]


# --- data ------------------------------------------------------------------------------------


def test_a_far_peak_and_data_that_covers_take_an_offline_contrastive_loss(ask, tmp_path):
    data = rows(tmp_path / "covers.jsonl", of_reference)
    page, record = ask(data)
    assert (record["advice"]["c1"], record["advice"]["c2"]) == ("far", "covers")
    assert record["advice"]["recommended"][0].startswith(advice.CONTRASTIVE)
    assert record["c2"]["responses"] == 120 and "NOT MEASURED" not in page
    command = shlex.split(record["advice"]["command"])
    assert command[:5] == ["python", "-m", "cluster", "train", "offline_ipo"]
    assert {f"data.path={data}", "rollout.responses_per_prompt=2"} <= set(command)


def test_a_far_peak_and_data_that_misses_take_on_policy_with_a_negative_gradient(ask, tmp_path):
    data = rows(tmp_path / "misses.jsonl", of_elsewhere)
    _, record = ask("offline_ipo", f"data.path={data}", "rollout.responses_per_prompt=2")
    assert (record["advice"]["c1"], record["advice"]["c2"]) == ("far", "misses")
    assert record["advice"]["recommended"] == [advice.ON_POLICY]
    assert record["c2"]["difference"]["high"] < -1.0 and record["c2"]["outside"]["value"] > 0.9
    assert data not in record["advice"]["command"]


def test_a_near_peak_and_data_that_covers_take_it_as_it_is(ask, tmp_path):
    data = rows(tmp_path / "covers.jsonl", of_reference)
    _, record = ask(data, "reward.centre=20")
    assert (record["advice"]["c1"], record["advice"]["c2"]) == ("near", "covers")
    assert f"data.path={data}" in record["advice"]["command"]


def test_a_preset_that_samples_its_data_covers_by_construction(ask):
    page, record = ask("offline_rwr")
    assert record["advice"]["c2"] == "covers" and record["c2"] is None
    assert "samples its data from π_ref itself" in page


# --- other problems --------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Settings of a GPT-NeoX of 40 tokens, its prompts in a file, and rewards of the user's."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    shape = GPTNeoXConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(shape).save_pretrained(tmp_path / "hf")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": [5] * n}) + "\n" for n in (1, 2, 3)))
    (tmp_path / "my_advised_rewards.py").write_text(
        textwrap.dedent("""
        def low(prompts, responses):
            return [sum(t < 20 for t in r) / len(r) for r in responses]

        def rare(prompts, responses):
            return [float(len(r) > 4 and all(t < 8 for t in r)) for r in responses]

        def broken(prompts, responses):
            raise OSError("no model here")
    """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return [
        f"policy.path={tmp_path / 'hf'}", "prompts.source=jsonl", f"prompts.path={prompts}",
        "rollout.max_tokens=6", "reward.kind=function", "samples=1200",
    ]  # fmt: skip


@pytest.mark.parametrize("name, verdict", [("low", "near"), ("rare", "far")])
def test_any_policy_prompts_and_reward_will_do(ask, own, name, verdict):
    page, record = ask("bandit", *own, f"reward.path=my_advised_rewards:{name}", "upper=1")
    assert record["advice"]["c1"] == verdict and "to 3 prompts" in page
    words = shlex.split(record["advice"]["command"])[4:]
    advised = prepare(words[0], words[1:])  # the user's preset, with what is advised
    assert advised.objective.name == {"near": "best_of_n", "far": "ipo"}[verdict]
    assert advised.policy.path and advised.reward.path == f"my_advised_rewards:{name}"


def test_without_a_greatest_reward_the_rise_of_the_best_of_n_is_judged(ask, own):
    page, record = ask("bandit", *own, "reward.path=my_advised_rewards:low")
    assert record["c1"]["share"] is None and record["c1"]["rise"] is not None
    assert record["c1"]["range"][1] is None and "upper=" in page


def test_rewards_that_fail_end_in_one_line(own, tmp_path, capsys):
    settings = [*own, "reward.path=my_advised_rewards:broken", f"run.dir={tmp_path}"]
    assert main(["advise", "bandit", *settings]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no model here" in err


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, settings, what",
    [
        ("bandti", "seed=0", "no such preset"),
        ("bandit", "samples=1", "samples=1: "),
        ("bandit", "samples=many", "samples=many: "),
        ("bandit", "upper=nan", "upper=nan: "),
        ("bandit", "lower=2", "lower=2"),
        ("bandit", "rollout.temperatur=1", "did you mean rollout.temperature"),
        ("bandit", "reward.width=0", "reward.width"),
        ("none.jsonl", "seed=0", "none.jsonl"),
        (
            "bandit",
            "policy.path=/none/x prompts.source=jsonl prompts.path=x",
            "policy.path=/none/x",
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sampled(
    tmp_path, monkeypatch, capsys, source, settings, what
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(advise, "sample", lambda problem: pytest.fail("sampled"))
    assert main(["advise", source, *settings.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and what in err
    assert not list(tmp_path.iterdir())


def test_a_reward_outside_of_the_range_given_is_refused(tmp_path, capsys):
    settings = ["upper=0.01", "samples=40", f"run.dir={tmp_path}"]
    assert main(["advise", "bandit", *settings]) == 2
    assert "upper=0.01" in capsys.readouterr().err


@pytest.mark.parametrize("preset", [n for n in presets() if not prepare(n, []).cluster.actor_gpus])
@pytest.mark.parametrize("start", list(dict.fromkeys(s for _, s in advice.TABLE.values())))
def test_every_command_that_is_advised_can_be_run(preset, start):
    given = advice.Given(preset, ["seed=1"], prepare(preset, ["seed=1"]), 0)
    _, command = advice._command(start, given)
    words = shlex.split(command)
    staged = any(vars(given.config.pipeline)[stage] for stage in ("data", "sft", "reward_model"))
    assert words[3] == ("pipeline" if staged else "train")
    assert prepare(words[4], words[5:]).objective.name == start.objective
