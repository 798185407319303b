"""Looks at finished runs, and at data before a run: nothing here trains what a run keeps."""
