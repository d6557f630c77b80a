"""The paper's lower bound as code (Theorem 3.1), and what a hand-built Based reaches.

INDEX: Alice holds n bits, sends one message, and Bob must name the bit of his
choice; her message needs n bits. A recurrent model that solves MQAR is such a
protocol, with its state as the message. So no state of fewer bits can hold n pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lgamma, log, log2
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from based.errors import BasedError
from based.mixers import State, build_mixer
from based.mixers.gated_convolution import GatedConvolution
from based.mixers.taylor_linear_attention import TaylorLinearAttention

if TYPE_CHECKING:
    from rich.console import Console

# Keys are this long, so that s^2 / 2 of a key with itself stands far above the rest.
SHARPNESS = 1e3


class HandBuiltBased(nn.Module):
    """A gated convolution and a Taylor linear attention with weights set by hand.

    Tokens: keys 0 .. keys - 1, then `values` values. Channels: the token's key
    code, its value code, and room for the key code of the token before. The
    convolution fills that room; the attention's key reads it, its query the
    token's own key code, its value the value code. A query then finds the token
    that stood behind the same key before: the value.
    """

    def __init__(self, keys: int, values: int, feature_dim: int, value_dim: int) -> None:
        super().__init__()
        self.keys, self.feature_dim, self.value_dim = keys, feature_dim, value_dim
        self.key_codes = near_orthogonal(keys, feature_dim)
        self.value_codes = sign_codes(values, value_dim)
        size = 2 * feature_dim + value_dim
        # Values by channel blocks: [key | value | key before].
        self.embedding = torch.zeros(keys + values, size, dtype=torch.float64)
        self.embedding[:keys, :feature_dim] = self.key_codes
        self.embedding[keys:, feature_dim : feature_dim + value_dim] = self.value_codes
        self.shift = _shift_by_one(size, feature_dim)
        self.memory = _memory(size, feature_dim, value_dim)

    def init_state(self, batch_size: int) -> list[State]:
        """Before the first token."""
        return [self.shift.init_state(batch_size), self.memory.init_state(batch_size)]

    @torch.no_grad()
    def read(
        self, tokens: Int[Tensor, "B T"], states: list[State]
    ) -> tuple[Int[Tensor, "B T"], list[State]]:
        """The value token named at every position, and the states after."""
        x = self.embedding[tokens]
        shifted, first = self.shift(x, states[0])
        named, second = self.memory(x + shifted, states[1])
        scores = named[..., : self.value_dim] @ self.value_codes.T
        assert first is not None
        assert second is not None
        return self.keys + scores.argmax(-1), [first, second]

    def state_bits(self) -> int:
        """Bits of one sequence's state, in float64 as it is computed here."""
        return 8 * sum(m.state_bytes(0, torch.float64) for m in (self.shift, self.memory))

    def coherence(self) -> float:
        """Largest |cosine| between two key codes."""
        gram = self.key_codes @ self.key_codes.T
        return (gram - torch.eye(self.keys, dtype=gram.dtype)).abs().max().item()


def index_protocol(
    model: HandBuiltBased, bits: Bool[Tensor, " N"], index: int
) -> tuple[bool, list[State]]:
    """INDEX solved by MQAR: Bob's answer for bit `index`, and Alice's message.

    Alice feeds the pairs (key i, bit i) and sends the state; Bob, who knows nothing
    else, feeds key `index` and reads the value.
    """
    values = model.keys + bits.long()
    pairs = torch.stack([torch.arange(len(bits)), values], dim=1).flatten()[None]
    _, message = model.read(pairs, model.init_state(1))
    answer, _ = model.read(torch.tensor([[index]]), message)
    return bool(answer.item() - model.keys), message


def lower_bound_bits(pairs: int, values: int, accuracy: float = 1.0) -> float:
    """Bits that any state needs to answer `pairs` queries this well; values are distinct.

    All assignments of distinct values must reach different states; errors save at
    most what Fano's inequality grants.
    """
    whole = (lgamma(values + 1) - lgamma(values - pairs + 1)) / log(2)
    wrong = 1 - accuracy
    entropy = 0.0 if wrong in (0.0, 1.0) else -wrong * log2(wrong) - accuracy * log2(accuracy)
    return max(0.0, whole - pairs * (entropy + wrong * log2(values)))


def guaranteed_pairs(model: HandBuiltBased) -> int:
    """How many pairs are recalled whatever the bits: a(1) > sum of the other weights.

    With cosine c between two codes a key weighs a(c) = 1 + s c + (s c)^2 / 2 against
    a(1), s = SHARPNESS. For two values, +1 and -1, the sum of all others can at worst
    oppose.
    """
    weights = _weights(model.key_codes @ model.key_codes.T * SHARPNESS)
    own = weights.diagonal()
    for pairs in range(1, model.keys + 1):
        others = weights[:pairs, :pairs].sum(1) - own[:pairs]
        if not bool((own[:pairs] > others).all()):
            return pairs - 1
    return model.keys


def taylor_error(largest: float, points: int = 1001) -> float:
    """Largest |1 + s + s^2/2 - e^s| / e^s over |s| <= largest."""
    s = torch.linspace(-largest, largest, points, dtype=torch.float64)
    return (_weights(s) / s.exp() - 1).abs().max().item()


def attention_distance(largest: float, keys: int = 64, trials: int = 200) -> float:
    """Mean total variation between Taylor's and softmax's weights, s uniform in +-largest."""
    generator = torch.Generator().manual_seed(0)
    s = largest * (2 * torch.rand(trials, keys, generator=generator, dtype=torch.float64) - 1)
    taylor = _weights(s)
    taylor = taylor / taylor.sum(-1, keepdim=True)
    return ((taylor - s.softmax(-1)).abs().sum(-1) / 2).mean().item()


def near_orthogonal(count: int, size: int, steps: int = 300) -> Float[Tensor, "N K"]:
    """Unit vectors with small products: orthonormal if they can be, else descended to.

    The sum of fourth powers of all products is what it lowers: with few vectors
    zero, with many as even as the space allows.
    """
    if count <= size:
        return torch.eye(size, dtype=torch.float64)[:count]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(count, size, generator=generator, dtype=torch.float64)
    codes.requires_grad_()
    optimizer = torch.optim.Adam([codes], lr=0.02)
    for _ in range(steps):
        unit = nn.functional.normalize(codes, dim=1)
        loss = (unit @ unit.T).pow(4).sum() / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return nn.functional.normalize(codes.detach(), dim=1)


def sign_codes(count: int, size: int) -> Float[Tensor, "N V"]:
    """Different rows of signs: the bits of a number, then random ones; -1 and +1 for two."""
    if count > 2**size:
        raise BasedError(f"{count} values need a head_dim of at least {(count - 1).bit_length()}")
    if count == 2:
        return torch.tensor([[-1.0], [1.0]], dtype=torch.float64).expand(2, size)
    bits = torch.arange(count)[:, None] >> torch.arange((count - 1).bit_length()) & 1
    generator = torch.Generator().manual_seed(1)
    rest = torch.randint(2, (count, size - bits.shape[1]), generator=generator)
    return 2.0 * torch.cat([bits, rest], dim=1).double() - 1


def _weights(s: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    return 1 + s + s**2 / 2


@torch.no_grad()
def _shift_by_one(size: int, feature_dim: int) -> GatedConvolution:
    """Adds the key code of the token before to the last block of channels.

    silu(x) - silu(-x) = x makes the activation vanish; the gate is one, by its bias.
    """
    layer = build_mixer("gated_convolution", size, kernel_size=2, expand=2).double()
    assert isinstance(layer, GatedConvolution)
    for parameter in layer.parameters():
        parameter.zero_()
    place = torch.arange(feature_dim)
    layer.in_proj.weight[place, place] = 1.0
    layer.in_proj.weight[feature_dim + place, place] = -1.0
    layer.in_proj.bias[layer.inner_size :] = 1.0
    layer.conv_weight[:, 0] = 1.0
    room = size - feature_dim + place
    layer.out_proj.weight[room, place] = 1.0
    layer.out_proj.weight[room, feature_dim + place] = -1.0
    return layer


@torch.no_grad()
def _memory(size: int, feature_dim: int, value_dim: int) -> TaylorLinearAttention:
    """Query: the token's key code; key: that of the token before; value: its value code."""
    layer = build_mixer(
        "taylor_linear_attention", size, num_heads=1, feature_dim=feature_dim
    ).double()
    assert isinstance(layer, TaylorLinearAttention)
    for parameter in layer.parameters():
        parameter.zero_()
    place, channel = torch.arange(feature_dim), torch.arange(value_dim)
    scale = (SHARPNESS * feature_dim**0.5) ** 0.5
    layer.q_proj.weight[place, place] = scale
    layer.k_proj.weight[place, size - feature_dim + place] = scale
    layer.v_proj.weight[channel, feature_dim + channel] = 1.0
    layer.out_proj.weight[channel, channel] = 1.0
    return layer


def quantised(states: list[State], bits: int) -> list[State]:
    """The memory's numerator and denominator rounded to `bits` bits a number, a scale a feature."""
    levels = 2 ** (bits - 1) - 1
    memory = {}
    for name, tensor in states[1].items():
        wide = tensor if name == "numerator" else tensor[..., None]
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-300) / levels
        memory[name] = ((wide / scale).round() * scale).reshape(tensor.shape)
    return [states[0], State(memory)]


def recalled(
    model: HandBuiltBased, pairs: int, trials: int, bits: int | None = None, seed: int = 0
) -> float:
    """Share of queries answered right on random tasks of `pairs` pairs, distinct values.

    With `bits` the state between the pairs and the queries is rounded to so many.
    """
    generator = torch.Generator().manual_seed(seed)
    values = len(model.embedding) - model.keys
    right = 0
    for _ in range(trials):
        keys = torch.randperm(model.keys, generator=generator)[:pairs]
        named = model.keys + torch.randperm(values, generator=generator)[:pairs]
        context = torch.stack([keys, named], dim=1).flatten()[None]
        _, states = model.read(context, model.init_state(1))
        states = states if bits is None else quantised(states, bits)
        answers, _ = model.read(keys[None], states)
        right += int((answers[0] == named).sum())
    return right / (trials * pairs)


def report(feature_dim: int, pairs: Sequence[int], trials: int, console: Console) -> None:
    """Both tables of `based recall capacity`."""
    from rich.table import Table

    values, value_dim, bits = 4096, 16, 4
    capacity = Table(
        *("pairs", "|cos| of keys", "recalled", f"with a {bits}-bit state"),
        *("bits needed", "bits of that state", "used"),
        title=f"A hand-built Based: feature_dim {feature_dim}, head_dim {value_dim}, "
        f"{values:,} values",
    )
    for count in pairs:
        model = HandBuiltBased(count, values, feature_dim, value_dim)
        exact, rounded = (recalled(model, count, trials, b) for b in (None, bits))
        needed = lower_bound_bits(count, values, rounded)
        size = model.state_bits() * bits // 64
        capacity.add_row(
            *(f"{count}", f"{model.coherence():.2f}", f"{exact:.1%}", f"{rounded:.1%}"),
            *(f"{needed:,.0f}", f"{size:,}", f"{needed / size:.1%}"),
        )
    console.print(capacity)
    console.print("Bits needed: for that share of answers no state can do with fewer.\n")
    errors = Table("|s| up to", "error of a weight", "distance to softmax", title="Taylor's form")
    for largest in (0.25, 0.5, 1.0, 2.0, 4.0):
        errors.add_row(
            f"{largest}", f"{taylor_error(largest):.1%}", f"{attention_distance(largest):.2%}"
        )
    console.print(errors)
