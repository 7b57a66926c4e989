"""Pictures with captions or labels: sources, transforms, the loader, and a cache of the outputs of frozen networks."""
