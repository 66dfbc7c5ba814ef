"""`accelerate launch -m k2quant.qat JOB.yaml`: `k2quant qat train` in each of several processes."""

from __future__ import annotations

import sys

from k2quant.qat.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
