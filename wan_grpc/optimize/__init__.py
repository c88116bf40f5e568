"""What makes one device faster, applied from outside. Does not know the pipeline, the ranks or the queue."""
