"""Opens files as a manager does and becomes the program that inherits them: NUMBER:FLAGS:PATH... -- PROGRAM..."""

import os
import sys


def main() -> None:
    end = sys.argv.index("--")
    for text in sys.argv[1:end]:
        number, flags, path = text.split(":", 2)
        descriptor = os.open(path, int(flags), 0o600)
        os.dup2(descriptor, int(number))
        os.close(descriptor)
    os.execv(sys.argv[end + 1], sys.argv[end + 1 :])


if __name__ == "__main__":
    main()
