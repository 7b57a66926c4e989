"""Pictures and what is said about them: sources, transforms, the loader and the cache of what networks make of them."""
