"""The registry: one line a mixer. docs/adding_a_mixer.md says how to add one."""

from importlib import import_module
from typing import Any

from based.errors import BasedError
from based.mixers.base import Mixer

MIXERS: dict[str, str] = {
    "taylor_linear_attention": "based.mixers.taylor_linear_attention:TaylorLinearAttention",
    "sliding_window_attention": "based.mixers.sliding_window_attention:SlidingWindowAttention",
    "gated_convolution": "based.mixers.gated_convolution:GatedConvolution",
    "linear_attention": "based.mixers.linear_attention:LinearAttention",
    "base_convolution": "based.mixers.base_convolution:BaseConvolution",
    "hyena": "based.mixers.hyena:Hyena",
    "h3": "based.mixers.h3:H3",
    "softmax_attention": "based.mixers.softmax_attention:SoftmaxAttention",
    "mamba": "based.mixers.mamba:Mamba",
    "mamba2": "based.mixers.mamba2:Mamba2",
    "rwkv5": "based.mixers.rwkv5:RWKV5",
    "rwkv7": "based.mixers.rwkv7:RWKV7",
    "gated_linear_attention": "based.mixers.gated_linear_attention:GatedLinearAttention",
    "delta_net": "based.mixers.delta_net:DeltaNet",
    "gated_delta_net": "based.mixers.gated_delta_net:GatedDeltaNet",
}


def mixer_class(name: str) -> type[Mixer]:
    """The class registered under `name`; its module is imported when first asked for."""
    if name not in MIXERS:
        raise BasedError(f"no mixer is named {name!r}; there are {', '.join(MIXERS)}")
    module, attribute = MIXERS[name].split(":")
    return getattr(import_module(module), attribute)


def build_mixer(name: str, hidden_size: int, **options: Any) -> Mixer:
    """A layer's mixer; `options` are the keyword arguments of its class."""
    try:
        return mixer_class(name)(hidden_size, **options)
    except TypeError as error:
        raise BasedError(f"mixer {name} does not take these options: {error}") from error
