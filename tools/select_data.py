"""`harness select CONFIG [section.key=value ...]`, as a program of its own."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main(["select", *sys.argv[1:]]))
