"""QEMU's migration stream and its mapped-ram form: bytes in, values out, and back. No I/O happens here."""
