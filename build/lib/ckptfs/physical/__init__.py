"""What a checkpoint's memory means to those who look into it: addresses, registers, page tables, cores. No I/O."""
