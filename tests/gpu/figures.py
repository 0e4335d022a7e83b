"""Figures of the CUDA path, as one JSON object: `python tests/gpu/figures.py [--out FILE]`.

Needs a GPU and no download: the model has Qwen3-0.6B's shape (596M parameters, 151,936 words) and random weights, which
cost the same time and memory as trained ones.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fst_optimizer.config.run import TrainConfig
from fst_optimizer.engines.base import GenerationRequest
from fst_optimizer.model.load import load_tokenizer
from fst_optimizer.policy.policy import Policy
from fst_optimizer.testing import as_row, make_tiny_model


def make_model(folder, layers):
    """Qwen3-0.6B's shape with random weights, behind the byte tokenizer of the tests."""
    make_tiny_model(folder)
    tokenizer = load_tokenizer(str(folder), False)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def seconds(run, repeats):
    """The median over `repeats`, after one turn that warms up."""
    found = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def measure(policy, sequences, prompt, completion, repeats):
    """Generation, the slow step, publishing, and how far sampler and trainer are apart."""
    policy.publish()
    requests = [
        GenerationRequest(tuple((seed * 31 + n * 7) % 250 + 3 for n in range(prompt)), completion, seed=seed, version=1)
        for seed in range(sequences)
    ]

    def generate():
        futures = [policy.engine.submit(request) for request in requests]
        return [future.result(timeout=600) for future in futures]

    torch.cuda.reset_peak_memory_stats()
    generate_s = seconds(generate, repeats)
    generate_gib = torch.cuda.max_memory_allocated() / 2**30
    rows = [as_row(*pair) for pair in zip(requests, generate(), strict=True)]
    sampled = sum(len(row.call.completion_ids) for row in rows)
    rows = [replace(row, advantage=(-1.0) ** place, rollout=place) for place, row in enumerate(rows)]
    trainer = policy.trainer(TrainConfig(microbatch_tokens=16_384))
    again = trainer.logprobs(rows)
    far = [
        abs(a - b) for row, new in zip(rows, again, strict=True) for a, b in zip(row.call.logprobs, new, strict=True)
    ]
    torch.cuda.reset_peak_memory_stats()
    step_s = seconds(lambda: trainer.step(rows), repeats)
    return {
        "sequences": sequences,
        "prompt_tokens": prompt,
        "sampled_tokens": sampled,
        "generate_tokens_per_s": round(sampled / generate_s),
        "generate_peak_gib": round(generate_gib, 2),
        "step_s": round(step_s, 3),
        "step_tokens_per_s": round((sampled + sequences * prompt) / step_s),
        "step_peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "publish_ms": round(1e3 * seconds(lambda: policy.retire_all_but({policy.publish()}), repeats), 1),
        "logprob_difference_mean": round(statistics.mean(far), 5),
        "logprob_difference_max": round(max(far), 4),
    }


def main():
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("--sequences", type=int, default=64)
    read.add_argument("--prompt", type=int, default=256)
    read.add_argument("--completion", type=int, default=256)
    read.add_argument("--layers", type=int, default=28)
    read.add_argument("--repeats", type=int, default=3)
    read.add_argument("--out", type=Path)
    asked = read.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        policy = Policy(make_model(Path(folder), asked.layers), device="cuda")
        found = measure(policy, asked.sequences, asked.prompt, asked.completion, asked.repeats)
        found |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": str(policy.model.dtype)}
        found |= {"parameters": sum(p.numel() for n, p in policy.model.named_parameters() if "lora_" not in n)}
        policy.close()
    text = json.dumps(found, indent=2)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
