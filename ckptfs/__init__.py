"""A virtual machine's memory as a file system you can checkpoint with ``echo save > ctl``."""

__version__ = "0.1.0"
