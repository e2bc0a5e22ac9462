"""Pictures, labels and prompts as files: sources, tar shards and their manifest, streams."""
