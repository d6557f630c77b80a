"""Sequences split over 2 and 4 gloo ranks: loss and gradients are one rank's, in float64."""

import pytest
import ranks
import torch
import torch.distributed as dist

from based.errors import BasedError
from based.mixers import Mixer
from based.models import Decoder, DecoderConfig
from based.training.context_parallel import Layout, split_sequences
from based.training.parallel import join_job

MIXER_OPTIONS = {
    "taylor_linear_attention": {"num_heads": 2, "feature_dim": 4},
    "sliding_window_attention": {"num_heads": 2, "window": 9},
    "softmax_attention": {"num_heads": 2},
}


def model() -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        mixers=("gated_convolution", *MIXER_OPTIONS),
        mixer_options=MIXER_OPTIONS,
        initializer_range=0.3,
    )
    return Decoder(config).double()


def differences(size: int) -> list[float]:
    """Of losses and gradients, over shards shorter and longer than window and kernel."""
    rank = dist.get_rank()
    groups = [dist.new_group(range(i, i + size)) for i in range(0, dist.get_world_size(), size)]
    group, place = groups[rank // size], rank % size
    net, found = model(), []
    edge = 8 * size
    for length, bounds in (
        (16, None),
        (2, None),
        (1, None),
        (8, [0, 3, 8, 9, edge - 5, edge, edge]),
        (8, [0, edge]),
    ):
        tokens = torch.randint(50, (1 if bounds else 2, length * size + 1))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        for mixer in net.mixers():
            mixer.shard = None
        total, losses, _ = net.loss(inputs, targets, cu_seqlens=cu_seqlens)
        total.backward()
        want = [parameter.grad for parameter in net.parameters()]
        own = split_sequences(net, group).columns(length * size)
        assert own == slice(place * length, (place + 1) * length)
        for net.recompute in (False, True):
            net.zero_grad()
            total, part, _ = net.loss(inputs[:, own], targets[:, own], cu_seqlens=cu_seqlens)
            total.backward()
            found.append((part - losses[:, own]).abs().max().item())
            for parameter, grad in zip(net.parameters(), want, strict=True):
                dist.all_reduce(parameter.grad, group=group)
                found.append((parameter.grad - grad).abs().max().item())
        net.zero_grad()
    return found


def job() -> list[float]:
    join_job("cpu")
    return differences(2) + differences(4)


def test_loss_and_gradients_are_those_of_one_rank() -> None:
    for found in ranks.run(4, job):
        assert len(found) > 500
        assert max(found) < 1e-10


def test_the_layout_of_sequences_on_shards() -> None:
    layout = Layout.of([0, 3, 11, 16, 16], length=4, rank=2, size=4)
    assert layout.position == 5
    assert layout.origin == 0
    assert layout.edges == [0, 3, 4]
    assert [(t.start, t.position, t.length) for t in layout.tails] == [
        (3, 0, 1),
        (0, 1, 4),
        (3, 0, 1),
        (0, 1, 4),
    ]


def test_a_mixer_without_a_rule_is_refused(monkeypatch) -> None:
    class Anonymous(dist.ProcessGroup):
        def __init__(self) -> None:
            super().__init__(0, 2)

    net = model()
    monkeypatch.setattr(type(net.mixers()[0]), "join_segments", Mixer.join_segments)
    with pytest.raises(BasedError, match="GatedConvolution has no rule to join segments"):
        split_sequences(net, Anonymous())
