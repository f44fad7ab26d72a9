"""One file for each framework: register and translate, never compute."""
