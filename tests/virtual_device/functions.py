"""What Python asks of tensors: those on the virtual device say 'cuda' and are moved there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.virtual_device.memory import Place, place_of, put
from tests.virtual_device.operations import Call, Operations, tensors_in

#: They make a tensor of numbers that lie on the host.
FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}

#: They answer from the tensor's description alone.
DESCRIPTIONS = {
    getattr(Tensor, name).__get__
    for name in ('shape', 'dtype', 'requires_grad', 'ndim', 'grad_fn', 'is_leaf', 'layout', 'grad')
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point}


def _place(device: Any) -> Place:
    return Place.DEVICE if torch.device(device).type == 'cuda' else Place.HOST


class Functions(TorchFunctionMode):
    """Answers for the device of tensors, and moves them."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        self.operations = operations
        self._handlers: dict[Any, Callable] = {
            Tensor.device.__get__: lambda x: place_of(x).device,  # type: ignore[attr-defined]
            Tensor.is_cuda.__get__: lambda x: place_of(x) is Place.DEVICE,  # type: ignore[attr-defined]
            Tensor.is_cpu.__get__: lambda x: place_of(x) is not Place.DEVICE,  # type: ignore[attr-defined]
            Tensor.get_device: lambda x: 0 if place_of(x) is Place.DEVICE else -1,
            Tensor.is_pinned: lambda x, *_: place_of(x) is Place.PINNED,
            Tensor.to: self._to,
            Tensor.cuda: self._cuda,
            Tensor.cpu: lambda x, *_, **__: self._moved(x, Place.HOST),
            Tensor.pin_memory: self._pin,
            Tensor.numpy: self._numpy,
            Tensor.__array__: self._numpy,
            Tensor.tolist: self._tolist,
            Tensor.__deepcopy__: self._deepcopy,
        }

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in DESCRIPTIONS or self.operations._paused:
            return function(*args, **kwargs)
        handler = self._handlers.get(function)
        if handler is not None:
            return handler(*args, **kwargs)
        return self._call(function, args, kwargs)

    def _call(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        device = kwargs.get('device')
        pinned = bool(kwargs.get('pin_memory'))
        place = None if device is None else _place(device)
        if device is not None or pinned:
            kwargs = {**kwargs, 'device': 'cpu' if place is Place.DEVICE else device}
            kwargs.pop('pin_memory', None)
        outer = self.operations.call
        self.operations.call = Call(args, kwargs, Place.PINNED if pinned else place)
        try:
            if function in FROM_HOST:
                return self._from_host(function, args, kwargs)
            return function(*args, **kwargs)
        finally:
            self.operations.call = outer

    def _from_host(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        operations = self.operations
        place = operations.call.place
        if place is None and function is Tensor.new_tensor:
            place = place_of(args[0])
        data = kwargs.get('data', args[function is Tensor.new_tensor] if args else None)
        with operations.paused():
            result = function(*args, **kwargs)
        if isinstance(data, Tensor):
            here = place_of(data)
            place = place or here
            if (
                here is Place.DEVICE
                and result.untyped_storage()._cdata != data.untyped_storage()._cdata
            ):
                operations.launch('clone')
            if (here is Place.DEVICE) == (place is Place.DEVICE):
                put(result, place) if place is not Place.HOST else None
                return result
        elif any(place_of(t) is Place.DEVICE for t in tensors_in(data)):
            operations.wait('numbers on the device in a list')
        if place is Place.DEVICE:
            result = result.clone() if isinstance(data, Tensor) else result
            put(result, place)
            operations.copy(result, place, None, non_blocking=False)
        elif place is Place.PINNED:
            put(result, place)
        return result

    # --------------------------------------------------------------------------------------- moving

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = bool(kwargs.pop('copy', False))
        other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop('other', None)
        if other is not None:
            place, dtype = place_of(other), other.dtype
            non_blocking, memory_format = bool(kwargs.get('non_blocking', False)), None
        else:
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
            place = place_of(tensor) if device is None else _place(device)
        dtype = dtype or tensor.dtype
        if (place is Place.DEVICE) == (place_of(tensor) is Place.DEVICE):
            outer, self.operations.call = self.operations.call, Call((tensor,))
            try:
                return tensor.to(dtype, copy=copy, **_given(memory_format=memory_format))
            finally:
                self.operations.call = outer
        return self._moved(tensor, place, non_blocking, dtype=dtype, memory_format=memory_format)

    def _cuda(
        self, tensor: Tensor, device: Any = None, non_blocking: bool = False, **_: Any
    ) -> Any:
        return self._moved(tensor, Place.DEVICE, non_blocking)

    def _moved(
        self, tensor: Tensor, to: Place, non_blocking: bool = False, **kwargs: Any
    ) -> Tensor:
        if (to is Place.DEVICE) == (place_of(tensor) is Place.DEVICE):
            return tensor
        self.operations.check_arrived(tensor)
        self.operations.moving = to, non_blocking
        try:
            return tensor.to(**{'dtype': tensor.dtype, **_given(**kwargs)}, copy=True)
        finally:
            self.operations.moving = None

    def _pin(self, tensor: Tensor, *_: Any) -> Tensor:
        if place_of(tensor) is Place.DEVICE:
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be")
        if place_of(tensor) is Place.PINNED:
            return tensor
        pinned = tensor.clone()
        put(pinned, Place.PINNED)
        return pinned

    def _numpy(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if place_of(tensor) is Place.DEVICE:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                'tensor to host memory first.'
            )
        self.operations.check_arrived(tensor)
        with self.operations.paused():
            return tensor.numpy(*args, **kwargs) if not args else tensor.__array__(*args)

    def _tolist(self, tensor: Tensor) -> Any:
        if place_of(tensor) is Place.DEVICE:
            self.operations.copy(tensor, Place.HOST, tensor, non_blocking=False)
        else:
            self.operations.check_arrived(tensor)
        with self.operations.paused():
            return tensor.tolist()

    def _deepcopy(self, tensor: Tensor, memo: dict) -> Tensor:
        place = place_of(tensor)
        with self.operations.paused():
            copied = tensor.__deepcopy__(memo)
            gradients = tensor.grad, copied.grad
        put(copied, place)
        if gradients[1] is not None:
            put(gradients[1], place_of(gradients[0]))
        if place is Place.DEVICE:
            self.operations.launch('clone')
        return copied


def _given(**kwargs: Any) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if value is not None}
