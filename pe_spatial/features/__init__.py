"""Looking at features: colors of principal components, similarity to a patch, attention; of any layers."""
