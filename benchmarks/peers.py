"""Other systems at the same sizes, each with its own best way of generating."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from based.errors import BasedError
from based.models import DecoderConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def timed(generate: Callable[[int], Any], batch: int, tokens: int) -> dict[str, float]:
    """Seconds and tokens a second of `generate(new tokens)`, after a short call as warm-up."""

    def seconds(count: int) -> float:
        began = time.perf_counter()
        generate(count)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(min(tokens, 8))
    prefill, whole = seconds(1), seconds(tokens)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    return {
        "tokens_per_second": batch * tokens / whole,
        "seconds": whole,
        "prefill_seconds": prefill,
        "peak_bytes": peak,
    }


def huggingface(
    config: DecoderConfig, batch: int, prompt: int, tokens: int, attention: str
) -> dict[str, float]:
    """`generate` of a Llama with the sizes of one of our Transformers; greedy."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    options = config.mixer_options["softmax_attention"]
    heads = int(options["num_heads"])
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=len(config.mixers),
        num_attention_heads=heads,
        num_key_value_heads=int(options.get("num_kv_heads") or heads),
        head_dim=config.hidden_size // heads,
        max_position_embeddings=prompt + tokens,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model: Any = AutoModelForCausalLM.from_config(
            shape, attn_implementation=attention, dtype=DTYPE
        )
    model.eval()
    inputs = torch.randint(config.vocab_size, (batch, prompt), device=DEVICE)
    mask = torch.ones_like(inputs)

    def generate(count: int) -> None:
        out = model.generate(
            inputs,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        assert out.shape == (batch, prompt + count)

    return timed(generate, batch, tokens)


def mamba(batch: int, prompt: int, tokens: int) -> dict[str, float]:
    """mamba-ssm's own generation under CUDA graphs; Mamba-1.3B as the paper's baseline."""
    try:
        from mamba_ssm.models.config_mamba import (  # pyright: ignore[reportMissingImports]
            MambaConfig,
        )
        from mamba_ssm.models.mixer_seq_simple import (  # pyright: ignore[reportMissingImports]
            MambaLMHeadModel,
        )
    except ImportError as error:
        raise BasedError("this piece needs mamba-ssm (pip install mamba-ssm)") from error
    torch.manual_seed(0)
    shape = MambaConfig(d_model=2048, n_layer=46, vocab_size=50277, pad_vocab_size_multiple=16)
    model = MambaLMHeadModel(shape, device=DEVICE, dtype=DTYPE).eval()
    inputs = torch.randint(50277, (batch, prompt), device=DEVICE)

    def generate(count: int) -> None:
        model.generate(input_ids=inputs, max_length=prompt + count, cg=True, top_k=1)

    return timed(generate, batch, tokens)


def official(repository: Path, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
    """The official repository's graph-captured decode of based-1.3b, in a process of its own.

    Its package has our name, so it is never imported here.
    """
    if not (repository / "based" / "generation.py").exists():
        raise BasedError(f"{repository} is no checkout of the official repository")
    script = Path(__file__).with_name("official_decode.py")
    sizes = [str(repository), str(batch), str(prompt), str(tokens)]
    command = [sys.executable, str(script), *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BasedError(f"the official decode failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
