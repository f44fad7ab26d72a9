import sys

from pe_spatial.cli.main import main

if __name__ == "__main__":
    main(["render_synthetic", *sys.argv[1:]])
