"""From a few prompts in a video to a dataset: a journal of prompts, masks by a tracker, files of annotation tools."""
