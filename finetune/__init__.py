"""Scripts that prepare captions, tags and metadata files."""
