"""Parts of tools/record_qemu; standard library only."""
