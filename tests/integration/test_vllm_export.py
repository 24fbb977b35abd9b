"""A run's exported policy, opened by plain vLLM as a user's would be."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.vllm_process import BLOCK_SIZE
from cluster.train import train
from configs.load import prepare

OPEN = """
import json, sys
from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
          kv_cache_memory_bytes=2**26, enable_chunked_prefill=False, block_size=int(sys.argv[2]))
greedy = SamplingParams(temperature=0, max_tokens=8, logprobs=0, detokenize=False)
prompts = [{"prompt_token_ids": [n]} for n in range(10)]
answers = [one.outputs[0] for one in llm.generate(prompts, greedy, use_tqdm=False)]
print(json.dumps([[[token, at[token].logprob] for token, at in zip(a.token_ids, a.logprobs)]
                  for a in answers]))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_opens_an_exported_policy_and_has_its_probabilities(crew, tmp_path):
    run = [f"run.dir={tmp_path}", "run.name=one", "rollout.engine=torch", "learner.updates=2"]
    assert train(prepare("bandit_vllm", run), "bandit_vllm", crew)["status"] == "finished"
    exported = str(tmp_path / "one/checkpoints/step-2/hf")
    alone = os.environ | {
        "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    command = [sys.executable, "-c", OPEN, exported, str(BLOCK_SIZE)]
    opened = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=240)
    assert opened.returncode == 0, opened.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    for prompt, answer in enumerate(json.loads(opened.stdout.splitlines()[-1])):
        tokens, logps = zip(*answer)
        with torch.no_grad():
            logits_TV = model(torch.tensor([[prompt, *tokens[:-1]]])).logits[0]
        theirs = logits_TV.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        np.testing.assert_allclose(logps, theirs.numpy(), atol=1e-5)
