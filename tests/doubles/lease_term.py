"""mount.ckptfs with another term of leases: `python lease_term.py SECONDS SPEC DIR ...`."""

import sys

from ckptfs.namespace import lease

if __name__ == "__main__":
    lease.TERM = float(sys.argv.pop(1))
    from ckptfs.cli.mount import main

    sys.exit(main())
