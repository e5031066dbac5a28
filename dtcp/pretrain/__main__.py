"""train.py for those who installed a wheel: python -m dtcp.pretrain --config NAME."""

import sys

from dtcp.pretrain.run import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], command=("-m", "dtcp.pretrain")))
