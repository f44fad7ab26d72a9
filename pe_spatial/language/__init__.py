"""PE-Core: images, texts and videos in one space, and what dense tasks do with words."""
