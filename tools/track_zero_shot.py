import sys

from pe_spatial.cli.main import main

if __name__ == "__main__":
    main(["track_zero_shot", *sys.argv[1:]])
