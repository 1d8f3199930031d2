"""What recipes train, a folder each: data, model and metric; no method knows a task."""
