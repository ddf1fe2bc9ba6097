"""What should happen, in QEMU's words: addresses, capabilities, parameters, states, plans. Pure: no I/O."""
