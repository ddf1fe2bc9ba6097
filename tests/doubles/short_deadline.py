"""mount.ckptfs with another deadline for its storage: `python short_deadline.py SECONDS SPEC DIR ...`."""

import sys

from ckptfs.channels import channels

if __name__ == "__main__":
    channels.BACKING_DEADLINE = float(sys.argv.pop(1))  # before it is anybody's default
    from ckptfs.cli.mount import main

    sys.exit(main())
