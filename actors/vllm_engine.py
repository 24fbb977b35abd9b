"""The vLLM engine: continuous batching over all prompts in flight, versions per token.

Every request's random numbers come from `request_seed(seed, stream, position)`, member m's from m
after it. A response's log-probabilities are those of the distribution sampled (temperature applied,
nothing masked). Each token's version is vLLM's own record of the weights that sampled it: it labels
every engine step, and changes the label only while the scheduler is paused.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors import policy
from actors.engine import NO_VERSION, Request
from actors.packing import does_not_fit, fail_group, pack
from actors.randomness import request_seed
from actors.rollout import GENERATION_FAILED, Rollouts, Version
from actors.shared_memory import FILLED, STAGED, UNSTAGED
from actors.vllm_process import DIED, EngineDied, VllmProcess
from actors.vllm_push import Pushes, label
from configs.schema import Config

STAGED_POLL = 0.001  # seconds between looks at the mark of weights that are being staged


class VllmEngine:
    """Generates with vLLM in processes below this one (see `actors.engine`).

    `generate` may be called from several threads at once; `load` waits for nobody: what is being
    generated is paused, and goes on under the new weights with its caches computed anew.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.version = NO_VERSION
        shape = policy.architecture(config)
        self.end_tokens = policy.end_tokens(shape)
        self.context = policy.context(config, shape)
        self.vocabulary: int = shape.vocab_size
        self.process = VllmProcess(config, shape)
        self._numbers = itertools.count()
        self._running = 0  # requests that vLLM has, counted on its loop
        self._loading = asyncio.Lock()  # from shared memory, one version at a time
        self.updating = asyncio.Lock()
        self.halted = self.asleep = False
        self._pushes = Pushes(self, config.limits.transfer_seconds)

    @property
    def llm(self) -> Any:
        """vLLM's AsyncLLM, to be used on the process's loop."""
        return self.process.llm

    @property
    def longest_prompt(self) -> int:
        """In tokens, so that a whole response still fits."""
        return self.context - self.config.rollout.max_tokens

    def load(self, weights: np.ndarray, version: Version) -> None:
        expected = self.process.buffer.array.size
        if weights.size != expected:
            raise ValueError(f"weights have {weights.size} numbers, this architecture {expected}")
        self.process.call(
            self._update(weights, version), self.config.limits.wait_seconds,
            lambda: f"vLLM is taking version {version.step} of the weights",
        )  # fmt: skip

    async def _update(self, weights: np.ndarray, version: Version) -> None:
        """vLLM's start, update, finish, with the caches emptied and nothing generated meanwhile; a
        worker that stages (`actors.vllm_staging`) starts before that, if there is work to go on
        with, and takes weights while they are still being written."""
        llm, buffer = self.process.llm, self.process.buffer
        async with self._loading:
            staged, buffer.mark[FILLED] = int(buffer.mark[STAGED]), 0
            filling = asyncio.create_task(asyncio.to_thread(buffer.fill, weights))
            try:
                if staged == UNSTAGED:
                    await filling
                ahead = staged != UNSTAGED and self._busy
                if ahead:
                    await llm.start_weight_update()
                    while buffer.mark[STAGED] == staged:
                        await asyncio.sleep(STAGED_POLL)
                await self._change(version, ahead)
            except BaseException:
                with contextlib.suppress(Exception):  # else the next would find this one's staged
                    seconds = self.config.limits.transfer_seconds
                    await asyncio.wait_for(llm.finish_weight_update(), seconds)
                raise
            finally:
                await filling

    async def _change(self, version: Version, ahead: bool) -> None:
        """ahead: the update has been started."""
        llm = self.process.llm
        async with self.updating:
            if busy := self._busy:  # as llm.pause_generation does, without its sleep of 20 ms
                await llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
            first = [] if busy else [llm.reset_prefix_cache()]
            await self._take(first if ahead else [*first, llm.start_weight_update()])
            await llm.update_weight_version(label(version))
            self.version, self.halted = version, False
            if busy:
                await llm.resume_generation()

    async def _take(self, first: list[Any]) -> None:
        """These calls, update and finish: each sent before another is answered, since vLLM serves
        them one after the other, and one there and back costs milliseconds."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        llm = self.process.llm
        last = [llm.update_weights(WeightTransferUpdateRequest(update_info={})),
                llm.finish_weight_update()]  # fmt: skip
        for answer in await asyncio.gather(*first, *last, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer

    @property
    def _busy(self) -> bool:
        return self._running > 0 or self.halted

    def push(self, step: str, payload: dict[str, Any]) -> None:
        """One step of a push from the learner's GPU, see `actors.vllm_push`; from any thread."""
        self.process.call(
            self._pushes.step(step, payload), self.config.limits.wait_seconds,
            lambda: f"vLLM is at {step} of weights that the learner pushes",
        )  # fmt: skip

    def sleep(self) -> None:
        """Give the GPU's memory to the learner; the weights are kept in main memory."""
        self.process.call(
            self._sleep(), self.config.limits.wait_seconds, lambda: "vLLM is going to sleep"
        )

    def wake(self) -> None:
        """Take the memory back, as far as it is not there."""
        self.process.call(self._wake(), self.config.limits.wait_seconds, lambda: "vLLM is waking")

    async def _sleep(self) -> None:
        async with self.updating:
            await self.llm.sleep(level=1)
            self.asleep = True

    async def _wake(self) -> None:
        async with self.updating:
            if self.asleep:
                await self.llm.wake_up()
                self.asleep = False

    def generate(self, requests: Sequence[Request], stream: str) -> Rollouts:
        answers = self.process.call(
            self._answer_all(requests, stream), self.config.limits.wait_seconds, self._progress
        )
        return self._block(requests, answers)

    def _progress(self) -> str:
        """Where vLLM is, in words; the same words later mean that it stands still."""
        states = list(self.process.llm.output_processor.request_states.values())
        tokens = sum(s.detokenizer.num_output_tokens() for s in states if s.detokenizer)
        return f"vLLM has {len(states)} responses in hand, {tokens} tokens long"

    def score(self, text_NT: np.ndarray) -> np.ndarray:
        rows = self.process.call(
            self._score_all(text_NT), self.config.limits.wait_seconds, self._progress
        )
        return np.array(rows, dtype=np.float32)

    async def _score_all(self, text_NT: np.ndarray) -> list[list[float]]:
        """vLLM's own scores of prompts, whatever else is running. It takes no prefix from its
        cache for them, and applies no temperature (0.32.0, gpu_model_runner.py); the one token
        that a request must generate is thrown away."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = SamplingParams(
            max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        outputs = await asyncio.gather(*(self._ask(text_T, sampling) for text_T in text_NT))
        return [output.prompt_logprobs.logprobs for output in outputs]

    async def _answer_all(self, requests: Sequence[Request], stream: str) -> list[Any]:
        return await asyncio.gather(*(self._answer(request, stream) for request in requests))

    async def _answer(self, request: Request, stream: str) -> list[Any] | str:
        """vLLM's C outputs for one prompt, or why there are none."""
        if why := does_not_fit(request, self.longest_prompt, self.vocabulary):
            return why
        try:
            last = await self._ask(request.prompt.ids, self._sampling(request, stream))
            return last.outputs if last else "vLLM gave no answer"
        except EngineDied:
            raise
        except Exception as error:
            return f"vLLM: {_one_line(error.__cause__ or error)}"

    async def _ask(self, ids: Any, sampling: Any) -> Any:
        """vLLM's last output for one prompt; None if there was none."""
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        async with self.updating:
            self._running += 1
        try:
            last, prompt = None, tokens_input(np.asarray(ids).tolist())
            async for output in self.process.llm.generate(
                prompt, sampling, str(next(self._numbers))
            ):
                last = output
            return last
        except EngineDeadError as error:
            raise EngineDied(DIED) from error
        finally:
            self._running -= 1

    def _sampling(self, request: Request, stream: str) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        rollout = self.config.rollout
        return SamplingParams(
            n=rollout.responses_per_prompt,
            seed=request_seed(self.config.seed, stream, request.id.position),
            temperature=rollout.temperature,
            max_tokens=rollout.max_tokens,
            stop_token_ids=list(self.end_tokens),
            ignore_eos=True,  # the end tokens are those of the architecture, listed above
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _block(self, requests: Sequence[Request], answers: list[list[Any] | str]) -> Rollouts:
        members = self.config.rollout.responses_per_prompt
        outputs: list[Any] = []  # of each rollout, None where there is none
        for answer in answers:
            outputs += [None] * members if isinstance(answer, str) else answer
        done = [o if o is not None and o.finish_reason in ("stop", "length") else None
                for o in outputs]  # fmt: skip
        kept = [output for output in done if output is not None]
        steps = [_versions(output) for output in kept]
        block = pack(
            requests, members, self.config.rollout.temperature,
            np.array([len(o.token_ids) if o is not None else 0 for o in done]),
            _join([o.token_ids for o in kept]), _join([o.logprobs.logprobs for o in kept]),
            _join([lineage_L for lineage_L, _ in steps]), _join([step_L for _, step_L in steps]),
        )  # fmt: skip
        for group, answer in enumerate(answers):
            if isinstance(answer, str):
                fail_group(block, group, answer)
        for rollout, (output, good) in enumerate(zip(outputs, done)):
            if output is not None and good is None:
                why = f"vLLM ended it with {output.finish_reason!r}"
                block.fail(rollout, GENERATION_FAILED, why)
            elif good is not None and self.end_tokens:
                block.truncated_N[rollout] = good.finish_reason == "length"
        return block

    def close(self) -> None:
        self.process.close()


def _versions(output: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lineage and step of the weights that sampled each token, [L] each."""
    lineage_L = np.full(len(output.token_ids), NO_VERSION.lineage)
    step_L = np.full(len(output.token_ids), NO_VERSION.step)
    for span in output.weight_versions or ():
        if "." in span.version:  # else vLLM's own label, of weights that no learner sent
            lineage, step = map(int, span.version.split("."))
            lineage_L[span.start : span.end], step_L[span.start : span.end] = lineage, step
    return lineage_L, step_L


def _join(parts: list[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(part) for part in parts]) if parts else np.zeros(0)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
