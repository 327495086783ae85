"""The paper's experiments: `batchrenorm reproduce PRESET`. Needs the extra ``batchrenorm[paper]``."""
