"""What ATen is asked for: where it runs, what it launches, who waits, and what CUDA refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.virtual_device.counts import Counts, Operation, Wait
from tests.virtual_device.memory import Place, place_of, put
from tests.virtual_device.sites import Site, current_site, stack
from tests.virtual_device.traffic import moved, multiplied, tensors_in

#: They describe or reserve memory, or make a scalar on the host.
FREE = {
    '_unsafe_view',
    'alias',
    'detach',
    'detach_',
    'device',
    'empty',
    'empty_like',
    'empty_strided',
    'lift_fresh',
    'new_empty',
    'new_empty_strided',
    'promote_types',
    'record_stream',
    'resize_',
    'scalar_tensor',
    'set_',
}

#: The size of their result, or the host itself, depends on numbers on the device.
WAITING = {
    '_local_scalar_dense',
    '_unique2',
    'bincount',
    'equal',
    'histc',
    'is_nonzero',
    'masked_select',
    'nonzero',
    'unique_consecutive',
    'unique_dim',
}

#: So many bytes of ordinary memory go to the device without a wait, says CUDA's programming guide.
STAGED = 64 * 1024

INDEXING = {'index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index'}


class DeviceError(RuntimeError):
    """What CUDA would refuse, or compute wrongly without a word."""


@dataclass(frozen=True)
class Kind:
    """What an operation's schema says of it."""

    name: str
    launches: bool
    makes: bool  # it takes a device

    @staticmethod
    @cache
    def of(function: Any) -> Kind:
        """Reads the schema."""
        schema = function._schema
        name = schema.name.split('::')[1]
        is_view = any(
            alias.alias_info is not None and not alias.alias_info.is_write
            for alias in schema.returns
        )
        makes = any(argument.name == 'device' for argument in schema.arguments)
        return Kind(name, not is_view and name not in FREE, makes)


@dataclass
class Call:
    """A function of torch's that is being called: what its factories inside go by."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    place: Place | None = None  # asked for in words
    in_engine: bool = False

    def place_of_results(self) -> Place:
        """Where a new tensor lies that nobody gave a device, as its like's is used."""
        if self.place is not None:
            return self.place
        if self.in_engine:  # gradients that the engine makes up
            return Place.DEVICE
        given = tensors_in((self.args, self.kwargs))
        on_device = any(place_of(tensor) is Place.DEVICE for tensor in given)
        return Place.DEVICE if on_device else Place.HOST


class Operations(TorchDispatchMode):
    """Runs ATen's operations on the CPU as if those on tagged storages ran on a GPU.

    Attributes:
        call: The function of torch's that is being called.
        moving: Where a copy goes that is being made, and whether the host may go on meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.call = Call()
        self.moving: tuple[Place, bool] | None = None
        self._paused = 0
        self._watching: list[Counts] = []
        self._origins: dict[int, Site] = {}
        self._in_flight: dict[int, tuple[Tensor, str]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard costs 0.2 ms an operation

    # ------------------------------------------------------------------------------------ recording

    @contextmanager
    def watch(self) -> Iterator[Counts]:
        """Counts what happens inside."""
        counts = Counts()
        self._watching.append(counts)
        try:
            yield counts
        finally:
            self._watching.remove(counts)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is the insides of a kernel: nobody looks."""
        self._paused += 1
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self._paused -= 1

    def launch(self, name: str, moved: int = 0, flops: int = 0) -> None:
        """Notes an operation on the device, the bytes that it moves and what it multiplies."""
        if not self._watching:
            return
        node = torch._C._current_autograd_node()
        if node is None:
            site = current_site()
            self._origins.setdefault(torch.autograd._get_sequence_nr() - 1, site)
        elif node._sequence_nr() in self._origins:
            site = self._origins[node._sequence_nr()]
        else:  # sums of gradients, and hooks
            site = current_site()._replace(part='engine')
        operation = Operation(site, name, node is not None)
        for counts in self._watching:
            counts.operations[operation] += 1
            counts.bytes[operation] += moved
            counts.flops[operation] += flops

    def wait(self, kind: str) -> None:
        """Notes that the host waits, after which all copies have arrived."""
        self._in_flight.clear()
        for counts in self._watching:
            counts.waits.append(Wait(kind, stack()))

    # -------------------------------------------------------------------------------------- copying

    def check_arrived(self, tensor: Tensor, writes: bool = False) -> None:
        """Refuses to touch pinned memory that a copy is still reading or writing."""
        known = self._in_flight.get(tensor.untyped_storage()._cdata)
        if known is not None and (known[1] == 'download' or writes):
            verb = 'written' if writes else 'read'
            raise DeviceError(f'pinned memory is {verb} before the {known[1]} has ended')

    def copy(self, source: Tensor, to: Place, target: Tensor | None, non_blocking: bool) -> None:
        """Notes a copy between host and device."""
        host = target if to is not Place.DEVICE else source
        pinned = host is None or place_of(host) is Place.PINNED
        way = 'upload' if to is Place.DEVICE else 'download'
        self.launch(f'copy: {way}')
        if not non_blocking:
            self.wait(f'blocking {way}')
        elif not pinned:
            if to is not Place.DEVICE or source.nbytes > STAGED:
                self.wait(f'{way} of ordinary memory')
        elif host is not None:
            self._in_flight[host.untyped_storage()._cdata] = host, way

    # ------------------------------------------------------------------------------------- dispatch

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self._run(function, Kind.of(function), args, kwargs)

    def _run(self, function: Any, kind: Kind, args: tuple, kwargs: dict[str, Any]) -> Any:
        given = list(tensors_in((args, kwargs)))
        places = [place_of(tensor) for tensor in given]
        if kind.name == '_to_copy' and self.moving is not None:
            (to, non_blocking), self.moving = self.moving, None
            result = function(*args, **kwargs)
            if to is not Place.DEVICE and non_blocking:
                to = Place.PINNED  # torch allocates it so
            put(result, to)
            self.copy(given[0], to, result, non_blocking)
            return result
        if kind.name == 'copy_' and (places[0] is Place.DEVICE) != (places[1] is Place.DEVICE):
            self._check_pinned(given, places, kind)
            non_blocking = bool(kwargs.get('non_blocking', args[2] if len(args) > 2 else False))
            if given[1].dim() == 0 and places[1] is Place.HOST:
                self.launch('copy_')  # a number of the host's is an argument of the kernel
            else:
                self.copy(given[1], places[0], given[0], non_blocking)
            return function(*args, **kwargs)
        place = self._place(kind, given, places)
        self._check_pinned(given, places, kind)
        if place is Place.DEVICE:
            self._check_together(kind, given, places)
            self._check_waits(kind, given, places, args, kwargs)
        result = function(*args, **kwargs)
        if place is Place.DEVICE and kind.launches and self._watching:
            call = function, args, kwargs, result
            self.launch(kind.name, moved(*call), multiplied(*call))
        if place is not Place.HOST:
            for tensor in tensors_in(result):
                if place_of(tensor) is Place.HOST:
                    put(tensor, place)
        return result

    def _place(self, kind: Kind, given: list[Tensor], places: list[Place]) -> Place:
        """Where an operation runs and its new results lie."""
        if kind.name == 'scalar_tensor':
            return Place.HOST
        if kind.makes and self.call.place is not None:
            return self.call.place
        if given:
            return Place.DEVICE if Place.DEVICE in places else Place.HOST
        return self.call.place_of_results()

    def _check_together(self, kind: Kind, given: list[Tensor], places: list[Place]) -> None:
        if kind.makes or kind.name in FREE:
            return
        indices = kind.name in INDEXING
        for number, (tensor, place) in enumerate(zip(given, places)):
            if place is Place.DEVICE or tensor.dim() == 0:
                continue
            is_index = tensor.dtype in (torch.int64, torch.int32, torch.bool, torch.uint8)
            if indices and number and is_index:
                self.copy(tensor, Place.DEVICE, None, non_blocking=False)
                continue
            if kind.name.startswith('_foreach') or kind.name.startswith('_fused'):
                continue  # their counters of steps lie on the host
            raise DeviceError(
                'Expected all tensors to be on the same device, but found at least two devices, '
                f'cuda:0 and cpu! ({kind.name}, tensor {number} of shape {tuple(tensor.shape)})'
            )

    def _check_waits(
        self,
        kind: Kind,
        given: list[Tensor],
        places: list[Place],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> None:
        if kind.name in WAITING:
            self.wait(kind.name)
        elif kind.name in INDEXING:
            masks = [t for t in tensors_in(args[1]) if t.dtype in (torch.bool, torch.uint8)]
            # assigning one number of the host's under a mask is a masked_fill
            one = len(args) > 2 and args[2].numel() == 1 and place_of(args[2]) is not Place.DEVICE
            if masks and not one:
                self.wait('a mask as index')
        elif kind.name == 'repeat_interleave' and kwargs.get('output_size') is None:
            self.wait('repeat_interleave without output_size')
        elif kind.name in ('masked_fill', 'masked_fill_') and places[2:] == [Place.DEVICE]:
            self.wait('masked_fill with a value on the device')

    def _check_pinned(self, given: list[Tensor], places: list[Place], kind: Kind) -> None:
        if not self._in_flight or not kind.launches:
            return
        writes = kind.name.endswith('_')
        for number, (tensor, place) in enumerate(zip(given, places)):
            if place is Place.PINNED:
                self.check_arrived(tensor, writes and number == 0)
