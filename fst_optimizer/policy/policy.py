"""The policy: a local model, one trainable LoRA adapter, and its published versions.

`Policy("Qwen/Qwen3-1.7B").lm` is a `dspy.LM` like any other. What is special is behind it: every version that
training publishes can be asked for by number, version 0 being the base.
"""

from __future__ import annotations

import itertools
import threading
import uuid
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_optimizer.config.arguments import check_callables, check_path
from fst_optimizer.config.policy import LoraConfig, PolicyArguments, VLLMConfig, settings_of
from fst_optimizer.config.run import TrainConfig
from fst_optimizer.errors import UserError
from fst_optimizer.failpoints import failpoint
from fst_optimizer.model import lora as adapters
from fst_optimizer.model.load import (
    check_placement,
    check_tokenizer,
    fingerprint,
    load_base,
    load_tokenizer,
    model_place,
)
from fst_optimizer.policy.face import PolicyFace
from fst_optimizer.policy.make_engine import EngineChoice, check_choice, make_engine
from fst_optimizer.policy.sharing import TrainingJobs

if TYPE_CHECKING:
    from torch import Tensor

    from fst_optimizer.engines.base import CallObserver
    from fst_optimizer.engines.recorder import RecordingEngine
    from fst_optimizer.engines.vllm.server import OnWait
    from fst_optimizer.train.distill import Distiller
    from fst_optimizer.train.trainer import Trainer
    from fst_optimizer.types import Call


class Policy(PolicyFace):
    """A trainable local model.

    Args:
        model: A folder or a hub name of a causal LM with a chat template; or `letters`, the small one in the package,
            unless a folder of that name has a model in it.
        engine: `torch` generates in this process; `vllm` has a vLLM server do it. A callable makes another engine from
            this policy.
        url: With `vllm`: a server that runs already, to attach to. None: one is started, and stopped by `close`.
        api_key: That server's key.
        vllm: How a vLLM server is started, placed and spoken to.
        quantization: `nf4` holds the base in 4 bits, in trainer and vLLM alike (QLoRA; needs bitsandbytes and a GPU;
            untested). None: as it is.
        on_wait: Told while a vLLM server starts: seconds so far, and the last line of its log.
        lora: The adapter's shape. Ignored when `adapter` is given.
        adapter: A folder with a LoRA adapter to start from; it becomes version 1.
        dtype: `auto` is float32 on CPU and bfloat16 elsewhere; or a name that torch knows.
        device: `auto` is the first GPU if there is one; or a name that torch knows.
        seed: Decides the adapter's initial values and the seeds of calls outside of rollouts.
        max_tokens: Most new tokens of a call that does not say.
        temperature: Of a call outside of rollouts that does not say. 0 is greedy; 1 gives what rollouts sample.
        chat_template_args: Passed to the chat template, e.g. `{"enable_thinking": False}`.
        trust_remote_code: Whether code in the model's folder may run. Off unless asked for.
        max_batch: Most requests that the `torch` engine runs together.
        max_batch_tokens: Most padded tokens that it runs together.
        max_wait_s: How long its first request waits for others, in seconds.

    Raises:
        UserError: The model is missing, has no chat template, or does not fit its tokenizer.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        engine: EngineChoice = "torch",
        lora: LoraConfig | Mapping[str, Any] | None = None,
        adapter: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        seed: int = 0,
        max_tokens: int = 512,
        temperature: float = 0.0,
        chat_template_args: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        max_batch: int = 128,
        max_batch_tokens: int = 262_144,
        max_wait_s: float = 0.004,
        url: str | None = None,
        api_key: str | None = None,
        vllm: VLLMConfig | Mapping[str, Any] | None = None,
        quantization: str | None = None,
        on_wait: OnWait | None = None,
    ) -> None:
        lora = settings_of(LoraConfig, {} if lora is None else lora)
        vllm = None if vllm is None else settings_of(VLLMConfig, vllm)
        PolicyArguments(
            seed=seed,
            max_tokens=max_tokens,
            temperature=temperature,
            trust_remote_code=trust_remote_code,
            max_batch=max_batch,
            max_batch_tokens=max_batch_tokens,
            max_wait_s=max_wait_s,
            dtype=dtype,
            device=device,
            url=url,
            quantization=quantization,
            chat_template_args=chat_template_args,
        )
        check_path("model", model)
        if adapter is not None:
            check_path("adapter", adapter)
        if not isinstance(api_key, str | None):
            raise UserError(f"api_key is of type {type(api_key).__name__}: give a string")
        if on_wait is not None:
            check_callables("on_wait", [on_wait])
        check_choice(engine, url, vllm, quantization)
        check_placement(dtype, device)
        self.folder = model_place(model)
        """Where the model is loaded from; a hub name as it is."""
        if adapter is not None:
            adapters.check_plain(adapter)
        self.key = uuid.uuid4().hex
        """Tells it from every other policy."""
        self.closed = False
        self.source = str(model)
        self.name = Path(self.source).name
        self.lora = lora
        self.seed = seed
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.chat_template_args = dict(chat_template_args or {})
        self.lock = threading.RLock()
        self.tokenizer = load_tokenizer(self.folder, trust_remote_code)
        base = load_base(self.folder, dtype, device, trust_remote_code, quantization)
        check_tokenizer(self.folder, self.tokenizer, base)
        self.fingerprint = fingerprint(base)
        """Tells base models apart, whatever their folder is called."""
        self.model = (
            adapters.attach(base, self.lora, seed=seed) if adapter is None else adapters.attach_from(base, adapter)
        )
        self.zero_adapter = adapters.zeroed(self.model)
        """The untrained adapter, which adds nothing to the base."""
        self.started_from: Mapping[str, Any] | None = None
        """The finished run whose weights training begins with, in plain words. None: none."""
        self.trust_remote_code = trust_remote_code
        self.quantization = quantization
        self.vllm = vllm
        self.url = url
        self._pinned: weakref.WeakSet[RecordingEngine] = weakref.WeakSet()
        self.jobs = TrainingJobs()
        """What the training jobs of dspy's own optimizers share."""
        self._observer: weakref.ref[CallObserver] | None = None
        self._begin_at_base()
        self.engine_name = engine if isinstance(engine, str) else "custom"
        batching = {"max_batch": max_batch, "max_batch_tokens": max_batch_tokens, "max_wait_s": max_wait_s}
        self.engine = make_engine(self, engine, api_key, on_wait, **batching)
        if adapter is not None:
            self.move_lm(self.publish())
        self.lm = self._make_lm(None)
        """The policy as an LM for any DSPy program. It stays at `lm_version`: training does not change its answers."""
        self.latest_lm = self._make_lm(None, follows=True)
        """The policy's current version, whichever that is: the newest while a run trains, the best one after it."""

    # -- versions ----------------------------------------------------------------------------------------------

    def _begin_at_base(self) -> None:
        self._seeds = itertools.count(self.seed << 32)
        self._tensors: dict[int, dict[str, Tensor]] = {}
        self.version = 0
        """The version that training goes on from, and that `latest_lm` serves: the last published or restored one."""
        self._newest = 0
        self._lm_version: int | None = 0

    def publish(self) -> int:
        """Freeze the trainable adapter as the next version, serve it, and return its number."""
        self._newest += 1
        with self.lock:
            frozen = adapters.snapshot(self.model)
        self._serve(failpoint("policy.publish", self._newest), frozen)
        self.version = self._newest
        return self.version

    def restore(self, version: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Go back to a version: serve it, and train on from it. None: the base, whose adapter adds nothing.

        Raises:
            UserError: Another program stays at this number, with other weights.
        """
        if tensors is not None and version in self._tensors and not adapters.same(self._tensors[version], tensors):
            raise UserError(
                f"policy version {version} is in use by another program on this Policy, with other weights (a compiled "
                "one, or policy.lm_at): make a new Policy for this run"
            )
        with self.lock:
            adapters.restore(self.model, self.zero_adapter if tensors is None else tensors)
        if tensors is not None and version not in self._tensors:
            self._serve(version, dict(tensors))
        self.version = version
        self._newest = max(self._newest, version)

    def start_over(self, lora: LoraConfig | None = None, *, seed: int | None = None) -> None:
        """Forget all training: from now on as a new policy on the same loaded base, behind the same engine.

        Every version but the base is retired, also those that an `lm_at` stays at, and numbers begin at 1 again. It is
        what a study's next trial starts from.

        Args:
            lora: The new adapter's shape. None: the old one.
            seed: Of the new policy. None: the old one.

        Raises:
            UserError: The rank is larger than what the engine can serve, as a vLLM server was started for less.
        """
        wanted = lora or self.lora
        max_rank = self.engine.max_rank
        if max_rank is not None and wanted.rank > max_rank:
            raise UserError(f"lora.rank is {wanted.rank}: this policy's vLLM server was started for at most {max_rank}")
        self.lora = wanted
        self.started_from = None
        self.seed = self.seed if seed is None else seed
        for version in sorted(self._tensors):
            self.engine.retire(version)
        with self.lock:
            adapters.replace_trained(self.model, self.lora, seed=self.seed)
            self.zero_adapter = adapters.zeroed(self.model)
        self._begin_at_base()

    def continue_numbers_from(self, newest: int) -> None:
        """Let the next published version be above `newest`, the last one of a run that is resumed, and all served."""
        self._newest = max([newest, *self._tensors])

    def _serve(self, version: int, tensors: dict[str, Tensor]) -> None:
        if version in self.engine.versions():  # of a publish that was interrupted
            self.engine.retire(version)
        self.engine.publish(version, tensors)
        self._tensors[version] = tensors

    def tensors(self, version: int) -> dict[str, Tensor]:
        """The LoRA tensors of a version that is still served."""
        return self._tensors[version]

    def retire_all_but(self, keep: Iterable[int]) -> None:
        """Stop serving every version but these, the base, and those that `lm` or a living `lm_at` stays at."""
        pinned = {self._lm_version, *(engine.version for engine in self._pinned)}
        for version in sorted(set(self._tensors) - set(keep) - pinned):
            self.engine.retire(version)
            del self._tensors[version]

    def save_version(self, version: int, folder: Path) -> None:
        """Write a served version as a peft LoRA folder (safetensors), atomically."""
        adapters.save_adapter(self.model, self._tensors[version], folder)

    def save(self, folder: str | Path) -> None:
        """Write the current version as a peft LoRA folder; version 0 has none to write."""
        if not self.version:
            raise UserError("policy.version is 0, the base: there is no adapter to save; compile a program first")
        self.save_version(self.version, Path(folder))

    # -- training ----------------------------------------------------------------------------------------------

    def trainer(self, config: TrainConfig) -> Trainer:
        """A slow-step trainer on this policy's adapter."""
        from fst_optimizer.train.trainer import Trainer

        return Trainer(
            self.model, self.pad_id, config, lock=self.lock, max_completion_tokens=self.max_tokens, seed=self.seed
        )

    def distiller(self, config: TrainConfig, teacher_version: int, *, full: bool = True) -> Distiller:
        """A trainer of this policy's adapter whose loss is the KL to a version that is served."""
        from fst_optimizer.train.distill import Distiller

        teacher = self._tensors[teacher_version] if teacher_version else None
        return Distiller(self.model, self.pad_id, config, teacher, full=full, lock=self.lock, seed=self.seed)

    def entropy_of(self, calls: Sequence[Call], version: int) -> float:
        """Mean entropy of a served version on these calls' tokens, in nats, at their temperatures."""
        from fst_optimizer.train.scoring import mean_entropy

        tensors = self._tensors[version] if version else None
        with (
            self.lock,
            adapters.temporary_adapter(self.model, tensors) as name,
            adapters.active_adapter(self.model, name),
        ):
            return mean_entropy(self.model, self.pad_id, calls)

    def kl_to_base(self, calls: Sequence[Call], version: int, microbatch_tokens: int = 8192) -> float:
        """Mean per-token KL(version || base) in nats over the full vocabulary, on these calls' tokens."""
        from fst_optimizer.train.scoring import kl_to_base

        if not version or not calls:
            return 0.0
        with self.lock, adapters.temporary_adapter(self.model, self._tensors[version]) as name:
            return kl_to_base(self.model, self.pad_id, calls, name, microbatch_tokens)

    def logprobs_of(self, calls: Sequence[Call], tensors: Mapping[str, Tensor] | None) -> list[list[float]]:
        """The trainer's log-probs of the calls' tokens under these LoRA tensors, or under the base, row by row."""
        from fst_optimizer.train.scoring import logprobs

        with (
            self.lock,
            adapters.temporary_adapter(self.model, tensors) as name,
            adapters.active_adapter(self.model, name),
        ):
            return logprobs(self.model, self.pad_id, calls)

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return int(self.model.peft_config[adapters.TRAINED].r)

    @property
    def dtype(self) -> str:
        """The base's, as torch names it: `float32`, ..."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def pad_id(self) -> int:
        """The padding token's id; masked wherever it appears."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)

    def close(self) -> None:
        """Stop the engine. The policy cannot generate afterwards. `with Policy(...) as policy:` does it at the end."""
        if not self.closed:
            self.closed = True
            self.engine.close()

    def __enter__(self) -> Policy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, object]) -> Policy:
        return self  # programs are copied, the weights behind them are shared on purpose

    def __repr__(self) -> str:
        versions = f"version={self.version}, lm_version={self.lm_version}"
        return f"Policy({self.source!r}, engine={self.engine_name!r}, {versions})"
