"""pyfuse3: handlers that translate and never decide, the mount's life cycle, the kernel's page cache above it."""
