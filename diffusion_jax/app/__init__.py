"""The program: one file for each mode of the command line."""
