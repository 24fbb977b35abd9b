"""Nothing to remember: no code and no pickle from outside, models by commit, one line of log."""

import ast
import functools
import logging
import os
import re
import tomllib
from pathlib import Path

import pytest

from actors import policy
from actors.tables import table_rows
from cluster.run_directory import describe_environment
from configs.load import prepare, presets
from configs.schema import Config, PolicyConfig
from tests.harness import settings
from tests.unit.test_fuzz_endpoint import AUTHORISED, LIMIT, TOKEN, ask, scope

ROOT = Path(__file__).parents[2]
PACKAGES = ("configs", "actors", "reward_server", "learner", "cluster")
# CUDA handles, from the learner's process to the engine's on one GPU, over Ray's own calls; the
# tree of settings, which the same process has pickled a moment before; the queue's connections,
# both sides of which have shown a key that only Ray's authenticated calls give away
# (U test_wire_callers).
PICKLES = {
    "actors/vllm_transfer.py", "learner/vllm_push.py", "configs/load.py",
    "learner/replay/wire/frames.py",
}  # fmt: skip


@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """(file, name of what is called, the call) in all of our packages."""
    found = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    found.append((str(path.relative_to(ROOT)), ast.unparse(node.func), node))
    return found


def given(call: ast.Call) -> dict[str, str]:
    return {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg}


def test_nothing_is_loaded_with_code_of_its_own_and_weights_are_safetensors():
    loads = [(file, name, given(c)) for file, name, c in calls() if "from_pretrained" in name]
    assert len(loads) >= 6
    for file, name, options in loads:
        assert options.get("trust_remote_code") == "False", (file, name)
        if "Model" in name:
            assert options.get("use_safetensors") == "True", (file, name)


def test_nothing_from_outside_is_unpickled():
    for file, name, call in calls():
        if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"):
            assert file in PICKLES, file
        if name == "torch.load":
            assert given(call)["weights_only"] == "True", file
        assert given(call).get("allow_pickle", "False") == "False", file
        assert name not in ("eval", "exec", "os.system", "yaml.load"), (file, name)
        assert given(call).get("shell", "False") == "False", file


def test_a_data_set_on_the_hub_is_read_at_the_commit_that_is_named(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path: str, **options: object) -> list[dict[str, int]]:
        asked.append((path, options["revision"]))
        return [{"a": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("some/where@0123abcd", "some/where"):
        (row,) = table_rows(path)
        assert row.values == {"a": 1}
    assert asked == [("some/where", "0123abcd"), ("some/where", None)]


def test_a_hub_name_without_a_commit_is_refused():
    with pytest.raises(ValueError, match="pin a hub name with policy.revision=COMMIT"):
        policy.architecture(settings("bandit", "policy.path=some/model", "prompts.source=jsonl",
                                     "prompts.path=x"))  # fmt: skip
    policy.pinned(PolicyConfig(path="some/model", revision="0" * 40))
    policy.pinned(PolicyConfig(path=str(ROOT)))


@pytest.mark.parametrize("name", presets())
def test_a_preset_names_directories_or_leaves_the_commit_to_be_set_and_runs_without_none(name):
    config: Config = prepare(name, [])
    path = config.policy.path
    if path and not path.startswith("{") and not config.policy.revision:
        with pytest.raises(ValueError, match="revision"):
            policy.architecture(config)
    assert not config.reward.port and not config.cluster.dashboard


def test_the_record_of_the_machine_has_no_environment_variable(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hush-hush-token")
    monkeypatch.setenv("HF_TOKEN", "hush-hush-too")
    told = str(describe_environment())
    assert "hush" not in told and os.environ["PATH"] not in told


@pytest.mark.parametrize(
    "request_, body, status",
    [
        (scope([]), b"{}", 401),
        (scope([(b"authorization", b"Bearer guess-guess")]), b"{}", 401),
        (scope(AUTHORISED), b"x" * (LIMIT + 1), 413),
        (scope(AUTHORISED), b"{", 400),
        (scope([], method="PO\nST"), b"", 405),
    ],
)
def test_a_refusal_is_one_line_in_the_log_without_token_or_body(request_, body, status):
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("ray.serve").addHandler(handler)
    try:
        assert ask(request_, [body])[0] == status
    finally:
        logging.getLogger("ray.serve").removeHandler(handler)
    (line,) = lines
    assert str(status) in line and "\n" not in line
    assert TOKEN.decode() not in line and "guess" not in line and "xxx" not in line


def test_ray_is_at_a_version_without_the_known_holes():
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (ray,) = [need for need in needs if need.startswith("ray[")]
    version = tuple(int(n) for n in re.search(r"==(\d+)\.(\d+)", ray).groups())
    assert version >= (2, 54)  # SECURITY.md says which holes those before have
