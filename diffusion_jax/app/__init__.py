"""The program: one file for each mode of the command line, and `build` to turn a config into objects."""
