"""Times the official repository's decode of based-1.3b: run as a script by `peers.official`.

    python official_decode.py REPOSITORY BATCH PROMPT TOKENS

`based` here is the official package, found in REPOSITORY; it needs flash-attn.
"""

import json
import sys
import time

LINEAR, WINDOW = [1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34]


def shape(length: int) -> dict:
    """The released configuration, as the repository's own files give it."""
    mixers = "based.models.mixers"
    return {
        "alt_mixer_layers": LINEAR,
        "alt_mixer_2_layers": WINDOW,
        "mixer": {
            "_target_": f"{mixers}.convolution.BaseConv",
            "l_max": length,
            "use_bias": True,
            "expand_proj": 4,
            "kernel_sizes": 3,
        },
        "alt_mixer": {
            "_target_": f"{mixers}.linear_attention.LinearAttention",
            "l_max": length,
            "feature_map": {"_target_": f"{mixers}.linear_attention.TaylorExp", "input_dim": 16},
            "feature_dim": 16,
            "num_heads": 16,
        },
        "alt_mixer_2": {
            "_target_": f"{mixers}.slide_attention.SlidingAttention",
            "window_size": 256,
            "num_heads": 16,
            "causal": True,
        },
        "n_embd": 1792,
        "n_head": 16,
        "n_layer": 36,
        "n_inner": 3584,
        "n_positions": length,
        "special_initializer": True,
        "rms_norm": True,
        "fused_mlp": False,
        "attn_pdrop": 0,
        "embd_pdrop": 0,
        "resid_pdrop": 0,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "out_proj_bias": False,
        "qkv_proj_bias": False,
        "fused_bias_fc": True,
        "use_flash_attn": True,
        "residual_in_fp32": True,
        "activation_function": "swiglu",
        "rotary_emb_fraction": 1,
        "fused_dropout_add_ln": True,
        "max_position_embeddings": 0,
        "pad_vocab_size_multiple": 8,
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
    }


def main() -> None:
    repository, batch, prompt, tokens = sys.argv[1], *map(int, sys.argv[2:])
    sys.path.insert(0, repository)
    import torch
    from based.models.gpt import (  # pyright: ignore[reportMissingImports]
        GPT2MixerConfig,
        GPTLMHeadModel,
    )

    torch.manual_seed(0)
    config = GPT2MixerConfig(**shape(prompt + tokens))
    model = GPTLMHeadModel(config).to("cuda", torch.bfloat16).eval()
    inputs = torch.randint(50257, (batch, prompt), device="cuda")

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.no_grad():
            model.generate(inputs, max_length=prompt + count, top_k=1, cg=True)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(tokens)  # warm-up, and the graph's capture
    prefill, whole = seconds(1), seconds(tokens)
    row = {
        "tokens_per_second": batch * tokens / whole,
        "seconds": whole,
        "prefill_seconds": prefill,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
