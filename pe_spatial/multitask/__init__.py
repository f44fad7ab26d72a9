"""Several models on one frozen encoder, which runs once for all of them."""
