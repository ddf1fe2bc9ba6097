"""The commands mount.ckptfs and ckptfs."""
