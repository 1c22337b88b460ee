"""python -m ringkern: the same as the command ringkern."""

import sys

from ringkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
