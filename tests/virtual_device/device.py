"""The virtual device itself: everything that has to be in place for a step to run on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from mmdet_gdino_lora.layers import deformable
from tests.virtual_device.attention import CudaFunctions
from tests.virtual_device.autocast import mapped_autocast
from tests.virtual_device.functions import Functions
from tests.virtual_device.kernels import Kernels
from tests.virtual_device.memory import Place, place_of, put
from tests.virtual_device.operations import Call, DeviceError, Operations, tensors_in


class VirtualDevice:
    """A context in which ``'cuda'`` is a device, on a machine without one.

    Numbers are computed on the CPU, by torch; what is watched is how they would be asked for.

    Raises:
        RuntimeError: Inside, what CUDA would refuse.
    """

    def __init__(self) -> None:
        self.operations = Operations()
        self.functions = Functions(self.operations)
        self.kernels = DeviceKernels(self.operations)

    def watch(self) -> Any:
        """A context that gives :class:`Counts` of what happens inside."""
        return self.operations.watch()

    def __enter__(self) -> VirtualDevice:
        self._stack = ExitStack()
        enter = self._stack.enter_context
        enter(mapped_autocast())
        # oneDNN's bfloat16 convolution of a 1 x 1 image leaves a part of the gradient unwritten
        enter(torch.backends.mkldnn.flags(enabled=False))
        functions = CudaFunctions(self.operations)
        stream = Stream(self.operations)
        for owner, name, stand_in in (
            (torch.autograd, '_engine_run_backward', self._run_engine),
            (torch._C, '_group_tensors_by_device_and_dtype', grouped),
            (torch.nn.functional, 'scaled_dot_product_attention', functions.attend),
            (torch.nn.functional, 'dropout', functions.dropout),
            (torch.cuda, 'is_available', lambda: True),
            (torch.cuda, 'device_count', lambda: 1),
            (torch.cuda, 'current_device', lambda: 0),
            (torch.cuda, 'current_stream', lambda device=None: stream),
            (torch.cuda, 'synchronize', lambda device=None: stream.synchronize()),
            (torch.cuda, 'Event', lambda *_, **__: Event(self.operations)),
            (deformable, '_has_cuda_ops', lambda: True),
        ):
            enter(mock.patch.object(owner, name, stand_in))
        enter(mock.patch('mmcv.ops.multi_scale_deform_attn.ext_module', self.kernels))
        enter(mock.patch('mmcv.ops.multi_scale_deform_attn.IS_CUDA_AVAILABLE', True))
        enter(self.operations)
        enter(self.functions)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _run_engine(self, *args: Any, **kwargs: Any) -> Any:
        """Autograd's engine, with the function mode that ``Tensor.backward`` switches off."""
        if self.operations._paused:
            return _engine(*args, **kwargs)
        outer, self.operations.call = self.operations.call, Call(in_engine=True)
        try:
            if self.functions in _get_current_function_mode_stack():
                return _engine(*args, **kwargs)
            with self.functions:
                return _engine(*args, **kwargs)
        finally:
            self.operations.call = outer


_engine = torch.autograd._engine_run_backward
_grouped = torch._C._group_tensors_by_device_and_dtype


def grouped(lists: Any, with_indices: bool = False) -> dict:
    """Groups by type, and by the device that the tensors say they are on."""
    groups = _grouped(lists, with_indices)
    return {
        (place_of(tensors[0][0]).device, dtype): (tensors, indices)
        for (_, dtype), (tensors, indices) in groups.items()
    }


class Stream:
    """The device's one stream."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def synchronize(self) -> None:
        """The host waits for everything."""
        self._operations.wait('synchronize')


class Event:
    """A place in the stream."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def record(self, stream: Any = None) -> None:
        """Everything asked for until now comes before the event."""

    def query(self) -> bool:
        """Whether it has come: with nobody waiting for it, never."""
        return not self._operations._in_flight

    def synchronize(self) -> None:
        """The host waits for it."""
        self._operations.wait('event')


class DeviceKernels(Kernels):
    """mmcv's extension for tensors of the virtual device."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def ms_deform_attn_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The extension's forward pass."""
        with self._kernel('ms_deform_attn_forward', *args):
            out = super().ms_deform_attn_forward(*args, **kwargs)
        put(out, Place.DEVICE)
        return out

    def ms_deform_attn_backward(self, *args: Any, **kwargs: Any) -> None:
        """The extension's backward pass."""
        with self._kernel('ms_deform_attn_backward', *args):
            super().ms_deform_attn_backward(*args, **kwargs)

    @contextmanager
    def _kernel(self, name: str, *args: Any) -> Iterator[None]:
        if any(place_of(tensor) is not Place.DEVICE for tensor in tensors_in(args)):
            raise DeviceError(f'{name}: all tensors have to be CUDA tensors')
        self._operations.launch(name)
        with self._operations.paused(), torch.autocast('cpu', enabled=False):
            yield


class ShapedKernels(DeviceKernels):
    """mmcv's extension as far as shapes go, for those who count and read no numbers."""

    def _compute(self, value: Tensor, locations: Tensor, weights: Tensor, shapes: Tensor) -> Tensor:
        batch, queries, heads = locations.shape[:3]
        total = value.sum() + locations.sum() + weights.sum()
        return total.expand(batch, queries, heads * value.shape[-1]).contiguous()
