"""Models as files for other runtimes: a graph, a manifest, and a certificate that the numbers are the same."""
