"""Public conformance suites: run them over your own method, pattern, format or study as openwork does over its own."""
