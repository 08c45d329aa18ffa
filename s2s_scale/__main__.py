"""``python -m s2s_scale`` is the same as ``s2s-scale``."""

import sys

from s2s_scale.cli import main

if __name__ == "__main__":
    sys.exit(main())
