"""A GPU for tests on machines without one: what a step would ask of it, and what it would refuse.

with VirtualDevice() as device:
    model.cuda()
    with device.watch() as forward:
        loss = model.loss(*batch)
forward.launches, forward.waits, forward.by('part', 'line')
"""

from tests.virtual_device.counts import Counts, Operation, Wait
from tests.virtual_device.device import VirtualDevice
from tests.virtual_device.operations import DeviceError

__all__ = ['Counts', 'DeviceError', 'Operation', 'VirtualDevice', 'Wait']
