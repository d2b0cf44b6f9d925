"""Where a storage lies on the virtual device: on the host, in its pinned memory, or on the device.

The numbers lie on the host all the same. The registry is the process's, because tensors outlive a
virtual device: what the package remembers by device is there when the next one comes.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Place(Enum):
    """Kinds of memory."""

    HOST = 'host'
    PINNED = 'pinned host'
    DEVICE = 'device'

    @property
    def device(self) -> torch.device:
        """What a tensor there says of itself."""
        return torch.device('cuda', 0) if self is Place.DEVICE else torch.device('cpu')


# The weak reference keeps a storage's address from being given to another as long as it is here.
_places: dict[int, tuple[StorageWeakRef, Place]] = {}
_room = 1 << 14


def place_of(tensor: Tensor) -> Place:
    """Tells where a tensor's storage lies; what nobody put anywhere is on the host."""
    known = _places.get(tensor.untyped_storage()._cdata)
    return Place.HOST if known is None else known[1]


def put(tensor: Tensor, place: Place) -> None:
    """Notes where a tensor's storage lies from now on."""
    global _room
    storage = tensor.untyped_storage()
    _places[storage._cdata] = StorageWeakRef(storage), place
    if len(_places) > _room:
        for key in [key for key, (reference, _) in _places.items() if reference.expired()]:
            del _places[key]
        _room = max(1 << 14, 2 * len(_places))
