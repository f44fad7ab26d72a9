import sys

from pe_spatial.cli.main import main

if __name__ == "__main__":
    main(["sweep_layers", *sys.argv[1:]])
