from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sdfleet.engine.prepacked import arrange, packed_bytes, prepack

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Network(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(4, 32, 3, padding=1)
        self.halve = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(32, 32, 1, bias=False)
        self.out = nn.Linear(32, 8, bias=False)
        self.to(dtype).eval().requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.halve(self.first(x))).flatten(2).transpose(1, 2))


def _clock(packed_s: float, plain_s: float) -> tuple[Callable[[Callable[[], object]], float], list[float]]:
    asked: list[float] = []

    def timed(call: Callable[[], object]) -> float:
        call()
        asked.append((packed_s, plain_s)[len(asked) % 2])
        return asked[-1]

    return timed, asked


def _picture(n: int = 2, side: int = 16) -> Tensor:
    return torch.randn(n, 4, side, side, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize(("packed_s", "plain_s"), [(1.0, 2.0), (2.0, 1.0)])
@torch.inference_mode()
def test_a_packed_network_answers_as_the_plain_one_for_any_size_and_rows(packed_s: float, plain_s: float) -> None:
    plain, packed = Network(), Network()
    prepack(packed, timed=_clock(packed_s, plain_s)[0])
    for n, side in ((2, 16), (5, 16), (1, 8), (2, 12), (2, 20), (2, 24), (3, 16)):  # more sizes than a layer packs for
        x = _picture(n, side)
        torch.testing.assert_close(packed(x), plain(x), atol=0.02, rtol=0.02)


@torch.inference_mode()
def test_a_packed_network_keeps_names_and_values_of_its_weights() -> None:
    before = Network().state_dict()
    network = Network()
    prepack(network)
    network(_picture())
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@torch.inference_mode()
def test_layers_are_timed_once_for_each_size_of_picture() -> None:
    timed, asked = _clock(1.0, 2.0)
    network = Network()
    prepack(network, timed=timed)
    network(_picture(2))
    n_asked = len(asked)
    network(_picture(7))
    assert n_asked == len(asked) > 0
    network(_picture(2, 8))
    assert len(asked) > n_asked


@torch.inference_mode()
def test_a_float32_network_is_left_alone() -> None:
    network = Network(torch.float32)
    kinds = [type(module) for module in arrange(network).modules()]
    assert kinds == [type(module) for module in Network(torch.float32).modules()]


@torch.inference_mode()
def test_a_small_bfloat16_network_is_packed() -> None:
    network = arrange(Network())
    assert not {nn.Conv2d, nn.Linear} & {type(module) for module in network.modules()}


@torch.inference_mode()
def test_a_packed_network_can_still_go_to_float32() -> None:
    network, x = Network(), _picture()
    prepack(network, timed=_clock(1.0, 2.0)[0])
    network(x)
    expected = Network().float()(x.float())
    torch.testing.assert_close(network.float()(x.float()), expected)


@torch.inference_mode()
def test_a_large_bfloat16_network_gets_weights_in_channels_last_order_and_no_second_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sdfleet.engine.prepacked._MOST_BYTES", 1000)
    network = arrange(Network())
    assert isinstance(network.halve, nn.Conv2d)
    assert network.halve.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(_picture()), Network()(_picture()), atol=0.02, rtol=0.02)


def test_what_packing_takes_is_known_before_it_is_done() -> None:
    weights = [layer.weight for layer in Network().children() if isinstance(layer.weight, Tensor)]
    with torch.device("meta"):
        in_bfloat16, in_float32 = Network().to(torch.bfloat16), Network().to(torch.float32)
        large = nn.Linear(2**14, 2**12, dtype=torch.bfloat16)
    assert packed_bytes(in_bfloat16) == sum(weight.nbytes for weight in weights)
    assert (packed_bytes(in_float32), packed_bytes(large)) == (0, 0)
