"""The real ``/dev/kvm`` behind the same Python methods as the emulated :class:`migsim.kvm.vm.Vm`.

Nothing but ctypes and fcntl; the only file opened is ``/dev/kvm``.  Modules, in reading order: ``abi`` numbers
and layouts, ``mapping`` memory that is always given back, ``device`` open and probe, ``guest_code`` operations to
machine code, ``ring`` the mapped dirty ring, ``stats`` the statistics fd, ``vcpu``, ``vm``.
"""

from migsim.host_kvm.device import HostUnavailable, unavailable_reason
from migsim.host_kvm.vm import HostVm

__all__ = ["HostUnavailable", "HostVm", "unavailable_reason"]
