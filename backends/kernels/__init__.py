"""One kernel adapter per file; the file's name is the backend's name."""
