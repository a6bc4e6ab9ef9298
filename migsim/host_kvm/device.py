"""Open ``/dev/kvm``, or say in one sentence what is missing."""

from __future__ import annotations

import fcntl
import os

from migsim.host_kvm import abi
from migsim.kvm import uapi


class HostUnavailable(Exception):
    """There is no usable KVM here; the text is one sentence saying what is missing."""


def open_device(path: str = abi.DEVICE) -> int:
    """A file descriptor of ``path``, checked to speak the stable KVM API (version 12).  Raises HostUnavailable."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise HostUnavailable(f"no {path}: KVM is not loaded, or not passed into this container") from None
    except PermissionError:
        raise HostUnavailable(f"no permission on {path}: join the group that owns it (usually kvm)") from None
    except OSError as error:
        raise HostUnavailable(f"cannot open {path}: {error.strerror}") from None
    try:
        version = fcntl.ioctl(fd, abi.KVM_GET_API_VERSION, 0)
    except OSError as error:
        os.close(fd)
        raise HostUnavailable(f"{path} does not answer KVM_GET_API_VERSION: {error.strerror}") from None
    if version != abi.API_VERSION:
        os.close(fd)
        raise HostUnavailable(f"{path} speaks KVM API {version}, not {abi.API_VERSION}")
    return fd


def unavailable_reason(path: str = abi.DEVICE) -> str | None:
    """None where a VM can be made here, else the sentence of :class:`HostUnavailable`."""
    try:
        fd = open_device(path)
    except HostUnavailable as error:
        return str(error)
    try:
        os.close(fcntl.ioctl(fd, uapi.KVM_CREATE_VM, 0))
    except OSError as error:
        return f"{path} refuses KVM_CREATE_VM: {error.strerror}"
    finally:
        os.close(fd)
    return None
