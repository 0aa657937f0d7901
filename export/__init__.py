"""From a finished run to a bundle: merge, graph, normalise, quantise, parity, bundle."""
