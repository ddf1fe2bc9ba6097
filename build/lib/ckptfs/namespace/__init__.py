"""What the mount looks like and understands: names, tree, ctl grammar, mount options, status. Pure: no I/O."""
