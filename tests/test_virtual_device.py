"""The virtual device sees every kind of mistake that a GPU would punish, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_gdino_lora.transfer import to_device
from tests.virtual_device import DeviceError, VirtualDevice


@pytest.fixture
def device() -> Iterator[VirtualDevice]:
    with VirtualDevice() as device:
        yield device


def numbers() -> Tensor:
    """Some, on the device."""
    return torch.arange(1.0, 7.0, device='cuda').view(2, 3)


def staged(x: Tensor) -> Tensor:
    """A pinned buffer that the device is still writing x into."""
    buffer = torch.empty(x.shape, pin_memory=True)
    buffer.copy_(x, non_blocking=True)
    return buffer


def test_tensors_say_where_they_are(device: VirtualDevice) -> None:
    x, host = numbers(), torch.ones(2)
    assert x.is_cuda and not x.is_cpu and x.device == torch.device('cuda', 0)
    assert not host.is_cuda and host.device.type == 'cpu'
    for there in (x[0], x.t(), x + 1, x.new_zeros(2), torch.zeros_like(x), host.cuda(), host.to(x)):
        assert there.is_cuda
    for here in (x.cpu(), host + 1, torch.zeros(2), torch.zeros_like(x, device='cpu')):
        assert not here.is_cuda
    assert host.pin_memory().is_pinned() and not host.is_pinned()


def test_models_and_their_copies_move_there(device: VirtualDevice) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).cuda()
    for moved in (model, copy.deepcopy(model)):
        assert all(tensor.is_cuda for tensor in moved.state_dict().values())
        assert moved(numbers()).is_cuda
    assert not any(tensor.is_cuda for tensor in model.cpu().state_dict().values())


def test_gradients_lie_where_their_tensors_do(device: VirtualDevice) -> None:
    x = numbers().requires_grad_()
    ends, _ = x.split([1, 2], dim=1)  # the engine makes up the gradient of the part that is unused
    x.unbind(1)[0].sum().add(ends.sum()).backward()
    assert x.grad is not None and x.grad.is_cuda
    assert x.grad.tolist() == [[2, 0, 0], [2, 0, 0]]


def test_outside_of_it_nothing_is_left(device: VirtualDevice) -> None:
    x = numbers()
    device.__exit__(None, None, None)
    try:
        assert x.device.type == 'cpu' and not torch.cuda.is_available()
        assert (x + torch.ones(3)).sum().item() == 27
        with torch.autocast('cpu', torch.bfloat16):
            assert (x @ x.t()).softmax(-1).dtype == torch.bfloat16
    finally:
        device.__enter__()


@pytest.mark.parametrize(
    'mistake',
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: x @ torch.ones(3, 2),
        lambda x: torch.where(x > 2, x, torch.zeros(3)),
        lambda x: x.masked_fill(torch.ones(2, 3, dtype=torch.bool), 0.0),
        lambda x: x.gather(1, torch.zeros(2, 1, dtype=torch.long)),
        lambda x: torch.ones(7)[x.long()],
        lambda x: F.linear(x, nn.Linear(3, 1).weight),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], torch.ones(1, 2, 3)),
        lambda x: torch.nn.functional.mse_loss(x, torch.ones(2, 3)),
    ],
)
def test_two_devices_in_one_operation(device: VirtualDevice, mistake: Callable) -> None:
    with pytest.raises(RuntimeError, match='same device'):
        mistake(numbers())


def test_two_devices_in_the_backward_pass(device: VirtualDevice) -> None:
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            assert grad.is_cuda
            return grad * torch.full((2, 3), 2.0)

    with pytest.raises(DeviceError, match='same device'):
        Careless.apply(numbers().requires_grad_()).sum().backward()


def test_numbers_of_the_host_go_with_tensors_of_the_device(device: VirtualDevice) -> None:
    x = numbers()
    with device.watch() as counts:
        x * torch.tensor(2.0) + 1.5
        torch.where(x > 2, x, torch.tensor(0.0))
        x.copy_(torch.tensor(1.0))
    assert counts.waits == []


def test_numpy_takes_no_tensor_of_the_device(device: VirtualDevice) -> None:
    with pytest.raises(TypeError, match='cpu'):
        numbers().numpy()


@pytest.mark.parametrize(
    'reading', [lambda t: t.numpy(), lambda t: t.tolist(), lambda t: t + 1, lambda t: t.cuda()]
)
def test_a_pinned_buffer_that_is_read_too_early(device: VirtualDevice, reading: Callable) -> None:
    with pytest.raises(DeviceError, match='read before the download has ended'):
        reading(staged(numbers()))


@pytest.mark.parametrize(
    'ending',
    [
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.current_stream().synchronize(),
        lambda: torch.cuda.Event().synchronize(),
    ],
)
def test_a_pinned_buffer_that_is_read_in_time(device: VirtualDevice, ending: Callable) -> None:
    buffer = staged(numbers())
    with device.watch() as counts:
        ending()
        assert buffer.numpy().sum() == 21
    assert len(counts.waits) == 1


def test_a_pinned_buffer_that_is_overwritten_too_early(device: VirtualDevice) -> None:
    buffer = torch.ones(3).pin_memory()
    buffer.to('cuda', non_blocking=True)
    assert (buffer + 1).sum() == 6  # to read it is safe
    with pytest.raises(DeviceError, match='written before the upload has ended'):
        buffer.zero_()


@pytest.mark.parametrize(
    'wait',
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 2).any()),
        lambda x: x[: int(x[0, 0])],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to('cpu', torch.float64),
        lambda x: torch.ones(2, 3).copy_(x),
        lambda x: torch.ones(2, 3).copy_(x, non_blocking=True),  # ordinary memory
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 2),
        lambda x: x[x > 2],
        lambda x: x.masked_select(x > 2),
        lambda x: x.index_put((x > 5,), x[0, :1]),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x[:, 0].long(), dim=0),
        lambda x: x.masked_fill(x > 2, x.sum()),
        lambda x: x[torch.tensor([0, 1])],  # is uploaded
        lambda x: torch.tensor([1.0, 2.0], device='cuda'),
        lambda x: torch.as_tensor(torch.ones(2), device='cuda'),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.ones(2).cuda(),
        lambda x: torch.ones(2).to(x),
        lambda x: torch.ones(2).pin_memory().to('cuda'),  # pinned for nothing
        lambda x: torch.zeros(1 << 16).to('cuda', non_blocking=True),  # not pinned
        lambda x: x.copy_(torch.ones(2, 3)),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.linspace(0, 1, int(x[0, 2]), device='cuda'),
    ],
)
def test_the_host_waits(device: VirtualDevice, wait: Callable) -> None:
    x = numbers()
    with device.watch() as counts:
        wait(x)
    assert len(counts.waits) == 1
    assert '<lambda>' in counts.waits[0].stack and 'test_virtual_device.py' in counts.waits[0].stack


@pytest.mark.parametrize(
    'work',
    [
        lambda x: (x @ x.t()).softmax(-1).sum(),
        lambda x: to_device(torch.ones(1 << 16), x.device),
        lambda x: torch.ones(4).to('cuda', non_blocking=True),  # goes with the command
        lambda x: x.to('cpu', non_blocking=True),  # nobody reads it yet
        lambda x: staged(x),
        lambda x: torch.zeros(2, device='cuda') + torch.full((2,), 3.0, device='cuda'),
        lambda x: x.new_full((2,), 3.0),
        lambda x: x.masked_fill(x > 2, 0.0),
        lambda x: x.clone().__setitem__(x > 2, 0.0),  # is a masked_fill
        lambda x: torch.where(x > 2, x, 0.0),
        lambda x: x[torch.zeros(2, dtype=torch.long, device='cuda')],
        lambda x: x.to(torch.bfloat16).float(),
        lambda x: F.pad(x, (0, 1)),
        lambda x: x.topk(2),
        lambda x: x.repeat_interleave(2, dim=0),
    ],
)
def test_the_host_goes_on(device: VirtualDevice, work: Callable) -> None:
    x = numbers()
    with device.watch() as counts:
        work(x)
    assert counts.waits == []
    assert counts.launches


def test_what_is_the_hosts_own_business_is_none_of_the_device(device: VirtualDevice) -> None:
    with device.watch() as counts:
        x = torch.ones(3)
        assert x[x > 0].sum().item() == 3
        assert x.numpy().sum() == 3
    assert counts.waits == [] and counts.launches == 0


def test_views_and_reserved_memory_launch_nothing(device: VirtualDevice) -> None:
    x = numbers()
    with device.watch() as counts:
        x.t().unsqueeze(0).expand(4, 3, 2)[:, 1:].unbind(0)
        x.new_empty(3), torch.empty_like(x), x.detach(), x.view(-1).split(2)
    assert counts.launches == 0


def test_operations_are_found_by_line_and_direction(device: VirtualDevice) -> None:
    x = numbers().requires_grad_()
    with device.watch() as counts:
        y = (x * x).sum()
        y.backward()
    forward = counts.by('name', 'backward')
    assert forward['mul', False] == forward['sum', False] == 1
    lines = {
        line for line, name, backward in counts.by('line', 'name', 'backward') if name == 'mul'
    }
    assert len(lines) == 1  # the backward pass's products are told by the line of the forward's
    assert counts.launches == 6  # mul, sum; ones_like, mul, mul, add


def test_the_optimizer_takes_all_parameters_at_once(device: VirtualDevice) -> None:
    parameters = [nn.Parameter(torch.ones(3, device='cuda')) for _ in range(20)]
    optimizer = torch.optim.AdamW(parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with device.watch() as counts:
            nn.utils.clip_grad_norm_(parameters, 0.1)
            optimizer.step()
    assert counts.launches < 20 and counts.waits == []


def test_autocast_has_cudas_lists(device: VirtualDevice) -> None:
    x = numbers()
    with torch.autocast('cuda', torch.bfloat16):
        assert torch.is_autocast_enabled('cuda')
        assert torch.get_autocast_dtype('cuda') == torch.bfloat16
        product = x @ x.t()
        assert product.dtype == torch.bfloat16
        for wide in (
            product.softmax(-1),
            F.layer_norm(product, (2,)),
            product.exp(),
            product.sum(),
        ):
            assert wide.dtype == torch.float32
        assert (product + 1).sigmoid().dtype == torch.bfloat16
    assert not torch.is_autocast_enabled('cuda')


def test_attention_and_dropout_are_single_kernels(device: VirtualDevice) -> None:
    q = torch.rand(1, 2, 5, 8, device='cuda', requires_grad=True)
    for keys, copies in ((16, 0), (20, 1)):
        kv = torch.rand(1, 2, keys, 8, device='cuda')
        bias = torch.zeros(5, keys, device='cuda')
        with device.watch() as counts:
            out = F.scaled_dot_product_attention(q, kv, kv, bias, dropout_p=0.1)
        # rows of the bias that are no multiple of 16 are copied to ones that are
        assert counts.by('name')['scaled_dot_product_attention',] == 1
        assert counts.launches == 1 + copies
        with device.watch() as counts:
            out.sum().backward()
        assert counts.by('name')['scaled_dot_product_attention_backward',] == 1
    with device.watch() as counts:
        F.dropout(q, 0.5)
    assert counts.launches == 1


def deformable(dtype: torch.dtype = torch.float32, batch: int = 2, step: int = 2) -> list:
    """Arguments of mmcv's kernel."""
    shapes = torch.ones(1, 2, dtype=torch.long, device='cuda')
    starts = torch.zeros(1, dtype=torch.long, device='cuda')
    value = torch.ones(batch, 1, 2, 4, dtype=dtype, device='cuda')
    locations = torch.ones(batch, 3, 2, 1, 5, 2, dtype=dtype, device='cuda')
    return [value, shapes, starts, locations, locations[..., 0].contiguous(), step]


def strided(given: list) -> list:
    given[0] = given[0].transpose(0, 2).contiguous().transpose(0, 2)
    return given


def on_the_host(given: list) -> list:
    given[1] = given[1].cpu()
    return given


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        (lambda: deformable(torch.bfloat16), "not implemented for 'bfloat16'"),
        (lambda: strided(deformable()), 'contiguous'),
        (lambda: deformable(batch=3), 'must divide im2col_step'),
        (lambda: on_the_host(deformable()), 'CUDA tensor'),
    ],
)
def test_mmcvs_kernel_refuses(device: VirtualDevice, wrong: Callable, said: str) -> None:
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    MultiScaleDeformableAttnFunction.apply(*deformable())
    with pytest.raises(RuntimeError, match=said):
        MultiScaleDeformableAttnFunction.apply(*wrong())
