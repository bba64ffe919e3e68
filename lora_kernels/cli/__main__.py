"""``python -m lora_kernels.cli``."""

import sys

from lora_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
