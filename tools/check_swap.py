import sys

from pe_spatial.cli.main import main

if __name__ == "__main__":
    main(["check_swap", *sys.argv[1:]])
