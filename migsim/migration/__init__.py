"""The QEMU side: RAM bookkeeping, the pre-copy loop, the wire. It reaches KVM through the ioctls alone."""
