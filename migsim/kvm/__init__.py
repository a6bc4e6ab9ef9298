"""The kernel side: KVM's memslots, paging, dirty log and vCPUs as an emulator; user space sees `ioctl` alone."""
