"""Context parallelism for long-sequence training: compiled, byte-minimal, never silently wrong."""
