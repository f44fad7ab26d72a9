"""Which layer is best: cached features, a probe for each layer, a report."""
