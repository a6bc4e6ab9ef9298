"""Devices that migrate in stages (VFIO): what goes out while the guest runs, what only once it stands still.

Source: QEMU 10.0 hw/vfio/migration.c and linux/vfio.h (migration v2). A device in PRE_COPY has initial bytes, read
once, and dirty bytes, which come back while it runs. The estimate of what is pending knows those two; the exact
figure adds the stop-copy size, so a device whose stop-copy state alone is above the threshold never lets a migration
complete. One turn of the loop reads one buffer of 1 MiB from each device, and only while the window has bytes left
(a handler is not called once the rate is exceeded; RAM's comes first).

switchover-ack (8.1): the destination acknowledges once every such device has loaded its initial bytes; until then
the source may not stop the guest. With no such device the acknowledgement comes with the return path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from migsim.units import MIB, NS_PER_S

__all__ = ["BUFFER_BYTES", "DeviceSet", "VfioDevice"]

BUFFER_BYTES: Final = MIB  # VFIO_MIG_DEFAULT_DATA_BUFFER_SIZE
BLOCK_FRAMING: Final = 8 + 8 + 8 + 10  # flag and size before the data, END_OF_STATE behind it, section framing
INIT_DATA_SENT: Final = 8  # VFIO_MIG_FLAG_DEV_INIT_DATA_SENT


@dataclass
class VfioDevice:
    """One device. Sizes in bytes, dirty_rate bytes/s, load_ns: until the destination's device has taken its state.

    initial, left: pre-copy bytes not yet read · dirty: read before and changed since, never more than `initial`.
    """

    name: str
    initial: int
    dirty_rate: int
    stop_copy: int
    load_ns: int = 0
    left: int = field(init=False)
    dirty: float = 0.0
    announced: bool = field(init=False)  # INIT_DATA_SENT is on the stream

    def __post_init__(self) -> None:
        self.left = self.initial
        self.announced = not self.initial  # no pre-copy: no turn of its own, no acknowledgement

    def read(self, most: int) -> int:
        """Up to `most` bytes of pre-copy data leave the device."""
        initial = min(self.left, most)
        self.left -= initial
        dirty = min(int(self.dirty), most - initial)
        self.dirty -= dirty
        return initial + dirty

    @property
    def precopy_bytes(self) -> int:
        return self.left + int(self.dirty)


@dataclass
class DeviceSet:
    """The guest's staged devices and the acknowledgement of the destination.

    round_trip_ns: of the link · byte_ns: reading a byte of device state on the source · query_ns: asking
    one device for its stop-copy size · ack: switchover-ack is on.
    """

    devices: Sequence[VfioDevice] = ()
    round_trip_ns: int = 0
    byte_ns: float = 0.0
    query_ns: int = 0
    ack: bool = False
    transferred: int = 0
    ack_ns: int | None = None  # when the source has the acknowledgement
    at_ns: int = 0

    @property
    def pending(self) -> int:
        """Bytes the estimate knows of: VFIO's state_pending_estimate."""
        return sum(device.precopy_bytes for device in self.devices) if self.devices else 0

    @property
    def stop_copy(self) -> int:
        """Bytes that go out only while the device stands still; the exact figure adds them."""
        return sum(device.stop_copy for device in self.devices)

    @property
    def load_ns(self) -> int:
        """The destination loads one device after the other."""
        return sum(device.load_ns for device in self.devices)

    def advance(self, now_ns: int, running: bool) -> None:
        """Devices dirtied state they had handed out."""
        gone, self.at_ns = now_ns - self.at_ns, now_ns
        for device in self.devices if running else ():
            most = device.initial - device.left
            device.dirty = min(float(most), device.dirty + device.dirty_rate * gone / NS_PER_S)

    def iterate(self) -> tuple[int, int]:
        """One turn of each device: (bytes on the stream, ns the source took to read them)."""
        stream = data = 0
        for device in self.devices:
            size = device.read(BUFFER_BYTES)
            if not size and device.announced:
                continue
            data += size
            stream += size + BLOCK_FRAMING
            if not device.left and not device.announced:
                device.announced, stream = True, stream + INIT_DATA_SENT
        self.transferred += stream
        return stream, round(data * self.byte_ns)

    def complete(self) -> tuple[int, int]:
        """The rest, with the devices stopped: (bytes on the stream, ns to read them)."""
        stream = data = 0
        for device in self.devices:
            size = device.stop_copy + device.read(1 << 62)
            data += size
            stream += size + max(1, -(-size // BUFFER_BYTES)) * BLOCK_FRAMING
        self.transferred += stream
        return stream, round(data * self.byte_ns)

    def may_switch_over(self, now_ns: int, guest_stopped: bool) -> bool:
        """can_switchover of migration_iteration_run."""
        if not self.ack or guest_stopped:
            return True
        if self.ack_ns is None and all(device.announced for device in self.devices):
            self.ack_ns = now_ns + self.round_trip_ns
        return self.ack_ns is not None and now_ns >= self.ack_ns
