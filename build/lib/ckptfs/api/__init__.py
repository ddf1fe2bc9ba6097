"""The library: what `ckptfs.open` and `ckptfs.mounted` give, for programs and for our own commands."""
