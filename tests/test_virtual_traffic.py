"""Bytes and floating point operations are counted as a GPU would move and compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_gdino_lora.layers import levels
from tests.virtual_device import Counts, VirtualDevice
from tests.virtual_device.real_size import Kept, emptied, shapes_alone

ROWS, COLUMNS = 6, 8
BYTES = ROWS * COLUMNS * 4


@pytest.fixture
def device() -> Iterator[VirtualDevice]:
    with VirtualDevice() as device:
        yield device


def counted(device: VirtualDevice, call: Callable[[Tensor, Tensor], object]) -> Counts:
    """Of a call with two tensors of 6 x 8 float32 numbers."""
    x, y = (torch.rand(ROWS, COLUMNS, device='cuda') for _ in range(2))
    with device.watch() as counts:
        call(x, y)
    return counts


@pytest.mark.parametrize(
    ('call', 'size'),
    [
        (lambda x, y: x + y, 3 * BYTES),
        (lambda x, y: x * x, 2 * BYTES),  # once is enough to read it
        (lambda x, y: x + 1, 2 * BYTES),
        (lambda x, y: x.add_(y), 3 * BYTES),
        (lambda x, y: torch.add(x, y, out=torch.empty_like(x)), 3 * BYTES),
        (lambda x, y: x.copy_(y), 2 * BYTES),
        (lambda x, y: x.zero_(), BYTES),
        (lambda x, y: torch.zeros_like(x), BYTES),
        (lambda x, y: x + y[:1].expand(ROWS, -1), 2 * BYTES + COLUMNS * 4),
        (lambda x, y: x.t().contiguous(), 2 * BYTES),
        (lambda x, y: x.bfloat16(), BYTES + BYTES // 2),
        (lambda x, y: x.float(), 0),  # it is
        (lambda x, y: x > y, 2 * BYTES + ROWS * COLUMNS),
        (lambda x, y: torch.cat([x, y]), 4 * BYTES),
        (lambda x, y: x.sum(1), BYTES + ROWS * 4),
        (lambda x, y: x.softmax(-1), 2 * BYTES),
        (lambda x, y: torch._foreach_add_([x, y], [y, x]), 4 * BYTES),
        (lambda x, y: torch._foreach_copy_([x], [y]), 2 * BYTES),
    ],
)
def test_bytes_of_what_computes_little(device: VirtualDevice, call: Callable, size: int) -> None:
    assert counted(device, call).traffic == size


def test_of_a_table_as_much_is_read_as_is_picked(device: VirtualDevice) -> None:
    rows = torch.zeros(2, dtype=torch.long, device='cuda')
    picked = 2 * COLUMNS * 4
    for call in (
        lambda x, y: x[rows],
        lambda x, y: x.index_select(0, rows),
        lambda x, y: F.embedding(rows, x),
    ):
        assert counted(device, call).traffic == 2 * picked + 2 * 8


@pytest.mark.parametrize(
    'view',
    [
        lambda x: x.t(),
        lambda x: x[1:, ::2],
        lambda x: x.view(COLUMNS, ROWS),
        lambda x: x[None].expand(4, -1, -1),
        lambda x: x.detach().unflatten(1, (2, -1)).transpose(0, 1).split(1),
    ],
)
def test_views_are_free(device: VirtualDevice, view: Callable) -> None:
    counts = counted(device, lambda x, y: view(x))
    assert counts.traffic == counts.launches == 0


def test_products_multiply_and_move_nothing(device: VirtualDevice) -> None:
    product = 2 * ROWS * COLUMNS * ROWS
    bias = torch.zeros(ROWS, device='cuda')
    out = torch.empty(ROWS, ROWS, device='cuda')
    for call in (
        lambda x, y: x @ y.t(),
        lambda x, y: F.linear(x, y, bias),
        lambda x, y: x.mm(y.t()),
        lambda x, y: torch.mm(x, y.t(), out=out),
        lambda x, y: out.addmm_(x, y.t()),
        lambda x, y: torch.bmm(x[None], y.t()[None]),
    ):
        counts = counted(device, call)
        assert (counts.flops.total(), counts.traffic) == (product, 0)
    counts = counted(device, lambda x, y: x + y)
    assert counts.flops.total() == 0


def test_attention_moves_nothing_and_its_results_need_no_copy(device: VirtualDevice) -> None:
    query, key = (torch.rand(2, 4, n, 8, device='cuda', requires_grad=True) for n in (5, 16))
    with device.watch() as counts:
        out = F.scaled_dot_product_attention(query, key, key, dropout_p=0.5)
        out.transpose(1, 2).flatten(2)  # heads inside positions, as the next layer wants them
    assert (counts.launches, counts.traffic) == (1, 0)


def net() -> nn.Module:
    """Something of everything."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))


@pytest.mark.parametrize('amp', [False, True])
def test_tensors_without_numbers_count_the_same(device: VirtualDevice, amp: bool) -> None:
    def step(device: VirtualDevice, model: nn.Module) -> tuple[dict, dict]:
        with device.watch() as counts, torch.autocast('cuda', torch.bfloat16, enabled=amp):
            x = torch.empty(32, 8, device='cuda')
            model(x).float().softmax(-1).sum().backward()
        return counts.by('name', 'backward'), counts.by('name', 'backward', of='bytes')

    with_numbers = step(device, net().cuda())
    device.__exit__(None, None, None)
    try:
        with shapes_alone() as fake:
            found = step(fake, emptied(net()))
    finally:
        device.__enter__()
    assert found == with_numbers and sum(found[1].values()) > 0


def test_nothing_without_numbers_is_remembered() -> None:
    with shapes_alone():
        levels.grid(((4, 5),), torch.device('cuda', 0))
    with VirtualDevice():
        grid = levels.grid(((4, 5),), torch.device('cuda', 0))
        assert grid.level.tolist() == [0] * 20


def test_what_is_kept_is_counted_once_and_without_weights() -> None:
    with shapes_alone():
        model = emptied(nn.Linear(8, 16, bias=False))
        kept = Kept(model)
        x = torch.empty(32, 8, device='cuda')
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            hidden = model(x)
            (hidden[:, :4] * hidden[:, 4:8]).sum()
    assert kept.bytes == (32 * 8 + 32 * 16) * 4
