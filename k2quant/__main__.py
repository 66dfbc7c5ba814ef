"""`python -m k2quant` is the command line."""

from k2quant.cli import main

if __name__ == "__main__":
    main()
