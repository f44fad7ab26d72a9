"""Which layer is best: a probe for each layer of a frozen encoder, on cached maps, and a report."""
