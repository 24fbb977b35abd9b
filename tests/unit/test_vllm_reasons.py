"""Why vLLM did not start, in one line: from what its processes logged, or from its exception."""

import pytest

from actors.vllm_process import RECORD, TRACEBACK, reason, root_cause
from cluster import inputs
from configs.errors import ConfigError
from configs.load import prepare

NOTHING_TO_SEE = RuntimeError(
    "Engine core initialization failed. See root cause above. "
    "Failed core proc(s): {'EngineCore_DP0': 1}"
)
# As vLLM 0.32.0 writes them on a CPU, frames left out.
CACHE = f"""{RECORD}EngineCore failed to start.
{TRACEBACK}
  File "vllm/v1/core/kv_cache_utils.py", line 1030, in _check_enough_kv_cache_memory
    raise ValueError(
ValueError: To serve at least one request with the model's max seq len (2048), (1.5 GiB KV cache \
is needed, which is larger than the available KV cache memory (0.25 GiB). Based on the available \
memory, the estimated maximum model length is 320. Try increasing `gpu_memory_utilization` or \
decreasing `max_model_len` when initializing the engine. See https://docs.vllm.ai for more details.
"""
MEMORY = f"""{RECORD}Failed to import from vllm._C: no such file
{RECORD}WorkerProc hit an exception.
{TRACEBACK}
  File "vllm/v1/worker/cpu_worker.py", line 220, in determine_available_memory
    raise ValueError(
ValueError: Available memory on node 0 (13.73/15.09 GiB) on kv cache allocation is less than \
requested memory for kv (10000.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, \
or reduce CPU memory used by other processes.
{RECORD}EngineCore failed to start.
{TRACEBACK}
  File "vllm/v1/executor/multiproc_executor.py", line 444, in get_response
    raise RuntimeError(
RuntimeError: Worker failed with error 'Available memory on node 0', please check the stack trace
"""
CHAINED = f"""{RECORD}Invocation of collective_rpc method failed
{TRACEBACK}
  File "a.py", line 1, in load
KeyError: 'cls'

The above exception was the direct cause of the following exception:

{TRACEBACK}
  File "b.py", line 2, in load_weights
ValueError: There is no module or parameter named 'cls' in TransformersForCausalLM.
The available parameters belonging to it are: {{'model.a', 'model.b'}}
"""


@pytest.mark.parametrize(
    ("errors", "why", "fix"),
    [
        (CACHE, "1.5 GiB KV cache is needed", "set a higher rollout.vllm.kv_cache_gib"),
        (MEMORY, "kv (10000.0 GiB)", "set a lower rollout.vllm.kv_cache_gib"),
        (CHAINED, "no module or parameter named 'cls'", "set rollout.engine=torch"),
    ],
)
def test_the_root_cause_is_one_line_with_our_settings_in_it(errors, why, fix):
    line = reason(NOTHING_TO_SEE, errors)
    assert why in line and fix in line and "\n" not in line and len(line) < 450
    for theirs in ("See root cause", "gpu_memory_utilization", "--kv-cache", "model.a", "Worker"):
        assert theirs not in line


def test_the_first_of_several_processes_names_the_cause():
    assert root_cause(MEMORY).startswith("ValueError: Available memory on node 0 (13.73")
    assert root_cause("") == root_cause(f"{RECORD}a line without a traceback") == ""


def test_without_a_log_the_exception_has_to_do():
    line = reason(NOTHING_TO_SEE, "")
    assert "Engine core initialization failed" in line and "log" in line
    killed = RuntimeError(str(NOTHING_TO_SEE).replace(": 1}", ": -9}"))
    assert "ended by signal 9; set a lower rollout.vllm.kv_cache_gib" in reason(killed, "")


def test_a_setting_that_vllm_refuses_is_told_without_what_is_around_it():
    class Refused(ValueError):
        def errors(self) -> list[dict[str, str]]:
            text = "Value error, Model architectures ['A'] are not supported for now. "
            return [{"msg": text + "Supported architectures: dict_keys(['B', 'C'])"}]

    assert reason(Refused("1 validation error for ModelConfig"), "") == (
        "Model architectures ['A'] are not supported for now; "
        "vLLM does not know this network: set rollout.engine=torch"
    )


def test_a_cache_too_small_for_one_sequence_is_refused_before_anything_starts():
    inputs.vllm_can_serve(prepare("bandit_vllm", ["rollout.vllm.kv_cache_gib=0.0001"]))
    config = prepare("bandit_vllm", ["rollout.vllm.kv_cache_gib=0.00005"])
    with pytest.raises(ConfigError, match="a sequence of 11 tokens takes 9.2e-05 GiB; set roll"):
        inputs.vllm_can_serve(config)


def test_more_memory_than_there_is_is_refused_before_anything_starts():
    config = prepare("bandit_vllm", ["rollout.vllm.kv_cache_gib=3", "rollout.actors=4"])
    inputs.memory_for_vllm(config, 12.1 * inputs.GIB)
    with pytest.raises(ConfigError, match=r"4 actors want 12.0 GiB .* set .*gib=2 or less"):
        inputs.memory_for_vllm(config, 10.0 * inputs.GIB)


def test_responses_that_leave_no_room_for_a_prompt_are_refused(tmp_path):
    from transformers import GPT2Config

    from actors import policy

    policy.write_architecture(GPT2Config(n_positions=64, n_embd=64, n_head=2), str(tmp_path))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_ids": [1]}\n')
    paths = [f"policy.path={tmp_path}", "prompts.source=jsonl", f"prompts.path={prompts}"]
    inputs.prompts(prepare("bandit_vllm", [*paths, "rollout.max_tokens=63"]))
    with pytest.raises(ConfigError, match="is 64 tokens in all; set rollout.max_tokens=32, or at"):
        inputs.prompts(prepare("bandit_vllm", [*paths, "rollout.max_tokens=64"]))
