"""`python -m jaxq`: the command line."""

import sys

from jaxq.cli import main

if __name__ == "__main__":
    sys.exit(main())
