"""Put a Perception Encoder into any MMDetection or MMSegmentation config."""
