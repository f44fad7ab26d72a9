"""Reports that explain results: which errors cost what, where two results differ, which images are worst."""
