"""Tools on model files and pictures; each script is started by its path."""
