from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sdfleet.engine.attention import Ways, attend_by_heads, attention

FUSED, HEADS = 0, 1
# Away from float32's answer, standard normal inputs: eight bits of mantissa in the scores.
MOST_APART = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.01}


def _inputs(n: int, m: int, d: int, dtype: torch.dtype, *, heads: int = 2, b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + m + d)

    def as_projected(length: int) -> Tensor:
        # A view into [b, n, heads * d], as the networks hand it over.
        tokens = torch.randn(b, length, heads * d, generator=generator).to(dtype)
        return tokens.unflatten(-1, (heads, d)).transpose(1, 2)

    return as_projected(n), as_projected(m), as_projected(m)


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def _in_float32(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _fused(query.float(), key.float(), value.float())


def _clock(fused_s: float, heads_s: float) -> tuple[Callable[[Callable[[], object]], float], list[float]]:
    asked: list[float] = []

    def timed(call: Callable[[], object]) -> float:
        call()
        asked.append((fused_s, heads_s)[len(asked) % 2])
        return asked[-1]

    return timed, asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [40, 64, 80, 160])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 77), (64, 64), (256, 154), (130, 333)])
def test_products_by_heads_answer_as_torch_does_in_float32(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    inputs = _inputs(n, m, d, dtype)
    expected = _in_float32(*inputs)
    answer = attend_by_heads(*inputs, chunk_rows=96)
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.float(), expected, atol=MOST_APART[dtype], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m"), [(16, 77), (600, 600)])
def test_attention_answers_as_torch_does_whichever_way_it_takes(n: int, m: int, dtype: torch.dtype) -> None:
    inputs = _inputs(n, m, 40, dtype)
    expected = _in_float32(*inputs)
    torch.testing.assert_close(attention(*inputs).float(), expected, atol=MOST_APART[dtype], rtol=0)


def test_in_float32_attention_is_torchs_own_to_the_bit() -> None:
    inputs = _inputs(600, 600, 40, torch.float32)
    assert torch.equal(attention(*inputs), _fused(*inputs))


def test_a_mask_is_added_to_the_scores() -> None:
    query, key, value = _inputs(8, 8, 16, torch.bfloat16)
    mask = torch.zeros(2, 1, 1, 8, dtype=torch.bfloat16)
    mask[..., 5:] = -torch.inf
    expected = attention(query, key[:, :, :5], value[:, :, :5])
    torch.testing.assert_close(attention(query, key, value, mask), expected, atol=0.02, rtol=0)


@pytest.mark.parametrize(("fused_s", "heads_s", "wins"), [(2.0, 1.0, HEADS), (1.0, 2.0, FUSED), (1.05, 1.0, FUSED)])
def test_the_way_that_was_clearly_faster_is_taken(fused_s: float, heads_s: float, wins: int) -> None:
    timed, _ = _clock(fused_s, heads_s)
    inputs = _inputs(32, 32, 40, torch.bfloat16)
    by_way = _fused(*inputs), attend_by_heads(*inputs)
    assert not torch.equal(*by_way)
    assert torch.equal(Ways(timed).attend(*inputs), by_way[wins])


def test_a_kind_of_shape_is_timed_once_whatever_the_number_of_rows() -> None:
    timed, asked = _clock(2.0, 1.0)
    ways = Ways(timed)
    ways.attend(*_inputs(32, 32, 40, torch.bfloat16))
    n_asked = len(asked)
    ways.attend(*_inputs(40, 33, 40, torch.bfloat16, b=5))
    assert n_asked == len(asked) == 4
    ways.attend(*_inputs(128, 32, 40, torch.bfloat16))
    assert len(asked) == 8


def test_memory_of_the_products_hangs_on_the_chunk_and_not_on_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    product = torch.mm

    def noted(a: Tensor, b: Tensor) -> Tensor:
        answer = product(a, b)
        most.append(answer.numel())
        return answer

    monkeypatch.setattr(torch, "mm", noted)
    attend_by_heads(*_inputs(1000, 50, 40, torch.bfloat16), chunk_rows=64)
    assert max(most) == 64 * 50
